"""The dataclasses of what is done with trained runs: see `medcl.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medcl.config.kinds import Absent, Accelerator, Natural, NonNegative, Precision, Settings, ShareBelowOne


@dataclass(frozen=True)
class PredictConfig(Settings):
    """Write label maps on each input's own grid.

    Args:
        run: run folder of a fine-tuning.
        input: a volume, a DICOM folder, a folder of scans, or a manifest.
        output: folder for the label maps, `<case>.nii.gz` each.
        subjects: `all`, or `train`, `val` or `test` for that part of the run's own split.
        overlap: share by which neighbouring windows overlap.
        mirror: average over mirrored inputs; only for anatomy without sides.
        precision: auto takes bf16 where the hardware multiplies in it, else 16 on a GPU and 32 on a CPU.
        accelerator: what to predict on.
        channel: which channel of 4D files to take.
    """

    run: str
    input: str
    output: str
    subjects: Literal["all", "train", "val", "test"] = "all"
    overlap: ShareBelowOne = 0.5
    mirror: bool = False
    precision: Precision = "auto"
    accelerator: Accelerator = "auto"
    channel: int | None = None


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Dice, 95% Hausdorff distance and normalised surface distance, with intervals over subjects.

    Args:
        predictions: folder of predicted label maps named `<case>.nii.gz`, or the run folder of a fine-tuning, whose own
            test subjects are then predicted and scored into `RUN/test`.
        subjects: of a run: test, or val for its validation subjects, scored into `RUN/val`.
        reference: folder of labelled scans, or a manifest; by default the one the run was trained on.
        out: where to write evaluation.csv and evaluation.json; by default beside the predictions.
        tolerance: tolerance of the normalised surface distance in mm; by default one voxel along the finest axis (the
            median of the cases scored).
        allow_leakage: go on where test volumes were seen in training; every result is then marked.
        channel: which channel of 4D files to take.
        absent: what a structure counts that reference and prediction both lack: nothing, or one (Dice and NSD of 1).
    """

    predictions: str
    reference: str = ""
    out: str = ""
    subjects: Literal["test", "val"] = "test"
    tolerance: NonNegative | None = None
    allow_leakage: bool = False
    channel: int | None = None
    absent: Absent = "nothing"


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Paired comparison of two arms, run by run.

    Args:
        runs: evaluated run folders of the first arm, one a draw.
        baseline: evaluated run folders of the arm to compare with, one a draw.
        out: folder for the comparison and its report.
        names: what to call the two arms.
        absent: what a structure counts that the reference and all runs lack: nothing, or one (Dice and NSD of 1).
    """

    runs: list[str]
    baseline: list[str]
    out: str = "comparison"
    names: tuple[str, str] = ("pretrained", "scratch")
    absent: Absent = "nothing"


@dataclass(frozen=True)
class AuditConfig(Settings):
    """Were volumes that are tested on seen in training?

    Args:
        seen: what was trained on: a run folder, which stands for all that its weights have seen, in it and in the
            runs it started from; or a folder of scans, or a manifest.
        held: what is tested on: a folder of scans, or a manifest; or a run folder, which stands for the subjects that
            it holds out for validation and test.
        out: JSON file to write.
        store: folder that remembers signatures; by default `$MEDCL_STORE`, or `~/.cache/medcl`.
        channel: which channel of 4D files to take.
        workers: processes; 0 takes one a core.
    """

    seen: str
    held: str
    out: str = ""
    store: str = ""
    channel: int | None = None
    workers: Natural = 0


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Write report.html of a run again.

    Args:
        run: run folder.
    """

    run: str


@dataclass(frozen=True)
class ExportConfig(Settings):
    """Weights for the plain MONAI class.

    Args:
        run: run folder of a pretraining or fine-tuning.
        to: the format; there is one so far.
        out: folder to write; by default `RUN/export`.
    """

    run: str
    to: Literal["monai"] = "monai"
    out: str = ""


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """Versions, devices, threads, allocator and disk speed of this machine, a timed step, and what to change.

    Args:
        store: folder for prepared volumes, or an fsspec address such as `s3://bucket/store`; by default `$MEDCL_STORE`,
            or `~/.cache/medcl`.
        quick: time no step.
        json: print JSON instead of lines.
    """

    store: str = ""
    quick: bool = False
    json: bool = False
