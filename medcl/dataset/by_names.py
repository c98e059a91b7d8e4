"""Any folder that is no known layout: what each file is, whose it is, and which label map belongs to which image.

Labels are told by folder or name (`medcl.dataset.naming`) and by content (`roles`), persons by the structure of all
names (`structure`). A label map belongs to an image of its person by name, by folder or by grid, in this order.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from medcl.dataset import naming
from medcl.dataset.case import BY_TABLE, Case, Problem
from medcl.dataset.checks import check_grid
from medcl.dataset.roles import Contents, labels_by_content
from medcl.dataset.structure import Reading, read_subjects
from medcl.dataset.tokens import template, tokens
from medcl.errors import MedclError
from medcl.io.formats import format_of
from medcl.io.volumes import read_header

RULE = (
    "by names: labels by folder (labels, masks, …), ending (_seg, _mask, …) or content; the subject is what varies "
    "with the person in all names together"
)


def cases_by_names(root: Path, files: Sequence[str]) -> tuple[list[Case], list[Problem], str, dict[int, str]]:
    """Cases of a folder, problems and questions, the rule, and names of label values where masks are merged."""
    contents = Contents(root)
    maps = [name for name in files if naming.is_probability(name)]
    files = [name for name in files if name not in set(maps)]
    named = {name for name in files if naming.is_label(name)}
    labels = named | labels_by_content([name for name in files if name not in named], contents)
    images = [name for name in files if name not in labels]
    reading = read_subjects(images, sorted(labels))
    subjects = named_subjects(images, reading, naming.subjects(images))
    pairs, problems = _pair(root, images, sorted(labels), reading)
    label_of, masks_of, value_names, more = _settle(pairs, contents, reading)
    problems += more
    if maps:
        what = f"is named like a map of probabilities, as {len(maps)} files are, and is left out"
        problems.append(Problem(maps[0], what, "Threshold it for a label map; or name it as an image in a table."))
    cases = [
        Case(
            naming.stem(name), subjects[name], (name,), label=label_of.get(name), masks=masks_of.get(name, ()),
            format=format_of(name), modality=naming.modality(name), split=naming.split(name),
        )
        for name in images
    ]  # fmt: skip
    rule = RULE
    count = len(set(subjects.values()))
    if reading.more > count and not reading.doubt:
        rule += f"; other parts of the names would make {reading.more} subjects"
    if count == len(images) > 1:
        rule += "; here every file is its own subject"
    by_content = labels - named
    if by_content:
        rule += f"; {len(by_content)} label maps are told by content alone, such as {min(by_content)}"
    return cases, [*problems, *doubts(images, reading, subjects)], rule, value_names


def named_subjects(images: Sequence[str], reading: Reading, by_ending: dict[str, str]) -> dict[str, str]:
    """A name for every person, which its images share.

    Args:
        images: of whom.
        reading: whose they are.
        by_ending: names of subjects that are taken where they say the same of who is who.
    """
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in images:
        groups[reading.keys[name]].append(name)
    if all(len({by_ending[name] for name in same}) == 1 for same in groups.values()):
        first = {key: by_ending[same[0]] for key, same in groups.items()}
        if len(set(first.values())) == len(first):
            return by_ending
    taken: set[str] = set()
    result = {}
    for key, same in sorted(groups.items(), key=lambda item: item[1][0]):
        person = naming.safe(_spelled(same[0], key))
        if person in taken:
            person = naming.safe(f"{person}_{'-'.join(key)}")
        taken.add(person)
        result.update({name: person for name in same})
    return result


def _spelled(name: str, key: tuple[str, ...]) -> str:
    """The part of a path that holds a person's number, to the end of the number."""
    for part in [*name.split("/")[:-1], naming.stem(name)]:
        at = part.casefold().rfind(key[-1]) if key else -1
        if at >= 0 and all(piece in part.casefold() for piece in key):
            return part[: at + len(key[-1])]
    return "-".join(key) or (name.split("/")[0] if "/" in name else "subject")


def doubts(images: Sequence[str], reading: Reading, subjects: dict[str, str]) -> list[Problem]:
    """What a person must decide about subjects."""
    found, count = [], len(set(subjects.values()))
    if reading.doubt:
        return [_question("subjects", f"{reading.doubt}: {_counted(count)} (taken) or {reading.more}")]
    for kind, of in (("split", naming.split_word), ("modality", naming.modality)):
        both: dict[str, dict[str, str]] = defaultdict(dict)
        for name in images:
            told = of(name)
            if told and told != "unknown":
                both[subjects[name]].setdefault(told, name)
        torn = [names for names in both.values() if len(names) > 1]
        if torn:
            one, other, *_ = torn[0].values()
            more = count + sum(len(names) - 1 for names in torn)
            why = "in different parts of the data set" if kind == "split" else "CT and MR"
            what = f"{one} and {other}, {why}, may be one person or two: {_counted(count)} (taken) or {more}"
            found.append(_question("subjects", what))
    return found


