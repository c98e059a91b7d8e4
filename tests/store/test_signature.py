"""Hashes and thumbnail of a volume: equal for equal voxels, and a damaged file is told."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from medcl.dataset.phantom import make_subject
from medcl.errors import MedclError
from medcl.store.signature import load_marks, load_thumbnail, save_signature, sign


@pytest.fixture(scope="module")
def volume():
    return np.asarray(make_subject((7, 0), shape=(44, 38, 36)).image)


def test_equal_values_hash_equally_whatever_axes_and_type(volume):
    volume = np.rint(volume)
    first, turned = sign(volume), sign(volume.astype(np.int16).transpose(2, 0, 1)[::-1])
    assert first.values == turned.values and first.voxels != turned.voxels
    assert sign(volume.astype(np.float64)).voxels == first.voxels
    other = volume.copy()
    other[0, 0, 0] += 1
    assert sign(other).values != first.values


def test_a_damaged_signature_is_told_with_its_remedy(volume, tmp_path):
    path = tmp_path / "signature.npz"
    save_signature(path, sign(volume))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("thumbnail.npy").header_offset
    start += 30 + sum(int.from_bytes(data[start + at : start + at + 2], "little") for at in (26, 28))
    data[start] = 0xFF  # no deflate stream begins so: zlib stops before the checksum is looked at
    path.write_bytes(data)
    load_marks(path)
    with pytest.raises(MedclError, match=r"is damaged.*Delete it"):
        load_thumbnail(path)


def test_whatever_byte_of_a_signature_changed_it_is_read_as_it_was_or_told(volume, tmp_path):
    path = tmp_path / "signature.npz"
    save_signature(path, sign(volume))
    data, marks, picture = path.read_bytes(), load_marks(path), load_thumbnail(path)
    told = 0
    for place in [*range(400), *range(len(data) - 300, len(data))]:  # headers and marks; the table at the end
        for change in (0x01, 0xFF):
            path.write_bytes(data[:place] + bytes([data[place] ^ change]) + data[place + 1 :])
            try:
                assert load_marks(path) == marks
                np.testing.assert_array_equal(load_thumbnail(path), picture)
            except MedclError:
                told += 1
    assert told > 500
