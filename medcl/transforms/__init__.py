"""Batched, replayable random transforms of volumes (B, C, D, H, W), on any device."""

from medcl.transforms.base import Params, RandomTransform
from medcl.transforms.compose import (
    Compose,
    StrongAugmentation,
    ViewIntensity,
    strong_augmentation,
    view_intensity,
)
from medcl.transforms.intensity import (
    RandomBiasField,
    RandomBlur,
    RandomBrightnessContrast,
    RandomCoarseDropout,
    RandomGamma,
    RandomLowResolution,
    RandomNoise,
)
from medcl.transforms.random import mix, mix_seeds, noise_like
from medcl.transforms.spatial import RandomSpatial

__all__ = [
    "Compose",
    "Params",
    "RandomBiasField",
    "RandomBlur",
    "RandomBrightnessContrast",
    "RandomCoarseDropout",
    "RandomGamma",
    "RandomLowResolution",
    "RandomNoise",
    "RandomSpatial",
    "RandomTransform",
    "StrongAugmentation",
    "ViewIntensity",
    "mix",
    "mix_seeds",
    "noise_like",
    "strong_augmentation",
    "view_intensity",
]
