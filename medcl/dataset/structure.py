"""Whose every file is, by the names of all files together: what varies with the person, what repeats for every person.

A path is cut into tokens. A token with a digit that varies among files of one template (equal in all words) may be a
person's number; one that repeats under many persons is a visit, a channel or a reader. Known words (`T1`, `left`,
`ses-1`, `train`) are hints: they never make a person. Where two readings remain, the one with fewer subjects is taken,
because taking one person for two leaks between splits, and taking two for one only wastes a split.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from medcl.dataset import naming
from medcl.dataset.second_readings import MOST_VISITS, second_readings
from medcl.dataset.tokens import Token, channel_files, template_of, tokens, without_channel

Key = tuple[str, ...]
Parsed = dict[str, list[Token]]
_PLAIN = re.compile(r"^(scan|v|t|acq|rep)[-_]?\d+$")  # as often the number of a person as that of a visit
SURELY = 0.7  # of the subjects of the other reading: with fewer, a person is asked


@dataclass
class Reading:
    """What the names say of persons.

    Attributes:
        keys: of every name, what tells its person from others; equal for the files of one person.
        occasions: of every name, the visits, frames and further numbers that tell its images apart within the person.
        more: subjects by the other reading, which takes more of the names' parts for persons.
        doubt: why a person must decide between the two; empty where the names leave no doubt.
    """

    keys: dict[str, Key]
    occasions: dict[str, frozenset[str]]
    more: int = 0
    doubt: str = ""


def read_subjects(images: Sequence[str], others: Sequence[str] = ()) -> Reading:
    """Whose every file is.

    Args:
        images: their names decide how many persons there are.
        others: label maps, whose persons are looked for among those of the images.
    """
    every = [*images, *others]
    channels = channel_files(every)
    parsed = {name: without_channel(tokens(name)) if name in channels else tokens(name) for name in every}
    varying = _vary(parsed, ("id", "moment"), template_of)
    values = _numbers(parsed)
    if not any(values[name] for name in images):
        values = _words(images, parsed)
    else:  # a name among numbers
        values = {name: found or _word_values(parsed[name])[:1] for name, found in values.items()}
    if not any(values[name] for name in images):
        reading = _moments(images, parsed, varying)
    else:
        if others:
            values.update(_linked(images, others, values))
        reading = _by_depth(images, values)
        if not reading.doubt:
            reading = _constant_number(images, parsed, values, reading)
        if not reading.doubt:
            reading = _prefixes(images, parsed, reading)
        if not reading.doubt:
            reading = _joined(images, parsed, values, reading)
    reading.occasions = {name: frozenset(varying[name]) - set(reading.keys[name]) for name in every}
    return reading


def _vary(parsed: Parsed, kinds: Sequence[str], alike: Callable[[Sequence[Token]], Hashable]) -> dict[str, Key]:
    """Of every path, the tokens of these kinds that vary among the paths that are alike."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, found in parsed.items():
        groups[alike(found)].append(name)
    result: dict[str, Key] = {}
    for names in groups.values():
        rows = [[token.value for token in parsed[name] if token.kind in kinds] for name in names]
        columns = [column for column in zip(*rows, strict=True) if len(set(column)) > 1]
        columns = list(dict.fromkeys(columns))  # a folder's number, said again in the file's name
        result.update({name: tuple(column[place] for column in columns) for place, name in enumerate(names)})
    return result


def _shape(found: Sequence[Token]) -> Hashable:
    return tuple((token.part, token.kind) for token in found)


def _form(found: Sequence[Token]) -> Hashable:
    """What paths have in common that differ in words and numbers."""
    return tuple((token.part, "*" if token.kind in ("id", "word") else token.kind) for token in found)


def _numbers(parsed: Parsed) -> dict[str, Key]:
    """The numbers of every path that may be a person's.

    Those that vary among paths of one shape, and those places that vary among paths of one form and hold a number in
    most. Where a path has none, its numbers that vary elsewhere; or all that are not the same in other paths, if every
    path has one.
    """
    numbers = {name: tuple(dict.fromkeys(t.value for t in found if t.kind == "id")) for name, found in parsed.items()}
    result = _vary(parsed, ("id",), _shape)
    codes = {value for values in result.values() for value in values}
    constant = {value for name in parsed if result[name] for value in set(numbers[name]) - set(result[name])}
    by_form = _vary(parsed, ("id", "word"), _form)
    forms: dict[Hashable, list[str]] = defaultdict(list)
    for name, found in parsed.items():
        forms[_form(found)].append(name)
    for names in forms.values():
        columns = list(zip(*(by_form[name] for name in names), strict=True))
        # a code without digits among codes is one too, and so is whatever stands where nothing else varies
        few = len(columns) > 1
        columns = [c for c in columns if sum(value in codes for value in c) > (len(names) / 2 if few else 0)]
        for place, name in enumerate(names):
            known = tuple(value for value in numbers[name] if value in codes)
            result[name] = tuple(column[place] for column in columns) or result[name] or known
    if all(result[name] or set(numbers[name]) - constant for name in parsed):
        return {name: found or tuple(v for v in numbers[name] if v not in constant) for name, found in result.items()}
    return result


