"""Known layouts: which files are images, which are their label maps, and whose they are.

`detect` looks at paths (and at `dataset.json`), never at voxels. What it cannot know it says in `rule`: a reader must
be able to see why two files were taken for one person, because every split is by subject.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from medcl.dataset import naming
from medcl.dataset.by_names import cases_by_names, doubts, named_subjects
from medcl.dataset.case import Case, Problem
from medcl.dataset.labels import label_names, unsupported_labels
from medcl.dataset.structure import read_subjects
from medcl.errors import MedclError
from medcl.io.formats import format_of
from medcl.runtime.files import read_json


@dataclass(frozen=True)
class Layout:
    """What a layout makes of the volume files below a folder.

    Attributes:
        name: `msd`, `acdc`, `bids` or `names`.
        rule: one sentence saying how subjects and labels were worked out.
        cases: images with subject and label; headers are not read yet. Sorted by id, ids unique.
        label_names: name of every label value that the data set names.
        problems: missing images and labels, and label maps that belong to no image.
        refused_labels: why no label map of the data set can be used, or None.
    """

    name: str
    rule: str
    cases: tuple[Case, ...]
    label_names: dict[int, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    refused_labels: Problem | None = None


def detect(root: str | Path, files: Iterable[str], channel: int | None = None) -> Layout:
    """Recognises the layout of a folder.

    Args:
        root: the folder.
        files: the volume files below it (not DICOM), relative, with forward slashes.
        channel: which channel file to take where a case has several (nnU-Net's `_0000`, `_0001`); the first if None.

    Raises:
        MedclError: `dataset.json` is damaged.
    """
    names = sorted(files)
    for recognise in (_msd, _acdc, _bids):
        layout = recognise(Path(root), names, channel)
        if layout is not None:
            return with_unique_ids(layout)
    cases, problems, rule, value_names = cases_by_names(Path(root), names)
    return with_unique_ids(Layout("names", rule, tuple(cases), value_names, tuple(problems)))


def _case(image: str, subject: str, id: str | None = None, **known: Any) -> Case:
    return Case(id or naming.stem(image), subject, (image,), format=format_of(image), **known)


def with_unique_ids(layout: Layout) -> Layout:
    """Makes ids safe and unique: a name that occurs in several folders gets its folders in front."""
    by_id = defaultdict(list)
    for case in layout.cases:
        by_id[naming.safe(case.id)].append(case)
    cases: dict[str, Case] = {}
    for id, same in by_id.items():
        for case in same:
            unique = id if len(same) == 1 else naming.safe(naming.without_suffix(case.image[0]).replace("/", "_"))
            while unique in cases:  # two formats of one name in one folder
                unique += f"-{case.format}" if not unique.endswith(case.format) else "x"
            cases[unique] = replace(case, id=unique)
    return replace(layout, cases=tuple(cases[id] for id in sorted(cases)))


def _missing_label(image: str, label: str) -> Problem:
    what = f"this label map is missing; its image {image} is kept as unlabelled"
    return Problem(label, what, "Restore it, or ignore this.", aside=False)


def _orphan(label: str) -> Problem:
    return Problem(
        label,
        "is named or placed like a label map, but no image matches it",
        "Give it its image's name, or move it if it is an image.",
    )


_PARTS = re.compile(r"(images|labels)(Tr|Ts|Va|Val)/")


def _msd(root: Path, files: list[str], channel: int | None) -> Layout | None:
    """Medical Segmentation Decathlon, and nnU-Net's raw folder, its close relative."""
    top = {name.split("/")[0] for name in files}
    bases = [""] if (root / "dataset.json").is_file() else [f"{folder}/" for folder in top]
    bases = [base for base in bases if (root / base / "dataset.json").is_file()]
    if len(bases) != 1 or not all(name.startswith(bases[0]) for name in files):
        return None
    base = bases[0]
    inside = {name for name in files if _PARTS.match(name[len(base) :])}
    if not inside:
        return None
    data = read_json(root / base / "dataset.json")
    if not isinstance(data, dict):
        raise MedclError("is not a Decathlon or nnU-Net data set", root / base / "dataset.json", "Mend or remove it.")

    labels = {naming.without_suffix(name): name for name in inside if name.startswith(f"{base}labels")}
    nnunet = "file_ending" in data or "channel_names" in data
    modality = _modality(data.get("channel_names") or data.get("modality"))
    cases, problems, used = [], [], set()
    listed = _listed(data, base)

    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(inside):
        if name.startswith(f"{base}images"):
            plain = naming.without_suffix(name)
            groups[re.sub(r"_\d{4}$", "", plain) if nnunet else plain].append(name)
    reading = read_subjects(list(groups))
    subjects = named_subjects(list(groups), reading, {plain: naming.subject(plain) for plain in groups})
    for plain, images in groups.items():
        which = (channel or 0) if len(images) > 1 else 0
        if which >= len(images):
            remedy = f"Choose --channel 0 to {len(images) - 1}."
            problems.append(Problem(images[0], f"has no channel file {which}", remedy))
            continue
        image = images[which]
        notes = () if len(images) == 1 else (f"channel file {which} of {len(images)}; --channel takes another",)
        expected = listed.get(image) or plain.replace(f"{base}images", f"{base}labels", 1)
        label = expected if expected in inside else labels.get(naming.without_suffix(expected))
        used.add(label)
        if label is None and (listed.get(image) or (nnunet and f"{base}imagesTr/" in image)):
            ending = data.get("file_ending", "")
            problems.append(_missing_label(image, listed.get(image) or expected + ending))
        split = {"tr": "train", "ts": "test"}.get(image[len(base) + 6 : len(base) + 8].lower(), "val")
        id = plain.rsplit("/", 1)[-1]
        cases.append(_case(image, subjects[plain], id, label=label, split=split, modality=modality, notes=notes))
    known = {image for images in groups.values() for image in images}
    missing = "dataset.json names this image, but it is missing"
    problems += [Problem(image, missing, "Restore it or ignore this.") for image in sorted(set(listed) - known)]
    problems += [_orphan(label) for label in sorted(set(labels.values()) - used)]
    problems += doubts(list(groups), reading, subjects)
    outside = sorted(set(files) - inside)
    if outside:
        what = f"lies outside imagesTr, imagesTs and imagesVa, as {len(outside)} files do, and is passed over"
        problems.append(Problem(outside[0], what, "Move it there, or name it in a table.", aside=False))
    kind = "nnU-Net" if nnunet else "Medical Segmentation Decathlon"
    rule = (
        f"{kind} layout (dataset.json): labels are the files of the same name in labelsTr, and every image is its own "
        "subject (save for frame, session, side and modality endings), because the layout names no people"
    )
    refused = unsupported_labels(data.get("labels"), f"{base}dataset.json")
    return Layout("msd", rule, tuple(cases), label_names(data.get("labels")), tuple(problems), refused)


def _listed(data: dict[str, Any], base: str) -> dict[str, str | None]:
    """The images that dataset.json lists, each with its label."""
    listed: dict[str, str | None] = {}
    for entry in [each for part in ("training", "validation", "test") for each in _list(data.get(part))]:
        pair = entry if isinstance(entry, dict) else {"image": entry}
        image, label = pair.get("image"), pair.get("label")
        if isinstance(image, str):
            clean = str(PurePosixPath(base) / image)
            listed[clean] = str(PurePosixPath(base) / label) if isinstance(label, str) else None
    return listed


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _modality(channels: Any) -> str:
    text = " ".join(map(str, channels.values() if isinstance(channels, dict) else _list(channels))).lower()
    return "CT" if re.search(r"\bct\b", text) else "MR" if re.search(r"mr|t1|t2|flair|adc|dwi", text) else "unknown"


_ACDC = re.compile(r"^(?:(.*)/)?(patient\d{3})/\2_(frame\d+)(_gt)?\.nii(\.gz)?$")


def _acdc(root: Path, files: list[str], channel: int | None) -> Layout | None:
    """ACDC: `training/patientNNN/patientNNN_frameMM.nii.gz` and `…_gt.nii.gz`; the cine series `_4d` is passed over."""
    matches = {name: match for name in files if (match := _ACDC.match(name))}
    others = [name for name in files if name not in matches and not re.search(r"patient\d{3}_4d\.nii(\.gz)?$", name)]
    if not matches or others:
        return None
    labels = {naming.without_suffix(name): name for name, match in matches.items() if match[4]}
    labelled_folders = {matches[name][1] for name in labels.values()}
    cases, problems = [], []
    for name, match in matches.items():
        if match[4]:
            continue
        folder = match[1] or ""
        split = "train" if "train" in folder else "test" if "test" in folder else None
        label = labels.pop(f"{naming.without_suffix(name)}_gt", None)
        if label is None and match[1] in labelled_folders:
            problems.append(_missing_label(name, name.replace(".nii", "_gt.nii")))
        cases.append(_case(name, match[2], label=label, split=split, modality="MR"))
    problems += [_orphan(label) for label in labels.values()]
    names = {0: "background", 1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
    rule = "ACDC layout: the subject is the patientNNN folder (both frames kept together), labels end in _gt"
    return Layout("acdc", rule, tuple(cases), names, tuple(problems))


_BIDS = re.compile(r"^(.*?)(sub-[A-Za-z0-9]+)/(?:(ses-[A-Za-z0-9]+)/)?(anat|ct|pet)/(\2_[^/]*)$")
_FUNCTIONAL = re.compile(r"/(func|fmap|perf)/|_desc-brain_")
# Entities that describe a label map or its making rather than the scan it was drawn on.
_LABEL_ENTITIES = {"label", "desc", "seg", "atlas", "res", "den", "mod"}


def _bids(root: Path, files: list[str], channel: int | None) -> Layout | None:
    """BIDS: `sub-XX[/ses-YY]/anat/*_T1w.nii.gz`; labels `*_dseg` or `*_mask`, beside the image or in derivatives."""
    parsed = [(name, match) for name in files if (match := _BIDS.match(name))]
    aside = {name for name in files if not _BIDS.match(name) and not _FUNCTIONAL.search(name)}
    if not parsed or any(naming.is_label(name) for name in aside):
        return None  # labels of other folders belong to images that this layout does not see
    images: list[tuple[str, dict[str, str], str]] = []
    labels: list[tuple[str, dict[str, str]]] = []
    raw = [name for name, match in parsed if "derivatives/" not in match[1]]
    for name, _match in parsed:
        *pairs, kind = naming.stem(name).split("_")
        entities = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
        if kind in ("dseg", "mask"):
            if entities.get("desc") != "brain":  # a brain mask is no label map
                labels.append((name, entities))
        elif kind != "probseg" and (name in raw or not raw):
            images.append((name, entities, kind))

    labels.sort(key=lambda item: (not naming.stem(item[0]).endswith("dseg"), item[0]))
    label_of: dict[str, str] = {}
    problems = []
    for name, entities in labels:
        own = {key: value for key, value in entities.items() if key not in _LABEL_ENTITIES}
        if own.get("space") in ("orig", "T1w"):
            del own["space"]
        fits = [image for image in images if all(image[1].get(key) == value for key, value in own.items())]
        fits = [image for image in fits if "space" in own or "space" not in image[1]]
        fits.sort(key=lambda image: (image[2] != "T1w", image[0]))
        if not fits:
            problems.append(_orphan(name))
        elif fits[0][0] in label_of:
            first = label_of[fits[0][0]]
            problems.append(Problem(name, f"is a second label map of {fits[0][0]}", f"Unused: {first} is taken."))
        else:
            label_of[fits[0][0]] = name

    kinds = {"ct": "CT", "pet": "PET"}
    cases = [
        _case(name, f"sub-{entities['sub']}", label=label_of.get(name), modality=kinds.get(kind, "MR"))
        for name, entities, kind in images
    ]
    skipped = len(files) - len(parsed)
    passed = f"; {skipped} files outside anat folders are passed over" if skipped else ""
    rule = (
        "BIDS layout: the subject is the sub- entity (all sessions kept together), labels are _dseg or _mask files "
        f"with the same entities{passed}"
    )
    return Layout("bids", rule, tuple(cases), _dseg_names(root), tuple(problems))


def _dseg_names(root: Path) -> dict[int, str]:
    """Label names from a `dseg.tsv` with columns `index` and `name`."""
    found = [*root.glob("*dseg.tsv"), *root.glob("derivatives/*dseg.tsv"), *root.glob("derivatives/*/*dseg.tsv")]
    names: dict[int, str] = {}
    for path in found[:1]:
        head, *rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
        if {"index", "name"} <= set(head):
            at, called = head.index("index"), head.index("name")
            names = {int(row[at]): row[called] for row in rows if len(row) == len(head) and row[at].isdigit()}
    return names
