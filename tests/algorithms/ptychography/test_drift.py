import numpy as np
import pytest

from stemtomo.algorithms.ptychography.drift import slice_drift, straightened

SHIFT = np.array([0.73, -0.41])


def leaning(slices=5, kind=float):
    """Band-limited bumps whose centre moves by SHIFT (x, y) pixels from slice to slice."""
    y, x = np.indices((64, 60))
    rng = np.random.default_rng(0)
    atoms = rng.uniform(20, 40, size=(12, 2))
    layers = []
    for s in range(slices):
        at = atoms + (s - (slices - 1) / 2) * SHIFT
        layers.append(sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * 1.6**2)) for a, b in at))
    return np.array(layers).astype(kind)


def test_the_drift_of_slices_is_found_with_its_sign():
    drift = slice_drift(leaning(), (slice(4, 60), slice(4, 56)))
    np.testing.assert_allclose(drift.per_slice_px, SHIFT, atol=0.04)  # the window stands still while the columns move
    assert drift.scatter_px < 0.03
    # 0.25 Å pixels and 20 Å slices: 0.73 px is 9.1 mrad.
    tilt = drift.tilt_rad_xy((0.25, 0.25), 20.0)
    assert tilt[0] == pytest.approx(0.73 * 0.25 / 20, abs=3e-4)
    assert tilt[1] < 0


def test_straightened_slices_lie_upon_the_middle_one():
    layers = leaning(kind=np.complex64)
    upright = straightened(layers, slice_drift(layers, (slice(4, 60), slice(4, 56))))
    assert upright.dtype == np.complex64
    for layer in upright:
        np.testing.assert_allclose(layer.real, layers[2].real, atol=0.06)
