"""What the path of a bag is taken for."""

from __future__ import annotations

import pytest

from medcl.mil.bags import Bag
from medcl.mil.instances import kind_of

KINDS = {
    "volume": ["a.nii", "a.nii.bz2", "a.mgz", "a.nhdr", "a.mha", "a.hdr", "a.dcm", "a.dcm.gz"],
    "slide": ["a.tif", "a.svs", "a.png"],
    "features": ["a.h5"],
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, names in KINDS.items() for name in names])
def test_the_kind_of_a_bag_is_told_by_its_file(tmp_path, name, kind):
    (tmp_path / name).touch()
    assert kind_of(Bag("b", tmp_path / name, None, "g")) == kind
