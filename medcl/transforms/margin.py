"""How much to read around a patch that is then turned, zoomed and bent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medcl.transforms.base import Spacing
from medcl.transforms.compose import Compose

COVERED = 0.95  # share of the patch's voxels that come from the read
DRAWS = 64
STEPS = 8  # places along an axis that are followed


def margin_for(
    augmentation: Compose, size: Sequence[int], spacing: Spacing, most: Sequence[int], covered: float = COVERED
) -> tuple[int, int, int]:
    """Voxels to read beyond a patch on either side of each axis, so that what augmentation shows is mostly data.

    The margin is the same share of the reach along every axis, the smallest that covers enough. It is found by drawing
    from the augmentation itself, with seeds of its own; the same arguments give the same margin.

    Args:
        augmentation: with exactly one spatial transform, without a margin of its own.
        size: voxels of the patch.
        spacing: mm along its axes.
        most: largest margin along each axis that a volume could fill.
        covered: mean share of the patch's voxels that come from the read.

    Returns:
        A margin along each axis; 0 where the augmentation moves nothing, and never more than `most`.
    """
    seeds = torch.arange(DRAWS)
    params = augmentation.draw(seeds, size, spacing)
    picks = [torch.linspace(0, n - 1, min(n, STEPS)).round().long() for n in size]
    beyond = []  # voxels that a place lies outside the patch along each axis
    for rows in seeds.split(16):
        where = augmentation.coordinates([{k: v[rows] for k, v in each.items()} for each in params], size)
        for axis, chosen in enumerate(picks):
            where = where.index_select(axis + 2, chosen)
        last = torch.tensor(size).view(1, 3, 1, 1, 1) - 1
        beyond.append(torch.maximum(-where, where - last).clamp(min=0))
    reach = torch.cat(beyond)
    far = reach.amax((0, 2, 3, 4))
    limit = torch.tensor(most, dtype=torch.float32).clamp(min=0)

    def margin(share: float) -> torch.Tensor:
        return (share * far).ceil().minimum(limit)

    def missed(share: float) -> float:
        return float((reach > margin(share).view(1, 3, 1, 1, 1) + 0.5).any(1).float().mean())

    shares = [step / 64 for step in range(65)]
    enough = next((share for share in shares if 1 - missed(share) >= covered), 1.0)
    x, y, z = margin(enough).int().tolist()
    return x, y, z
