"""Second readings of names: files that may be one person's although the first reading parts them.

Each rule groups files by something else in their names. Where a group holds several persons of the first reading, they
are taken for one, because that cannot leak, and a person is asked.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence

from medcl.dataset.tokens import Token

Key = tuple[str, ...]
Group = Mapping[str, Hashable]
MOST_VISITS = 10  # images of one person under numbers of their own
FEW = 3  # numbers of its own that a folder has on average, if it may be a person's
_SUFFIX = re.compile(r"^([^\W\d]*\d+)[^\W\d]{1,3}\d{0,3}$")  # P01a, S01V1, P01OD
_SIDE = re.compile(r"^(.*?)[rl](\d+)$")  # KneeR01, KneeL01


def second_readings(
    images: Sequence[str], parsed: Mapping[str, Sequence[Token]], keys: Mapping[str, Key], numbers: Mapping[str, Key]
) -> list[Group]:
    """Groups of images, by each rule that would put several persons together.

    Args:
        images: their paths.
        parsed: tokens of every path.
        keys: what tells the person of every path by the first reading.
        numbers: the numbers and codes of every path that vary.
    """
    codes = {name: keys[name] for name in images}
    rules = [
        _spellings(codes),
        _behind(codes),
        *_columns(codes, numbers),
        _folders(codes, parsed),
        _names(codes, parsed),
    ]
    return [group for group in rules if group and _joins(group, codes)]


def _joins(group: Group, codes: Mapping[str, Key]) -> bool:
    persons: dict[Hashable, set[Key]] = defaultdict(set)
    for name, mark in group.items():
        persons[mark].add(codes[name])
    return any(len(found) > 1 for found in persons.values())


def _spellings(codes: Mapping[str, Key]) -> Group:
    """One code with leading zeros, a letter behind it, a side before it, or a program's prefix (`msub01`)."""
    known = {value for key in codes.values() for value in key}
    plain = {value: _plain(value, known) for value in known}
    return {name: tuple(plain[value] for value in key) for name, key in codes.items()}


def _plain(value: str, known: Collection[str]) -> str:
    """A code in the form that its variants share.

    Args:
        value: the code.
        known: all codes of the folder.
    """
    if value.isdigit():
        return value.lstrip("0") or "0"
    for length in range(4, 0, -1):
        rest = value[length:]
        if rest in known and not (value[length - 1].isdigit() and rest[0].isdigit()):
            return _plain(rest, known)
    found = _SUFFIX.match(value)
    value = found[1] if found else value
    side = _SIDE.match(value)
    if side and {f"{side[1]}r{side[2]}", f"{side[1]}l{side[2]}"} <= set(known):
        return side[1] + side[2]
    return value


def _behind(codes: Mapping[str, Key]) -> Group:
    """What follows the first number, where that number has few values: `wave1/001` and `wave2/001`."""
    first, rest = ({key[:1] for key in codes.values()}, {key[1:] for key in codes.values()})
    if () in rest or len(first) >= len(rest):
        return {}
    return {name: key[1:] for name, key in codes.items()}


def _columns(codes: Mapping[str, Key], numbers: Mapping[str, Key]) -> list[Group]:
    """Another number of which there are nearly as many as persons, and which a few share: `001_K17`, `003_K17`."""
    persons = len(set(codes.values()))
    groups: list[Group] = []
    for place in range(1, max((len(numbers[name]) for name in codes), default=0)):
        if any(len(numbers[name]) <= place for name in codes):
            break
        column = {name: numbers[name][place] for name in codes}
        owners: dict[str, set[Key]] = defaultdict(set)
        for name, value in column.items():
            owners[value].add(codes[name])
        if persons / 2 < len(owners) < persons and max(map(len, owners.values())) <= max(2, persons // 3):
            groups.append(column)
    return groups


def _folders(codes: Mapping[str, Key], parsed: Mapping[str, Sequence[Token]]) -> Group:
    """A folder of words that holds a few numbers of its own: `anna/5501`, `anna/5502`."""
    named = {name: _word_folder(parsed[name], codes[name]) for name in codes}
    words, persons = set(named.values()), len(set(codes.values()))
    return named if "" not in words and 1 < len(words) < persons <= FEW * len(words) else {}


def _word_folder(found: Sequence[Token], key: Key) -> str:
    """The last word of a folder before the person's number."""
    place = next((i for i, token in enumerate(found) if token.value in key), 0)
    part = found[place].part if found else 0
    words = [token.value for token in found[:place] if token.kind == "word" and token.part < part]
    return words[-1] if words else ""


def _names(codes: Mapping[str, Key], parsed: Mapping[str, Sequence[Token]]) -> Group:
    """Words behind numbers of which there are fewer, as of years: `2019/anna`, `2021/anna`."""
    common = set.intersection(*({token.value for token in parsed[name]} for name in codes)) if codes else set()
    behind = {}
    for name, key in codes.items():
        last = max((i for i, token in enumerate(parsed[name]) if token.value in key), default=-1)
        words = [t.value for t in parsed[name][last + 1 :] if t.kind == "word" and t.value not in common]
        if len(words) != 1 or last < 0:
            return {}  # a leaf such as `T1` tells that the others are roles too
        behind[name] = words[0]
    return behind if len(set(behind.values())) > len(set(codes.values())) else {}
