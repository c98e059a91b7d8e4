"""Shared fixtures: a small phantom data set, and a store of its own for every test session."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from medcl.dataset.case import Case, Manifest

REAL = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_finish():
    """What has been imported by now stays: every later collection of garbage would look through all of it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's store."""
    monkeypatch.setenv("MEDCL_STORE", str(tmp_path_factory.getbasetemp() / "store"))


@pytest.fixture(autouse=True, scope="session")
def same_precision():
    """`auto` is float32 on every machine, as the tolerances suppose."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def small_machine():
    """Less of what takes longer than a small run itself: processes, rows read to tell a rank, draws of a bootstrap."""
    from medcl.mil import evaluation

    draw = evaluation.group_bootstrap
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "group_bootstrap", lambda *given, **more: draw(*given, **{**more, "samples": 20}))
        patch.setattr("medcl.runtime.pool.available_cores", lambda: 1)
        patch.setattr("medcl.losses.diagnostics.ROWS", 4)
        yield


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """Twelve small synthetic subjects in the Decathlon's layout."""
    from medcl.dataset.phantom import write_phantoms

    return write_phantoms(tmp_path_factory.mktemp("phantoms"), 12, shape=(28, 24, 24))


@pytest.fixture(scope="session")
def runs(tmp_path_factory, phantoms) -> Path:
    """A pretraining and a fine-tuning from it: `pre` and `fine` in one folder."""
    from small_runs import finetuning, pretraining

    import medcl

    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDCL_STORE", str(folder / "store"))
        medcl.pretrain(pretraining(phantoms, folder / "pre"))
        medcl.finetune(finetuning(phantoms, folder / "fine", init=str(folder / "pre")))
    return folder


def case_for(name: str, shape=(8, 8, 8), spacing=(1.0, 1.0, 1.0), label: bool = True, **more) -> Case:
    """A case without files, for what looks at headers only."""
    affine = np.diag([*spacing, 1.0])
    return Case(
        id=name,
        subject=more.pop("subject", name),
        image=(f"{name}.nii.gz",),
        label=f"{name}_gt.nii.gz" if label else None,
        shape=tuple(shape),
        spacing=tuple(spacing),
        orientation="RAS",
        affine=tuple(map(tuple, affine.tolist())),
        **more,
    )


def manifest_for(cases, root="nowhere", names=None) -> Manifest:
    return Manifest(str(root), "names", "by names.", tuple(cases), (), names or {})