def _counted(subjects: int) -> str:
    return "1 subject" if subjects == 1 else f"{subjects} subjects"


def _question(file: str, what: str, remedy: str = BY_TABLE) -> Problem:
    return Problem(file, what, remedy, aside=False, question=True)


def _index(names: Iterable[str], key: Callable[[str], object]) -> dict[object, list[str]]:
    index: dict[object, list[str]] = defaultdict(list)
    for name in names:
        index[key(name)].append(name)
    return index


def _pair(
    root: Path, images: Sequence[str], labels: Sequence[str], reading: Reading
) -> tuple[dict[str, list[str]], list[Problem]]:
    """The label maps of every image, and those that belong to none."""
    exact, loose = (_index(images, functools.partial(naming.pair_key, loose=loose)) for loose in (False, True))
    persons = _index(images, reading.keys.__getitem__)
    stems = _index(images, lambda name: naming.stem(name).casefold())
    pairs: dict[str, list[str]] = defaultdict(list)
    problems = []
    for label in labels:
        own = persons.get(reading.keys[label], [])
        fits = exact.get(naming.pair_key(label)) or _by_place(root, label, own, reading)
        fits = fits or loose.get(naming.pair_key(label, loose=True), [])
        same = stems.get(naming.stem(label).casefold(), [])
        fits = fits or (same if len(same) == 1 else [])
        if not fits:
            what = "is named, placed or filled like a label map, but no image matches it"
            problems.append(Problem(label, what, f"It is left out. {BY_TABLE}"))
        for image in fits:
            pairs[image].append(label)
    return pairs, problems


def _by_place(root: Path, label: str, own: Sequence[str], reading: Reading) -> list[str]:
    """The images of a label map's person that were taken at its time, lie nearest, share most words and its grid."""
    times = frozenset().union(*(reading.occasions[image] for image in own)) & reading.occasions[label]
    split = naming.split_word(label)
    own = [
        image
        for image in own
        if times <= reading.occasions[image] and (not split or naming.split_word(image) in (None, split))
    ]
    folder = label.rpartition("/")[0]
    while own:
        near = [image for image in own if not folder or image.startswith(f"{folder}/")]
        if near:
            own = near
            break
        folder = folder.rpartition("/")[0]
    words = {token.value for token in tokens(label)}
    shared = {image: len(words & {token.value for token in tokens(image)}) for image in own}
    own = [image for image in own if shared[image] == max(shared.values())]
    if len(own) < 2:
        return list(own)
    return [image for image in own if _same_grid(root / label, root / image)]


def _same_grid(label: Path, image: Path) -> bool:
    try:
        one, other = (read_header([path]) for path in (label, image))
        check_grid(one.blank(), other.blank(), label)
    except (MedclError, OSError):
        return False
    return True


def _settle(
    pairs: dict[str, list[str]], contents: Contents, reading: Reading
) -> tuple[dict[str, str], dict[str, tuple[tuple[str, str], ...]], dict[int, str], list[Problem]]:
    """One label map an image, or several binary masks that make one; a question where several are whole maps."""
    label_of: dict[str, str] = {}
    masks_of: dict[str, tuple[tuple[str, str], ...]] = {}
    problems: list[Problem] = []
    binary: dict[object, bool] = {}
    several: dict[object, list[tuple[str, list[str]]]] = defaultdict(list)
    for image, found in sorted(pairs.items()):
        if len(found) == 1:
            label_of[image] = found[0]
            continue
        for label in found:
            kind = template(label)
            if kind not in binary:
                binary[kind] = contents.is_binary(label)
        if all(binary[template(label)] for label in found):
            masks_of[image] = tuple(zip(_structures(found), found, strict=True))
        else:
            label_of[image] = found[0]
            several[tuple(str(template(label.rpartition("/")[2])) for label in found)].append((image, found))
    for same in several.values():
        image, found = same[0]
        more = f", and so have {len(same) - 1} more images" if same[1:] else ""
        what = f"has {len(found)} label maps, {', '.join(found)}{more}: the first of them is taken"
        problems.append(_question(image, what))
    names = sorted({name for masks in masks_of.values() for name, _ in masks})
    return label_of, masks_of, {0: "background", **dict(enumerate(names, 1))} if names else {}, problems


def _structures(labels: Sequence[str]) -> list[str]:
    """What distinguishes the names of an image's masks: `liver` of `s1/segmentations/liver.nii.gz`."""
    pieces = [re.split(r"[_\-. ]+", naming.stem(label)) for label in labels]
    while all(len(one) > 1 for one in pieces) and len({one[0] for one in pieces}) == 1:
        pieces = [one[1:] for one in pieces]
    while all(len(one) > 1 for one in pieces) and len({one[-1] for one in pieces}) == 1:
        pieces = [one[:-1] for one in pieces]
    stems = ["_".join(one) for one in pieces]
    if len(set(stems)) == len(stems):
        return stems
    return [label.rpartition("/")[0].replace("/", "_") + f"_{stem}" for label, stem in zip(labels, stems, strict=True)]
