"""A case is one image with what is known of it; a manifest is the cases of a folder and the problems met there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from medcl.errors import MedclError
from medcl.io.formats import format_of
from medcl.runtime.files import read_json, write_json

MANIFEST_VERSION = 1
BY_TABLE = "`medcl scan DIR --write-table FILE.csv` writes what was guessed: mend it, and give it as SOURCE."


@dataclass(frozen=True)
class Case:
    """One 3D image (one frame, one channel, one DICOM series), its label map if any, and its header.

    Attributes:
        id: unique in its manifest, safe as a file name; predictions are named after it.
        subject: the person; every split is by subject. Never a patient name (DICOM identifiers are hashed).
        image: the file, or the slice files of a DICOM series in slice order, relative to the manifest's root. A header
            comes first, the files beside it that hold its voxels after it.
        label: the label map's file, or a SEG or RTSTRUCT object, relative to the root; or None.
        masks: instead of one label map, names of structures and their binary masks, relative to the root.
        format: `dicom`, or a format of `medcl.io.formats.SUFFIXES`: `nifti`, `nrrd`, `meta` (MHA/MHD), `analyze`, `mgh`
            (FreeSurfer), `minc`, `parrec`, `afni`, `tiff`.
        channel: which channel of a 4D file, or None for a 3D file.
        shape: voxels along the three array axes, in the file's own order.
        spacing: mm along the same axes.
        orientation: nibabel's axis codes of those axes, such as `RAS` or `LPS`.
        affine: rows of the 4x4 matrix from voxel index to RAS+ world coordinates in mm.
        dtype: the stored voxel type.
        intensity: minimum, median and maximum, where voxels were read.
        modality: `MR`, `CT`, `PET` or `unknown`.
        split: `train`, `val` or `test` where the data set's layout or a table says so.
        session, site: of the acquisition, where a table says them.
        targets: further columns of a table, each a name and a value.
        notes: what was done to read it that a user should know (gantry tilt resampled, ...).
    """

    id: str
    subject: str
    image: tuple[str, ...]
    label: str | None = None
    masks: tuple[tuple[str, str], ...] = ()
    format: str = "nifti"
    channel: int | None = None
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    orientation: str = ""
    affine: tuple[tuple[float, ...], ...] = ()
    dtype: str = ""
    intensity: tuple[float, ...] | None = None
    modality: str = "unknown"
    split: str | None = None
    session: str = ""
    site: str = ""
    targets: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_labelled(self) -> bool:
        """Whether it has a label map or masks."""
        return self.label is not None or bool(self.masks)

    @property
    def label_files(self) -> tuple[str, ...]:
        """The files of its label map or masks, relative to the root."""
        return tuple(file for _, file in self.masks) if self.label is None else (self.label,)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Case:
        """Builds a case from its entry in a manifest file; lists become tuples."""
        fixed: dict[str, Any] = {
            k: tuple(map(tuple, v)) if k in ("affine", "masks", "targets") else tuple(v) if isinstance(v, list) else v
            for k, v in data.items()
        }
        return Case(**fixed)


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file.

    Attributes:
        file: path relative to the root.
        what: what is wrong, in one line.
        remedy: what a person can do.
        aside: True where the volume was set aside; False where it is used all the same (a warning).
        twin: the volume that it is identical to, where that goes under another subject's name.
        question: True where something was guessed that a person has to confirm. Nothing trains on the folder until a
            table answers it, or `--yes` takes the guess.
    """

    file: str
    what: str
    remedy: str
    aside: bool = True
    twin: str = ""
    question: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.what}. {self.remedy}"


@dataclass(frozen=True)
class Manifest:
    """What `medcl scan` found below `root`.

    Attributes:
        root: absolute folder that all paths are relative to.
        layout: the layout recognised: `msd`, `acdc`, `bids`, `dicom`, `nnunet` or `names`.
        rule: one sentence saying how subjects and labels were worked out.
        cases: usable cases, sorted by id.
        problems: files set aside, and warnings.
        label_names: name of every label value that the data set names.
    """

    root: str
    layout: str
    rule: str
    cases: tuple[Case, ...]
    problems: tuple[Problem, ...] = ()
    label_names: dict[int, str] = field(default_factory=dict)

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases that have a label map."""
        return tuple(case for case in self.cases if case.is_labelled)

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of all subjects, sorted, each once."""
        return tuple(sorted({case.subject for case in self.cases}))

    def image_paths(self, case: Case) -> tuple[Path, ...]:
        """Full paths of a case's image: its file or files, as `Case.image` orders them."""
        return tuple(Path(self.root) / name for name in case.image)

    def label_path(self, case: Case) -> Path | None:
        """Full path of a case's label map, or None."""
        return None if case.label is None else Path(self.root) / case.label

    def label_paths(self, case: Case) -> tuple[Path, ...]:
        """The files of a case's label map: its own; of a DICOM object also those of its series. Empty without one."""
        path = self.label_path(case)
        if path is None:
            return ()
        return (path, *self.image_paths(case)) if format_of(path) == "dicom" else (path,)

    @property
    def questions(self) -> tuple[Problem, ...]:
        """What was guessed and is not confirmed yet."""
        return tuple(problem for problem in self.problems if problem.question)

    def confirmed(self) -> Manifest:
        """The same manifest with every guess taken: its questions are warnings from now on."""
        return replace(self, problems=tuple(replace(problem, question=False) for problem in self.problems))

    def with_cases(self, cases: tuple[Case, ...], problems: tuple[Problem, ...] = ()) -> Manifest:
        """The same manifest over other cases, with further problems appended."""
        return replace(self, cases=cases, problems=self.problems + problems)

    def save(self, path: str | Path) -> None:
        """Writes the manifest to a JSON file that `load` reads."""
        data = asdict(self)
        data["label_names"] = {str(value): name for value, name in self.label_names.items()}
        write_json(path, {"medcl_manifest": MANIFEST_VERSION, **data})

    @staticmethod
    def load(path: str | Path) -> Manifest:
        """Reads a manifest.

        Raises:
            MedclError: the file is not a manifest this version can read.
        """
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("medcl_manifest", None) != MANIFEST_VERSION:
            raise MedclError("is not a manifest of this version", path, "Write it anew with `medcl scan DIR`.")
        try:
            return Manifest(
                root=data["root"],
                layout=data["layout"],
                rule=data["rule"],
                cases=tuple(Case.from_dict(case) for case in data["cases"]),
                problems=tuple(Problem(**problem) for problem in data["problems"]),
                label_names={int(value): name for value, name in data["label_names"].items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MedclError(f"is damaged ({error})", path, "Write it anew with `medcl scan DIR`.") from None
