"""Alignment of faces: the similarity is Umeyama's, and pixels land where they belong."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluate.sets.align import REFERENCE_LANDMARKS, align_face, fit_similarity


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The 2x3 matrix of Umeyama's paper, by the singular value decomposition."""
    a, b = source - source.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(b.T @ a / len(a))
    sign = np.diag([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    scale = (d * np.diag(sign)).sum() / a.var(0).sum()
    rotation = scale * u @ sign @ vt
    return np.column_stack([rotation, target.mean(0) - rotation @ source.mean(0)])


def test_the_similarity_is_umeyamas() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        marks = REFERENCE_LANDMARKS @ rng.standard_normal((2, 2)) + rng.uniform(0, 200, 2)
        marks += rng.normal(0, 4, (5, 2))
        a, b = fit_similarity(marks, REFERENCE_LANDMARKS)
        found = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
        np.testing.assert_allclose(found, umeyama(marks, REFERENCE_LANDMARKS), atol=1e-9)
    with pytest.raises(ValueError, match="one point"):
        fit_similarity(np.ones((5, 2)), REFERENCE_LANDMARKS)
    with pytest.raises(ValueError, match="one point, or none"):
        fit_similarity(np.full((5, 2), np.nan), REFERENCE_LANDMARKS)


def test_alignment_moves_pixels_where_they_belong() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
    assert (align_face(image, REFERENCE_LANDMARKS) == image).all()
    # The face lies 3 to the right and 2 higher.
    moved = align_face(image, REFERENCE_LANDMARKS + np.array([3, -2]))
    assert (moved[2:, :-3] == image[:-2, 3:]).all()
    assert (moved[:2] == 0).all()
    assert (moved[:, -3:] == 0).all()
    # Twice as large and turned by a quarter: bilinear at the middles of pixels.
    quarter = (REFERENCE_LANDMARKS - 55.5) @ np.array([[0, 1], [-1, 0]]) + 55.5
    assert (align_face(image, quarter) == np.rot90(image, 1)).mean() > 0.999
    halved = align_face(image, REFERENCE_LANDMARKS / 2)
    assert (halved[::2, ::2][:56, :56] == image[:56, :56]).mean() > 0.999
    assert align_face(image, REFERENCE_LANDMARKS, size=56).shape == (56, 56, 3)
