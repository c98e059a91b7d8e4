"""Random intensity transforms of batches. Images are expected normalised to about zero mean and unit spread."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medcl.transforms.base import Params, RandomTransform, Range, per_sample
from medcl.transforms.linear import along_axes, gaussian_matrix, low_resolution_matrix, smooth_field
from medcl.transforms.random import bernoulli, mix_seeds, name_key, noise_like, normal, uniform

_SPACE = (2, 3, 4)
_TINY = 1e-6


def _ordered(name: str, value: Range, least: float = -math.inf) -> Range:
    low, high = value
    if not least <= low <= high:
        limit = "" if math.isinf(least) else f", from {least} up"
        raise ValueError(f"{name} must be a range (low, high){limit}, not {value}")
    return value


def _mean_spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and root of the summed squared deviations over space; `torch.std_mean` takes several times as long."""
    mean = x.mean(_SPACE, keepdim=True)
    return mean, torch.linalg.vector_norm(x - mean, dim=_SPACE, keepdim=True)


class RandomNoise(RandomTransform):
    """Adds Gaussian noise.

    Args:
        std: range of its standard deviation, in the image's unit.
        probability: of applying it to a sample.
    """

    def __init__(self, std: Range = (0.0, 0.1), probability: float = 1.0):
        super().__init__(probability)
        self.std = _ordered("std", std, 0.0)

    def _draw(self, seeds: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Params:
        low, high = self.std
        return {"std": uniform(seeds, "std", low=low, high=high), "seed": mix_seeds(seeds, name_key("noise"))}

    def _apply(self, image: Tensor, params: Params) -> Tensor:
        return torch.addcmul(image, noise_like(image, params["seed"]), per_sample(params["std"], image))


class RandomBlur(RandomTransform):
    """Gaussian blur as one matrix product along each axis.

    Args:
        sigma: range of its width, in voxels of the finest axis; along coarser axes it is as wide in mm.
        probability: of applying it to a sample.
    """

    def __init__(self, sigma: Range = (0.5, 1.0), probability: float = 1.0):
        super().__init__(probability)
        self.sigma = _ordered("sigma", sigma, 0.0)

    def _draw(self, seeds: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Params:
        low, high = self.sigma
        relative = min(spacing) / torch.tensor(spacing, dtype=torch.float32)
        return {"sigma": uniform(seeds, "sigma", low=low, high=high)[:, None] * relative}

    def _apply(self, image: Tensor, params: Params) -> Tensor:
        sigma = params["sigma"].to(image.device)  # (B, 3)
        return along_axes(
            image, [gaussian_matrix(n, sigma[:, axis]).to(image.dtype) for axis, n in enumerate(image.shape[2:])]
        )


class RandomBrightnessContrast(RandomTransform):
    """Multiplies the image (brightness), and stretches it about its mean (contrast), each in its own half of cases.

    Args:
        brightness: range of the factor on the image.
        contrast: range of the factor on the distance from the mean.
        p_brightness: probability of the first.
        p_contrast: probability of the second.
        preserve_range: contrast is clipped to the range the image had.
    """

    def __init__(
        self,
        brightness: Range = (0.75, 1.25),
        contrast: Range = (0.75, 1.25),
        p_brightness: float = 0.5,
        p_contrast: float = 0.5,
        preserve_range: bool = True,
    ):
        super().__init__(1.0)
        self.brightness, self.contrast = _ordered("brightness", brightness), _ordered("contrast", contrast, 0.0)
        self.p_brightness, self.p_contrast = p_brightness, p_contrast
        self.preserve_range = preserve_range

    def _draw(self, seeds: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Params:
        params: Params = {"active": torch.zeros(len(seeds), dtype=torch.bool)}
        for name, (low, high), chance in (
            ("brightness", self.brightness, self.p_brightness),
            ("contrast", self.contrast, self.p_contrast),
        ):
            chosen = bernoulli(seeds, f"p_{name}", chance)
            params[name] = torch.where(chosen, uniform(seeds, name, low=low, high=high), torch.ones(()))
            params["active"] |= chosen
        return params

    def _apply(self, image: Tensor, params: Params) -> Tensor:
        brighter = image * per_sample(params["brightness"], image)
        if not self.p_contrast:
            return brighter
        mean = brighter.mean(_SPACE, keepdim=True)
        out = torch.lerp(mean, brighter, per_sample(params["contrast"], image))
        if not self.preserve_range:
            return out
        return torch.clamp(out, brighter.amin(_SPACE, keepdim=True), brighter.amax(_SPACE, keepdim=True))


class RandomGamma(RandomTransform):
    """Raises the image, brought to the range 0 to 1, to a power.

    Args:
        gamma: range of the power, above 0; below and above 1 are equally likely where the range spans it.
        invert: whether the power acts on the negative, changing the bright end rather than the dark.
        retain_stats: mean and spread of each channel are restored.
        probability: of applying it to a sample.
    """

    def __init__(
        self,
        gamma: Range = (0.7, 1.5),
        invert: bool = False,
        retain_stats: bool = True,
        probability: float = 1.0,
    ):
        super().__init__(probability)
        self.gamma, self.invert, self.retain_stats = _ordered("gamma", gamma, _TINY), invert, retain_stats

    def _draw(self, seeds: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Params:
        low, high = self.gamma
        value = uniform(seeds, "gamma")
        if low < 1 < high:
            below = bernoulli(seeds, "below", 0.5)
            return {"gamma": torch.where(below, low + (1 - low) * value, 1 + (high - 1) * value)}
        return {"gamma": low + (high - low) * value}

    def _apply(self, image: Tensor, params: Params) -> Tensor:
        low, high = image.amin(_SPACE, keepdim=True), image.amax(_SPACE, keepdim=True)
        span = (high - low).clamp(min=_TINY)
        zero, sign = (high, -span) if self.invert else (low, span)
        unit = ((image - zero) / sign).clamp_(0, 1)
        # pow by log and exp, which are vectorised; log of 0 is -inf and comes back as 0
        out = unit.log2().mul_(per_sample(params["gamma"], image)).exp2_()
        if self.retain_stats:
            (mean, spread), (wanted_mean, wanted_spread) = _mean_spread(out), _mean_spread(unit)
            factor = wanted_spread / spread.clamp(min=_TINY)
            zero, sign = zero + sign * (wanted_mean - mean * factor), sign * factor
        out = torch.addcmul(zero, out, sign)
        return torch.where(high - low > _TINY, out, image)  # a constant has no range to work in


class RandomLowResolution(RandomTransform):
    """Simulates a coarser scan: averages into fewer voxels and interpolates back, along each axis or some of them.

    Args:
        zoom: range of the ratio of voxels kept, in (0, 1].
        p_axis: probability with which each axis takes part; a sample may so become anisotropic.
        probability: of applying it to a sample.
    """

    def __init__(self, zoom: Range = (0.5, 1.0), p_axis: float = 1.0, probability: float = 1.0):
        super().__init__(probability)
        self.zoom, self.p_axis = _ordered("zoom", zoom, _TINY), p_axis
        if zoom[1] > 1:
            raise ValueError(f"zoom must not exceed 1, not {zoom}")

    def _draw(self, seeds: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Params:
        low, high = self.zoom
        zoom = uniform(seeds, "zoom", low=low, high=high)[:, None]
        # the finest axis loses most; an axis already coarser is only brought to what an isotropic loss leaves
        relative = torch.tensor(spacing, dtype=torch.float32) / min(spacing)
        zoom = (zoom * relative).clamp(max=1.0)
        return {"zoom": torch.where(bernoulli(seeds, "axes", self.p_axis, 3), zoom, torch.ones(()))}

    def _apply(self, image: Tensor, params: Params) -> Tensor:
        zoom = params["zoom"]
        matrices: list[Tensor | None] = []
        for axis, n in enumerate(image.shape[2:]):
            idle = bool((zoom[:, axis] == 1).all())
            matrices.append(None if idle else low_resolution_matrix(n, zoom[:, axis].to(image.device)).to(image.dtype))
        return along_axes(image, matrices)


class RandomBiasField(RandomTransform):
    """Multiplies the image, counted from its minimum, by a smooth field, as an MRI coil's sensitivity does.

    Args:
        strength: range of the standard deviation of the field's logarithm at the control points.
        knots: control points along each axis, at least 4; more let the field vary faster.
        probability: of applying it to a sample.
    """

    def __init__(self, strength: Range = (0.1, 0.4), knots: int = 4, probability: float = 1.0):
        super().__init__(probability)
        self.strength, self.knots = _ordered("strength", strength, 0.0), knots
        if knots < 4:
            raise ValueError(f"knots must be at least 4, not {knots}")

    def _draw(self, seeds: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Params:
        low, high = self.strength
        strength = uniform(seeds, "strength", low=low, high=high).reshape(-1, 1, 1, 1, 1)
        return {"control": strength * normal(seeds, "control", 1, self.knots, self.knots, self.knots)}

    def _apply(self, image: Tensor, params: Params) -> Tensor:
        field = smooth_field(params["control"].to(image.device), image.shape[2:]).exp_().to(image.dtype)
        low = image.amin(_SPACE, keepdim=True)
        return torch.addcmul(low, image - low, field)


class RandomCoarseDropout(RandomTransform):
    """Fills boxes with the channel's mean.

    Args:
        holes: how many boxes.
        size: range of a box's side as a fraction of the volume's.
        probability: of applying it to a sample.
    """

    def __init__(self, holes: int = 4, size: Range = (0.1, 0.3), probability: float = 1.0):
        super().__init__(probability)
        self.holes, self.size = holes, _ordered("size", size, 0.0)

    def _draw(self, seeds: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Params:
        low, high = self.size
        size = uniform(seeds, "size", self.holes, 3, low=low, high=high)
        start = uniform(seeds, "start", self.holes, 3) * (1 - size).clamp(min=0)
        return {"start": start, "stop": start + size}

    def _apply(self, image: Tensor, params: Params) -> Tensor:
        inside = []
        for axis, n in enumerate(image.shape[2:]):
            centre = (torch.arange(n, device=image.device) + 0.5) / n
            start, stop = (params[end][..., axis, None].to(image.device) for end in ("start", "stop"))
            inside.append(((centre >= start) & (centre < stop)).float())  # (B, holes, n)
        depth, height, width = inside
        plane = (height[:, :, :, None] * width[:, :, None, :]).flatten(2)
        covered = (depth.mT @ plane).reshape(len(image), 1, *image.shape[2:])  # by how many boxes
        return torch.where(covered > 0, image.mean(_SPACE, keepdim=True), image)
