"""A batch through a network in parts: equal gradient, the memory of one part.

Each part's activations are computed again for the gradient (Chen et al., "Training Deep Nets with Sublinear Memory
Cost", 2016), and the feature maps of all parts are joined before any loss sees them. So a contrastive loss keeps all of
its negatives, which accumulating the gradients of smaller batches would not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medcl.errors import MedclError

MOST_PARTS = 64  # more never helps: a part is a row at least


def in_parts(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a method of a backbone run over `self.parts` parts of its rows, one after another.

    The first argument is a tensor or a list of them. It is divided by rows, as is every other tensor given by position;
    what is given by name goes whole to every part. A part runs again for the gradient, so the method must be a function
    of its arguments: a hook that it leaves behind, or one set around the call, would see single parts, and each twice.

    Exact for networks that treat every row by itself, as all do but those with batch normalisation.
    """

    @functools.wraps(method)
    def call(self: Any, x: Any, *args: Any, **named: Any) -> Any:
        rows = len(x) if isinstance(x, Tensor) else len(x[0])
        parts = min(self.parts, rows)
        if parts <= 1:
            return method(self, x, *args, **named)

        def divided(value: Any) -> Any:
            return value.tensor_split(parts) if isinstance(value, Tensor) else [value] * parts

        first = divided(x) if isinstance(x, Tensor) else zip(*map(divided, x), strict=True)
        pieces = list(zip(first, *map(divided, args), strict=True))
        if torch.is_grad_enabled():
            done = [checkpoint(method, self, *piece, use_reentrant=False, **named) for piece in pieces]
        else:
            done = [method(self, *piece, **named) for piece in pieces]
        return torch.cat(done) if isinstance(done[0], Tensor) else [torch.cat(maps) for maps in zip(*done, strict=True)]

    return call


def check_parts(parts: int, norm: str) -> None:
    """Refuses parts where they would not give an equal gradient.

    Raises:
        MedclError: batch normalisation looks at all rows.
    """
    if parts > 1 and norm == "batch":
        raise MedclError("batch normalisation sees all rows at once", "--parts", "Use --norm instance or layer.")


def compile_network(backbone: Any) -> None:
    """Compiles `encode` and `decode` in place; names of weights stay as they are."""
    for name in ("encode", "decode"):
        object.__setattr__(backbone, name, torch.compile(getattr(backbone, name), dynamic=False))
