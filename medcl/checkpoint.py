"""Weights with their contract: what the network expects to see, what it was trained on, and whether it fits."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medcl.config import ExportConfig
from medcl.data.plan import Plan, round_up
from medcl.errors import MedclError
from medcl.files import atomic_path, file_sha256, read_json, sha256, write_json
from medcl.networks.backbones import Backbone, BackboneSpec, build_backbone
from medcl.run import log

CONTRACT_VERSION = 1


@dataclass(frozen=True)
class Contract:
    """What goes with the weights of a backbone.

    Attributes:
        kind: `pretrained` or `segmentation`.
        backbone: how to rebuild the network.
        plan: how its input is prepared: orientation RAS, spacing, normalisation, window.
        trained: parts of the network that training has touched: `encoder`, `decoder`, `head`.
        task: name of the pretext or downstream task.
        options: its settings.
        label_values: the label value of every output channel but the first.
        source: folder or manifest that it was trained on.
        volumes: hashes of the voxels of every volume seen.
        subjects: whose volumes those are.
        step: optimiser step of these weights.
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

    @staticmethod
    def from_dict(data: dict[str, Any], where: object) -> Contract:
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
    if data.pop("medcl_contract", None) != CONTRACT_VERSION:
        raise MedclError("is not a contract of this version", folder / "contract.json", "Train again with this medcl.")
    aliases, digest, file, _ = (data.pop(key) for key in ("aliases", "sha256", "file", "input"))
    path = folder / Path(file).name
    try:
        if file_sha256(path) != digest:
            raise MedclError("differs from what its contract vouches for", path, "Copy the whole weights folder again.")
        state = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise MedclError(f"cannot be read ({error})", path, "Copy the whole weights folder again.") from None
    state.update({name: state[same] for name, same in aliases.items()})
    return Contract.from_dict(data, folder / "contract.json"), state


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
        names: state-dict names of the tensors taken over.
        fresh: how many others start from random values.
    """

    names: frozenset[str]
    fresh: int

    @property
    def matched(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        rest = f"; {self.fresh} others start from random values" if self.fresh else ""
        return f"{self.matched} of {self.matched} pretrained tensors matched{rest}"


def transfer(contract: Contract, state: dict[str, Tensor], backbone: Backbone, where: object) -> Transfer:
    """Copies the trained parts into `backbone`, every tensor or none.

    The output layer is never taken over: its channels belong to other classes.

    Raises:
        MedclError: a tensor is missing or has another shape; the message says which layers and why.
    """
    source = build_backbone(contract.backbone)
    names = set().union(*(source.tensor_names(part) for part in contract.trained)) - source.tensor_names("head")
    mine = backbone.net.state_dict()
    wrong = []
    for name in sorted(names):
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
    return Transfer(frozenset(names), len(mine) - len(names))


def export(config: ExportConfig) -> Path:
    """Writes weights that the plain MONAI class loads with `strict=True`, and how to build and feed it.

    Raises:
        MedclError: unknown format, or the run holds no weights.
    """
    from safetensors.torch import save_file

    if config.to != "monai":
        raise MedclError(f"unknown format {config.to!r}", "--to", "Use monai.")
    contract, backbone = rebuild(config.run)
    out = Path(config.out) if config.out else Path(config.run) / "export"
    name, arguments = backbone.monai_arguments()
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
            "label_values": [0, *contract.label_values],
            "load": f"net = monai.networks.nets.{name}(**arguments); "
            "net.load_state_dict(safetensors.torch.load_file('model.safetensors'), strict=True)",
        },
    )
    untrained = {"encoder", "decoder", "head"} - set(contract.trained)
    log.info("%s weights in %s.", name, out)
    if untrained:
        log.info("Pretraining trained the %s only; what the file has of the %s is random.",
                 " and ".join(contract.trained), " and ".join(sorted(untrained)))  # fmt: skip
    return out
