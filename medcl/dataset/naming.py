"""What a file's name says: its role, its subject, its modality.

The subject rule errs towards too few subjects: taking two people for one wastes a split, taking one person for two
leaks between splits.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from medcl.io.formats import volume_suffix

_LABEL_WORDS = "segs?|segmentations?|labels?|lbl|masks?|msk|dseg|gt|groundtruth|annotations?|roi"
_IMAGE_WORDS = "imgs?|images?|vol|volumes?|scans?"
_LABEL_FOLDER = re.compile(rf"^({_LABEL_WORDS}|ground[_-]truth)([_-]?(tr|ts|va|val|train|test))?$", re.I)
_IMAGE_FOLDER = re.compile(rf"^({_IMAGE_WORDS}|data)([_-]?(tr|ts|va|val|train|test))?$", re.I)
_LABEL_NAME = re.compile(rf"^({_LABEL_WORDS})(?=[_\-.\d]|$)|[_\-.]({_LABEL_WORDS})$", re.I)
_IMAGE_NAME = re.compile(rf"^({_IMAGE_WORDS})(?=[_\-.\d]|$)|[_\-.]({_IMAGE_WORDS})$", re.I)

_MR = "t1(w|c|n|ce|gd)?|t2(w|f)?|flair|pdw?|dwi|adc|swi|bold|mr|mri|mra|dixon|inphase|outphase|cine|lge|mprage"
_CT = "ct|cta|cect|ncct|ldct|cbct"
_MODALITY = re.compile(rf"^({_MR}|{_CT}|pet)$", re.I)
_MOMENT = re.compile(
    r"^(frame|fr|ses|session|visit|time|timepoint|tp|t|run|rep|echo|phase|acq|scan|v|date)[-_]?\d+$"
    r"|^(ed|es|pre|post|baseline|followup|bl|fu|frame|session|visit|time|run|echo|phase|scan|4d|3d|mr)\d*$",
    re.I,
)
_SIDE = re.compile(r"^(l|r|lh|rh|left|right|sag|cor|ax|axial|sagittal|coronal)$", re.I)
_SUBJECT_FOLDER = re.compile(
    r"^(sub|subj|subject|patient|pat|case|participant|volunteer|person|pid|id|p|s)[-_ ]?\d+$|^sub-[a-z0-9]+$", re.I
)
_PROBABILITY = re.compile(r"^(probs?|probmaps?|probabilit(y|ies)|probseg|softmax|logits?|pve|uncertainty)$", re.I)
_SPLITS = {"train": "tr|train|training", "val": "va|val|valid|validation", "test": "ts|test|testing"}
# Folders that say what is inside, not whose it is.
_GENERIC_FOLDER = re.compile(
    r"^(anat|raw|nifti|nii|nrrd|dicom|dcm|train|training|test|testing|val|valid|validation|func|study|series)\d*$", re.I
)


def without_suffix(name: str) -> str:
    """The file name without its volume suffix, such as `.nii.gz`."""
    suffix = volume_suffix(name)
    return name[: len(name) - len(suffix)] if suffix else name


def stem(name: str) -> str:
    """The file name without folders and without its volume suffix."""
    return without_suffix(name.rsplit("/", 1)[-1])


def safe(name: str) -> str:
    """The name with everything but letters of any script, digits, `.`, `_` and `-` replaced.

    Composed forms of letters (NFC) make one name of what two systems spell apart.
    """
    return re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", name)).strip("-.") or "case"


def is_role(word: str) -> bool:
    """Whether a word tells what a file is (`t1`, `left`, `mask`, `train`) and never whose."""
    return any(kind.match(word) for kind in (_MODALITY, _SIDE)) or (is_generic(word) and not word[-1].isdigit())


def is_probability(name: str) -> bool:
    """Whether a file's name or folder says that it holds probabilities: `_prob`, `softmax/`, `_pve_0`."""
    return any(_PROBABILITY.match(word) for word in re.split(r"[/_\-. ]+", without_suffix(name)))


def is_moment(word: str) -> bool:
    """Whether a word tells when an image was taken, or which of several it is: `ses-1`, `frame01`, `baseline`."""
    return bool(_MOMENT.match(word))


def is_person(folder: str) -> bool:
    """Whether a folder is named after a person: `sub-01`, `patient7`."""
    return bool(_SUBJECT_FOLDER.match(folder))


def is_generic(folder: str) -> bool:
    """Whether a folder's name tells what it holds and never whose: `imagesTr`, `labels`, `anat`, `training`."""
    return any(kind.match(folder) for kind in (_GENERIC_FOLDER, _LABEL_FOLDER, _IMAGE_FOLDER))


