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
    """Lets a backbone's `encode` or `decode` run over `self.parts` parts of its rows, one after another.

    Exact for networks that treat every row by itself, as all do but those with batch normalisation.
    """

    @functools.wraps(method)
    def call(self: Any, x: Any, *args: Any, **named: Any) -> Any:
        rows = len(x) if isinstance(x, Tensor) else len(x[0])
        parts = min(self.parts, rows)
        if parts <= 1:
            return method(self, x, *args, **named)
        pieces = (
            x.tensor_split(parts)
            if isinstance(x, Tensor)
            else list(zip(*(m.tensor_split(parts) for m in x), strict=True))
        )
        if torch.is_grad_enabled():
            done = [checkpoint(method, self, piece, *args, use_reentrant=False, **named) for piece in pieces]
        else:
            done = [method(self, piece, *args, **named) for piece in pieces]
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
