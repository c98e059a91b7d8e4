"""Random changes of histology patches, batched, on whatever device they are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medcl.transforms.random import bernoulli, uniform

# optical density of haematoxylin, eosin and the rest; Ruifrok and Johnston 2001
STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))


def random_patch_view(images: Tensor, seeds: Tensor, least: float = 0.5) -> Tensor:
    """A random view of every patch: a part of it enlarged, turned, mirrored, stained anew, blurred.

    Args:
        images: (N, 3, H, W) in [0, 1].
        seeds: (N,) int64 on the CPU.
        least: smallest share of the area that a view shows.

    Returns:
        (N, 3, H, W) in [0, 1].
    """
    n, device = len(images), images.device
    share = uniform(seeds, "patch.area", low=least, high=1.0).sqrt()
    angle = uniform(seeds, "patch.turn", low=-math.pi, high=math.pi)
    mirror = torch.where(bernoulli(seeds, "patch.mirror", 0.5), -1.0, 1.0)
    shift = uniform(seeds, "patch.shift", 2, low=-1.0, high=1.0) * (1 - share)[:, None]
    cos, sin = share * angle.cos(), share * angle.sin()
    matrix = torch.stack([cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrix.to(device), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return restained(blurred(views, seeds), seeds).clamp(0, 1)


def restained(images: Tensor, seeds: Tensor, strength: float = 0.25, shift: float = 0.04) -> Tensor:
    """Scales and shifts the amount of each stain (Tellez et al., IEEE TMI 2018), and the brightness."""
    device = images.device
    stains = F.normalize(torch.tensor(STAINS, device=device), dim=1)
    density = -(images.clamp(1 / 255, 1)).log()
    amount = torch.einsum("nchw,cs->nshw", density, torch.linalg.inv(stains))
    scale = uniform(seeds, "patch.stain", 3, low=1 - strength, high=1 + strength).to(device)
    offset = uniform(seeds, "patch.offset", 3, low=-shift, high=shift).to(device)
    amount = amount * scale[:, :, None, None] + offset[:, :, None, None]
    light = uniform(seeds, "patch.light", low=0.85, high=1.15).to(device).view(-1, 1, 1, 1)
    return torch.einsum("nshw,sc->nchw", amount, stains).neg().exp() * light


def blurred(images: Tensor, seeds: Tensor, probability: float = 0.3) -> Tensor:
    """Mixes a box blur of three pixels in."""
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    share = uniform(seeds, "patch.blur") * bernoulli(seeds, "patch.blurred", probability)
    return torch.lerp(images, soft, share.to(images.device).view(-1, 1, 1, 1))
