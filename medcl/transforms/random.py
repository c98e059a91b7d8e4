"""Stateless randomness: every number is a function of a sample's seed, a name and an index, and of nothing else.

The generator is SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014), counter-based, so
a batch is drawn in one vectorised expression and a sample gets the same numbers whichever batch it is in.
"""

from __future__ import annotations

import functools
import hashlib
import math

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_MASK63 = (1 << 63) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer: torch multiplies and wraps in int64."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts the sign in


def _finalise(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 taken as bits."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, 31)


def mix(seed: int, *ints: int) -> int:
    """A new non-negative 63-bit seed from a seed and any integers, such as epoch, sample and view.

    The order matters, and so does the number of integers.
    """
    state = seed & _MASK64
    for value in (*ints, len(ints)):
        state = (state + _GOLDEN * ((value & _MASK64) + 1)) & _MASK64
        for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
            state = ((state ^ (state >> shift)) * multiplier) & _MASK64
        state ^= state >> 31
    return state & _MASK63


def mixed_seed(seed: int, *numbers: int) -> int:
    """The seed of one of several trainings under one seed, such as a draw of labels: another for each, as `mix` does.

    32 bits, which is what every generator takes. Where all numbers are 0 it is `seed` itself.
    """
    return mix(seed, *numbers, name_key("training")) % 2**32 if any(numbers) else seed


def mix_seeds(seeds: Tensor, *ints: int | Tensor) -> Tensor:
    """`mix` for a whole batch.

    Args:
        seeds: (B,) int64.
        ints: integers, or int64 tensors that broadcast with `seeds`.

    Returns:
        (B,) int64, equal to `mix` of each.
    """
    state = seeds
    for value in (*ints, len(ints)):
        step = _signed(_GOLDEN * ((value & _MASK64) + 1)) if isinstance(value, int) else (value + 1) * _signed(_GOLDEN)
        state = _finalise(state + step)
    return state & _MASK63


@functools.cache
def name_key(name: str) -> int:
    """A 63-bit integer for a name, the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") & _MASK63


def as_seeds(seeds: Tensor) -> Tensor:
    """(B,) int64 seeds on the CPU, where parameters are drawn.

    Raises:
        ValueError: not one integer per sample.
    """
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be int64 of shape (B,), not {seeds.dtype} of shape {tuple(seeds.shape)}")
    return seeds.cpu()


def uniform(seeds: Tensor, name: str, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Independent uniform numbers in [low, high).

    Args:
        seeds: (B,) int64.
        name: what the numbers are for; other names give independent numbers.
        size: shape for each sample; none for one number.
        low: lower end.
        high: upper end.

    Returns:
        (B, *size) float32.
    """
    count = math.prod(size)
    counter = torch.arange(1, count + 1, device=seeds.device) * _signed(_GOLDEN)
    bits = _shift_right(_finalise(mix_seeds(seeds, name_key(name))[:, None] + counter), 40)
    unit = bits.to(torch.float32) / (1 << 24)  # 24 bits are exact in float32, so 1.0 is never reached
    return (low + (high - low) * unit).reshape(len(seeds), *size)


def normal(seeds: Tensor, name: str, *size: int) -> Tensor:
    """Independent standard normal numbers, (B, *size) float32, by Box and Muller."""
    pair = uniform(seeds, name, 2, *size)
    radius = torch.sqrt(-2 * torch.log1p(-pair[:, 0]))
    return radius * torch.cos(2 * math.pi * pair[:, 1])


def bernoulli(seeds: Tensor, name: str, probability: float, *size: int) -> Tensor:
    """True with the given probability, (B, *size) bool: never at 0, always at 1."""
    return uniform(seeds, name, *size) < probability


def noise_like(x: Tensor, seeds: Tensor) -> Tensor:
    """Standard normal noise in the shape of `x`, drawn on its device.

    Each sample has its own generator: many times faster on a CPU than hashing every voxel, and on a GPU one kernel
    per sample. The same seed gives the same noise on the same kind of device, not across kinds.

    Args:
        x: (B, ...) floating point.
        seeds: (B,) int64.

    Returns:
        (B, ...) like `x`.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    generator = torch.Generator(x.device)
    # the CPU generator looks at 32 bits of its seed only, so they must depend on all 64
    for sample, seed in zip(out, mix_seeds(as_seeds(seeds), name_key("noise")).tolist(), strict=True):
        sample.normal_(generator=generator.manual_seed(seed))
    return out
