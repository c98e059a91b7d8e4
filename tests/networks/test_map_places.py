"""Where the voxels of a feature map lie: the centre of what they are sensitive to, in a view and in its mirror."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medcl.losses.pixel_contrast import IGNORED, voxel_classes
from medcl.losses.segmentation import shares
from medcl.mil.patch_encoders import VolumeEncoder
from medcl.networks.backbones import Backbone, BackboneSpec, build_backbone
from medcl.pretext.local_contrast import LocalContrast
from medcl.transforms.correspondence import first_place, grid_points, map_to_view

ISOTROPIC, THICK, FLAT = ((2, 2, 2),) * 3, ((2, 2, 1), (2, 2, 2), (2, 2, 1)), ((2, 2, 1),) * 3


def maps_of(net: Backbone, x):
    """Every map of encoder and decoder, how many voxels a step of it is, and where its first voxel is said to lie."""
    features = net.encode(x)
    yield from zip(features, net.reductions, net.offsets, [False] * len(features), strict=True)
    for block, (level, offset) in enumerate(zip(net.decoder_levels, net.decoder_offsets, strict=True), 1):
        yield net.decode(features, block), net.reductions[level], offset, True


def sensitivity(net: Backbone, size, inputs: int, most: int):
    """Centre of the squared gradient of voxels amid every map, less m * reduction: one triple a map."""
    x = torch.randn(inputs, 1, *size, requires_grad=True)
    axes = [torch.arange(n).double() for n in size]
    for feature, reduction, offset, decoded in maps_of(net, x):
        if max(reduction) > most:
            continue
        # some voxels amid the map; a repeated coarse voxel lies otherwise for its first copy than for its last
        middle = [[(n // 2) - k for k in ((0, 1) if n > 3 else (0,))] for n in feature.shape[2:]]
        found = []
        for m in torch.cartesian_prod(*map(torch.tensor, middle)).view(-1, 3).tolist()[:: 3 if decoded else 8]:
            value = (feature[:, :, m[0], m[1], m[2]] * torch.randn(feature.shape[:2])).sum()
            (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
            energy = gradient.double().square().sum((0, 1))
            centre = [(energy.sum([a for a in range(3) if a != b]) @ axes[b] / energy.sum()) for b in range(3)]
            found.append([float(c) - i * r for c, i, r in zip(centre, m, reduction, strict=True)])
        yield torch.tensor(found).mean(0), reduction, offset, decoded


@pytest.mark.parametrize(
    ("name", "strides", "size", "dims"),
    [
        ("unet", ISOTROPIC, (32, 32, 32), 3),
        ("unet", THICK, (32, 32, 12), 3),
        ("unet", FLAT, (32, 32, 3), 2),
        ("dynunet", ISOTROPIC, (32, 32, 32), 3),
        ("dynunet", THICK, (32, 32, 12), 3),
        ("dynunet", FLAT, (32, 32, 3), 2),
        ("swin_unetr", ISOTROPIC, (32, 32, 32), 3),
    ],
)
def test_offsets_are_the_measured_centres_of_sensitivity(name, strides, size, dims):
    """To a fifth of a step of the map, and 0.6 voxels after a decoder block, where two sources mix."""
    torch.manual_seed(0)
    swin = name == "swin_unetr"
    spec = BackboneSpec(name, 1, 2, strides, 12 if swin else 4, "layer" if swin else "instance", dims)
    # a window of attention spans a coarser map of this input: there it has no centre of its own
    inputs, most = (1, 4) if swin else (2, 8)
    runs = [list(sensitivity(build_backbone(spec).eval(), size, inputs, most)) for _ in range(1 if swin else 3)]
    for measured in zip(*runs, strict=True):
        _, reduction, offset, decoded = measured[0]
        centre = torch.stack([m[0] for m in measured]).mean(0)
        for place in set(zip(offset, reduction, strict=True)):  # axes alike are measured together
            alike = [axis for axis in range(3) if (offset[axis], reduction[axis]) == place]
            allowed = 0.2 * place[1] + (0.6 if decoded else 0.1)
            assert abs(float(centre[alike].mean()) - place[0]) < allowed, (reduction, decoded, centre, offset)


def centre_of_response(net: Backbone, image, place, level: int, given=None):
    """Where, by a map's own places, an impulse at `place` changes it: the centre of the squared change."""
    marked = image.clone()
    marked[:, :, place[0], place[1], place[2]] += 5
    with torch.no_grad():
        change = (net.encode(marked)[level] - net.encode(image)[level]).square().sum((0, 1)).double()
    points = grid_points(change.shape).double()
    m = (points * change.flatten()[:, None]).sum(0) / change.sum()
    step = torch.tensor(net.reductions[level]).double()
    first = torch.tensor(first_place(net.offsets[level], net.reductions[level], step.tolist())).double()
    return map_to_view(m, step, first if given is None else (step - 1) / 2)


