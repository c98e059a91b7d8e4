"""Encoders of instances: patches of a slide, or sub-volumes of a scan, to one row of features each."""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcl.errors import MedclError
from medcl.networks.backbones import Backbone
from medcl.networks.heads import pooled_pyramid
from medcl.runtime.run import log
from medcl.runtime.trained import count, summary
from medcl.transforms.correspondence import grid_points, map_to_view, sample_at, view_to_map

WIDTHS = {"resnet18": 512, "resnet34": 512, "resnet50": 2048}


class InstanceEncoder(nn.Module, ABC):
    """Maps a batch of instances to features (N, M).

    Attributes:
        identity: name and digest of the weights: features of two encoders are never mixed.
    """

    identity: str

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Features (N, M) of patches (N, 3, H, W) in [0, 1], or of sub-volumes (N, 1, D, H, W)."""


class PatchResNet(InstanceEncoder):
    """MONAI's 2D ResNet without its classifier: average of the last map.

    Args:
        name: resnet18, resnet34 or resnet50.
        width: factor on the number of channels.
    """

    def __init__(self, name: str = "resnet18", width: float = 1.0):
        super().__init__()
        from monai.networks import nets

        if name not in WIDTHS:
            raise MedclError(f"unknown encoder {name!r}", "--encoder", f"Use one of {', '.join(WIDTHS)}.")
        self.name, self.features = name, int(WIDTHS[name] * width)
        self.net = getattr(nets, name)(
            spatial_dims=2, n_input_channels=3, feed_forward=False, shortcut_type="B", widen_factor=width,
            conv1_t_stride=2,  # as in the original; MONAI's default keeps full resolution
        )  # fmt: skip

    @property
    def identity(self) -> str:  # type: ignore[override]
        """Name and digest of the current weights."""
        return f"{self.name}:{digest(self)}"

    def forward(self, x: Tensor) -> Tensor:
        return self.net(2 * x - 1)


Cell = tuple[int, int, int]


class VolumeEncoder(InstanceEncoder):
    """A pretrained medcl encoder of sub-volumes: mean and maximum of every map of its pyramid.

    The mean tells what a sub-volume is, the maximum that something small lies in it.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.identity = f"{backbone.spec.name}:{digest(backbone)}:mean-max"

    def cells(
        self, volume: Tensor, size: Cell, intensity: Tensor, maps: int = 0, step: Cell | None = None,
        pool: str = "mean-max",
    ) -> tuple[Tensor, list[int]]:  # fmt: skip
        """Features of a grid of cells over a whole volume, which is encoded once.

        Of the intensities and of every map finer than the steps the mean and the maximum in a cell; of coarser maps
        the value at its centre. So a cell knows what is in it and what lies around it.

        Args:
            volume: (1, 1, D, H, W), each a multiple of the encoder's stride and of `size`.
            size: voxels of a cell.
            intensity: the same volume without its intensities clipped, as the encoder must not see it.
            maps: how many of the encoder's maps, the finest first; 0 takes all.
            step: voxels from one cell to the next, a divisor of `size`, which is the default.
            pool: `mean-max`, or `mean` alone.

        Returns:
            (cells, M), the last axis fastest, and the cells along every axis.
        """
        step = step or size
        grid = [n // s for n, s in zip(volume.shape[2:], step, strict=True)]
        along = [n // s for n, s in zip(size, step, strict=True)]
        parts = []
        encoded = self.backbone.encode(volume)[: maps or None]
        # where voxels of the coarser maps lie is the backbone's to tell; in a finer one those of a cell lie in it
        places = [((1, 1, 1), (0.0, 0.0, 0.0)), *zip(self.backbone.reductions, self.backbone.offsets, strict=True)]
        centres = map_to_view(grid_points(grid, volume.device), torch.tensor(step, device=volume.device))
        for map_, (reduction, first) in zip([intensity, *encoded], places[: 1 + len(encoded)], strict=True):
            if all(have % want == 0 for have, want in zip(map_.shape[2:], grid, strict=True)):
                window = [n * have // want for n, have, want in zip(along, map_.shape[2:], grid, strict=True)]
                stride = [have // want for have, want in zip(map_.shape[2:], grid, strict=True)]
                parts.append(F.avg_pool3d(map_, window, stride))
                if max(window) > 1 and pool == "mean-max":
                    parts.append(F.max_pool3d(map_, window, stride))
            else:
                at = view_to_map(centres, *torch.tensor([reduction, first], device=volume.device))
                finer = sample_at(map_, at[None]).mT.unflatten(2, grid)
                parts.append(F.avg_pool3d(finer, along, 1))
        found = torch.cat(parts, dim=1)[0]
        return found.flatten(1).T.float(), list(found.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone.encode(x)
        return torch.cat([pooled_pyramid(features), *(f.flatten(2).amax(2) for f in features)], dim=1).float()


class Foreign(InstanceEncoder):
    """Any torch module that maps patches to features, with the mean and deviation it expects."""

    def __init__(self, module: nn.Module, name: str, mean: Any = (0.0, 0.0, 0.0), std: Any = (1.0, 1.0, 1.0)):
        super().__init__()
        self.module = module
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        self.identity = f"{name}:{digest(module)}"

    def forward(self, x: Tensor) -> Tensor:
        return self.module((x - self.mean) / self.std).flatten(1)


def digest(module: nn.Module) -> str:
    """Twelve hexadecimal digits that change with any weight."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


def instance_encoder(name: str, seed: int = 0) -> InstanceEncoder:
    """The encoder that `--encoder` names.

    Args:
        name: a run folder of `medcl mil pretrain` or `medcl pretrain`; `resnet18` and the like for random weights;
            `timm:NAME` for a pretrained model of timm (downloads it); `MODULE:FUNCTION` for a function that returns a
            torch module of patches (N, 3, H, W) in [0, 1].
        seed: of random weights.

    Raises:
        MedclError: nothing of that name, or what it needs is not installed.
    """
    torch.manual_seed(seed)
    folder = Path(name)
    if (folder / "weights" / "patch_encoder.json").exists():
        return load_patch_encoder(folder)
    if (folder / "weights" / "contract.json").exists():
        from medcl.checkpoint import rebuild

        contract, backbone = rebuild(folder)
        random = backbone.tensor_names("encoder").difference(contract.trained_in(backbone).tensors)
        if fresh := count(backbone, random):
            log.warning("%s: %d tensors of the encoder were never trained, so that features of theirs are random: %s.",
                        name, fresh, ", ".join(summary(random, backbone.net.state_dict())))  # fmt: skip
        return VolumeEncoder(backbone).eval()
    if name in WIDTHS:
        return PatchResNet(name).eval()
    if name.startswith("timm:"):
        try:
            timm = importlib.import_module("timm")
        except ImportError:
            raise MedclError(f"{name} needs timm", "--encoder", "pip install timm.") from None
        model = timm.create_model(name[5:], pretrained=True, num_classes=0)
        config = timm.data.resolve_model_data_config(model)
        return Foreign(model, name, config["mean"], config["std"]).eval()
    if ":" in name and not folder.exists():
        module, _, function = name.partition(":")
        try:
            made = getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError) as error:
            raise MedclError(f"{name} cannot be imported ({error})", "--encoder", "Give MODULE:FUNCTION.") from None
        return Foreign(made, name).eval()
    raise MedclError(
        f"no encoder {name!r}", "--encoder", f"Give a run folder, {', '.join(WIDTHS)}, timm:NAME or MODULE:FUNCTION."
    )


def save_patch_encoder(run: Path, encoder: PatchResNet, width: float, facts: dict[str, Any]) -> None:
    """Writes `weights/patch_encoder.safetensors` and, last, the JSON that vouches for it."""
    from safetensors.torch import save

    from medcl.runtime.files import atomic_path, sha256, write_json

    data = save({name: tensor.cpu().contiguous() for name, tensor in encoder.state_dict().items()})
    with atomic_path(run / "weights" / "patch_encoder.safetensors") as part:
        part.write_bytes(data)
    about = {**facts, "name": encoder.name, "width": width, "sha256": sha256(data)}
    write_json(run / "weights" / "patch_encoder.json", about)


def load_patch_encoder(run: Path) -> PatchResNet:
    """The patch encoder of a run.

    Raises:
        MedclError: damaged weights.
    """
    from safetensors.torch import load

    from medcl.runtime.files import read_json, sha256

    facts = read_json(run / "weights" / "patch_encoder.json")
    data = (run / "weights" / "patch_encoder.safetensors").read_bytes()
    if sha256(data) != facts["sha256"]:
        raise MedclError("are not what patch_encoder.json vouches for", run / "weights", "Pretrain again.")
    encoder = PatchResNet(facts["name"], facts["width"])
    encoder.load_state_dict(load(data), strict=True)
    return encoder.eval()
