"""Augmentation: what each change does, and that its draws are keyed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mhe_dist.config.data import AugmentConfig
from mhe_dist.seeds import generator
from pipelines.data.augment import DRAWS_PER_IMAGE, AugmentationNoise, augment

COLOUR = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
GREY = COLOUR[:, :, 0].copy()
ALL = {
    "flip": 0.5,
    "crop": 0.2,
    "rotate": 20,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.3,
    "blur": 0.5,
    "low_resolution": 0.5,
    "erase": 0.5,
}


def draws(number: int) -> list[float]:
    return AugmentationNoise(0).draws(0, number)


def test_nothing_configured_changes_nothing() -> None:
    for number in range(20):
        assert np.array_equal(augment(COLOUR, AugmentConfig(), draws(number)), COLOUR)


@pytest.mark.parametrize("copied", [False, True], ids=["here", "in a loader process"])
def test_draws_are_those_of_the_keyed_generator(copied: bool) -> None:
    noise = AugmentationNoise(5)
    if copied:
        noise = pickle.loads(pickle.dumps(noise))
    for epoch, sample in [(0, 0), (3, 77), (0, 0), (10**6, 10**9)]:
        expected = generator(5, "augment", epoch, sample).random(DRAWS_PER_IMAGE)
        assert noise.draws(epoch, sample) == expected.tolist()


@pytest.mark.parametrize("image", [COLOUR, GREY], ids=["colour", "grey"])
def test_shape_type_and_argument_are_kept(image: np.ndarray) -> None:
    before = image.copy()
    for number in range(50):
        changed = augment(image, AugmentConfig(**ALL), draws(number))
        assert changed.shape == image.shape
        assert changed.dtype == np.uint8
        assert np.array_equal(image, before)


def test_equal_draws_make_equal_pixels() -> None:
    config = AugmentConfig(**ALL)
    first = [augment(COLOUR, config, draws(number)) for number in range(20)]
    again = [augment(COLOUR, config, draws(number)) for number in reversed(range(20))]
    assert all(np.array_equal(a, b) for a, b in zip(first, reversed(again), strict=True))


@pytest.mark.parametrize("alone", [{"flip": 0.5}, {"crop": 0.2}, {"rotate": 20}, {"blur": 0.5}])
def test_a_grey_image_is_changed_like_each_channel_of_a_coloured_one(
    alone: dict[str, float],
) -> None:
    config = AugmentConfig(**alone, brightness=0.3, contrast=0.3)
    for number in range(20):
        grey = augment(GREY, config, draws(number))
        coloured = augment(np.stack([GREY] * 3, 2), config, draws(number))
        assert np.array_equal(np.stack([grey] * 3, 2), coloured)


def test_one_change_leaves_the_draws_of_the_others_alone() -> None:
    for number in range(20):
        bright = augment(COLOUR, AugmentConfig(brightness=0.3), draws(number))
        both = augment(COLOUR, AugmentConfig(brightness=0.3, flip=0.5), draws(number))
        assert np.array_equal(both, bright) or np.array_equal(both, bright[:, ::-1])


def test_flip_has_its_probability() -> None:
    flipped = [
        np.array_equal(augment(COLOUR, AugmentConfig(flip=0.3), draws(n)), COLOUR[:, ::-1])
        for n in range(1000)
    ]
    assert 0.25 < np.mean(flipped) < 0.35


def test_rotation_turns_about_the_middle_by_at_most_its_angle() -> None:
    line = np.zeros((101, 101), np.uint8)
    line[50, 50:] = 255  # from the middle to the right
    angles = []
    for number in range(100):
        y, x = np.nonzero(augment(line, AugmentConfig(rotate=30), draws(number)) > 100)
        far = np.argmax((x - 50) ** 2 + (y - 50) ** 2)
        angles.append(np.degrees(np.arctan2(y[far] - 50, x[far] - 50)))
    assert max(angles) <= 31
    assert min(angles) >= -31
    assert max(angles) > 25
    assert min(angles) < -25


def test_crop_keeps_at_least_its_share_and_fills_the_picture() -> None:
    ramp = np.arange(0, 200, 2, dtype=np.uint8)[None, :].repeat(100, 0)
    for number in range(50):
        row = augment(ramp, AugmentConfig(crop=0.4), draws(number))[50].astype(int)
        assert row[-1] - row[0] >= 0.6 * 198 - 3
    assert (
        len({augment(ramp, AugmentConfig(crop=0.4), draws(n)).tobytes() for n in range(50)}) == 50
    )


def test_what_is_outside_gets_the_fill_value() -> None:
    white = np.full((20, 20, 3), 255, np.uint8)
    corner = augment(white, AugmentConfig(rotate=45, fill=7), [1.0 - 1e-9] * DRAWS_PER_IMAGE)[0, 0]
    assert corner.tolist() == [7, 7, 7]


def test_brightness_contrast_and_saturation_are_linear() -> None:
    low = [0.0] * DRAWS_PER_IMAGE  # the factor is 1 - strength
    assert np.array_equal(
        augment(COLOUR, AugmentConfig(brightness=0.5), low), (COLOUR / 2 + 0.5).astype(np.uint8)
    )
    flat = augment(COLOUR, AugmentConfig(contrast=1), low)
    assert (flat == round(COLOUR.mean())).all()
    colourless = augment(COLOUR, AugmentConfig(saturation=1), low).astype(int)
    assert (np.ptp(colourless, axis=2) == 0).all()
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(colourless[:, :, 0] - luma).max() <= 1


def test_bright_colours_are_clipped_not_wrapped() -> None:
    high = [1.0 - 1e-9] * DRAWS_PER_IMAGE
    white = np.full((8, 8, 3), 250, np.uint8)
    assert (augment(white, AugmentConfig(brightness=1, saturation=1), high) == 255).all()


def test_blur_and_low_resolution_smooth() -> None:
    for config in (AugmentConfig(blur=1), AugmentConfig(low_resolution=1)):
        smooth = augment(COLOUR, config, [0.5] * DRAWS_PER_IMAGE)
        assert np.abs(np.diff(smooth.astype(int), axis=0)).mean() < (
            0.95 * np.abs(np.diff(COLOUR.astype(int), axis=0)).mean()
        )


def test_erasing_paints_one_rectangle() -> None:
    white = np.full((40, 40), 255, np.uint8)
    for number in range(50):
        hole = augment(white, AugmentConfig(erase=1, fill=9), draws(number)) == 9
        rows, columns = hole.any(1), hole.any(0)
        assert hole.sum() == rows.sum() * columns.sum()
        assert 0.01 < hole.mean() < 0.25
