"""Refusing options that cannot work, in one line that says which and what to give."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NoReturn

from medcl.errors import MedclError


class Checks:
    """Checks of a task's options, by name.

    Args:
        options: dataclass of the task's options.
        task: its name, for the message.

    Every method raises MedclError where a value cannot work.
    """

    def __init__(self, options: Any, task: str):
        self.options, self.where = options, f"options of {task}"

    def refuse(self, name: str, remedy: str) -> NoReturn:
        """Raises the error that names the option, its value and the remedy."""
        raise MedclError(f"{name} is {getattr(self.options, name)!r}", self.where, remedy)

    def one_of(self, name: str, known: Iterable[str]) -> None:
        """One of the known names."""
        known = list(known)
        if getattr(self.options, name) not in known:
            self.refuse(name, f"Use one of {', '.join(known)}.")

    def counts(self, *names: str) -> None:
        """Positive whole numbers."""
        for name in names:
            if not is_count(getattr(self.options, name)):
                self.refuse(name, "Give a positive number.")

    def between(
        self, name: str, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
    ) -> None:
        """Finite numbers in [low, high]; `above` and `below` leave that end out."""
        value = getattr(self.options, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < low or value > high or (above and value == low) or (below and value == high):
            least = f"above {low:g}" if above else f"{low:g} or more"
            end = "" if math.isinf(high) else f", {'below' if below else 'at most'} {high:g}"
            self.refuse(name, f"Give a number {least}{end}.")

    def triples(self, *names: str) -> None:
        """Three positive whole numbers, or None."""
        for name in names:
            value = getattr(self.options, name)
            if value is not None and not is_triple(value):
                self.refuse(name, "Give three positive numbers.")

    def growth(self, name: str) -> None:
        """A range (low, high) of positive factors."""
        value = getattr(self.options, name)
        pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, (int, float)) for n in value)
        if not pair or not 0 < value[0] <= value[1] < math.inf:
            self.refuse(name, "Give two positive numbers, the smaller first.")


def is_count(value: Any) -> bool:
    """Whether a value is a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_triple(value: Any) -> bool:
    """Whether a value is three positive whole numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(is_count, value))
