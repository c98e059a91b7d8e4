"""Slides and images to tiles, features and maps of attention; the real slide end to end."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from conftest import REAL
from PIL import Image

pytest.importorskip("h5py", reason="the extra `mil` is not installed")
pytest.importorskip("tiffslide", reason="the extra `mil` is not installed")

from small_bags import picture, table

import medcl
from medcl import PretrainConfig
from medcl.config.mil import MILFitConfig, MILPredictConfig, MILPrepareConfig, MILPretrainConfig
from medcl.errors import MedclError
from medcl.mil.bags import read_features
from medcl.mil.instances import slices, sub_volumes
from medcl.mil.patch_encoders import instance_encoder
from medcl.mil.prepare import cells_of_volume, prepare_bags, step_of
from medcl.mil.pretrain import pretrain_patches
from medcl.mil.slides import Slide, Tiling, side_of, tiles, tissue_mask
from medcl.mil.stage import fit, predict_bags
from medcl.report.attention import draw_attention, geojson, rank_share
from medcl.report.bags import write_prediction_report
from medcl.transforms.patches import random_patch_view, restained

SLIDE = REAL / "slides" / "cmu-1-small-region.svs"
BROKEN = REAL / "slides" / "broken.svs"
real = pytest.mark.skipif(not SLIDE.exists(), reason="the real scans and slides do not lie beside this checkout")


def test_tissue_is_what_is_coloured(tmp_path):
    slide = Slide(picture(tmp_path / "a.png"))
    mask = tissue_mask(slide.thumbnail())
    assert mask[:, :120].mean() > 0.98 and mask[:, 136:].mean() < 0.02
    assert not tissue_mask(np.full((50, 50, 3), 255, np.uint8)).any()
    full = np.asarray(Image.open(picture(tmp_path / "b.png", (230, 120, 170), (180, 90, 160))))
    assert tissue_mask(full).all()  # all tissue: nothing to tell it from


def test_tiles_cover_tissue_only_and_read_back_what_lies_there(tmp_path):
    path = picture(tmp_path / "a.png")
    slide, tiling = Slide(path), Tiling(pixels=32, mpp=0.0, tissue=0.5)
    corners = tiles(slide, tiling, side_of(slide, tiling))
    assert len(corners) == 16 and corners[:, 0].max() < 128
    pixels = np.asarray(Image.open(path))
    for x, y in corners:
        np.testing.assert_array_equal(slide.read(int(x), int(y), 32.0, 32), pixels[y : y + 32, x : x + 32])
    overlapping = tiles(slide, Tiling(32, 0.0, overlap=0.5, tissue=0.5), 32.0)
    assert len(overlapping) > 3 * len(corners)
    small = Slide(picture(tmp_path / "s.png", size=(20, 10)))
    assert len(tiles(small, Tiling(32, 0.0, tissue=0.0), 32.0)) == 1
    assert small.read(-6, -11, 32.0, 32).shape == (32, 32, 3)


def test_resolution_decides_how_much_a_tile_shows(tmp_path):
    slide = Slide(picture(tmp_path / "a.png"))
    assert side_of(slide, Tiling(64, 1.0)) == 64  # a plain image says nothing: its pixels as they are
    assert side_of(slide, Tiling(64, 1.0), known_mpp=0.5) == 128
    slide.path = slide.path.with_suffix(".svs")
    with pytest.raises(MedclError, match="--slide_mpp"):
        side_of(slide, Tiling(64, 1.0))
    assert slide.read(0, 0, 128.0, 64).shape == (64, 64, 3)


@real
def test_a_real_slide_from_pixels_to_a_heat_map(tmp_path):
    picture(tmp_path / "glass.png", (250, 250, 250))
    picture(tmp_path / "b.png")
    source = table(
        tmp_path, ["slide", SLIDE, "a", "1"], ["broken", BROKEN, "a", "2"], ["glass", "glass.png", "b", "3"],
        ["b", "b.png", "b", "4"], ["lost", "lost.svs", "b", "5"],
    )  # fmt: skip
    options = {"encoder": "resnet18", "tile": 64, "mpp": 2.0, "slide_mpp": 1.0, "tissue": 0.1}
    folder = prepare_bags(MILPrepareConfig(source, str(tmp_path / "out"), **options))
    aside = json.loads((folder / "aside.json").read_text())
    assert set(aside) == {"broken", "glass", "lost"}
    assert "broken.svs" in aside["broken"] and "no tissue" in aside["glass"] and "no such file" in aside["lost"]
    found = read_features(folder / "features" / "slide.h5")
    assert found.h.shape == (len(found.coordinates), 512) and len(found.h) > 20
    assert found.coordinates[:, 0].max() < 2220 and found.coordinates[:, 1].max() < 2967
    assert found.meta["patch_size_level0"] == pytest.approx(64 * 2.0 / 0.499)
    before = (folder / "features" / "slide.h5").stat().st_mtime_ns
    prepare_bags(MILPrepareConfig(source, str(tmp_path / "out"), **options))
    assert (folder / "features" / "slide.h5").stat().st_mtime_ns == before  # extracted once
    prepare_bags(MILPrepareConfig(source, str(tmp_path / "out"), **{**options, "seed": 1}))
    again = read_features(folder / "features" / "slide.h5")
    assert again.encoder != found.encoder and not np.allclose(again.h, found.h)  # another encoder


def test_images_are_classified_and_the_attention_drawn(tmp_path):
    rows = []
    for number in range(8):
        spot = number % 2
        path = picture(tmp_path / f"{number}.png", (230, 120, 170), (215, 130, 180))
        pixels = np.array(Image.open(path))
        if spot:
            pixels[32:64, 192:224] = (60, 20, 140)
        Image.fromarray(pixels).save(path)
        rows.append([f"i{number:02d}", path.name, ("benign", "malignant")[spot], f"g{number // 2}"])
    source = table(tmp_path, *rows)
    run = pretrain_patches(
        MILPretrainConfig(source, str(tmp_path / "enc"), width=0.125, tile=32, mpp=0, steps=4, batch_size=8)
    )
    prepare = {"encoder": str(run), "tile": 32, "mpp": 0.0}
    folder = prepare_bags(MILPrepareConfig(source, str(tmp_path / "bags"), **prepare))
    fitted = fit(MILFitConfig(str(folder), str(tmp_path / "fit"), folds=2, epochs=20, lr=5e-3, options={"hidden": 16}))
    told = draw_attention(predict_bags(MILPredictConfig(str(fitted), str(folder), str(tmp_path / "told"))))
    assert Image.open(told / "attention" / "i01.png").size[0] >= 1000
    areas = json.loads((told / "attention" / "i01.geojson").read_text())["features"]
    assert len(areas) == 32
    tops = []
    for number in range(1, 8, 2):
        best = max(
            json.loads((told / "attention" / f"i{number:02d}.geojson").read_text())["features"],
            key=lambda area: area["properties"]["measurements"]["attention"],
        )
        tops.append(best["geometry"]["coordinates"][0][0] == [192, 32])
    assert np.mean(tops) >= 0.9  # the planted spot, found from the bags' labels


def test_geojson_is_closed_polygons_in_slide_pixels():
    corners, attention = np.array([[0, 0], [100, 50]]), np.array([0.2, 0.8])
    made = geojson(corners, 64.0, attention, rank_share(attention), np.zeros((2, 3), int))
    assert json.loads(json.dumps(made))["type"] == "FeatureCollection"
    ring = made["features"][1]["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1] == [100, 50] and ring[2] == [164.0, 114.0]
    assert made["features"][1]["properties"]["measurements"]["share attended less"] == 1.0


def test_a_folder_of_patches_and_feature_files_are_bags_too(tmp_path):
    (tmp_path / "patches").mkdir()
    for number in range(3):
        picture(tmp_path / "patches" / f"{number}.png", size=(40, 40))
    np.savez(tmp_path / "ready.npz", features=np.ones((4, 512), np.float32))
    source = table(tmp_path, ["p", "patches", "a", "1"], ["r", "ready.npz", "b", "2"])
    folder = prepare_bags(MILPrepareConfig(source, str(tmp_path / "out"), tile=32))
    assert read_features(folder / "features" / "p.h5").h.shape == (3, 512)
    rows = list(csv.DictReader((folder / "bags.csv").read_text().splitlines()))
    assert rows[1]["path"].endswith("ready.npz") and rows[0]["path"] == "features/p.h5"


def test_volumes_are_bags_of_sub_volumes_with_a_map_on_their_own_grid(tmp_path, phantoms):
    import nibabel as nib

    options = {"hidden": 16, "size": [16, 16, 16]}
    run = medcl.pretrain(
        PretrainConfig(str(phantoms), str(tmp_path / "pre"), width=4, steps=2, batch_size=2, options=options)
    )
    scans = sorted((phantoms / "imagesTr").glob("*.nii.gz"))[:6]
    rows = [[f"v{n}", path, ("a", "b")[n % 2], f"g{n}"] for n, path in enumerate(scans)]
    source = table(tmp_path, *rows)
    folder = prepare_bags(MILPrepareConfig(source, str(tmp_path / "bags"), encoder=str(run)))
    found = read_features(folder / "features" / "v0.h5")
    assert found.coordinates.shape[1] == 3 and len(found.h) > 1
    fitted = fit(MILFitConfig(str(folder), str(tmp_path / "fit"), folds=3, epochs=2))
    told = draw_attention(predict_bags(MILPredictConfig(str(fitted), str(folder), str(tmp_path / "told"))))
    image, scan = nib.load(told / "attention" / "v0.nii.gz"), nib.load(scans[0])
    assert image.shape == scan.shape
    np.testing.assert_allclose(image.affine, scan.affine, atol=1e-4)
    assert float(np.asarray(image.dataobj).max()) >= 1
    with pytest.raises(MedclError, match="none of 6"):
        prepare_bags(MILPrepareConfig(source, str(tmp_path / "other"), encoder="resnet18"))


def test_sub_volumes_cover_a_volume_of_any_size():
    image = np.random.default_rng(0).normal(size=(20, 9, 33)).astype(np.float32)
    found = sub_volumes(image, (8, 16, 16))
    seen = np.zeros(image.shape, bool)
    blocks = np.concatenate(list(found.read()))
    for corner, block in zip(found.coordinates, blocks, strict=True):
        part = image[tuple(slice(c, c + n) for c, n in zip(corner, (8, 16, 16), strict=True))]
        np.testing.assert_array_equal(block[0][tuple(slice(0, n) for n in part.shape)], part)
        seen[tuple(slice(c, c + n) for c, n in zip(corner, (8, 16, 16), strict=True))] = True
    assert seen.all() and blocks.shape[1:] == (1, 8, 16, 16)


def test_patch_views_are_functions_of_their_seed():
    images, seeds = torch.rand(3, 3, 24, 24), torch.tensor([1, 2, 3])
    views = random_patch_view(images, seeds)
    assert torch.equal(views, random_patch_view(images, seeds)) and views.shape == images.shape
    torch.testing.assert_close(views[1:2], random_patch_view(images[1:2], seeds[1:2]))
    assert not torch.allclose(views, random_patch_view(images, seeds + 1))
    assert float(views.min()) >= 0 and float(views.max()) <= 1


def test_staining_anew_with_no_strength_changes_brightness_only():
    images = torch.rand(2, 3, 8, 8) * 0.8 + 0.1
    ratio = restained(images, torch.tensor([1, 2]), strength=0.0, shift=0.0) / images
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet19", "timm:resnet18", "nothing.here:make"])
def test_encoders_that_are_not_there_are_told(name):
    with pytest.raises(MedclError, match="--encoder"):
        instance_encoder(name)


def test_a_users_own_module_is_an_encoder():
    encoder = instance_encoder("torch.nn:Flatten")
    assert encoder(torch.rand(2, 3, 4, 4)).shape == (2, 48) and encoder.identity.startswith("torch.nn:Flatten")


@pytest.mark.parametrize("change", [{"tile": 4}, {"overlap": 1.0}, {"tissue": 2.0}, {"mpp": -1.0}], ids=str)
def test_settings_that_cannot_work_are_refused(tmp_path, change):
    with pytest.raises(MedclError, match=f"--{next(iter(change))}"):
        prepare_bags(MILPrepareConfig(table(tmp_path, ["a", "a.png", "x", "1"]), str(tmp_path / "out"), **change))


def test_a_cell_has_the_mean_and_maximum_of_every_map_at_its_place(tmp_path):
    from medcl.mil.patch_encoders import VolumeEncoder
    from medcl.networks.backbones import BackboneSpec, build_backbone

    torch.manual_seed(0)
    encoder = VolumeEncoder(build_backbone(BackboneSpec(strides=((2, 2, 2),) * 3, width=4))).eval()
    image = np.random.default_rng(0).normal(size=(14, 16, 9)).astype(np.float32)
    image[:4, :4, :4] = 0.5  # without contrast
    h, corners = cells_of_volume(image, 2 * image, encoder, (4, 4, 4), "cpu")
    grid = {tuple(c) for c in corners.tolist()}
    assert grid == {(x, y, z) for x in (0, 4, 8, 12) for y in (0, 4, 8, 12) for z in (0, 4, 8)} - {(0, 0, 0)}
    padded = np.pad(image, [(0, 2), (0, 0), (0, 7)], mode="edge")
    maps = [2 * torch.from_numpy(padded)[None, None], *encoder.backbone.encode(torch.from_numpy(padded)[None, None])]
    row = corners.tolist().index([8, 4, 0])
    at = 0
    for map_ in maps[:3]:  # of 16, 8 and 4 cells along the first axis
        n = 4 // (16 // map_.shape[2])
        part = map_[0][:, 2 * n : 3 * n, n : 2 * n, :n].detach().flatten(1)
        for wanted in [part.mean(1), part.amax(1)] if n > 1 else [part.mean(1)]:
            np.testing.assert_allclose(h[row, at : at + len(wanted)], wanted, rtol=1e-4, atol=1e-5)
            at += len(wanted)
    assert h.shape[1] == at + sum(m.shape[1] for m in maps[3:]) and np.isfinite(h).all()
    few, _ = cells_of_volume(image, 2 * image, encoder, (4, 4, 4), "cpu", maps=1)
    np.testing.assert_array_equal(few, h[:, : 2 + 2 * 4])
    near, at = cells_of_volume(image, 2 * image, encoder, (4, 4, 4), "cpu", maps=1, step=(2, 2, 2), pool="mean")
    of = {tuple(c): row for c, row in zip(at.tolist(), near, strict=True)}
    np.testing.assert_allclose(of[(8, 4, 0)], few[row][[0, 2, 3, 4, 5]], rtol=1e-4, atol=1e-5)
    finest = maps[1][0, :, 3:5, 1:3, 0:2].detach().flatten(1).mean(1)
    np.testing.assert_allclose(of[(6, 2, 0)][1:], finest, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of[(6, 2, 0)][0], 2 * image[6:10, 2:6, :4].mean(), rtol=1e-4, atol=1e-5)
    assert max(c[0] for c in of) == 10 and max(c[2] for c in of) == 6  # the last step holds a part of the image
    coarse, _ = cells_of_volume(image, image, encoder, (2, 2, 2), "cpu", step=(1, 1, 1))
    assert np.isfinite(coarse).all()


def test_an_overlap_that_is_no_whole_part_of_a_cell_is_told():
    assert step_of((4, 4, 8), 0.5) == (2, 2, 4) and step_of((3, 3, 3), 0) == (3, 3, 3)
    with pytest.raises(MedclError, match="--overlap"):
        step_of((3, 3, 3), 0.5)
    with pytest.raises(MedclError, match="--overlap"):
        step_of((8, 8, 8), 0.3)


def test_a_volume_is_a_bag_of_cells_or_of_slices_too(tmp_path, phantoms, runs):
    import nibabel as nib

    run = runs / "pre"
    scans = sorted((phantoms / "imagesTr").glob("*.nii.gz"))[:4]
    source = table(tmp_path, *[[f"v{n}", path, ("a", "b")[n % 2], f"g{n}"] for n, path in enumerate(scans)])
    found = {}
    for name, encoder, instances in (
        ("cells", str(run), "cells"), ("thick", str(run), "slices"), ("flat", "resnet18", "slices"),
    ):  # fmt: skip
        folder = prepare_bags(
            MILPrepareConfig(source, str(tmp_path / name), encoder=encoder, instances=instances, tile=32)
        )
        fitted = fit(MILFitConfig(str(folder), str(tmp_path / f"{name}-fit"), folds=2, epochs=1))
        one = (folder / "bags.csv").read_text().splitlines()[:2]
        (folder / "bags.csv").write_text("\n".join(one) + "\n")
        told = predict_bags(MILPredictConfig(str(fitted), str(folder), str(tmp_path / f"{name}-told")))
        write_prediction_report(draw_attention(told))
        heat, scan = nib.load(told / "attention" / "v0.nii.gz"), nib.load(scans[0])
        assert heat.shape == scan.shape and np.allclose(heat.affine, scan.affine, atol=1e-4)
        assert (told / "report.html").read_text().count("data:image/png") == 1
        found[name] = read_features(folder / "features" / "v0.h5")
    assert len(found["cells"].h) > 50 and found["cells"].encoder.endswith(":cells-4x4x4-placed")
    # slices differ in z alone, and of the 2D encoder every one is an instance
    assert np.ptp(found["thick"].coordinates, axis=0)[:2].tolist() == [0, 0] and len(found["thick"].h) > 1
    assert len(found["flat"].h) == min(nib.as_closest_canonical(nib.load(scans[0])).shape[2], len(found["flat"].h))
    assert found["flat"].h.shape[1] == 512
    with pytest.raises(MedclError, match="none of 4"):
        prepare_bags(MILPrepareConfig(source, str(tmp_path / "no"), encoder="resnet18", instances="cells"))


def test_slices_are_upright_and_in_order():
    volume = np.zeros((8, 8, 4), np.float32)
    volume[6:, 6:, 1] = 100  # to the patient's right and front
    volume[:, :, 3] = np.arange(8)[:, None]
    found = slices(volume, 16)
    assert found.coordinates.tolist() == [[0, 0, 1], [0, 0, 3]]  # the others are empty
    first, second = np.concatenate(list(found.read()))[:, 0].astype(int)
    assert first[:3, :3].min() > 200 and first[8:].max() == 0  # right on the left, front up
    assert (np.diff(second[0]) <= 0).all()


def test_a_change_of_the_instances_extracts_anew(tmp_path):
    picture(tmp_path / "a.png")
    source = table(tmp_path, ["a", "a.png", "x", "1"])
    for tile, count in ((64, 4), (32, 16)):
        folder = prepare_bags(MILPrepareConfig(source, str(tmp_path / "out"), tile=tile, mpp=0.0, tissue=0.5))
        assert len(read_features(folder / "features" / "a.h5").h) == count
