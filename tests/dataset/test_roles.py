from __future__ import annotations

import numpy as np
import pytest
from conftest import REAL
from scipy.ndimage import gaussian_filter

from medcl.dataset.roles import looks_like_labels
from medcl.io.volumes import read_volume


def regions(values: int, seed: int = 0, shape: tuple[int, ...] = (48, 40, 36)) -> np.ndarray:
    """A parcellation: background outside a ball, and in it the nearest of some points."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    points = rng.uniform(0, 1, (values, 3)) * shape
    nearest = ((grid[..., None, :] - points) ** 2).sum(-1).argmin(-1) + 1
    ball = (((grid - np.array(shape) / 2) / np.array(shape) * 2.2) ** 2).sum(-1) < 1
    return (nearest * ball).astype(np.int32)


@pytest.mark.parametrize("values", [1, 2, 5, 40])
@pytest.mark.parametrize("kind", ["u1", "i2", "f4", "f8"])
def test_parcellations_are_label_maps(values, kind):
    assert looks_like_labels(regions(values).astype(kind)) is True


def test_values_of_other_kinds_are_label_maps_too():
    assert looks_like_labels(regions(30) * 25)  # MM-WHS, FreeSurfer: large values
    assert looks_like_labels(regions(1).astype("u1") * 255)
    assert looks_like_labels(regions(3) * 0.9999)
    single = np.zeros((20, 20, 20), np.uint8)
    single[3, 4, 5] = single[9, 9, 9] = 1
    assert looks_like_labels(single)


def test_images_are_not():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (40, 40, 40))
    smooth = gaussian_filter(noise, 2)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    for image in (
        noise,
        smooth,
        (smooth * 255).round(),
        (smooth * 1000).astype("i2") - 500,
        (noise * 20 + 128).round().clip(0, 255),
    ):
        assert looks_like_labels(image.astype(np.float32)) is False
    assert looks_like_labels(regions(4, shape=noise.shape) + noise) is False
    # an 8-bit image in a box of air, as after skull stripping
    stripped = np.zeros((60, 60, 60))
    stripped[10:50, 10:50, 10:50] = (noise * 25 + 120).round().clip(1, 255)
    assert looks_like_labels(stripped.astype("u1")) is False
    assert looks_like_labels(regions(4) * -1.0) is False
    assert looks_like_labels(np.where(regions(2) > 0, np.nan, 0.0)) is False


def test_a_constant_array_is_neither():
    assert looks_like_labels(np.zeros((4, 4, 4))) is None


@pytest.mark.skipif(not (REAL / "ACDC").exists(), reason="the real scans and slides do not lie beside this checkout")
def test_real_images_and_labels():
    for path in sorted((REAL / "ACDC").rglob("*frame01*.nii.gz"))[:30]:
        assert looks_like_labels(read_volume([path]).array) is path.name.endswith("_gt.nii.gz")
    for path in sorted((REAL / "Task04_Hippocampus/imagesTr").glob("*.nii.gz"))[:60]:
        assert looks_like_labels(read_volume([path]).array) is False
        label = path.parents[1] / "labelsTr" / path.name
        assert looks_like_labels(read_volume([label]).array) is True
