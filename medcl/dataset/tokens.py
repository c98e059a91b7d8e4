"""A path cut into tokens: numbers, moments, known words that tell what a file is, and all other words."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from medcl.dataset import naming

_UID = re.compile(r"^\d+(\.\d+){4,}$")
_DAY = r"\d{4}[-_]\d{2}[-_]\d{2}|\d{2}[-_]\d{2}[-_]\d{4}|(19|20)\d{6}"
_DATE = re.compile(rf"(?<!\d)({_DAY})([-_t ]\d{{2}}[-_:.]\d{{2}}[-_:.]\d{{2}}(\.\d+)?)?(?!\d)")
_CONTAINER = "fold|subset|batch|part|split|cohort|site|center|centre|group|set|release|version|disc|cv|institution"


@dataclass(frozen=True)
class Token:
    """A piece of a path.

    Attributes:
        kind: `id` (holds a digit), `moment` (a visit, a frame, a date), `role` (a known word that never names a
            person), `place` (a site, a fold) or `word`.
        value: in lower case.
        part: which folder it stands in, counted from the root; the file's name is the last.
    """

    kind: str
    value: str
    part: int


def tokens(name: str) -> list[Token]:
    """The tokens of a path, in order."""
    folders = name.split("/")[:-1]
    found = []
    for place, part in enumerate([*folders, naming.stem(name)]):
        text = unicodedata.normalize("NFC", part).casefold()
        found += [Token(kind, value, place) for kind, value in _pieces(text)]
    return found


@functools.lru_cache(maxsize=1 << 16)  # folders and endings repeat
def _pieces(part: str) -> list[tuple[str, str]]:
    if _UID.match(part):
        return [("id", part)]
    if naming.is_generic(part) and not part[-1].isdigit():
        return [("role", part)]
    pieces: list[tuple[str, str]] = []
    dated = _DATE.search(part)
    if dated:
        return [*_pieces(part[: dated.start()]), ("moment", dated[0]), *_pieces(part[dated.end() :])]
    words = [word for word in re.split(r"[_\-. +()]+", part) if word]
    while words:
        word, *words = words
        if words and words[0].isdigit() and naming.is_moment(f"{word}-{words[0]}"):
            pieces.append(("moment", f"{word}-{words.pop(0)}"))
        elif scanner := re.match(r"^(mr|ct|pet|pt)(\d{2,})$", word):
            pieces += [("role", scanner[1]), ("id", scanner[2])]
        elif naming.is_role(word):
            pieces.append(("role", word))
        elif naming.is_moment(word):
            pieces.append(("moment", word))
        elif words and re.fullmatch(_CONTAINER, word) and re.fullmatch(r"\d+|\w", words[0]):
            pieces.append(("place", f"{word}-{words.pop(0)}"))
        elif re.fullmatch(rf"({_CONTAINER})\d*|\w*(part|fold|batch|subset)\d+", word):
            pieces.append(("place", word))
        elif (glued := re.match(r"^([^\W\d]+)(\d+)$", word)) and naming.is_generic(glued[1]):
            pieces += [("role", glued[1]), ("id", glued[2])]
        elif glued := re.match(r"^(.*\d)([lr])$", word):
            pieces += [("id", glued[1]), ("role", glued[2])]
        else:
            pieces.append(("id" if any(map(str.isdigit, word)) else "word", word))
    return pieces


def channel_files(names: Iterable[str]) -> set[str]:
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


def without_channel(found: list[Token]) -> list[Token]:
    """The tokens of a channel file's path, its ending no number any more."""
    return [*found[:-1], Token("moment", found[-1].value, found[-1].part)]


def template_of(found: Sequence[Token]) -> Hashable:
    """What paths that differ in numbers and moments only have in common."""
    blank = {"id": "#", "moment": "@"}
    return tuple((token.part, blank.get(token.kind, token.value)) for token in found)


def template(name: str) -> Hashable:
    """What paths that differ in numbers and moments only have in common."""
    return template_of(tokens(name))