@pytest.mark.parametrize("name", ["unet", "dynunet"])
def test_an_impulse_is_met_at_corresponding_places_of_a_view_and_its_mirror_image(name):
    torch.manual_seed(0)
    net = build_backbone(BackboneSpec(name, strides=ISOTROPIC, width=4, norm="layer")).eval()
    level = net.reductions.index((8, 8, 8))
    image, apart, before = torch.randn(2, 1, 40, 40, 40), [], []
    for k in range(8):  # every place within a voxel of the map
        place = (16 + k, 16 + (3 * k) % 8, 16 + (5 * k) % 8)
        mirrored = tuple(39 - p for p in place)
        for told, given in ((apart, None), (before, "amid")):
            one = centre_of_response(net, image, place, level, given)
            other = centre_of_response(net, image.flip(2, 3, 4), mirrored, level, given)
            told.append(one - (39 - other))
    assert float(torch.stack(apart).mean(0).abs().max()) < 2.0
    assert float(torch.stack(before).mean(0).abs().min()) > 5.0  # 7: where a voxel lies amid those it covers


def test_an_enlarged_view_is_shown_at_the_place_that_is_told():
    """A linear image, enlarged to the input: what lies at m * reduction + offset there is what the view shows."""
    size, larger, reduction, offset = (12, 10, 5), (24, 16, 5), (4, 2, 1), (0.5, -0.3, 0.0)
    step = [n * r / m for n, m, r in zip(size, larger, reduction, strict=True)]
    points = torch.tensor([[1.0, 2.0, 1.0], [3.0, 5.0, 4.0], [2.5, 4.0, 2.0]])
    at = map_to_view(points, torch.tensor(step), torch.tensor(first_place(offset, reduction, step)))
    for axis in range(3):
        ramp = torch.arange(float(size[axis])).view([-1 if a == axis else 1 for a in range(3)]).expand(size)
        seen = F.interpolate(ramp[None, None], larger, mode="trilinear").movedim(axis + 2, 0).flatten(1)[:, 0]
        place = points[:, axis] * reduction[axis] + offset[axis]
        low = place.floor().long()
        there = torch.lerp(seen[low], seen[(low + 1).clamp(max=len(seen) - 1)], place - low)
        torch.testing.assert_close(at[:, axis], there, atol=1e-4, rtol=0)


def test_regions_of_a_mirrored_view_lie_where_the_mirror_puts_them():
    from medcl.store.plan import Plan

    plan = Plan(volume_size=(32, 32, 32), patch_size=(32, 32, 32), strides=((2, 2, 2),) * 2)
    for name in ("unet", "dynunet"):
        net = build_backbone(BackboneSpec(name, strides=plan.strides, width=4))
        task = LocalContrast(net, plan, {"region": 2, "blocks": 1})
        matrix, origin = torch.eye(3).repeat(1, 2, 1, 1), torch.zeros(1, 2, 3)
        matrix[:, 1, 0, 0], origin[:, 1, 0] = -1, 31
        points, inside = task.corresponding(matrix, origin)
        reduction, offset = net.reductions[net.decoder_levels[0]], net.decoder_offsets[0]
        for view in range(2):
            place = points[:, view] * torch.tensor(reduction) + torch.tensor(offset)
            told = place[..., 0] if view == 0 else 31 - place[..., 0]
            if view == 0:
                wanted = told
        torch.testing.assert_close(told, wanted)
        assert inside.any() and not (points[:, 1][inside.expand_as(points[:, 1, ..., 0, 0])] < -0.5).any()


