"""Where instances lie: planted grids of tiles, what files say of them, and the map that TransMIL makes of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

h5py = pytest.importorskip("h5py", reason="the extra `mil` is not installed")

from medcl.mil.bags import Features, read_features, write_features  # noqa: E402
from medcl.mil.classifier import collate  # noqa: E402
from medcl.mil.instances import sub_volumes  # noqa: E402
from medcl.mil.places import cells_of  # noqa: E402
from medcl.mil.training import rows_of, subset_of  # noqa: E402
from medcl.mil.transmil import PositionEncoding  # noqa: E402

TILE = 256
CONTOURS = ((0, 0), (1021, 2051))  # of the two, the smallest gaps are 3 and 3


def grid(columns: int = 10, rows: int = 10, start=(0, 0), step: float = TILE) -> np.ndarray:
    return np.array([[round(start[0] + i * step), round(start[1] + j * step)] for j in range(rows)
                     for i in range(columns)])  # fmt: skip


def index(columns: int = 10, rows: int = 10) -> np.ndarray:
    return np.array([[i, j] for j in range(rows) for i in range(columns)])


def cells(where: np.ndarray, meta: dict | None = None) -> np.ndarray:
    found = cells_of(Features(np.zeros((len(where), 1), np.float32), where, "", meta))
    assert found is not None
    return found


def assert_grid(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal but for where the first lies."""
    np.testing.assert_array_equal(found - found[0], wanted - wanted[0])


@pytest.mark.parametrize("meta", [None, {"patch_size": TILE}], ids=["nothing said", "the tile's size said"])
@pytest.mark.parametrize(
    "starts", [CONTOURS, CONTOURS[::-1], ((0, 0), (128, 6000)), ((0, 0), (1021, 2051), (9313, 77), (40100, 33333))]
)
def test_contours_with_grids_of_their_own_are_grids(starts, meta):
    where = np.concatenate([grid(start=start) for start in starts])
    found = cells(where, meta)
    for number in range(len(starts)):
        assert_grid(found[number * 100 : number * 100 + 100], index())
    apart = (where - where.min(0)) / TILE
    assert np.abs(found - apart).max() <= 1  # and the grids lie where they lie
    if len(starts) == 2:
        assert np.prod(found.max(0) + 1) <= 10 * len(where)


def test_the_order_of_the_tiles_changes_nothing():
    where = np.concatenate([grid(start=start) for start in CONTOURS])
    order = np.random.default_rng(0).permutation(len(where))
    np.testing.assert_array_equal(cells(where)[order], cells(where[order]))


def test_tissue_with_holes_is_a_grid():
    kept = np.random.default_rng(0).random(400) < 0.6
    assert_grid(cells(grid(20, 20)[kept]), index(20, 20)[kept])


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {"patch_size_level0": 256.0, "overlap": 0.5},  # medcl
        {"patch_size_level0": 256, "patch_size": 128, "overlap": 64},  # TRIDENT: pixels of the tile
        {"patch_size": 64, "patch_level": 1, "downsample": np.array([4.0, 4.0])},  # CLAM does not say the step
    ],
    ids=["nothing said", "medcl", "TRIDENT", "CLAM"],
)
def test_overlapping_tiles_are_one_cell_apart(meta):
    assert_grid(cells(grid(12, 7, step=128), meta), index(12, 7))


@pytest.mark.parametrize(
    "meta,apart",
    [
        ({"patch_size": 256, "patch_level": 0}, 2),
        ({"patch_size": 256, "patch_level": 1, "downsample": (2.0, 2.0)}, 1),
        ({"patch_size": 256, "patch_level": 1}, 1),  # of a level whose factor nobody says: as the tiles lie
        ({"patch_size": "large"}, 1),
        ({"patch_size": 0}, 1),
        (None, 1),
    ],
)
def test_the_tile_that_a_file_says_is_taken_where_it_makes_sense(meta, apart):
    assert_grid(cells(grid(6, 6, step=512), meta), apart * index(6, 6))


def test_a_single_tile_and_tiles_in_a_row():
    for meta in (None, {"patch_size": TILE}):
        assert cells(np.array([[5000, 300]]), meta).tolist() == [[0, 0]]
        assert cells(np.array([[5000, 300]] * 3), meta).tolist() == [[0, 0]] * 3
        assert_grid(cells(grid(9, 1, (17, 40)), meta), index(9, 1))
        assert_grid(cells(grid(1, 9, (17, 40)), meta), index(1, 9))


