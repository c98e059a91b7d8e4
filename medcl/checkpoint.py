"""Weights with their contract: what the network expects to see, what it was trained on, and whether it fits."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medcl.config import ExportConfig
from medcl.errors import MedclError
from medcl.networks.backbones import Backbone, BackboneSpec, build_backbone
from medcl.runtime.files import atomic_path, file_sha256, read_json, sha256, write_json
from medcl.runtime.run import log
from medcl.runtime.trained import Trained, count, summary
from medcl.store.plan import Plan, round_up

CONTRACT_VERSION = 2
BY_PART = 1  # contracts of this version say which parts were trained, not which tensors
PARTS = ("encoder", "decoder", "head")


@dataclass(frozen=True)
class Contract:
    """What goes with the weights of a backbone.

    Attributes:
        kind: `pretrained` or `segmentation`.
        backbone: how to rebuild the network.
        plan: how its input is prepared: orientation RAS, spacing, normalisation, window.
        trained: parts of the network that hold a trained tensor: `encoder`, `decoder`, `head`.
        task: name of the pretext or downstream task.
        options: its settings.
        label_values: the label value of every output channel but the first.
        source: folder or manifest that it was trained on.
        volumes: hashes of the voxels of every volume seen.
        subjects: whose volumes those are.
        step: optimiser step of these weights.
        tensors: state-dict names of the tensors that were trained, in this run or in those that it started from; see
            `medcl.runtime.trained.Record`. None in contracts made before medcl recorded them, which know parts only.
        doubtful: those of them that only such an older contract speaks for.
    """

    kind: str
    backbone: BackboneSpec
    plan: Plan
    trained: tuple[str, ...]
    task: str
    options: dict[str, Any] = field(default_factory=dict)
    label_values: tuple[int, ...] = ()
    source: str = ""
    volumes: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    step: int = 0
    tensors: tuple[str, ...] | None = None
    doubtful: tuple[str, ...] = ()

    def with_trained(self, trained: Trained, backbone: Backbone) -> Contract:
        """The contract of weights of which these tensors were trained."""
        parts = tuple(part for part in PARTS if backbone.tensor_names(part) & set(trained.tensors))
        return dataclasses.replace(self, tensors=trained.tensors, doubtful=trained.doubtful, trained=parts)

    def trained_in(self, backbone: Backbone) -> Trained:
        """The trained tensors; of a contract that knows parts only, all tensors of those parts."""
        if self.tensors is not None:
            return Trained(self.tensors, self.doubtful)
        names = tuple(sorted(set().union(*(backbone.tensor_names(part) for part in self.trained))))
        return Trained(names, names)

    @staticmethod
    def from_dict(data: dict[str, Any], where: object) -> Contract:
        """Builds a contract from the content of `weights/contract.json`.

        Args:
            data: the attributes of the contract, by name; lists become tuples.
            where: the file, for error messages.

        Raises:
            MedclError: a key is missing or unknown, or a value cannot be used.
        """
        try:
            spec = dict(data["backbone"])
            spec["strides"] = tuple(tuple(stride) for stride in spec["strides"])
            fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            fixed |= {"backbone": BackboneSpec(**spec), "plan": Plan.from_dict(data["plan"], where)}
            return Contract(**fixed)
        except (KeyError, TypeError, ValueError) as error:
            raise MedclError(f"is damaged ({error!r})", where, "Restore it, or train again.") from None


def unique_state(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with every tensor once, and the further names of those that have several (as in `DynUNet`)."""
    first: dict[tuple[int, torch.Size], str] = {}
    state, aliases = {}, {}
    for name, tensor in net.state_dict().items():
        same = first.setdefault((tensor.data_ptr(), tensor.shape), name) if tensor.numel() else name
        if same == name:
            state[name] = tensor.detach().cpu().contiguous()
        else:
            aliases[name] = same
    return state, aliases


def save_weights(run: Path, backbone: Backbone, contract: Contract) -> None:
    """Writes `weights/model-HASH.safetensors` and, last, `weights/contract.json` that vouches for it by its hash."""
    from safetensors.torch import save

    state, aliases = unique_state(backbone.net)
    data = save(state, metadata={"format": "pt"})
    digest = sha256(data)
    # a file of its own for every state: until the new contract stands, the old one vouches for the old file
    weights = run / "weights" / f"model-{digest[:12]}.safetensors"
    with atomic_path(weights) as part:
        part.write_bytes(data)
    write_json(
        run / "weights" / "contract.json",
        {
            "medcl_contract": CONTRACT_VERSION,
            **asdict(contract),
            "input": {"orientation": "RAS", "channels": contract.backbone.in_channels, **contract.plan.preparation()},
            "aliases": aliases,
            "file": weights.name,
            "sha256": digest,
        },
    )
    for old in weights.parent.glob("model-*.safetensors"):
        if old != weights:
            old.unlink()


def load_weights(run: str | Path) -> tuple[Contract, dict[str, Tensor]]:
    """Reads a run's contract and its whole state dict, aliases included.

    Raises:
        MedclError: no weights, damaged weights, or weights that the contract does not vouch for.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(run) / "weights"
    if not (folder / "contract.json").exists():
        raise MedclError("holds no weights", run, "Give the run folder of a finished pretrain or finetune.")
    data = read_json(folder / "contract.json")
    if data.pop("medcl_contract", None) not in (BY_PART, CONTRACT_VERSION):
        raise MedclError("is not a contract of this version", folder / "contract.json", "Train again with this medcl.")
    try:
        aliases, digest, file, _ = (data.pop(key) for key in ("aliases", "sha256", "file", "input"))
    except KeyError as error:
        raise MedclError(f"lacks {error}", folder / "contract.json", "Take it from a copy of the run.") from None
    path = folder / Path(file).name
    try:
        if file_sha256(path) != digest:
            raise MedclError("differs from what its contract vouches for", path, "Copy the whole weights folder again.")
        state = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise MedclError(f"cannot be read ({error})", path, "Copy the whole weights folder again.") from None
    state.update({name: state[same] for name, same in aliases.items()})
    return Contract.from_dict(data, folder / "contract.json"), state


def weights_hash(run: str | Path) -> str:
    """SHA-256 of the weights that a run's contract vouches for."""
    return str(read_json(Path(run) / "weights" / "contract.json").get("sha256", ""))