def slow_classes(target, weight, size, offset):
    """Shares of every voxel in a box around a map voxel's place, by fine sampling of the nearest voxels."""
    out = torch.full((len(target), *size), IGNORED)
    counts = [n / m for n, m in zip(target.shape[2:], size, strict=True)]
    fine = [(torch.arange(40) + 0.5) / 40 - 0.5] * 3
    for n in range(len(target)):
        for m in grid_points(size).long().tolist():
            index = [
                (m[a] * counts[a] + offset[a] + fine[a] * counts[a]).round().long().clamp(0, target.shape[a + 2] - 1)
                for a in range(3)
            ]
            x, y, z = index
            share = (target * weight)[n][:, x][:, :, y][:, :, :, z].mean((1, 2, 3))
            if float(share.max()) > 0.5 + 1e-6:
                out[n, m[0], m[1], m[2]] = share.argmax()
    return out


@pytest.mark.parametrize("offset", [(0.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.0, 0.25, -0.25)])
def test_classes_of_a_map_are_those_around_its_places(offset):
    torch.manual_seed(0)
    target = torch.softmax(4 * torch.randn(2, 3, 8, 6, 3), 1)
    weight = (torch.rand(2, 1, 8, 6, 3) < 0.95).float()
    found = voxel_classes(target, weight, (4, 3, 3), offset)
    assert torch.equal(found, slow_classes(target, weight, (4, 3, 3), offset))
    assert len(found.unique()) == 4
    whole = shares((torch.arange(8).view(1, 1, 8, 1, 1) >= 4).long().expand(1, 1, 8, 2, 2), 2)
    classes = voxel_classes(whole, torch.ones(1, 1, 8, 2, 2), (4, 1, 1), (0.0, 0.5, 0.5)).flatten()
    assert classes.tolist() == [0, 0, 1, 1]  # at 0, 2, 4 and 6
    edge = shares((torch.arange(8).view(1, 1, 8, 1, 1) >= 3).long().expand(1, 1, 8, 2, 2), 2)
    classes = voxel_classes(edge, torch.ones(1, 1, 8, 2, 2), (4, 1, 1), (0.0, 0.5, 0.5)).flatten()
    assert classes.tolist() == [0, 0, 1, 1]  # amid 2 and 3 there would be as much of either class


def test_networks_label_the_map_before_their_output_layer_where_that_layer_writes():
    """The output layer answers an impulse in the map at the place that its labels are taken from."""
    for name in ("unet", "dynunet"):
        torch.manual_seed(0)
        net = build_backbone(BackboneSpec(name, strides=ISOTROPIC, width=4)).eval()
        features = torch.randn(1, net.feature_channels, 8, 8, 8)
        marked = features.clone()
        marked[:, :, 4, 4, 4] += 3
        with torch.no_grad():
            change = (net.read_out(marked) - net.read_out(features)).square().sum((0, 1))
        reduction = change.shape[0] // 8
        axis = torch.arange(change.shape[0]).float()
        centre = change.sum((1, 2)) @ axis / change.sum()
        assert abs(float(centre) - (4 * reduction + net.feature_offset[0])) < 0.25


def test_cells_read_a_coarse_map_at_their_centre():
    class Planted(Backbone):
        """Two maps that hold the place of each of their voxels, one finer than a cell and one coarser."""

        def __init__(self):
            torch.nn.Module.__init__(self)
            self.spec = BackboneSpec()
            self.reductions, self.offsets = ((2, 2, 2), (8, 8, 8)), ((0.0,) * 3, (0.0,) * 3)

        def encode(self, x):
            return [r[0] * grid_points([n // r[0] for n in x.shape[2:]]).T.view(1, 3, *[n // r[0] for n in x.shape[2:]])
                    for r in self.reductions]  # fmt: skip

        monai_arguments = encoder_modules = head_modules = decoder_modules = decode = None

    Planted.__abstractmethods__ = frozenset()
    volume = torch.zeros(1, 1, 32, 32, 32)
    found, grid = VolumeEncoder(Planted()).cells(volume, (4, 4, 4), volume)
    centre = 4 * grid_points(grid) + 1.5
    coarse = found[:, -3:]
    inner = (centre < 24).all(1)  # beyond the last voxel of the map there is its border
    torch.testing.assert_close(coarse[inner], centre[inner])
    assert math.prod(grid) == len(found)