def _words(images: Sequence[str], parsed: Parsed) -> dict[str, Key]:
    """The words of every path that may be a person's."""
    if all(any(naming.is_person(part) for part in name.split("/")[:-1]) for name in images):
        return {name: () for name in parsed}  # one person's folder
    common = set.intersection(*({token.value for token in parsed[name]} for name in images))
    inside = {name: [t for t in parsed[name] if t.kind == "word" and t.value not in common] for name in parsed}
    # `T1` tells that `orig` in the same place is a role too
    roles = {
        (found[-1].part, part)
        for name, found in parsed.items()
        for part in range(found[-1].part + 1)
        if "/" in name
        and any(token.part == part for token in found)
        and not any(token.part == part for token in inside[name])
        and any(token.part == part and token.kind == "role" and not naming.is_generic(token.value) for token in found)
    }
    return {
        name: tuple(dict.fromkeys(t.value for t in inside[name] if (parsed[name][-1].part, t.part) not in roles))
        for name in parsed
    }


def _word_values(found: Sequence[Token]) -> Key:
    return tuple(token.value for token in found if token.kind == "word")


def _linked(images: Sequence[str], others: Sequence[str], values: dict[str, Key]) -> dict[str, Key]:
    """Of label maps whose code no image has, the code of images that ends in the same digits (`orig001`, `seg001`)."""
    known = {values[name][:1] for name in images}
    holders: dict[str, set[str]] = defaultdict(set)
    for name in images:
        for value in values[name]:
            holders[value].add(name)
    by_digits = defaultdict(set)
    for key in known:
        by_digits[tuple(_digits(value) for value in key)].add(key)
    linked = {}
    for name in others:
        first = values[name][:1]
        found = by_digits.get(tuple(_digits(value) for value in first), set())
        if first in known:
            continue
        if len(found) == 1:
            linked[name] = (*next(iter(found)), *values[name][1:])
            continue
        # of several codes, those that images have too
        shared = [holders[value] for value in values[name] if value in holders]
        same = {values[image] for image in set.intersection(*shared)} if shared else set()
        if len(same) == 1:
            linked[name] = next(iter(same))
    return linked


def _digits(value: str) -> str:
    return value[len(value.rstrip("0123456789")) :] or value


def _by_depth(images: Sequence[str], values: dict[str, Key]) -> Reading:
    """How many leading numbers, or words, make a person."""
    longest = max(len(values[name]) for name in images)
    everything = len({values[name] for name in images})
    for depth in range(1, longest):
        counts: dict[Key, set[Key]] = defaultdict(set)
        for name in images:
            counts[values[name][:depth]].add(values[name][depth:])
        keys = {name: found[:depth] for name, found in values.items()}
        if len(counts) == everything:
            return Reading(keys, {}, everything)
        if everything / len(counts) > MOST_VISITS:
            continue
        rest = [{value for key in found for value in key} for found in counts.values()]
        times = Counter(value for found in rest for value in found)
        # what repeats for every person is a visit or a channel
        if (len(times) < len(counts) and min(times.values()) > 1) or len(counts) >= SURELY * everything:
            return Reading(keys, {}, everything)
        torn = next(key for key, found in counts.items() if len(found) > 1)
        doubt = _two([name for name in images if keys[name] == torn])
        if max(times.values()) > 1:  # any may be the person: nobody who agrees in one of them is parted
            for place in range(depth, longest):
                keys = _join(keys, {name: found[place : place + 1] for name, found in values.items()})
        return Reading(keys, {}, everything, doubt)
    return Reading({name: found[:longest] for name, found in values.items()}, {}, everything)


def _two(same: Sequence[str]) -> str:
    """The doubt, by the example of two files of one subject."""
    first, *rest = sorted(same)
    other = next((name for name in rest if name.rpartition("/")[0] != first.rpartition("/")[0]), rest[0])
    return f"{first} and {other} may be one person or two"


