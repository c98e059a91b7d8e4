"""Views of a read for contrast: a place in it, a spatial change, an appearance; coordinates travel along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medcl.transforms.base import Params, Range, Spacing
from medcl.transforms.compose import ViewIntensity, view_intensity
from medcl.transforms.inside import Box, data_box, inside_at, repeat_edge, starts_within
from medcl.transforms.random import mix_seeds, name_key, uniform
from medcl.transforms.rows import by_rows
from medcl.transforms.spatial import RandomSpatial


class RandomView:
    """Views of reads (N, C, D, H, W): moved, cut to `size` at a random place, changed in appearance.

    Args:
        size: voxels of a view, at most those of the read.
        spacing: mm along D, H, W.
        modality: `MR`, `CT` or `unknown`.
        intensity: changes of appearance, or None.
        rotate_deg: largest angle about each axis, or one for each; 0 with a `scale` of (1, 1) resamples nothing.
        scale: range of the growth of what is seen.
        flip: probability of mirroring each axis.
    """

    def __init__(
        self,
        size: Sequence[int],
        spacing: Spacing,
        modality: str,
        intensity: ViewIntensity | None,
        rotate_deg: float | Sequence[float] = 0.0,
        scale: Range = (1.0, 1.0),
        flip: Sequence[float] = (0.0, 0.0, 0.0),
    ):
        self.size, self.spacing = tuple(size), tuple(spacing)
        angles = [rotate_deg] * 3 if isinstance(rotate_deg, int | float) else list(rotate_deg)
        moves = max(angles) > 0 or tuple(scale) != (1.0, 1.0)
        self.spatial = RandomSpatial(angles, (scale[0], scale[1]), flip=flip, p_affine=float(moves))
        self.intensity = view_intensity(modality, spacing, intensity) if intensity else None

    def of_reads(self, reads: Mapping[str, Tensor], view: int) -> tuple[Tensor, Tensor, Tensor]:
        """One view of every read of a batch, as `medcl.store.crops.ReadDataset` gives them.

        Args:
            reads: `image` and `seed`, and where there are `start` and `extent`, by which a read holds data.
            view: as in `__call__`.

        Returns:
            As `__call__`, and which voxels of the views hold data (N, 1, *size) bool. The others repeat the nearest
            voxel that does, whatever the read holds there.
        """
        box = data_box(reads)
        image, where = self(repeat_edge(reads["image"], box), reads["seed"], view, box)
        return image, where, inside_at(where, box)

    def __call__(self, read: Tensor, seeds: Tensor, view: int, box: Box | None = None) -> tuple[Tensor, Tensor]:
        """One view of every read.

        Args:
            read: (N, C, D, H, W), not written to.
            seeds: (N,) int64, one a read.
            view: its number; other numbers give other views of the same read.
            box: where the reads hold data, which a view then shows as much of as it can; by default everywhere.

        Returns:
            The views (N, C, *size), and the place in the read, in voxels, that every voxel of them shows:
            (N, 3, *size).

        Raises:
            ValueError: the read is smaller than the view.
        """
        shape = tuple(read.shape[2:])
        if any(n < s for n, s in zip(shape, self.size, strict=True)):
            raise ValueError(f"a view of {self.size} does not fit into a read of {shape}")
        own = mix_seeds(seeds, name_key("view"), view)
        params = self.spatial.draw(own, shape, self.spacing)
        box = data_box({"image": read}) if box is None else box
        starts = starts_within(uniform(own, "view.start", 3), box, self.size, shape)
        image, where = by_rows(self._cut, (read, starts), [params])
        return (image if self.intensity is None else self.intensity(image, own)), where

    def _cut(self, read: Tensor, starts: Tensor, params: Sequence[Params]) -> tuple[Tensor, Tensor]:
        where = self.spatial.coordinates(params[0], read.shape[2:], read.device)
        moved = self.spatial.apply(read, params[0])
        return cut_each(moved, starts, self.size), cut_each(where, starts, self.size)


def cut_each(volume: Tensor, starts: Tensor, size: Sequence[int]) -> Tensor:
    """One crop (N, C, *size) of every row of (N, C, D, H, W), at `starts` (N, 3)."""
    return torch.stack(
        [
            row[:, a : a + size[0], b : b + size[1], c : c + size[2]]
            for row, (a, b, c) in zip(volume, starts.tolist(), strict=True)
        ]
    )
