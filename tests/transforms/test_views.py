"""Views of a read: cut where they say, moved as their coordinates say, each with its own appearance."""

from __future__ import annotations

import pytest
import torch

from medcl.transforms.compose import STRONG_VIEWS
from medcl.transforms.correspondence import affine_of, grid_points, into, map_to_view, sample_at, view_to_map
from medcl.transforms.views import RandomView, cut_each

SPACING = (1.0, 1.0, 2.0)


def ramp(size, n=2):
    """An image whose value at a voxel is its place, by axis."""
    axes = torch.meshgrid(*(torch.arange(s, dtype=torch.float32) for s in size), indexing="ij")
    return torch.stack(axes)[None].repeat(n, 1, 1, 1, 1)


def test_still_views_are_slices_at_the_place_they_tell():
    read = torch.randn(3, 1, 10, 9, 8)
    view = RandomView((6, 5, 4), SPACING, "MR", None)
    images, where = view(read, torch.tensor([1, 2, 3]), 0)
    for image, place, row in zip(images, where, read, strict=True):
        i, j, k = place.long()
        assert torch.equal(image[0], row[0, i, j, k])
    other, _ = view(read, torch.tensor([1, 2, 3]), 1)
    assert not torch.equal(images, other)


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_moved_views_show_what_their_coordinates_say(flip):
    size = (20, 18, 12)
    view = RandomView((12, 12, 8), SPACING, "MR", None, 20.0, (0.8, 1.25), (flip,) * 3)
    images, where = view(ramp(size, 4), torch.arange(4), 0)
    last = torch.tensor(size).view(1, 3, 1, 1, 1) - 1
    inside = ((where >= 0) & (where <= last)).all(1, keepdim=True).expand_as(where)
    assert float(inside.float().mean()) > 0.5
    torch.testing.assert_close(images[inside], where[inside], atol=2e-3, rtol=0)


def test_a_view_is_a_function_of_its_seed_and_number():
    view = RandomView((8, 8, 8), SPACING, "MR", STRONG_VIEWS, 10.0)
    read, seeds = torch.randn(2, 1, 10, 10, 10), torch.tensor([5, 6])
    kept = read.clone()
    one, other = view(read, seeds, 0)[0], view(read, seeds, 0)[0]
    assert torch.equal(one, other) and torch.equal(read, kept)
    torch.testing.assert_close(view(read[1:], seeds[1:], 0)[0], one[1:])
    assert not torch.allclose(one, view(read, seeds, 1)[0])
    assert not torch.allclose(one, view(read, seeds + 1, 0)[0])


def test_a_view_larger_than_its_read_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        RandomView((8, 8, 8), SPACING, "MR", None)(torch.zeros(1, 1, 8, 8, 7), torch.tensor([1]), 0)


def test_crops_are_cut_row_by_row():
    volume = torch.randn(2, 3, 6, 6, 6)
    crops = cut_each(volume, torch.tensor([[0, 1, 2], [3, 3, 3]]), (3, 2, 3))
    assert torch.equal(crops[0], volume[0, :, 0:3, 1:3, 2:5]) and torch.equal(crops[1], volume[1, :, 3:6, 3:5, 3:6])


def test_the_map_behind_coordinates_is_found_and_inverted():
    view = RandomView((9, 8, 7), SPACING, "MR", None, 30.0, (0.7, 1.4), (0.5,) * 3)
    read, seeds = torch.zeros(3, 1, 12, 11, 10), torch.tensor([1, 2, 3])
    fields = [view(read, seeds, number)[1] for number in range(2)]
    maps = [affine_of(field) for field in fields]
    points = grid_points((9, 8, 7)).expand(3, -1, -1)
    matrix, origin = maps[0]
    told = points @ matrix.mT + origin[:, None]
    torch.testing.assert_close(told, fields[0].flatten(2).mT, atol=1e-4, rtol=0)
    there = into(points, *maps)
    torch.testing.assert_close(there @ maps[1][0].mT + maps[1][1][:, None], told, atol=1e-4, rtol=0)


def test_a_slice_goes_along_itself():
    field = ramp((5, 4, 1)) + torch.tensor([2.0, 3.0, 7.0]).view(1, 3, 1, 1, 1)
    matrix, origin = affine_of(field)
    assert torch.equal(matrix[0], torch.eye(3)) and origin[0].tolist() == [2, 3, 7]


def test_centres_of_map_voxels_lie_amid_the_voxels_they_cover():
    step = torch.tensor([2.0, 4.0, 1.0])
    assert map_to_view(torch.zeros(3), step).tolist() == [0.5, 1.5, 0.0]
    points = torch.rand(5, 3) * 10
    torch.testing.assert_close(view_to_map(map_to_view(points, step), step), points)


@pytest.mark.parametrize("size", [(5, 6, 7), (4, 5, 1)])
def test_samples_at_voxels_are_the_voxels(size):
    features = torch.randn(2, 3, *size)
    points = grid_points(size).expand(2, -1, -1)
    torch.testing.assert_close(sample_at(features, points), features.flatten(2).mT)
    between = sample_at(features, points[:, :1] + torch.tensor([0.25, 0, 0]))
    torch.testing.assert_close(between[:, 0], 0.75 * features[:, :, 0, 0, 0] + 0.25 * features[:, :, 1, 0, 0])
