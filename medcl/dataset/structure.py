"""Whose every file is, by the names of all files together: what varies with the person, what repeats for every person.

A path is cut into tokens. A token with a digit that varies among files of one template (equal in all words) may be a
person's number; one that repeats under many persons is a visit, a channel or a reader. Known words (`T1`, `left`,
`ses-1`, `train`) are hints: they never make a person. Where two readings remain, the one with fewer subjects is taken,
because taking one person for two leaks between splits, and taking two for one only wastes a split.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from medcl.dataset import naming

Key = tuple[str, ...]
MOST_VISITS = 10  # images of one person under numbers of their own; above, the first number is a site's or a batch's
SURELY = 0.7  # of the subjects of the other reading: with fewer, a person is asked
_UID = re.compile(r"^\d+(\.\d+){4,}$")
_DAY = r"\d{4}[-_]\d{2}[-_]\d{2}|\d{2}[-_]\d{2}[-_]\d{4}|(19|20)\d{6}"
_DATE = re.compile(rf"(?<!\d)({_DAY})([-_t ]\d{{2}}[-_:.]\d{{2}}[-_:.]\d{{2}}(\.\d+)?)?(?!\d)")
_CONTAINER = re.compile(r"^(fold|subset|batch|part|split|cohort|site|cent(er|re)|group|set|release|version|disc|cv)$")


@dataclass(frozen=True)
class Token:
    """A piece of a path.

    Attributes:
        kind: `id` (holds a digit), `moment` (a visit, a frame, a date), `role` (a known word that never names a
            person) or `word`.
        value: in lower case.
        part: which folder it stands in, counted from the root; the file's name is the last.
        glued: whether it is the number at a word's end, as in `BraTS20`.
    """

    kind: str
    value: str
    part: int
    glued: bool = False


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


def tokens(name: str) -> list[Token]:
    """The tokens of a path, in order."""
    folders = name.split("/")[:-1]
    found = []
    for place, part in enumerate([*folders, naming.stem(name)]):
        text = unicodedata.normalize("NFC", part).casefold()
        found += [Token(kind, value, place, bool(glued)) for kind, value, *glued in _pieces(text)]
    return found


def _pieces(part: str) -> list[tuple[Any, ...]]:
    if _UID.match(part):
        return [("id", part)]
    if naming.is_generic(part) and not part[-1].isdigit():
        return [("role", part)]
    pieces: list[tuple[Any, ...]] = []
    dated = _DATE.search(part)
    if dated:
        return [*_pieces(part[: dated.start()]), ("moment", dated[0]), *_pieces(part[dated.end() :])]
    words = [word for word in re.split(r"[_\-. +()]+", part) if word]
    while words:
        word, *words = words
        if words and words[0].isdigit() and naming.is_moment(f"{word}-{words[0]}"):
            pieces.append(("moment", f"{word}-{words.pop(0)}"))
        elif naming.is_role(word):
            pieces.append(("role", word))
        elif naming.is_moment(word):
            pieces.append(("moment", word))
        elif _CONTAINER.match(word) and words and words[0].isdigit():
            pieces.append(("word", f"{word}-{words.pop(0)}"))
        elif glued := re.match(r"^([^\W\d]+)(\d+)$", word):
            kind = "role" if naming.is_role(glued[1]) else "word"
            pieces += [("word", word)] if _CONTAINER.match(glued[1]) else [(kind, glued[1]), ("id", glued[2], "glued")]
        elif glued := re.match(r"^(\d+)([^\W\d]{1,2})$", word):
            pieces += [("id", glued[1]), ("role" if naming.is_role(glued[2]) else "word", glued[2])]
        else:
            pieces.append(("id" if any(map(str.isdigit, word)) else "word", word))
    return pieces


def read_subjects(images: Sequence[str], others: Sequence[str] = ()) -> Reading:
    """Whose every file is.

    Args:
        images: their names decide how many persons there are.
        others: label maps, whose persons are looked for among those of the images.
    """
    every = [*images, *others]
    channels = _channel_files(every)
    parsed = {name: _without_channel(tokens(name)) if name in channels else tokens(name) for name in every}
    varying = _vary(parsed, _template)
    ids = _ids(parsed, varying)
    if not any(ids[name] for name in images):
        return _by_words(images, parsed, varying)
    first = {name: ids[name][:1] or _words(parsed[name]) for name in every}
    depth, doubt = _depth(images, ids)
    keys = {name: ids[name][:depth] or first[name] for name in every}
    reading = Reading(keys, {}, len({ids[name] or first[name] for name in images}), doubt)
    if not doubt:
        reading = _constant_number(images, parsed, ids, reading)
    if not reading.doubt:
        reading = _prefixes(images, parsed, ids, reading)
    reading.occasions = {name: frozenset(varying[name]) - set(reading.keys[name]) for name in every}
    return reading


def _unique(values: Iterable[str]) -> Key:
    return tuple(dict.fromkeys(values))


def _channel_files(names: Iterable[str]) -> set[str]:
    """nnU-Net's channel files: all files of a folder end in `_0000`, `_0001`, …, and every case has its `_0000`."""
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folders[name.rpartition("/")[0]].append(name)
    result: set[str] = set()
    for group in folders.values():
        endings = {name: re.search(r"^(.*\d.*)_(000\d)$", naming.stem(name)) for name in group}
        firsts = {found[1] for found in endings.values() if found and found[2] == "0000"}
        if all(found and found[1] in firsts for found in endings.values()):
            result.update(group)
    return result