def rebuild(run: str | Path) -> tuple[Contract, Backbone]:
    """The network of a run with its weights."""
    contract, state = load_weights(run)
    backbone = build_backbone(contract.backbone)
    backbone.net.load_state_dict(state, strict=True)
    return contract, backbone


@dataclass(frozen=True)
class Transfer:
    """What was taken over.

    Attributes:
        taken: the tensors taken over.
        matched: how many those are; one with several names counts once.
        fresh: how many others start from random values.
        doubtful: how many of those taken over only the contract of an older run calls trained.
    """

    taken: Trained
    matched: int
    fresh: int
    doubtful: int = 0

    @property
    def names(self) -> frozenset[str]:
        """State-dict names of the tensors taken over."""
        return frozenset(self.taken.tensors)

    def __str__(self) -> str:
        rest = f"; {self.fresh} others start from random values" if self.fresh else ""
        return f"{self.matched} of {self.matched + self.fresh} tensors pretrained{rest}{doubt(self.doubtful)}"


def doubt(doubtful: int) -> str:
    """What to add where a contract made before medcl recorded tensors speaks for some of them."""
    if not doubtful:
        return ""
    return f"; {doubtful} are known by part only, from a run made before medcl recorded tensors: some may be random"


def transfer(contract: Contract, state: dict[str, Tensor], backbone: Backbone, where: object) -> Transfer:
    """Copies the trained tensors into `backbone`, all of them or none; what is random there stays as it is here.

    The output layer is never taken over: its channels belong to other classes.

    Raises:
        MedclError: a tensor is missing or has another shape; the message says which layers and why.
    """
    source = build_backbone(contract.backbone)
    head = source.tensor_names("head")
    taken = Trained(*(tuple(name for name in names if name not in head) for names in contract.trained_in(source)))
    names = taken.tensors
    mine = backbone.net.state_dict()
    wrong = []
    for name in names:
        if name not in mine:
            wrong.append(f"{name} is not in this network")
        elif mine[name].shape != state[name].shape:
            wrong.append(f"{name} is {tuple(state[name].shape)} there, {tuple(mine[name].shape)} here")
    reasons = [
        f"{f.name} is {getattr(source.spec, f.name)} there, {getattr(backbone.spec, f.name)} here"
        for f in dataclasses.fields(BackboneSpec)
        if f.name not in ("out_channels", "width") and getattr(source.spec, f.name) != getattr(backbone.spec, f.name)
    ]
    if source.width != backbone.width:
        reasons.append(f"width is {source.width} there, {backbone.width} here")
    if wrong or reasons:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        layers = f" {len(wrong)} of {len(names)} tensors do not fit: {shown}." if wrong else ""
        why = f" Because {', '.join(reasons)}." if reasons else ""
        raise MedclError(
            f"the pretrained network is not the one to be trained.{layers}{why}", where,
            "Leave out --backbone, --width, --norm and --plan to rebuild the pretrained one.",
        )  # fmt: skip
    backbone.net.load_state_dict({**mine, **{name: state[name] for name in names}}, strict=True)
    matched = count(backbone, names)
    return Transfer(taken, matched, count(backbone, mine) - matched, count(backbone, taken.doubtful))


def export(config: ExportConfig) -> Path:
    """Writes weights that the plain MONAI class loads with `strict=True`, and how to build and feed it.

    Raises:
        MedclError: unknown format, or the run holds no weights.
    """
    from safetensors.torch import save_file

    contract, backbone = rebuild(config.run)
    out = Path(config.out) if config.out else Path(config.run) / "export"
    name, arguments = backbone.monai_arguments()
    trained = contract.trained_in(backbone)
    weights = {key for key, tensor in backbone.net.state_dict().items() if tensor.is_floating_point()}
    with atomic_path(out / "model.safetensors") as part:
        # plain MONAI knows tensors with several names; a file with shared tensors is not allowed
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in backbone.net.state_dict().items()}, str(part))
    preparation = {"orientation": "RAS", "channels": contract.backbone.in_channels, **contract.plan.preparation()}
    write_json(
        out / "model.json",
        {
            "class": f"monai.networks.nets.{name}",
            "arguments": arguments,
            "input": preparation,
            "patch_size": round_up(contract.plan.patch_size, backbone.multiple),
            "patch_multiple": backbone.multiple,
            "trained": contract.trained,
            "trained_tensors": trained.tensors,
            "label_values": [0, *contract.label_values],
            "load": f"net = monai.networks.nets.{name}(**arguments); "
            "net.load_state_dict(safetensors.torch.load_file('model.safetensors'), strict=True)",
        },
    )
    fresh = weights.difference(trained.tensors)
    log.info("%s weights in %s: %d of %d tensors trained%s.", name, out, count(backbone, trained.tensors),
             count(backbone, weights), doubt(count(backbone, trained.doubtful)))  # fmt: skip
    if fresh:
        log.info("Never trained and random: %s.", ", ".join(summary(fresh, weights)))
    return out
