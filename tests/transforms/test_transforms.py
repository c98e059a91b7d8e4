"""Transforms replay, know nothing of their batch, and do what slow independent references say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_images import SEEDS, SHAPE, volumes
from scipy import ndimage, stats
from torch import Tensor

from medcl.transforms import (
    Compose,
    RandomBiasField,
    RandomBlur,
    RandomBrightnessContrast,
    RandomCoarseDropout,
    RandomGamma,
    RandomLowResolution,
    RandomNoise,
    RandomSpatial,
    RandomTransform,
    StrongAugmentation,
    ViewIntensity,
    mix,
    mix_seeds,
    noise_like,
    strong_augmentation,
    view_intensity,
)
from medcl.transforms.linear import bspline_matrix, gaussian_matrix, low_resolution_matrix
from medcl.transforms.random import _finalise, bernoulli, normal, uniform

EVERY = {
    "spatial": RandomSpatial(shear=0.2, translate=0.1, flip=(0.5,) * 3, elastic=(5, 2), p_affine=0.5, p_elastic=0.5),
    "spatial_label_linear": RandomSpatial(elastic=(5, 2), p_elastic=0.5, label_mode="linear"),
    "noise": RandomNoise((0.1, 0.3), 0.6),
    "blur": RandomBlur((0.5, 1.5), 0.6),
    "brightness_contrast": RandomBrightnessContrast(),
    "gamma": RandomGamma(probability=0.6),
    "gamma_inverted": RandomGamma(invert=True, retain_stats=False, probability=0.6),
    "low_resolution": RandomLowResolution((0.3, 0.9), p_axis=0.7, probability=0.6),
    "bias_field": RandomBiasField(probability=0.6),
    "coarse_dropout": RandomCoarseDropout(probability=0.6),
    "strong": strong_augmentation(),
    "weak": view_intensity(),
}


def flat(params: object) -> list[Tensor]:
    steps = params if isinstance(params, list) else [params]
    return [value for step in steps for value in step.values()]


# what holds of all of them


@pytest.mark.parametrize("name", EVERY)
def test_drawn_parameters_replay(name: str) -> None:
    transform, (image, label) = EVERY[name], volumes()
    before = image.clone(), label.clone()
    params = transform.draw(SEEDS, image.shape)
    first, first_label = transform.apply_both(image, label, params)
    again, again_label = transform.apply_both(image, label, params)
    called, called_label = transform(image, SEEDS, label)
    assert torch.equal(first, again) and torch.equal(first, called) and torch.equal(transform(image, SEEDS), first)
    assert torch.equal(first_label, again_label) and torch.equal(first_label, called_label)
    assert torch.equal(image, before[0]) and torch.equal(label, before[1]), "the input was written to"
    assert first.dtype == torch.float32 and first_label.dtype == label.dtype
    assert first.shape == image.shape and first_label.shape == label.shape
    assert torch.isfinite(first).all() and set(first_label.unique().tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_knows_nothing_of_its_batch(name: str) -> None:
    transform, (image, label) = EVERY[name], volumes()
    together, together_label = transform(image, SEEDS, label)
    for index in ([2], [5, 0, 3]):
        params = transform.draw(SEEDS[index], SHAPE)
        for mine, whole in zip(flat(params), flat(transform.draw(SEEDS, SHAPE)), strict=True):
            assert torch.equal(mine, whole[index])
        alone, alone_label = transform.apply_both(image[index], label[index], params)
        torch.testing.assert_close(alone, together[index], rtol=1e-5, atol=1e-5)
        assert torch.equal(alone_label, together_label[index])


@pytest.mark.parametrize("name", EVERY)
def test_other_seeds_draw_otherwise(name: str) -> None:
    image, _ = volumes(1)
    image = image.expand(16, -1, -1, -1, -1)
    out = EVERY[name](image, torch.arange(16))
    assert len({tuple(sample.flatten().tolist()) for sample in out}) > 3


@pytest.mark.parametrize("constant", [0.0, -3.0, 1e4])
@pytest.mark.parametrize("name", EVERY)
def test_constant_images_stay_finite(name: str, constant: float) -> None:
    out = EVERY[name](torch.full((8, 1, 9, 8, 7), constant), torch.arange(8))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 1, 7), (3, 4, 2), (1, 1, 1)])
@pytest.mark.parametrize("name", EVERY)
def test_thin_volumes_are_no_exception(name: str, shape: tuple[int, int, int]) -> None:
    image, label = volumes(4, shape)
    out, moved = EVERY[name](image, torch.arange(4), label, spacing=(5.0, 1.0, 1.0))
    assert out.shape == image.shape and moved.shape == label.shape and torch.isfinite(out).all()


def test_zero_probability_changes_nothing() -> None:
    image, label = volumes()
    never: list[RandomTransform] = [
        RandomSpatial(p_affine=0, p_elastic=0),
        RandomNoise(probability=0),
        RandomBlur(probability=0),
        RandomBrightnessContrast(p_brightness=0, p_contrast=0),
        RandomGamma(probability=0),
        RandomLowResolution(probability=0),
        RandomBiasField(probability=0),
        RandomCoarseDropout(probability=0),
    ]
    for transform in never:
        out, moved = transform(image, SEEDS, label)
        assert torch.equal(out, image) and torch.equal(moved, label), type(transform).__name__


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("strong", "weak", "brightness_contrast")])
def test_only_drawn_samples_change(name: str) -> None:
    transform, (image, _) = EVERY[name], volumes()
    seeds = torch.arange(6) + 20
    params = transform.draw(seeds, SHAPE)
    changed = (transform.apply(image, params) != image).flatten(1).any(dim=1)
    assert torch.equal(changed, params["active"])


def test_neutral_strength_changes_next_to_nothing() -> None:
    image, _ = volumes()
    for transform in (
        RandomSpatial(0.0, (1.0, 1.0)),
        RandomNoise((0.0, 0.0)),
        RandomBlur((0.0, 0.0)),
        RandomBrightnessContrast((1.0, 1.0), (1.0, 1.0), 1.0, 1.0),
        RandomGamma((1.0, 1.0)),
        RandomGamma((1.0, 1.0), invert=True),
        RandomLowResolution((1.0, 1.0)),
        RandomBiasField((0.0, 0.0)),
        RandomCoarseDropout(size=(0.0, 0.0)),
    ):
        torch.testing.assert_close(transform(image, SEEDS), image, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RandomNoise(probability=1.5),
        lambda: RandomNoise((0.2, 0.1)),
        lambda: RandomBlur((-1.0, 1.0)),
        lambda: RandomLowResolution((0.5, 2.0)),
        lambda: RandomSpatial(scale=(0.0, 1.0)),
        lambda: RandomSpatial(elastic=(8, 4)),
        lambda: RandomSpatial(rotate_deg=(10.0, 10.0)),
        lambda: RandomBiasField(knots=3),
        lambda: RandomNoise()(torch.zeros(2, 1, 4, 4, 4), torch.zeros(2)),
    ],
)
def test_nonsense_is_refused(wrong) -> None:
    with pytest.raises(ValueError):
        wrong()


# random numbers


def test_draws_are_uniform_and_normal() -> None:
    seeds = torch.arange(4000)
    for sample in (uniform(seeds, "a"), uniform(torch.tensor([7]), "a", 20000).flatten()):
        assert stats.kstest(sample.numpy(), "uniform").pvalue > 1e-3
    for sample in (normal(seeds, "a"), normal(torch.tensor([7]), "a", 20000).flatten()):
        assert stats.kstest(sample.numpy(), "norm").pvalue > 1e-3
    assert abs(bernoulli(seeds, "a", 0.3).float().mean() - 0.3) < 0.03
    assert bernoulli(seeds, "a", 1.0).all() and not bernoulli(seeds, "a", 0.0).any()


def test_neighbouring_seeds_names_and_indices_are_unrelated() -> None:
    seeds = torch.arange(20000)
    here = uniform(seeds, "a", 2)
    pairs = [
        (here[:-1, 0], here[1:, 0]),
        (here[:, 0], here[:, 1]),
        (here[:, 0], uniform(seeds, "b")),
        (here[:, 0], uniform(seeds << 32, "a")),
        (here[:, 0], uniform(mix_seeds(seeds, 1), "a")),
    ]
    for left, right in pairs:
        assert abs(np.corrcoef(left.numpy(), right.numpy())[0, 1]) < 0.03
        table = np.histogram2d(left.numpy(), right.numpy(), bins=8)[0].ravel()
        assert stats.chisquare(table, np.full(64, table.sum() / 64)).pvalue > 1e-4


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(-(2**40), 2**63 - 1), max_size=4))
@settings(max_examples=60, deadline=None)
def test_mix_agrees_with_its_batched_form(seed: int, ints: list[int]) -> None:
    expected = mix(seed, *ints)
    assert 0 <= expected < 2**63
    wrapped = (seed + 2**63) % 2**64 - 2**63
    assert mix_seeds(torch.tensor([wrapped]), *ints).item() == expected
    assert mix_seeds(torch.tensor([wrapped]), *(torch.tensor([i]) for i in ints)).item() == expected


def test_mix_separates_order_count_and_value() -> None:
    values = {mix(s, *ints) for s in range(20) for ints in ((), (0,), (0, 0), (1,), (0, 1), (1, 0), (2, 5), (5, 2))}
    assert len(values) == 20 * 8
    assert mix(0, 1, 2) == 6002386098753201777, "a new stream would change every published run"


def test_the_generator_is_splitmix64() -> None:
    counter = torch.arange(1, 4) * -7046029254386353131  # 0x9E3779B97F4A7C15
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of seed 0
    assert [value % 2**64 for value in _finalise(counter).tolist()] == published


def test_noise_is_normal_and_follows_its_seed() -> None:
    x = torch.zeros(4, 1, 24, 24, 24)
    noise = noise_like(x, torch.tensor([1, 2, 1 + 2**32, 2**62]))
    for sample in noise:
        assert stats.kstest(sample.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise.flatten(1).numpy()) - np.eye(4)).max() < 0.04, "32 low bits must not decide alone"
    assert torch.equal(noise_like(x[:1], torch.tensor([2])), noise[1:2])


# intensity against references


def test_blur_is_scipys_gaussian_with_renormalised_borders() -> None:
    image, _ = volumes()
    transform = RandomBlur((0.4, 2.0))
    params = transform.draw(SEEDS, SHAPE, (2.0, 1.0, 1.0))
    out = transform.apply(image, params).numpy()
    assert torch.allclose(params["sigma"][:, 0] * 2, params["sigma"][:, 1]), "as wide in mm along a coarser axis"
    for b in range(len(image)):
        sigma = params["sigma"][b].numpy()

        def smooth(volume: np.ndarray, sigma: np.ndarray = sigma) -> np.ndarray:
            return ndimage.gaussian_filter(volume.astype(np.float64), sigma, mode="constant", truncate=9)

        for c in range(2):
            expected = smooth(image[b, c].numpy()) / smooth(np.ones(SHAPE))
            np.testing.assert_allclose(out[b, c], expected, atol=2e-5)


def test_noise_adds_the_drawn_spread() -> None:
    image = torch.full((6, 1, 20, 20, 20), 5.0)
    transform = RandomNoise((0.1, 0.5))
    params = transform.draw(SEEDS, image.shape)
    spread = (transform.apply(image, params) - image).flatten(1).std(dim=1)
    torch.testing.assert_close(spread, params["std"], rtol=0.05, atol=0)


def test_brightness_and_contrast_by_the_book() -> None:
    image, _ = volumes()
    transform = RandomBrightnessContrast((0.5, 1.5), (0.5, 1.5), 1.0, 1.0)
    params = transform.draw(SEEDS, SHAPE)
    out = transform.apply(image, params).numpy()
    for b in range(len(image)):
        for c in range(2):
            x = image[b, c].numpy() * params["brightness"][b].item()
            expected = np.clip((x - x.mean()) * params["contrast"][b].item() + x.mean(), x.min(), x.max())
            np.testing.assert_allclose(out[b, c], expected, atol=1e-5)


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("retain", [False, True])
def test_gamma_by_the_book(invert: bool, retain: bool) -> None:
    image, _ = volumes()
    image = image * 3 + 50
    transform = RandomGamma((0.5, 2.0), invert, retain)
    params = transform.draw(SEEDS, SHAPE)
    out = transform.apply(image, params).numpy()
    for b in range(len(image)):
        for c in range(2):
            x = image[b, c].numpy().astype(np.float64) * (-1 if invert else 1)
            y = ((x - x.min()) / np.ptp(x)) ** params["gamma"][b].item() * np.ptp(x) + x.min()
            y = (y - y.mean()) / y.std() * x.std() + x.mean() if retain else y
            np.testing.assert_allclose(out[b, c], y * (-1 if invert else 1), atol=2e-4)


def test_gamma_falls_on_both_sides_of_one_equally() -> None:
    gamma = RandomGamma((0.7, 1.5)).draw(torch.arange(4000), SHAPE)["gamma"]
    assert gamma.min() >= 0.7 and gamma.max() <= 1.5 and abs((gamma < 1).float().mean() - 0.5) < 0.03


def test_low_resolution_averages_and_interpolates() -> None:
    line = torch.tensor([0.0, 2.0, 4.0, 6.0, 1.0, 3.0])
    half = low_resolution_matrix(6, torch.tensor([0.5]))[0] @ line  # averages 1, 5, 2 at 0.5, 2.5, 4.5
    torch.testing.assert_close(half, torch.tensor([1.0, 2.0, 4.0, 4.25, 2.75, 2.0]))
    whole = low_resolution_matrix(6, torch.tensor([1.0, 1 / 6]))
    torch.testing.assert_close(whole[0], torch.eye(6))
    torch.testing.assert_close(whole[1] @ line, line.mean().expand(6))


@given(st.integers(1, 40), st.floats(0.02, 1.0), st.floats(0.0, 5.0), st.integers(4, 9))
@settings(max_examples=60, deadline=None)
def test_every_axis_matrix_averages(size: int, zoom: float, sigma: float, knots: int) -> None:
    for matrix in (
        low_resolution_matrix(size, torch.tensor([zoom])),
        gaussian_matrix(size, torch.tensor([sigma])),
        bspline_matrix(size, knots),
    ):
        assert (matrix >= -1e-6).all()
        torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:-1]), rtol=0, atol=1e-5)


def test_low_resolution_spares_the_coarser_axis() -> None:
    zoom = RandomLowResolution((0.5, 0.6)).draw(SEEDS, SHAPE, (3.0, 1.0, 1.0))["zoom"]
    assert (zoom[:, 0] == 1).all() and (zoom[:, 1:] <= 0.6).all()


def test_bias_field_is_smooth_positive_and_counted_from_the_minimum() -> None:
    image, _ = volumes(channels=1)
    transform = RandomBiasField((0.3, 0.3))
    out = transform(image, SEEDS)
    low = image.amin((2, 3, 4), keepdim=True)
    field = ((out - low) / (image - low).clamp(min=1e-9))[:, :, 1:-1, 1:-1, 1:-1]
    kept = (image - low)[:, :, 1:-1, 1:-1, 1:-1] > 0.5
    assert (field[kept] > 0).all() and field[kept].std() > 0.05
    assert torch.allclose(out.amin((2, 3, 4)), image.amin((2, 3, 4)))
    step = (field[:, :, 1:] - field[:, :, :-1]).abs()[kept[:, :, 1:] & kept[:, :, :-1]]
    assert step.max() < 0.25


def test_dropout_fills_boxes_with_the_mean() -> None:
    image, _ = volumes()
    transform = RandomCoarseDropout(holes=2, size=(0.3, 0.5))
    params = transform.draw(SEEDS, SHAPE)
    out = transform.apply(image, params)
    for b in range(len(image)):
        expected = image[b].clone()
        for start, stop in zip(params["start"][b], params["stop"][b], strict=True):
            slices = [
                [i for i in range(n) if lo <= (i + 0.5) / n < hi]
                for n, lo, hi in zip(SHAPE, start.tolist(), stop.tolist(), strict=True)
            ]
            d, h, w = torch.meshgrid(*map(torch.tensor, slices), indexing="ij")
            expected[:, d, h, w] = image[b].mean((1, 2, 3))[:, None, None, None]
        torch.testing.assert_close(out[b], expected)


def test_streams_do_not_depend_on_the_rest_of_the_chain() -> None:
    noise, gamma = RandomNoise(), RandomGamma()
    short, long = Compose([noise, gamma]), Compose([RandomBlur(), noise, RandomBiasField(), gamma, gamma])
    few, many = short.draw(SEEDS, SHAPE), long.draw(SEEDS, SHAPE)
    assert torch.equal(few[0]["std"], many[1]["std"]) and torch.equal(few[1]["gamma"], many[3]["gamma"])
    assert not torch.equal(many[3]["gamma"], many[4]["gamma"]), "two of a kind must not draw alike"


def test_presets_take_overrides_and_know_the_modality() -> None:
    off = {f.name: 0.0 for f in dataclasses.fields(StrongAugmentation) if f.name.startswith("p_")}
    image, label = volumes()
    out, moved = strong_augmentation(preset=StrongAugmentation(**off))(image, SEEDS, label)  # type: ignore[arg-type]
    assert torch.equal(out, image) and torch.equal(moved, label)
    for make in (strong_augmentation, view_intensity):
        kinds = [{type(t) for t in make(modality).transforms} for modality in ("MR", "CT")]
        assert kinds[0] - kinds[1] == {RandomBiasField}
    weak = view_intensity(preset=ViewIntensity(p_bias=1, p_noise=1, p_blur=1, p_gamma=1))(image, SEEDS)
    correlation = np.corrcoef(weak.flatten().numpy(), image.flatten().numpy())[0, 1]
    assert correlation > 0.8