def _without_channel(found: list[Token]) -> list[Token]:
    return [*found[:-1], Token("moment", found[-1].value, found[-1].part)]


def _template(found: Sequence[Token]) -> Hashable:
    blank = {"id": "#", "moment": "@"}
    return tuple((token.part, blank.get(token.kind, token.value)) for token in found)


def template(name: str) -> Hashable:
    """What paths that differ in numbers and moments only have in common."""
    return _template(tokens(name))


def _shape(found: Sequence[Token]) -> Hashable:
    return tuple((token.part, token.kind) for token in found)


def _vary(parsed: dict[str, list[Token]], alike: Callable[[Sequence[Token]], Hashable]) -> dict[str, Key]:
    """Of every path, the numbers and moments that vary among the files that are alike."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, found in parsed.items():
        groups[alike(found)].append(name)
    result: dict[str, Key] = {}
    for names in groups.values():
        rows = [[token.value for token in parsed[name] if token.kind in ("id", "moment")] for name in names]
        columns = [column for column in zip(*rows, strict=True) if len(set(column)) > 1]
        columns = list(dict.fromkeys(columns))  # a folder's number, said again in the file's name
        result.update({name: tuple(column[place] for column in columns) for place, name in enumerate(names)})
    return result


def _ids(parsed: dict[str, list[Token]], varying: dict[str, Key]) -> dict[str, Key]:
    """The numbers of every path that may be a person's.

    Those that vary among files of equal words; where a file is alone with its words, those that vary among files of
    equal form; where it is alone with that too, all that are not the same in each of several other files.
    """
    numbers = {name: _unique(token.value for token in found if token.kind == "id") for name, found in parsed.items()}
    result = {name: tuple(value for value in varying[name] if value in numbers[name]) for name in parsed}
    by_form = _vary(parsed, _shape)
    common = {value for name in parsed if result[name] for value in set(numbers[name]) - set(varying[name])}
    for name, values in result.items():
        if not values:
            loose = tuple(value for value in by_form[name] if value in numbers[name])
            result[name] = loose or tuple(value for value in numbers[name] if value not in common)
    return result


def _depth(images: Sequence[str], ids: dict[str, Key]) -> tuple[int, str]:
    """How many leading numbers of a path make a person, and why that is in doubt."""
    longest = max(len(ids[name]) for name in images)
    everything = len({ids[name] for name in images})
    for depth in range(1, longest):
        counts: dict[Key, set[Key]] = defaultdict(set)
        for name in images:
            counts[ids[name][:depth]].add(ids[name][depth:])
        persons = len(counts)
        if persons == everything:
            return depth, ""
        if everything / persons > MOST_VISITS:
            continue
        # what repeats for every person is a visit or a channel
        rest = [set(found) - {()} for found in counts.values()]
        values = set().union(*rest)
        repeats = len(values) < persons and all(sum(value in found for found in rest) > 1 for value in values)
        if repeats or persons >= SURELY * everything:
            return depth, ""
        one = next(key for key, found in counts.items() if len(found) > 1)
        same = [name for name in images if ids[name][:depth] == one]
        return depth, _two(same)
    return longest, ""


def _two(same: Sequence[str]) -> str:
    """The doubt, by the example of two files of one subject."""
    first, *rest = sorted(same)
    other = next((name for name in rest if name.rpartition("/")[0] != first.rpartition("/")[0]), rest[0])
    return f"{first} and {other} may be one person or two"


def _constant_number(
    images: Sequence[str], parsed: dict[str, list[Token]], ids: dict[str, Key], reading: Reading
) -> Reading:
    """A few files that share a number before the one in which they differ may be one person's."""
    if not 1 < reading.more <= MOST_VISITS:
        return reading
    before = []
    for name in images:
        numbers = [token for token in parsed[name] if token.kind == "id"]
        place = next((i for i, token in enumerate(numbers) if token.value in ids[name][:1]), 0)
        same = [token for token in numbers[:place] if token.part == numbers[place].part and not token.glued]
        before.append(same[-1].value if same and same[-1].value.isdigit() else "")
    if len(set(before)) == 1 and before[0]:
        keys: dict[str, Key] = {name: (before[0],) for name in reading.keys}
        return Reading(keys, {}, reading.more, _two(images))
    return reading


