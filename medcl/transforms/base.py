"""What all batched random transforms share: parameters are drawn in one method and applied in another.

They follow the idea of `monai.transforms.RandomizableTransform` on whole batches, but do not derive from it: importing
MONAI takes seconds, and its state-carrying `randomize` is what statelessness must avoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from medcl.transforms.random import as_seeds, bernoulli

Params = dict[str, Tensor]
Range = tuple[float, float]
Spacing = Sequence[float]


def select(params: Params, index: Tensor) -> Params:
    """The parameters of some samples."""
    return {name: value[index] for name, value in params.items()}


class RandomTransform:
    """A transform of (B, C, D, H, W) float tensors on any device, applied to each sample with some probability.

    Subclasses write `_draw` and `_apply`. Samples for which nothing was drawn come back bit for bit and cost nothing.

    Args:
        probability: of applying it to a sample.

    Raises:
        ValueError: the probability is not within 0 and 1.
    """

    def __init__(self, probability: float = 1.0):
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must lie between 0 and 1, not {probability}")
        self.probability = probability

    def draw(self, seeds: Tensor, shape: Sequence[int], spacing: Spacing = (1.0, 1.0, 1.0)) -> Params:
        """Draws parameters; those of a sample depend on its own seed only.

        Args:
            seeds: (B,) int64.
            shape: (D, H, W) of the volumes; leading dimensions are ignored.
            spacing: mm along D, H, W.

        Returns:
            CPU tensors with leading dimension B, among them `active` (B,) bool.
        """
        seeds = as_seeds(seeds)
        active = bernoulli(seeds, "active", self.probability)
        return {"active": active, **self._draw(seeds, tuple(shape)[-3:], tuple(spacing))}

    def apply(self, image: Tensor, params: Params) -> Tensor:
        """Applies drawn parameters to (B, C, D, H, W); the input is not written to."""
        chosen = params["active"].nonzero().squeeze(1)
        if len(chosen) == 0:
            return image
        if len(chosen) == len(image):
            return self._apply(image, params)
        where = chosen.to(image.device)
        return image.index_copy(0, where, self._apply(image[where], select(params, chosen)))

    def apply_both(self, image: Tensor, label: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Applies the same parameters to an image and a label map (B, 1, D, H, W); intensity leaves labels alone."""
        return self.apply(image, params), label

    @overload
    def __call__(self, image: Tensor, seeds: Tensor, *, spacing: Spacing = ...) -> Tensor: ...
    @overload
    def __call__(
        self, image: Tensor, seeds: Tensor, label: Tensor, *, spacing: Spacing = ...
    ) -> tuple[Tensor, Tensor]: ...
    def __call__(
        self, image: Tensor, seeds: Tensor, label: Tensor | None = None, *, spacing: Spacing = (1.0, 1.0, 1.0)
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draws and applies.

        Args:
            image: (B, C, D, H, W) float.
            seeds: (B,) int64, one for each sample.
            label: (B, 1, D, H, W) of any type, moved along with the image.
            spacing: mm along D, H, W.

        Returns:
            The image, or the image and the label.
        """
        params = self.draw(seeds, image.shape, spacing)
        return self.apply(image, params) if label is None else self.apply_both(image, label, params)

    def _draw(self, seeds: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Params:
        raise NotImplementedError

    def _apply(self, image: Tensor, params: Params) -> Tensor:
        raise NotImplementedError


def per_sample(values: Tensor, image: Tensor) -> Tensor:
    """(B,) drawn numbers as (B, 1, 1, 1, 1), in the type and on the device of `image`."""
    return values.to(image.device, image.dtype).reshape(-1, 1, 1, 1, 1)
