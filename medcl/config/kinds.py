"""What a setting may be, said once: the parser, `--help` and every error message read it from here.

A field of a stage's dataclass is annotated with one of these types, a `Literal` of its choices, or a plain type.
`Settings` checks values against that, wherever they come from: flags, YAML, another stage or Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import types
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from medcl.errors import MedclError


@dataclass(frozen=True)
class Within:
    """A range of numbers.

    Attributes:
        low, high: its ends.
        above, below: whether the end is left out.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return low and high and math.isfinite(value)

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        if math.isinf(self.high):
            return low
        if not (self.above or self.below):
            return f"{self.low:g} to {self.high:g}"
        return f"{low}, {'below' if self.below else 'up to'} {self.high:g}"


Count = Annotated[int, Within(1)]
Natural = Annotated[int, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
NonNegative = Annotated[float, Within(0)]
Share = Annotated[float, Within(0, 1)]
ShareBelowOne = Annotated[float, Within(0, 1, below=True)]

Accelerator = Literal["auto", "cpu", "gpu"]
Precision = Literal["auto", "32", "bf16", "16"]
Absent = Literal["nothing", "one"]


@dataclass(frozen=True)
class Kind:
    """What one field may hold.

    Attributes:
        plain: its type without range and choices, as a parser takes it.
        choices: its only values; empty for none.
        within: the range of a number, or of each number of several.
        optional: whether None is a value too.
    """

    plain: Any
    choices: tuple[Any, ...] = ()
    within: Within | None = None
    optional: bool = False

    def describe(self) -> str:
        """`auto, cpu or gpu`; `a whole number, 1 or more`; `three numbers, each more than 0`."""
        if self.choices:
            names = [str(choice) for choice in self.choices if choice != ""]
            return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
        origin, inner = get_origin(self.plain), get_args(self.plain)
        if origin is tuple:
            count = {2: "two", 3: "three"}.get(len(inner), str(len(inner)))
            what = "texts" if str in inner else "whole numbers" if int in inner else "numbers"
            return f"{count} {what}" + (f", each {self.within}" if self.within else "")
        if origin is list or self.plain is list:
            return "a list"
        name = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        what = name.get(self.plain, "`key: value` pairs")
        return f"{what}, {self.within}" if self.within else what

    def fits(self, value: Any) -> bool:
        """Whether the field may hold this."""
        if value is None:
            return self.optional
        if self.choices:
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        if get_origin(self.plain) is tuple:
            inner = get_args(self.plain)
            if not isinstance(value, (tuple, list)) or len(value) != len(inner):
                return False
            return all(_is(each, kind) and self._in_range(each) for each, kind in zip(value, inner, strict=True))
        return _is(value, get_origin(self.plain) or self.plain) and self._in_range(value)

    def _in_range(self, value: Any) -> bool:
        return self.within is None or value in self.within


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, bool)
    if kind is list:
        return isinstance(value, (list, tuple))
    return kind is Any or isinstance(value, kind)


def kind_of(hint: Any) -> Kind:
    """What a field of this annotation may hold."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = kind_of(inner[0])
        return dataclasses.replace(found, within=next((each for each in inner[1:] if isinstance(each, Within)), None))
    if origin is Literal:
        return Kind(type(inner[0]), inner)
    if origin in (Union, types.UnionType):
        found = kind_of(next(each for each in inner if each is not type(None)))
        return dataclasses.replace(found, optional=True)
    if origin is tuple:
        parts = [kind_of(each) for each in inner]
        return Kind(tuple[tuple(part.plain for part in parts)], within=parts[0].within)  # type: ignore[misc]
    return Kind(hint)


@cache
def kinds_of(settings: Hashable) -> dict[str, Kind]:
    """What every field of a dataclass may hold, by its name."""
    assert isinstance(settings, type)
    hints = get_type_hints(settings, include_extras=True)
    return {field.name: kind_of(hints[field.name]) for field in dataclasses.fields(settings)}


class Settings:
    """A dataclass whose fields hold what their types say. Paths and numbers become text where a text is wanted.

    Raises:
        MedclError: a field holds something else; the message says which, and what it may hold.
    """

    def __post_init__(self) -> None:
        for name, kind in kinds_of(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            # YAML reads `precision: 32` as a number
            if kind.plain is str and isinstance(value, (int, float, os.PathLike)) and not isinstance(value, bool):
                value = str(value)
                object.__setattr__(self, name, value)
            if not kind.fits(value):
                raise MedclError(f"{value!r} cannot be used", f"--{name}", remedy(kind, value))


def remedy(kind: Kind, value: Any) -> str:
    """What to give instead of a value that does not fit: the choice that was probably meant, or all there are."""
    close = difflib.get_close_matches(str(value), [str(choice) for choice in kind.choices if choice], n=1, cutoff=0.75)
    return f"Did you mean {close[0]!r}?" if close else f"Give {kind.describe()}."


def nearest(key: str, known: Any) -> str:
    """`Did you mean 'x'?`, or the list of what is known."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(sorted(known))}."