def _words(found: Iterable[Token]) -> Key:
    return tuple(token.value for token in found if token.kind == "word")


def _prefixes(images: Sequence[str], parsed: dict[str, list[Token]], ids: dict[str, Key], reading: Reading) -> Reading:
    """Equal numbers under different words (`Utrecht/0`, `Singapore/0`): one person, or one a word?"""
    ahead = {name: _ahead(parsed[name], reading.keys[name]) for name in images}
    common = frozenset.intersection(*ahead.values())
    ahead = {name: words - common for name, words in ahead.items()}
    owners: dict[Key, set[frozenset[str]]] = defaultdict(set)
    for name in images:
        owners[reading.keys[name]].add(ahead[name])
    torn = {key: found for key, found in owners.items() if any(a - b and b - a for a in found for b in found)}
    if not torn:
        return reading
    more = len({(reading.keys[name], ahead[name]) for name in images})
    spelled = {words for words in ahead.values() if words}
    example = next(iter(torn))
    doubt = _two([name for name in images if reading.keys[name] == example])
    if len(spelled) < len(owners):
        return Reading(reading.keys, {}, max(more, reading.more), doubt)
    words = {name: tuple(sorted(_ahead(parsed[name], reading.keys[name]) - common)) for name in parsed}
    if len(spelled) > len(owners):  # a name of one's own, and numbers that repeat for everybody
        return Reading(words, {}, more, "" if len(torn) == len(owners) else doubt)
    joined = _join(images, (reading.keys.__getitem__, words.__getitem__))
    return Reading({name: joined.get(name, reading.keys[name]) for name in parsed}, {}, more, doubt)


def _ahead(found: Sequence[Token], key: Key) -> frozenset[str]:
    """The unknown words before a person's number."""
    words = set()
    for token in found:
        if token.kind == "id" and token.value in key:
            break
        if token.kind == "word":
            words.add(token.value)
    return frozenset(words)


def _join(names: Sequence[str], keys: Sequence[Callable[[str], Key]]) -> dict[str, Key]:
    """The finest grouping in which names that agree in any key are together."""
    group = {name: name for name in names}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for key in keys:
        firsts: dict[Key, str] = {}
        for name in names:
            group[root(name)] = root(firsts.setdefault(key(name), name))
    return {name: keys[0](root(name)) for name in names}


def _by_words(images: Sequence[str], parsed: dict[str, list[Token]], varying: dict[str, Key]) -> Reading:
    """Names without numbers: the first folder that varies tells the person, or else the first word that does."""
    common = set.intersection(*(set(_words(parsed[name])) for name in images)) if images else set()

    def own(name: str, folder: bool) -> Key:
        last = parsed[name][-1].part if parsed[name] else 0
        words = (t.value for t in parsed[name] if t.kind == "word" and (t.part < last) == folder)
        return tuple(word for word in words if word not in common)[:1]

    by_folder, by_leaf = ({name: own(name, folder) for name in parsed} for folder in (True, False))
    folders, leaves = ({by[name] for name in images} for by in (by_folder, by_leaf))
    keys = {name: by_leaf[name] or by_folder[name] for name in parsed}
    doubt, more = "", len({keys[name] for name in images})
    repeated = len(leaves) < len(images)
    if len(folders) > 1 and (repeated or all(folders)):
        keys = {name: by_folder[name] or by_leaf[name] for name in parsed}
        # a leaf such as `T1` tells that leaves are roles
        if repeated and len(leaves) >= len(folders) and all(leaves):
            joined = _join(images, (by_folder.__getitem__, by_leaf.__getitem__))
            keys = {name: joined.get(name, by_folder[name]) for name in parsed}
            more, doubt = len({(by_folder[name], by_leaf[name]) for name in images}), _two(images)
    elif len(folders) == 1 and len(leaves) > 1 and () in leaves:
        keys = {name: () for name in parsed}
    elif len(leaves) == 1 and len({varying[name] for name in images}) > 1:
        # visits or scans of nobody in particular
        more = len({varying[name] for name in images})
        keys = {name: varying[name] for name in parsed} if more > MOST_VISITS else {name: () for name in parsed}
        doubt = "" if more > MOST_VISITS else _two(images)
    occasions = {name: frozenset(varying[name]) - set(keys[name]) for name in parsed}
    return Reading(keys, occasions, max(more, len({keys[name] for name in images})), doubt)
