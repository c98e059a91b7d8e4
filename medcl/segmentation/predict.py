"""The stage `predict`: label maps on each input's own grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from medcl.checkpoint import Contract, rebuild, weights_hash
from medcl.config import PredictConfig
from medcl.dataset.case import Case, Manifest, Problem
from medcl.dataset.checks import check_image, whole_labels, without_nan
from medcl.dataset.modality import check_hounsfield
from medcl.dataset.splits import Split, cases_of
from medcl.errors import MedclError
from medcl.io.geometry import Volume, from_canonical, to_canonical
from medcl.io.nifti import write_nifti
from medcl.io.volumes import read_volume
from medcl.networks.backbones import Backbone
from medcl.runtime.precision import choose_precision
from medcl.runtime.run import log, setup_log
from medcl.runtime.training import choose_accelerator
from medcl.segmentation.inputs import input_row, read_inputs, write_inputs
from medcl.segmentation.module import class_scores
from medcl.store.image import prepare_image
from medcl.store.plan import round_up
from medcl.store.stage import bar, describe, load_source, log_problems, tell_growth


class Predictor:
    """A fine-tuned network that takes a volume as it was read and gives its label map.

    Args:
        run: run folder of a fine-tuning.
        accelerator, precision: as in training.
        overlap: share by which neighbouring windows overlap.
        mirror: average over mirrored inputs.
    """

    def __init__(
        self,
        run: str | Path,
        accelerator: str = "auto",
        precision: str = "auto",
        overlap: float = 0.5,
        mirror: bool = False,
    ):
        if not 0 <= overlap < 1:
            raise MedclError(f"{overlap} is not a share", "--overlap", "Give 0 or more and less than 1.")
        self.accelerator = choose_accelerator(accelerator)
        self.precision = choose_precision(precision, self.accelerator, run)
        self.contract: Contract
        self.backbone: Backbone
        self.contract, self.backbone = rebuild(run)
        if self.contract.kind != "segmentation":
            raise MedclError(
                "holds a pretrained encoder, not a segmentation network", run, "Run `medcl finetune` first."
            )
        # noted in every label map, so that it is known what they may be scored on
        self.maker = str(Path(run).resolve()), weights_hash(run)
        self.backbone.eval().to("cuda" if self.accelerator == "gpu" else "cpu")
        self.overlap, self.mirror = overlap, mirror
        self.patch = round_up(self.contract.plan.patch_size, self.backbone.multiple)
        self._values = whole_labels(np.array([0, *self.contract.label_values]))

    @torch.inference_mode()
    def __call__(self, volume: Volume) -> np.ndarray:
        """Label map, uint8 or uint16, on the grid of `volume`: same axes, same shape."""
        canonical = to_canonical(volume)
        prepared = prepare_image(canonical, self.contract.plan)
        scores = class_scores(
            self.backbone, prepared.image, self.patch, precision=self.precision, accelerator=self.accelerator,
            overlap=self.overlap, mirror=self.mirror,
        )  # fmt: skip
        return from_canonical(self._values[prepared.restore(scores)], volume.affine)


def predict(config: PredictConfig) -> Path:
    """Predicts every volume of the input; one that cannot be read is listed and the others go on.

    Returns:
        The output folder, with `<case>.nii.gz` for every case, and `cases.csv`, which maps each to its input.

    Raises:
        MedclError: no volume could be predicted, or a setting cannot work.
    """
    setup_log()
    predictor = Predictor(config.run, config.accelerator, config.precision, config.overlap, config.mirror)
    manifest = load_source(config.input, config.channel)
    log.info("%s: %s.", config.input, describe(manifest))
    tell_growth(manifest, predictor.contract.plan, config.run)
    log_problems(manifest)
    cases = chosen_cases(manifest, config)
    return predict_cases(predictor, manifest, cases, Path(config.output))


def predict_cases(predictor: Predictor, manifest: Manifest, cases: tuple[Case, ...], out: Path) -> Path:
    """Predicts `cases` into `out`, one file each, written whole or not at all; `cases.csv` lists their inputs."""
    problems: list[Problem] = []
    known, rows = read_inputs(out), []
    inputs = {(Path(manifest.root) / name).resolve() for case in cases for name in (*case.image, *case.label_files)}
    if any((out / f"{case.id}.nii.gz").resolve() in inputs for case in cases):
        raise MedclError(
            "holds the scans themselves, which the label maps would overwrite", out, "Choose another folder."
        )
    trained = predictor.contract.plan.modality
    others = [case.id for case in cases if len({case.modality, trained} - {"unknown"}) > 1]
    if others:
        log.warning("The network was trained on %s; %d inputs are not, such as %s.", trained, len(others), others[0])
    for case in bar(iter(cases), len(cases), "predict"):
        try:
            volume = read_volume(manifest.image_paths(case), channel=case.channel)
            volume = without_nan(volume) if predictor.contract.plan.nan == "zero" else volume
            check_image(volume.array, where=case.image[0])
            if predictor.contract.plan.normalise == "ct":
                check_hounsfield(volume.array, case.image[0])
        except MedclError as error:
            problems.append(Problem(case.image[0], error.what, error.remedy or "Mend the file."))
            continue
        for note in volume.notes:
            log.info("%s: %s.", case.id, note.rstrip("."))
        try:
            found = predictor(volume)
        except (RuntimeError, ValueError, MedclError) as error:
            what = f"could not be predicted ({' '.join(str(error).split())[:120]})"
            problems.append(
                Problem(case.image[0], what, "If memory ran out, use a coarser spacing or --accelerator cpu.")
            )
            continue
        write_nifti(out / f"{case.id}.nii.gz", found, volume.affine, predictor.maker)
        rows.append(input_row(manifest, case, f"{case.id}.nii.gz"))
    write_inputs(out, rows, known)
    log_problems(manifest.with_cases(cases, tuple(problems)), before=len(manifest.problems))
    if len(problems) == len(cases):
        raise MedclError("no volume could be predicted", manifest.root, "See the problems above.")
    log.info(
        "%d label maps in %s%s.",
        len(cases) - len(problems),
        out,
        f", {len(problems)} volumes skipped" if problems else "",
    )
    return out


def chosen_cases(manifest: Manifest, config: PredictConfig) -> tuple[Case, ...]:
    """All cases, or those of a part of the run's own split.

    Raises:
        MedclError: the manifest holds none of them.
    """
    if config.subjects == "all":
        return manifest.cases
    cases = cases_of(manifest, getattr(Split.load(Path(config.run) / "split.json"), config.subjects))
    if not cases:
        raise MedclError(
            f"holds no {config.subjects} subject of the run", manifest.root, "Predict the folder it was trained on."
        )
    return cases