def _constant_number(images: Sequence[str], parsed: Parsed, values: dict[str, Key], reading: Reading) -> Reading:
    """A few files that share a number right before the one in which they differ may be one person's."""
    if not 1 < reading.more <= MOST_VISITS:
        return reading
    before = []
    for name in images:
        numbers = [token for token in parsed[name] if token.kind == "id"]
        place = next((i for i, token in enumerate(numbers) if token.value in values[name][:1]), 0)
        same = [token.value for token in numbers[:place] if token.part == numbers[place].part]
        before.append(same[-1] if same and same[-1].isdigit() else "")
    if len(set(before)) == 1 and before[0]:
        keys: dict[str, Key] = {name: (before[0],) for name in reading.keys}
        return Reading(keys, {}, reading.more, _two(images))
    return reading


def _prefixes(images: Sequence[str], parsed: Parsed, reading: Reading) -> Reading:
    """Equal numbers under different words (`Utrecht/0`, `Singapore/0`): one person, or one a word?"""
    ahead = {name: _ahead(parsed[name], reading.keys[name]) for name in parsed}
    common = set.intersection(*(set(ahead[name]) for name in images))
    ahead = {name: tuple(word for word in words if word not in common) for name, words in ahead.items()}
    owners: dict[Key, set[Key]] = defaultdict(set)
    for name in images:
        owners[reading.keys[name]].add(ahead[name])
    torn = [
        key for key, found in owners.items() if any(set(a) - set(b) and set(b) - set(a) for a in found for b in found)
    ]
    if not torn:
        return reading
    more = max(reading.more, len({(reading.keys[name], ahead[name]) for name in images}))
    doubt = _two([name for name in images if reading.keys[name] == torn[0]])
    last = {name: words[-1:] for name, words in ahead.items()}
    spelled = {last[name] for name in images} - {()}
    if len(owners) > MOST_VISITS and len(spelled) < len(owners):
        return Reading(reading.keys, {}, more, doubt)
    # a name of one's own, and a few numbers that repeat for everybody
    alike = len(torn) == len(owners) and all(len(words) == 1 for words in ahead.values())
    if alike and len(spelled) >= 2 * len(owners):
        return Reading(last, {}, more)
    return Reading(_join(reading.keys, last), {}, more, doubt)


def _joined(images: Sequence[str], parsed: Parsed, values: dict[str, Key], reading: Reading) -> Reading:
    """Persons whom a second reading of the names puts together."""
    keys, before = reading.keys, len({reading.keys[name] for name in images})
    for group in second_readings(images, parsed, reading.keys, values):
        keys = _join(keys, {name: (str(group[name]),) for name in images})
    if keys is reading.keys:
        return reading
    parted: dict[Key, str] = {}
    for name in sorted(images):
        other = parted.setdefault(keys[name], name)
        if reading.keys[other] != reading.keys[name]:
            return Reading(keys, {}, max(reading.more, before), _two([other, name]))
    return reading


def _ahead(found: Sequence[Token], key: Key) -> Key:
    """The unknown words before a person's number, save those that the path says again behind it."""
    places = [i for i, token in enumerate(found) if token.value in key] or [len(found)]
    place, behind = places[0], {token.value for token in found[places[-1] :]}
    words = (t.value for t in found[:place] if t.kind in ("word", "place", "id") and t.value not in behind)
    return tuple(dict.fromkeys(words))


def _join(first: dict[str, Key], second: dict[str, Key]) -> dict[str, Key]:
    """The finest grouping in which names that agree in either key are together."""
    group = {name: name for name in first}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for keys in (first, second):
        known: dict[Key, str] = {}
        for name, key in keys.items():
            if key:
                group[root(name)] = root(known.setdefault(key, name))
    return {name: first[root(name)] for name in first}


def _moments(images: Sequence[str], parsed: Parsed, varying: dict[str, Key]) -> Reading:
    """Names that differ in visits or known words alone: one person's, or, without a number for the person, many."""
    times = {varying[name] for name in images}
    alone = not any(token.kind == "id" for name in images for token in parsed[name])
    if alone and len(times) > 1:
        plain = all(any(_PLAIN.match(t.value) for t in parsed[name] if t.kind == "moment") for name in images)
        if plain or len(times) > MOST_VISITS:
            return Reading(dict(varying), {}, len(times))
        return Reading({name: () for name in parsed}, {}, len(times), _two(images))
    return Reading({name: () for name in parsed}, {}, 1)
