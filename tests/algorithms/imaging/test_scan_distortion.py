"""Scans that drift or are sheared: written down as they would be recorded, and put right."""

import numpy as np
import pytest

from stemtomo.algorithms.imaging.scan_distortion import (
    averaged,
    corrected,
    drift_of,
    matrix_of_drift,
    matrix_of_lattice,
)
from stemtomo.errors import CalibrationError

ROWS, COLUMNS = 96, 100
SPOTS = np.array([[0.11, 0.02], [-0.03, 0.13]])
BLOBS = np.random.default_rng(0).uniform(-38, 38, (60, 2))


def _specimen(x, y):
    """Gaussian blobs at known places, at any coordinates from the centre."""
    return sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * 2.2**2)) for a, b in BLOBS)


def _scan(drift=(0.0, 0.0), frame=0, matrix=None, seen=_specimen):
    """Record row after row: at time t, in frames, the specimen has moved by drift times t."""
    y, x = np.meshgrid(np.arange(ROWS) - ROWS // 2, np.arange(COLUMNS) - COLUMNS // 2, indexing="ij")
    t = frame + y / ROWS
    if matrix is not None:
        x, y = matrix[0, 0] * x + matrix[0, 1] * y, matrix[1, 0] * x + matrix[1, 1] * y
    return seen(x - drift[0] * t, y - drift[1] * t)


@pytest.mark.parametrize("drift", [(2.4, -1.3), (-4.0, 3.1)])
def test_drift_is_found_and_taken_out_of_the_mean(drift):
    rng = np.random.default_rng(1)
    frames = np.stack([_scan(drift, k) for k in range(4)])
    frames += 0.1 * rng.normal(size=frames.shape)
    found = drift_of(frames)
    np.testing.assert_allclose(found.per_frame_px, drift, atol=0.08)
    assert found.scatter_px < 0.15
    mean, known, _ = averaged(frames, np.ones(frames.shape, bool))
    inner = (slice(16, -16), slice(16, -16))
    assert known[inner].all()
    truth, plain = _scan()[inner], frames.mean(axis=0)[inner]
    assert np.corrcoef(mean[inner].ravel(), truth.ravel())[0, 1] > 0.985
    assert np.corrcoef(plain.ravel(), truth.ravel())[0, 1] < 0.9


def test_a_lattice_says_how_the_scan_is_distorted():
    matrix = np.array([[1.03, 0.02], [-0.015, 0.97]])

    def lattice(x, y):
        return sum(np.cos(2 * np.pi * (a * x + b * y)) for a, b in SPOTS)

    image = _scan(matrix=matrix, seen=lattice) + 0.5 * np.random.default_rng(2).normal(size=(ROWS, COLUMNS))
    np.testing.assert_allclose(matrix_of_lattice(image, SPOTS), matrix, atol=2e-3)
    np.testing.assert_allclose(matrix_of_lattice(_scan(seen=lattice), SPOTS), np.eye(2), atol=1e-3)
    # Put right by the matrix found, the specimen is where it belongs.
    distorted = _scan(matrix=matrix)
    image, known = corrected(distorted, np.ones(distorted.shape, bool), matrix_of_lattice(image, SPOTS))
    assert np.abs(image - _scan())[known].max() < 0.1
    assert np.abs(distorted - _scan()).max() > 0.5
    assert 0.9 < known.mean() < 1


def test_what_was_not_measured_stays_unknown():
    image = _scan()
    valid = np.ones(image.shape, bool)
    valid[40:50, 30:40] = False
    found, known = corrected(np.where(valid, image, np.nan), valid, matrix_of_drift(np.array([3.0, 0.0]), ROWS))
    assert not known[42:48, 32:38].any()
    assert np.isfinite(found).all()


def test_what_cannot_be_determined_is_refused():
    with pytest.raises(CalibrationError, match="two frames"):
        drift_of(np.zeros((1, 8, 8)))
    with pytest.raises(CalibrationError, match="one direction"):
        matrix_of_lattice(np.zeros((8, 8)), np.array([[0.1, 0.0], [0.2, 0.0]]))
    noise = np.random.default_rng(3).normal(size=(64, 64))
    with pytest.raises(CalibrationError, match="no lattice spot"):
        matrix_of_lattice(noise, SPOTS)