@pytest.mark.parametrize("jitter", [1, 3, 20])
@pytest.mark.parametrize("meta", [None, {"patch_size": TILE}], ids=["nothing said", "the tile's size said"])
@pytest.mark.parametrize("whole", [True, False])
def test_jittered_tiles_are_a_grid(jitter, meta, whole):
    noise = np.random.default_rng(jitter).uniform(-jitter, jitter, (225, 2))
    assert_grid(cells(grid(15, 15) + (noise.round() if whole else noise), meta), index(15, 15))


@pytest.mark.parametrize("step", [170.67, 99.5, 512 / 3])
@pytest.mark.parametrize("said", [True, False])
def test_a_step_of_fractions_does_not_drift(step, said):
    """As tiles at a resolution between two levels are laid: their corners are rounded to pixels."""
    meta = {"patch_size_level0": step, "overlap": 0.0} if said else None
    assert_grid(cells(grid(300, 4, step=step), meta), index(300, 4))


def test_sub_volumes_lie_on_a_grid_whatever_the_rounding(tmp_path):
    image = np.random.default_rng(0).normal(size=(97, 40, 9)).astype(np.float32)
    found = sub_volumes(image, (8, 16, 16))
    write_features(tmp_path / "a.h5", Features(np.ones((len(found.coordinates), 2), np.float32), found.coordinates,
                                               "e", found.meta))  # fmt: skip
    kept = read_features(tmp_path / "a.h5")
    counts = [len(np.unique(c)) for c in found.coordinates.T]
    wanted = np.array(list(itertools.product(*map(range, counts))))
    np.testing.assert_array_equal(cells_of(kept), wanted)
    np.testing.assert_array_equal(cells(found.coordinates, {"size": kept.meta["size"]}), wanted)  # as stored before


def test_files_of_clam_are_read_with_their_tile(tmp_path):
    where = np.concatenate([grid(start=start, step=1024) for start in CONTOURS])
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((200, 3), np.float32), where
        for name, value in (("patch_size", 256), ("patch_level", 1), ("downsample", (4.0, 4.0))):
            file["coords"].attrs[name] = value
    found = cells_of(read_features(tmp_path / "clam.h5"))
    assert_grid(found[:100], index())
    assert_grid(found[100:], index())


def test_a_few_instances_of_a_bag_keep_their_places():
    bag = Features(np.zeros((400, 1), np.float32), grid(20, 20))
    rows = rows_of(bag, 12, np.random.default_rng(0))
    _, _, where = collate([subset_of(bag, rows)])
    np.testing.assert_array_equal(where[0], index(20, 20)[rows])


def dense(encoding: PositionEncoding, tokens: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """One map over everything, cell by cell."""
    planes, height, width = (int(n) + 1 for n in cells.amax(0)[[2, 0, 1]])
    total, count = torch.zeros(planes, height, width, tokens.shape[1]), torch.zeros(planes, height, width, 1)
    for token, (y, x, z) in zip(tokens, cells.tolist(), strict=True):
        total[z, y, x] += token
        count[z, y, x] += 1
    map_ = (total / count.clamp(min=1)).permute(0, 3, 1, 2)
    made = sum(convolution(map_) for convolution in encoding.convolutions)
    return torch.stack([token + made[z, :, y, x] for token, (y, x, z) in zip(tokens, cells.tolist(), strict=True)])


@pytest.mark.parametrize("dims", [2, 3])
def test_the_map_in_blocks_is_the_map(dims):
    torch.manual_seed(0)
    encoding = PositionEncoding(4)
    one = torch.randint(0, 30, (60, 3)) * torch.tensor([1, 1, int(dims == 3)])
    one[:3] = one[3]  # instances of one cell
    tokens = torch.randn(1, 60, 4, requires_grad=True)
    mask = torch.ones(1, 60, dtype=torch.bool)
    ours = encoding(tokens, mask, one[None, :, :dims])[0]
    slow = dense(encoding, tokens[0], one - one.amin(0))
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-5)
    weight = torch.randn(60, 4)
    grads = [torch.autograd.grad((made * weight).sum(), [tokens, *encoding.parameters()]) for made in (ours, slow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spread", [1, 3, 100])
def test_the_map_has_no_more_cells_than_a_multiple_of_the_instances(spread):
    encoding, sizes = PositionEncoding(2), []
    for convolution in encoding.convolutions:
        assert isinstance(convolution, nn.Conv2d)
        convolution.register_forward_hook(lambda _, given, made: sizes.append(given[0].numel() // 2))
    where = torch.arange(50)[:, None].repeat(1, 2) * spread  # along a diagonal
    encoding(torch.randn(1, 50, 2), torch.ones(1, 50, dtype=torch.bool), where[None])
    assert max(sizes) <= 484 * 50
