"""Where a place of one view lies in another: exact, because coordinates travel with the views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def affine_of(where: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map behind a field of coordinates.

    Args:
        where: place in the read that every voxel of a view shows, (N, 3, D, H, W), affine in the voxel's index.

    Returns:
        Matrix (N, 3, 3) and origin (N, 3): voxel x of the view shows matrix @ x + origin. An axis of a single voxel
        counts as going along itself.
    """
    origin = where[:, :, 0, 0, 0]
    columns = []
    for axis, n in enumerate(where.shape[2:]):
        if n > 1:
            columns.append((where.select(axis + 2, n - 1)[:, :, 0, 0] - origin) / (n - 1))
        else:
            columns.append(torch.eye(3, device=where.device)[axis].expand_as(origin))
    return torch.stack(columns, dim=2), origin


def first_place(offset: Sequence[float], reduction: Sequence[int], step: Sequence[float]) -> list[float]:
    """Where the first voxel of a backbone's map lies in a view that was enlarged to the network's input.

    Args:
        offset, reduction: of the map, in voxels of the input; see `Backbone.offsets`.
        step: voxels of the view in a voxel of the map.
    """
    # enlarging keeps the border of the first voxel, half a voxel before its centre
    return [(o + 0.5) * s / r - 0.5 for o, r, s in zip(offset, reduction, step, strict=True)]


def map_to_view(points: Tensor, step: Tensor, first: Tensor | None = None) -> Tensor:
    """Voxel coordinates of a feature map to those of the view, both counted at voxel centres.

    Args:
        points: (..., 3).
        step: voxels of the view in a voxel of the map, (3,).
        first: place of the first voxel of the map, (3,); see `first_place`. By default amid the voxels that it covers,
            as in a map of averages.
    """
    return points * step + ((step - 1) / 2 if first is None else first)


def view_to_map(points: Tensor, step: Tensor, first: Tensor | None = None) -> Tensor:
    """The inverse of `map_to_view`."""
    return (points - ((step - 1) / 2 if first is None else first)) / step


def into(points: Tensor, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Where the places that voxels `points` (N, P, 3) of one view show lie in another view of the same reads.

    Args:
        points: voxel coordinates in the first view.
        one, other: `affine_of` the views.
    """
    places = points @ one[0].mT + one[1][:, None]
    return torch.linalg.solve(other[0], (places - other[1][:, None]).mT).mT


def sample_at(features: Tensor, points: Tensor) -> Tensor:
    """Trilinear values (N, P, C) of maps (N, C, D, H, W) at voxel coordinates (N, P, 3); outside, the border's."""
    size = torch.tensor(features.shape[2:], device=points.device)
    grid = torch.where(size > 1, 2 * points / (size - 1).clamp(min=1) - 1, torch.zeros_like(points))
    grid = grid.flip(-1)[:, :, None, None].to(features.dtype)  # grid_sample counts axes from the last
    return F.grid_sample(features, grid, padding_mode="border", align_corners=True).flatten(2).mT


def grid_points(size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Voxel indices (D * H * W, 3) of a map, the last axis fastest, as floats."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in size)).float().view(-1, 3)
