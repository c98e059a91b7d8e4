"""A Dask cluster prepares what the local pool prepares, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

import medcl
from medcl import PrepareConfig
from medcl.errors import MedclError
from medcl.runtime.dask_pool import map_by_dask

pytest.importorskip("distributed")


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()
            and path.name in ("meta.json", "image.b2nd", "label.b2nd")}  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
        yield cluster.scheduler_address


def test_a_cluster_prepares_what_the_pool_prepares(cluster, phantoms, tmp_path):
    by_pool, _ = medcl.prepare(PrepareConfig(str(phantoms), store=str(tmp_path / "pool"), workers=1))
    by_dask, _ = medcl.prepare(PrepareConfig(str(phantoms), store=str(tmp_path / "dask"), dask=cluster))
    assert [item.case for item in by_pool] == [item.case for item in by_dask]
    first, second = contents(tmp_path / "pool"), contents(tmp_path / "dask")
    assert len(first) == 3 * len(by_pool)
    assert first == second


def test_a_volume_that_cannot_be_prepared_is_set_aside(cluster, phantoms, tmp_path):
    import shutil

    scans = shutil.copytree(phantoms, tmp_path / "scans")
    damaged = sorted((scans / "imagesTr").iterdir())[0]
    manifest = medcl.scan(medcl.ScanConfig(str(scans), str(tmp_path / "m.json"), quick=True))
    damaged.write_bytes(damaged.read_bytes()[:200])
    stored, _ = medcl.prepare(PrepareConfig(str(tmp_path / "m.json"), store=str(tmp_path / "store"), dask=cluster))
    assert len(stored) == len(manifest.cases) - 1


def test_no_scheduler_is_told_in_one_line(monkeypatch):
    from medcl.runtime import dask_pool

    monkeypatch.setattr(dask_pool, "WAIT", 1)
    with pytest.raises(MedclError, match="no Dask scheduler answers"):
        map_by_dask(len, ["a"], [0], "tcp://127.0.0.1:9")
