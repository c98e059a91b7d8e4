"""Chains of transforms, and the presets used for segmentation and for pretext views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from medcl.transforms.base import Params, RandomTransform, Range, Spacing
from medcl.transforms.intensity import (
    RandomBiasField,
    RandomBlur,
    RandomBrightnessContrast,
    RandomGamma,
    RandomLowResolution,
    RandomNoise,
)
from medcl.transforms.random import as_seeds, mix_seeds, name_key
from medcl.transforms.rows import by_rows
from medcl.transforms.spatial import RandomSpatial, within


class Compose:
    """Transforms one after another, each with its own stream of random numbers.

    A stream is named after the transform's class and how many of that class came before, so that adding a transform
    to the chain does not change what the others draw.

    Args:
        transforms: in order.
        spacing: mm along D, H, W, where a call does not say.
    """

    def __init__(self, transforms: Sequence[RandomTransform], spacing: Spacing = (1.0, 1.0, 1.0)):
        self.transforms, self.spacing = tuple(transforms), tuple(spacing)
        seen: Counter[str] = Counter()
        self._streams = []
        for transform in self.transforms:
            name = type(transform).__name__
            self._streams.append(name_key(f"{name}/{seen[name]}"))
            seen[name] += 1

    @property
    def margin(self) -> tuple[int, ...]:
        """Voxels that an input has beyond the output on either side of each axis; see `RandomSpatial`."""
        margins = [t.margin for t in self.transforms if isinstance(t, RandomSpatial)]
        return tuple(sum(each) for each in zip(*margins, strict=True)) if margins else (0, 0, 0)

    def draw(self, seeds: Tensor, shape: Sequence[int], spacing: Spacing | None = None) -> list[Params]:
        """Draws the parameters of every transform for seeds (B,) int64; see `RandomTransform.draw`."""
        seeds, shape = as_seeds(seeds), tuple(shape)[-3:]
        spacing = self.spacing if spacing is None else spacing
        drawn = []
        for transform, stream in zip(self.transforms, self._streams, strict=True):
            drawn.append(transform.draw(mix_seeds(seeds, stream), shape, spacing))
            if isinstance(transform, RandomSpatial):
                shape = within(shape, transform.margin)
        return drawn

    def apply(self, image: Tensor, params: Sequence[Params]) -> Tensor:
        """Applies drawn parameters to (B, C, D, H, W)."""
        return by_rows(self._apply, (image,), params)[0]

    def apply_both(self, image: Tensor, label: Tensor, params: Sequence[Params]) -> tuple[Tensor, Tensor]:
        """Applies drawn parameters to an image and its label map (B, 1, D, H, W)."""
        image, label = by_rows(self._apply_both, (image, label), params)
        return image, label

    def apply_soft(
        self, image: Tensor, soft: Tensor, params: Sequence[Params], inside: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Applies drawn parameters to an image, and moves maps of numbers, such as probabilities, along with it.

        Args:
            image: (B, C, D, H, W).
            soft: (B, K, D, H, W), interpolated linearly; what changes intensities leaves it alone.
            params: from `draw`.
            inside: which voxels hold data, (B, 1, D, H, W) bool; by default all.

        Returns:
            The image, the maps, and (B, 1, D, H, W) bool: whether a voxel comes from one that holds data. Outside the
            input both repeat their border.
        """
        inside = torch.ones_like(image[:, :1], dtype=torch.bool) if inside is None else inside
        image, soft, inside = by_rows(self._apply_soft, (image, soft, inside), params)
        return image, soft, inside

    def _apply(self, image: Tensor, params: Sequence[Params]) -> tuple[Tensor]:
        for transform, drawn in zip(self.transforms, params, strict=True):
            image = transform.apply(image, drawn)
        return (image,)

    def _apply_both(self, image: Tensor, label: Tensor, params: Sequence[Params]) -> tuple[Tensor, Tensor]:
        for transform, drawn in zip(self.transforms, params, strict=True):
            image, label = transform.apply_both(image, label, drawn)
        return image, label

    def _apply_soft(
        self, image: Tensor, soft: Tensor, inside: Tensor, params: Sequence[Params]
    ) -> tuple[Tensor, Tensor, Tensor]:
        inside = inside.to(torch.uint8)
        for transform, drawn in zip(self.transforms, params, strict=True):
            if isinstance(transform, RandomSpatial):
                # one grid for all of them; a label map is padded with 0
                both, inside = transform.apply_both(torch.cat([image, soft.to(image.dtype)], dim=1), inside, drawn)
                image, soft = both.split([image.shape[1], soft.shape[1]], dim=1)
            else:
                image = transform.apply(image, drawn)
        return image, soft, inside > 0

    def coordinates(self, params: Sequence[Params], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Source voxel coordinates (B, 3, D, H, W) of every output voxel; see `RandomSpatial.coordinates`.

        Raises:
            ValueError: not exactly one of the transforms is spatial.
        """
        spatial = [(t, p) for t, p in zip(self.transforms, params, strict=True) if isinstance(t, RandomSpatial)]
        if len(spatial) != 1:
            raise ValueError(f"coordinates need exactly one RandomSpatial in the chain, not {len(spatial)}")
        transform, drawn = spatial[0]
        return transform.coordinates(drawn, shape, device)

    @overload
    def __call__(self, image: Tensor, seeds: Tensor, *, spacing: Spacing | None = ...) -> Tensor: ...
    @overload
    def __call__(
        self, image: Tensor, seeds: Tensor, label: Tensor, *, spacing: Spacing | None = ...
    ) -> tuple[Tensor, Tensor]: ...
    def __call__(
        self, image: Tensor, seeds: Tensor, label: Tensor | None = None, *, spacing: Spacing | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draws and applies; see `RandomTransform.__call__`."""
        params = self.draw(seeds, image.shape, spacing)
        return self.apply(image, params) if label is None else self.apply_both(image, label, params)


@dataclass(frozen=True)
class StrongAugmentation:
    """nnU-Net's augmentation for segmentation, with its ranges; probabilities raised for few labels.

    Ranges are (low, high), probabilities are per sample. `flip` is per axis and off: anatomy has a left and a right.
    """

    rotate_deg: float = 30.0
    scale: Range = (0.7, 1.4)
    translate: float = 0.0
    flip: tuple[float, float, float] = (0.0, 0.0, 0.0)
    p_affine: float = 0.5
    elastic_distance: float = 16.0
    elastic_displacement: float = 5.0
    p_elastic: float = 0.5
    bias_strength: Range = (0.1, 0.3)
    p_bias: float = 0.3  # MR only
    noise_std: Range = (0.0, 0.1)
    p_noise: float = 0.3
    blur_sigma: Range = (0.5, 1.0)
    p_blur: float = 0.15
    brightness: Range = (0.75, 1.25)
    p_brightness: float = 0.15
    contrast: Range = (0.75, 1.25)
    p_contrast: float = 0.15
    low_resolution: Range = (0.5, 1.0)
    p_low_resolution: float = 0.2
    gamma: Range = (0.7, 1.5)
    p_gamma_inverted: float = 0.1
    p_gamma: float = 0.5


@dataclass(frozen=True)
class ViewIntensity:
    """Appearance changes for pretext views; nothing moves. Mild by default."""

    bias_strength: Range = (0.0, 0.15)
    p_bias: float = 0.3  # MR only
    noise_std: Range = (0.0, 0.05)
    p_noise: float = 0.2
    blur_sigma: Range = (0.4, 0.7)
    p_blur: float = 0.1
    brightness: Range = (0.9, 1.1)
    p_brightness: float = 0.3
    contrast: Range = (0.9, 1.1)
    p_contrast: float = 0.3
    gamma: Range = (0.85, 1.2)
    p_gamma: float = 0.2
    p_gamma_inverted: float = 0.0


# for views to be recognised by their anatomy, not by equal grey values or noise
STRONG_VIEWS = ViewIntensity(
    bias_strength=(0.1, 0.4),
    p_bias=0.5,
    noise_std=(0.0, 0.2),
    p_noise=0.5,
    blur_sigma=(0.4, 1.0),
    p_blur=0.3,
    brightness=(0.7, 1.3),
    p_brightness=0.5,
    contrast=(0.65, 1.5),
    p_contrast=0.5,
    gamma=(0.5, 2.0),
    p_gamma=0.5,
    p_gamma_inverted=0.25,
)
INTENSITY = {"none": None, "weak": ViewIntensity(), "strong": STRONG_VIEWS}


def _intensity(modality: str, preset: StrongAugmentation | ViewIntensity) -> list[RandomTransform]:
    chain: list[RandomTransform] = []
    if modality != "CT":  # Hounsfield units know no coil
        chain.append(RandomBiasField(preset.bias_strength, probability=preset.p_bias))
    chain += [
        RandomNoise(preset.noise_std, preset.p_noise),
        RandomBlur(preset.blur_sigma, preset.p_blur),
        RandomBrightnessContrast(preset.brightness, preset.contrast, preset.p_brightness, preset.p_contrast),
    ]
    return chain


def strong_augmentation(
    modality: str = "MR",
    spacing: Spacing = (1.0, 1.0, 1.0),
    preset: StrongAugmentation | None = None,
    margin: tuple[int, int, int] = (0, 0, 0),
) -> Compose:
    """Augmentation for few-label segmentation, as strong as nnU-Net's.

    Args:
        modality: `MR`, `CT` or `unknown`.
        spacing: mm along D, H, W.
        preset: ranges and probabilities.
        margin: voxels that an input has beyond the output on either side of each axis; see `margin_for`.
    """
    preset = preset or StrongAugmentation()
    spatial = RandomSpatial(
        preset.rotate_deg,
        preset.scale,
        translate=preset.translate,
        flip=preset.flip,
        elastic=(preset.elastic_distance, preset.elastic_displacement),
        p_affine=preset.p_affine,
        p_elastic=preset.p_elastic,
        margin=margin,
    )
    last = [
        RandomLowResolution(preset.low_resolution, probability=preset.p_low_resolution),
        RandomGamma(preset.gamma, invert=True, probability=preset.p_gamma_inverted),
        RandomGamma(preset.gamma, probability=preset.p_gamma),
    ]
    return Compose([spatial, *_intensity(modality, preset), *last], spacing)


def view_intensity(
    modality: str = "MR", spacing: Spacing = (1.0, 1.0, 1.0), preset: ViewIntensity | None = None
) -> Compose:
    """Intensity changes for pretext crops, mild by default; arguments as in `strong_augmentation`."""
    preset = preset or ViewIntensity()
    last = [
        RandomGamma(preset.gamma, probability=preset.p_gamma),
        RandomGamma(preset.gamma, invert=True, probability=preset.p_gamma_inverted),
    ]
    return Compose([*_intensity(modality, preset), *last], spacing)
