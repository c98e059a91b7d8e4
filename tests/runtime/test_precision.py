"""The precision that `auto` means: the faster one, and the same again when a run goes on."""

from __future__ import annotations

import pytest
import torch

from medcl.errors import MedclError
from medcl.runtime import precision
from medcl.runtime.precision import choose_precision, keep_precision, name_of


@pytest.fixture
def timed(monkeypatch):
    """A CPU that can multiply in bf16, and takes so many seconds for it."""
    seconds = {True: 1.0, False: 1.0}
    precision._bf16_is_faster.cache_clear()
    monkeypatch.setattr(precision, "_seconds", lambda bf16, repeats=4: seconds[bf16])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    yield seconds
    precision._bf16_is_faster.cache_clear()


@pytest.mark.parametrize(("bf16", "chosen"), [(0.5, "bf16-mixed"), (0.95, "32-true"), (1.4, "32-true")])
def test_auto_takes_bf16_where_it_is_faster(timed, bf16, chosen):
    timed[True] = bf16
    assert choose_precision("auto", "cpu") == chosen


def test_a_cpu_without_bf16_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(precision, "_seconds", lambda *_: pytest.fail("timed"))
    assert choose_precision("auto", "cpu") == "32-true"


def test_a_run_goes_on_as_it_began_whatever_the_clock_says(timed, tmp_path):
    timed[True] = 0.5
    keep_precision(tmp_path, choose_precision("auto", "cpu"), "cpu")
    timed[True] = 2.0
    precision._bf16_is_faster.cache_clear()  # another process
    assert choose_precision("auto", "cpu", tmp_path) == "bf16-mixed"
    assert choose_precision("32", "cpu", tmp_path) == "32-true"
    assert choose_precision("auto", "cpu") == "32-true"


def test_the_timing_moves_no_random_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert precision._seconds(False, 1) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_names_go_back_and_forth_and_others_are_refused():
    for name, full in precision.NAMES.items():
        assert name_of(full) == name and choose_precision(name, "gpu") == full
    for wish in ("64", "16"):
        with pytest.raises(MedclError):
            choose_precision(wish, "cpu")


def test_both_stages_train_in_bf16_on_a_cpu(phantoms, tmp_path):
    import medcl
    from medcl import FinetuneConfig, PretrainConfig

    common = {"width": 4, "steps": 1, "batch_size": 1, "accelerator": "cpu", "precision": "bf16"}
    small = {"task": "pixcontrast", "options": {"size": [16, 16, 16]}}
    run = medcl.pretrain(PretrainConfig(str(phantoms), str(tmp_path / "pre"), **small, **common))
    fine = medcl.finetune(
        FinetuneConfig(str(phantoms), str(tmp_path / "fine"), init=str(run), labels=2, **common)
    )
    assert (fine / "weights").exists()