def _folders(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts[:-1]


def is_label(name: str) -> bool:
    """Whether a file is a label map by its ending (`_seg`, `.seg`, `-label`), its start, or its nearest role folder."""
    own = stem(name)
    if _LABEL_NAME.search(own):
        return True
    if _IMAGE_NAME.search(own):
        return False
    for folder in reversed(_folders(name)):
        if _LABEL_FOLDER.match(folder):
            return True
        if _IMAGE_FOLDER.match(folder):
            return False
    return False


def pair_key(name: str, loose: bool = False) -> tuple[str, str]:
    """What an image and its label map have in common: the folder without role folders, the name without role words.

    `loose` also drops modality endings, so that `x_seg` fits `x_t1` and `x_flair`, and nnU-Net's `_0000`.
    """
    folder = "/".join(
        re.sub(r"^.*?((tr|ts|va|val|train|test)?)$", r"\1", part, flags=re.I).lower()
        if _LABEL_FOLDER.match(part) or _IMAGE_FOLDER.match(part)
        else part
        for part in _folders(name)
    )
    core = _IMAGE_NAME.sub("", _LABEL_NAME.sub("", stem(name))).strip("_-.")
    if loose:
        if not is_label(name):
            core = re.sub(r"_000\d$", "", core)
        pieces = re.split(r"[_\-. ]", core)
        while pieces and _MODALITY.match(pieces[-1]):
            pieces.pop()
        core = "_".join(pieces)
    return folder.strip("/"), core.lower()


def _person(text: str) -> str:
    """The name without the pieces at its end (or start) that say when, which side or how it was scanned."""
    pieces = re.split(r"([_\-. ]+)", text)
    words, joins = pieces[::2], pieces[1::2]

    def passing(index: int) -> bool:
        word = words[index]
        return bool(_MODALITY.match(word) or _MOMENT.match(word) or _SIDE.match(word) or not word)

    while words:
        # `ses-1` is two words here; so is `frame_01`
        if len(words) > 1 and words[-1].isdigit() and _MOMENT.match(f"{words[-2]}-{words[-1]}"):
            words, joins = words[:-2], joins[:-2]
        elif passing(len(words) - 1):
            words, joins = words[:-1], joins[:-1]
        else:
            break
    while words and (_MODALITY.match(words[0]) or _IMAGE_NAME.match(f"{words[0]}_")):
        words, joins = words[1:], joins[1:]
    if not words:
        return ""
    return "".join(word + join for word, join in zip(words, [*joins, ""], strict=True)).rstrip("_-. ")


def subject(name: str) -> str:
    """The subject that one name alone tells: `patient001_frame01_t1` is `patient001`, `case_12` is `case_12`."""
    own = stem(name)
    return safe(_person(own) or own)


def subjects(names: Sequence[str]) -> dict[str, str]:
    """The subject of every image.

    In this order: the nearest folder named after a subject (`sub-01`, `patient7`); the folder that the file is named
    after; the file's name without frame, session, side and modality endings; and where nothing is left of it, or
    it holds no digit and occurs in several folders (`a/brain.nii`, `b/brain.nii`), the nearest folder that is not
    a generic one.
    """
    persons = _persons(names)
    places: dict[str, set[str]] = defaultdict(set)
    for name in names:
        places[persons[name]].add("/".join(_folders(name)))
    result = {}
    for name in names:
        person, folders = persons[name], _folders(name)
        found = next((folder for folder in reversed(folders) if _SUBJECT_FOLDER.match(folder)), None)
        if found is None and folders and len(folders[-1]) > 2 and stem(name).lower().startswith(folders[-1].lower()):
            found = _person(folders[-1]) if re.search(r"\d", folders[-1]) else None
        vague = not person or (not re.search(r"\d", person) and len(places[person]) > 1)
        if not found and vague:
            found = next((folder for folder in reversed(folders) if not _says_nothing(folder)), None)
        result[name] = safe(found or person or stem(name))
    return result


def _persons(names: Sequence[str]) -> dict[str, str]:
    """`_person` of every name; where all files of a folder end in `_0000`, `_0001`, … those are nnU-Net's channels."""
    together: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        together[_folders(name)].append(name)
    result = {}
    for group in together.values():
        bases = [re.sub(r"_000\d$", "", stem(name)) for name in group]
        channels = len(set(bases)) > 1 and all(base != stem(name) for base, name in zip(bases, group, strict=True))
        for base, name in zip(bases, group, strict=True):
            result[name] = _person(base if channels else stem(name))
    return result


def _says_nothing(folder: str) -> bool:
    return is_generic(folder) or not _person(folder)


def modality(name: str) -> str:
    """`CT` or `MR` where a piece of the file's path says so."""
    pieces = re.split(r"[/_\-. ]", without_suffix(name).lower())
    if any(re.fullmatch(_CT, piece) for piece in pieces):
        return "CT"
    return "MR" if any(re.fullmatch(_MR, piece) for piece in pieces) else "unknown"


def split_word(name: str) -> str | None:
    """`train`, `val` or `test` where a word of the path says so, the nearest first."""
    for word in reversed(re.split(r"[/_\-. ]+", without_suffix(name).lower())):
        for part, words in _SPLITS.items():
            if re.fullmatch(rf"(images|labels)?({words})", word):
                return part
    return None


def split(name: str) -> str | None:
    """`train`, `val` or `test` where the nearest telling folder says so."""
    for folder in reversed(_folders(name)):
        for part, words in _SPLITS.items():
            if re.fullmatch(rf"(images|labels)?[_-]?({words})", folder, re.I):
                return part
    return None
