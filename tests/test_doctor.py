"""What the doctor advises follows from what it finds."""

from __future__ import annotations

import copy
import json
import os

import pytest

from medcl import DoctorConfig
from medcl.checkup import advice, allocator, describe, doctor
from medcl.cli import main

SOUND = {
    "versions": {"torch": "2.13.0"},
    "devices": {"cores": 8, "memory_gb": 64.0, "cpu_bf16": False, "gpus": [], "nvidia_seen": False, "cuda_build": None},
    "threads": {"torch": 8, "OMP_NUM_THREADS": "", "OMP_WAIT_POLICY": "PASSIVE", "load": 0.3},
    "allocator": {"name": "tcmalloc", "library": "", "hugetlb": False},
    "store": {"path": "store", "free_gb": 500.0, "write_mb_s": 300.0, "crops_s": 900.0},
}
CARD = {"name": "A100", "memory_gb": 80.0, "free_gb": 79.0, "bf16": True}


def changed(**parts) -> dict:
    facts = copy.deepcopy(SOUND)
    for part, values in parts.items():
        facts[part].update(values)
    return facts


def test_a_sound_machine_gets_no_advice():
    assert advice(SOUND) == []
    assert "Nothing to change." in describe({**SOUND, "advice": []})


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("versions", {"monai": "missing"}, "pip install monai"),
        ("devices", {"nvidia_seen": True}, "install a CUDA build"),
        ("devices", {"nvidia_seen": True, "cuda_build": "12.8"}, "mend driver"),
        ("devices", {"gpus": [{**CARD, "free_gb": 3.0}]}, "end what else runs"),
        ("threads", {"OMP_WAIT_POLICY": ""}, "OMP_WAIT_POLICY=PASSIVE"),
        ("threads", {"torch": 1}, "unset OMP_NUM_THREADS"),
        ("threads", {"load": 12.0}, "busy"),
        ("allocator", {"name": "glibc", "library": "/usr/lib/libtcmalloc_minimal.so.4"}, "LD_PRELOAD=/usr/lib/libtcm"),
        ("allocator", {"name": "glibc"}, "libtcmalloc-minimal4"),
        ("store", {"free_gb": 3.0}, "MEDCL_STORE"),
        ("store", {"crops_s": 9.0}, "local disk"),
    ],
)
def test_each_fault_has_its_remedy(part, values, words):
    assert words in " ".join(advice(changed(**{part: values})))


def test_a_gpu_makes_the_cpus_settings_unimportant():
    facts = changed(devices={"gpus": [CARD]}, threads={"OMP_WAIT_POLICY": ""}, allocator={"name": "glibc"})
    assert advice(facts) == []


def test_it_looks_at_this_machine_and_leaves_nothing(tmp_path, capsys):
    assert main(["doctor", "--store", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["store"]["path"] == str(tmp_path) and list(tmp_path.iterdir()) == []
    assert facts["store"]["crops_s"] > 0 and facts["step"]["seconds"] > 0
    assert facts["versions"]["torch"] != "missing"
    assert facts["threads"]["OMP_WAIT_POLICY"] == os.environ["OMP_WAIT_POLICY"]
    text = describe(doctor(DoctorConfig(store=str(tmp_path), quick=True)))
    assert "Step" not in text and "Allocator" in text


def test_a_preloaded_allocator_is_seen(monkeypatch):
    import pathlib

    real = pathlib.Path.read_text
    maps = "7f00 r-xp /usr/lib/libtcmalloc_minimal.so.4.5.10\n"
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self, *a, **k: maps if str(self) == "/proc/self/maps" else
                        real(self, *a, **k))  # fmt: skip
    assert allocator()["name"] == "tcmalloc"
