"""Flips, affine maps and elastic deformation, composed into one sampling grid and one resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medcl.transforms.base import Params, RandomTransform, Range, select
from medcl.transforms.linear import smooth_field
from medcl.transforms.random import bernoulli, uniform
from medcl.transforms.sampling import sample

STRONGLY_ANISOTROPIC = 3.0  # nnU-Net's threshold on the ratio of spacings
_MOST_BEND = 0.4  # of the control spacing: below it a cubic B-spline deformation cannot fold (Choi and Lee, 2000)


def _ranges(value: float | Sequence[float | Range], neutral: float = 0.0) -> list[Range]:
    """A half-width about `neutral`, or one half-width or (low, high) pair for each axis, as three pairs."""
    values: Sequence[float | Range] = [value] * 3 if isinstance(value, int | float) else value
    if len(values) != 3:
        raise ValueError(f"needs one number, or one number or range for each of three axes, not {value}")
    return [(neutral - v, neutral + v) if isinstance(v, int | float) else (v[0], v[1]) for v in values]


class RandomSpatial(RandomTransform):
    """Random flips, affine and elastic deformation about the volume's centre, resampled once.

    Rotations, shears and displacements are rigid or smooth in mm, whatever the spacing. Where the spacings differ by
    more than three times, slices are not mixed: rotation, shear, scaling and displacement stay within the slice
    (nnU-Net's "dummy 2D" rule). Axes are counted in the order D, H, W.

    Args:
        rotate_deg: largest angle about each axis, or a range for each; about axis 0 turns H towards W, and so on.
        scale: range of the growth of what is seen, drawn evenly on a logarithmic scale.
        scale_per_axis: another scale for every axis.
        shear: largest shear (tangent), between each pair of axes.
        translate: largest shift along each axis, as a fraction of its length.
        flip: probability of mirroring each axis.
        elastic: (distance of control points, largest displacement), both in voxels of the finest axis.
        p_affine: probability of the affine part.
        p_elastic: probability of the elastic part.
        in_plane: whether to keep within slices; None decides by the spacing.
        label_mode: `nearest`, or `linear` for the class of the largest interpolated share, which has smoother outlines.
        label_padding: what labels find outside: `zeros` (background) or `border`. Images repeat their border.
        margin: voxels that an input has beyond the output on either side of each axis. A turned or zoomed output then
            shows what lies there, not a repeated border.

    Raises:
        ValueError: a range is reversed, or the displacement is large enough to fold the volume.
    """

    def __init__(
        self,
        rotate_deg: float | Sequence[float | Range] = (30.0, 30.0, 30.0),
        scale: Range = (0.7, 1.4),
        *,
        scale_per_axis: bool = False,
        shear: float | Sequence[float | Range] = 0.0,
        translate: float | Sequence[float | Range] = 0.0,
        flip: Sequence[float] = (0.0, 0.0, 0.0),
        elastic: tuple[float, float] = (16.0, 4.0),
        p_affine: float = 1.0,
        p_elastic: float = 0.0,
        in_plane: bool | None = None,
        label_mode: Literal["nearest", "linear"] = "nearest",
        label_padding: Literal["zeros", "border"] = "zeros",
        margin: tuple[int, int, int] = (0, 0, 0),
    ):
        super().__init__(1.0)
        self.rotate, self.shear, self.translate = _ranges(rotate_deg), _ranges(shear), _ranges(translate)
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be a positive range (low, high), not {scale}")
        if elastic[1] > _MOST_BEND * elastic[0]:
            raise ValueError(
                f"elastic displacement {elastic[1]} folds a grid of control distance {elastic[0]}: "
                f"at most {_MOST_BEND} of the distance"
            )
        self.scale, self.scale_per_axis, self.flip, self.elastic = scale, scale_per_axis, tuple(flip), elastic
        self.p_affine, self.p_elastic, self.in_plane = p_affine, p_elastic, in_plane
        self.label_mode, self.label_padding, self.margin = label_mode, label_padding, margin

    def _draw(self, seeds: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Params:
        """Draws the parameters of every sample.

        Returns:
            Besides `active`: `warped` (B,), `flip` (B, 3), and the map from output to source voxels about the centre:
            `matrix` (B, 3, 3), `offset` (B, 3) and `control` (B, 3, k, l, m), displacements in voxels.
        """
        shape = within(shape, self.margin)
        mm = torch.tensor(spacing, dtype=torch.float32)
        flat = max(spacing) / min(spacing) > STRONGLY_ANISOTROPIC if self.in_plane is None else self.in_plane
        thick = int(mm.argmax()) if flat else None
        flip = uniform(seeds, "flip", 3) < torch.tensor(self.flip)
        affine = bernoulli(seeds, "affine", self.p_affine)
        elastic = bernoulli(seeds, "elastic", self.p_elastic)

        forward = self._forward(seeds, thick)  # in mm, from source to output
        matrix = torch.linalg.inv(forward) * (mm / mm[:, None])
        matrix = torch.where(affine[:, None, None], matrix, torch.eye(3))
        shift = self._uniform(seeds, "translate", self.translate) * torch.tensor(shape, dtype=torch.float32)
        offset = torch.where(affine[:, None], -(matrix @ shift[:, :, None])[:, :, 0], torch.zeros(()))

        distance, most = self.elastic
        per_voxel = min(spacing) / mm  # of the finest axis's voxels in one of this axis's
        knots = [
            max(math.ceil((n - 1) / max(distance * ratio, 1.0)), 1) + 3 if self.p_elastic else 4
            for n, ratio in zip(shape, per_voxel.tolist(), strict=True)
        ]
        size = uniform(seeds, "size", low=0.25 * most, high=most)[:, None] * per_voxel
        if thick is not None:
            size[:, thick] = 0
        control = uniform(seeds, "control", 3, *knots, low=-1, high=1) * size[:, :, None, None, None]
        control = torch.einsum("bij,bjxyz->bixyz", matrix, control) * elastic[:, None, None, None, None]

        mirror = torch.where(flip, -1.0, 1.0)
        warped = affine | elastic
        return {
            "active": warped | flip.any(dim=1),
            "warped": warped,
            "flip": flip,
            "matrix": mirror[:, :, None] * matrix,
            "offset": mirror * offset,
            "control": mirror[:, :, None, None, None] * control,
        }

    @staticmethod
    def _uniform(seeds: Tensor, name: str, ranges: list[Range]) -> Tensor:
        low, high = torch.tensor(ranges, dtype=torch.float32).T
        return low + (high - low) * uniform(seeds, name, 3)

    def _forward(self, seeds: Tensor, thick: int | None) -> Tensor:
        """Rotation, shear and scale (B, 3, 3) in mm."""
        angles = torch.deg2rad(self._uniform(seeds, "rotate", self.rotate))
        shears = self._uniform(seeds, "shear", self.shear)
        low, high = (math.log(s) for s in self.scale)
        scale = torch.exp(uniform(seeds, "scale", 3 if self.scale_per_axis else 1, low=low, high=high)).repeat(
            1, 1 if self.scale_per_axis else 3
        )
        if thick is not None:
            kept = torch.arange(3) == thick
            angles, shears = angles * kept, shears * kept
            scale = torch.where(kept, torch.ones(()), scale)
        result = torch.diag_embed(scale)
        for axis in range(3):
            i, j = (axis + 1) % 3, (axis + 2) % 3
            slant = torch.eye(3).repeat(len(seeds), 1, 1)
            slant[:, i, j] = shears[:, axis]
            turn = torch.eye(3).repeat(len(seeds), 1, 1)
            cos, sin = torch.cos(angles[:, axis]), torch.sin(angles[:, axis])
            turn[:, i, i], turn[:, i, j], turn[:, j, i], turn[:, j, j] = cos, -sin, sin, cos
            result = turn @ slant @ result
        return result

    @staticmethod
    def coordinates(params: Params, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Where each output voxel was taken from.

        Args:
            params: from `draw`.
            shape: (D, H, W) of the output; leading dimensions are ignored.
            device: where to compute.

        Returns:
            (B, 3, D, H, W) source voxel coordinates along D, H, W, counted from the output's first voxel: fractional,
            and outside the output's own range where the margin or padding is shown.
        """
        shape = tuple(shape)[-3:]
        centre = torch.tensor([(n - 1) / 2 for n in shape])
        matrix, control = params["matrix"].to(device), params["control"].to(device)
        start = (params["offset"] + centre).to(device)
        depth, height, width = (
            matrix[:, :, axis, None] * (torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2)
            for axis, n in enumerate(shape)
        )
        plane = (height + start[:, :, None])[:, :, :, None] + width[:, :, None, :]
        where = depth[:, :, :, None, None] + plane[:, :, None]
        bent = (params["control"] != 0).flatten(1).any(dim=1)
        if bool(bent.all()):
            return where.add_(smooth_field(control, shape))
        if bool(bent.any()):
            some = bent.to(device)
            where[some] += smooth_field(control[some], shape)
        return where

    def _sample_label(self, label: Tensor, where: Tensor) -> Tensor:
        if self.label_mode == "nearest":
            return sample(label.to(where.dtype), where, "nearest", self.label_padding).to(label.dtype)
        best = torch.zeros(label.shape[:2] + where.shape[2:], dtype=label.dtype, device=label.device)
        share = torch.zeros(best.shape, dtype=where.dtype, device=label.device)
        total = share.clone()
        for value in torch.unique(label):
            if value != 0:
                moved = sample((label == value).to(where.dtype), where, "bilinear", self.label_padding)
                best, share = torch.where(moved > share, value, best), torch.maximum(moved, share)
                total += moved
        return torch.where(share > 1 - total, best, torch.zeros_like(best))  # what no class claims is background

    def apply(self, image: Tensor, params: Params) -> Tensor:
        return self._move(image, None, params)[0]

    def apply_both(self, image: Tensor, label: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        moved, moved_label = self._move(image, label, params)
        assert moved_label is not None
        return moved, moved_label

    def _move(self, image: Tensor, label: Tensor | None, params: Params) -> tuple[Tensor, Tensor | None]:
        middle = cut_margin(image, self.margin)
        middle_label = None if label is None else cut_margin(label, self.margin)
        if not bool(params["active"].any()):
            return middle, middle_label
        out = middle.clone()
        out_label = None if middle_label is None else middle_label.clone()
        # a mirror image alone needs no interpolation and is exact
        for row in (params["active"] & ~params["warped"]).nonzero().squeeze(1).tolist():
            dims = [axis + 1 for axis in range(3) if params["flip"][row, axis]]
            out[row] = middle[row].flip(dims)
            if middle_label is not None and out_label is not None:
                out_label[row] = middle_label[row].flip(dims)
        warped = params["warped"].nonzero().squeeze(1)
        # a CPU samples a volume with one thread; fewer volumes at a time keep the grids in cache (a quarter less time)
        size = torch.get_num_threads() if image.device.type == "cpu" else max(len(warped), 1)
        for chosen in warped.split(size):
            rows = chosen.to(image.device)
            where = self.coordinates(select(params, chosen), middle.shape, image.device)
            for axis, beyond in enumerate(self.margin):
                where[:, axis] += beyond
            out[rows] = sample(image[rows], where)
            if label is not None and out_label is not None:
                out_label[rows] = self._sample_label(label[rows], where)
        return out, out_label


def within(shape: Sequence[int], margin: Sequence[int]) -> tuple[int, ...]:
    """The shape that is left without a margin on both sides of each axis."""
    return tuple(n - 2 * beyond for n, beyond in zip(shape, margin, strict=True))


def cut_margin(volume: Tensor, margin: Sequence[int]) -> Tensor:
    """The middle of (B, C, D, H, W), without `margin` voxels on either side of each axis."""
    x, y, z = (slice(beyond, n - beyond) for n, beyond in zip(volume.shape[2:], margin, strict=True))
    return volume[:, :, x, y, z]
