"""A store at an fsspec address holds, and gives, what a local one does."""

from __future__ import annotations

import shutil

import fsspec
import numpy as np
import pytest

import medcl
from medcl import PrepareConfig
from medcl.errors import MedclError
from medcl.store import remote
from medcl.store.volumes import default_store, open_volume, store_folder


@pytest.fixture(params=["memory", "file"])
def address(request, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote._address.cache_clear()
    where = f"memory://{tmp_path.name}/store" if request.param == "memory" else f"file://{tmp_path}/far/store"
    yield where
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def prepared(phantoms, store):
    return medcl.prepare(PrepareConfig(str(phantoms), store=store, workers=1))[0]


def test_a_far_store_gives_the_same_volumes(address, phantoms, tmp_path, monkeypatch):
    near = prepared(phantoms, str(tmp_path / "near"))
    far = prepared(phantoms, address)
    system, top = fsspec.url_to_fs(address)
    assert sum(name.endswith("/meta.json") for name in system.find(top)) == len(far)

    shutil.rmtree(tmp_path / "cache")  # another machine: nothing local
    remote._address.cache_clear()
    monkeypatch.setattr("medcl.store.prepare.prepare_case", None)  # and nothing may be prepared anew
    again = prepared(phantoms, address)
    for one, other in zip(near, again, strict=True):
        a, b = open_volume(one.path), open_volume(other.path)
        assert a.meta == b.meta
        np.testing.assert_array_equal(a.image(), b.image())
        assert (one.path / "image.b2nd").read_bytes() == (other.path / "image.b2nd").read_bytes()


def test_a_volume_cut_off_before_it_was_sent_is_sent_later(address, phantoms):
    far = prepared(phantoms, address)
    system, _ = fsspec.url_to_fs(address)
    _, top = fsspec.url_to_fs(remote.origin_of(far[0].path))
    system.rm(f"{top}/meta.json")
    assert far[0].path.name not in remote.held(store_folder(address))
    prepared(phantoms, address)
    assert far[0].path.name in remote.held(store_folder(address))


def test_a_volume_that_is_not_there_says_so(address, phantoms):
    prepared(phantoms, address)
    with pytest.raises(MedclError, match="is not in the store"):
        open_volume(store_folder(address) / "ab" / "abc")


def test_the_environment_may_name_an_address(address, monkeypatch):
    monkeypatch.setenv("MEDCL_STORE", address)
    assert default_store() == store_folder(address) == store_folder("")


def test_an_unknown_protocol_is_told():
    with pytest.raises(MedclError, match="cannot be used"):
        store_folder("nowhere://bucket/store")


def test_a_local_store_is_never_sent_anywhere(phantoms, tmp_path):
    stored = prepared(phantoms, str(tmp_path))
    assert remote.origin_of(stored[0].path) == "" and remote.held(tmp_path) == set()
