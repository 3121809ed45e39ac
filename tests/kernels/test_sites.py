"""A stack of slices read between its pixels: against scipy's linear interpolation, by every route."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from stemtomo import backend
from stemtomo.kernels import sites as kernel
from tests.kernels import host_cuda
from tests.kernels.test_orbitals import precisions, routes

SHAPE = (5, 20, 24)
#: Columns, rows and slices of places in Å: a turn, a scale and the centre.
AFFINE = np.c_[np.diag([1.5, 1.5, 0.4]) @ Rotation.from_rotvec([0.1, 0.7, 0.2]).as_matrix(), [12.0, 10.0, 2.0]]


def _scene(dtype, slices=SHAPE[0]):
    rng = np.random.default_rng(0)
    return rng.normal(size=(slices, *SHAPE[1:])).astype(dtype), rng.uniform(-9, 9, (400, 3)).astype(dtype)


def _reference(stack, sites):
    u, v, w = AFFINE[:, :3] @ sites.T.astype(np.float64) + AFFINE[:, 3:]
    inside = (u >= 0) & (v >= 0) & (u <= SHAPE[2] - 1) & (v <= SHAPE[1] - 1)
    assert 0.5 < inside.mean() < 0.99
    assert (w < 0).any()
    return inside * ndimage.map_coordinates(stack.astype(np.float64), (w, v, u), order=1, mode="nearest")


@routes
@precisions
@pytest.mark.parametrize("slices", [5, 1])
def test_values_between_pixels_are_linear_and_nothing_outside(route, dtype, tolerance, slices, monkeypatch):
    if route == "cuda source":
        monkeypatch.setattr(kernel, "is_device_array", lambda array: True)
        monkeypatch.setattr(kernel, "to_device_of", lambda array, like: array)
        monkeypatch.setattr(kernel.cuda, "launch", host_cuda.launch)
    stack, sites = _scene(dtype, slices)
    out = np.ones(len(sites), dtype)
    kernel.add_between(stack, sites, AFFINE, out)
    np.testing.assert_allclose(out - 1, _reference(stack, sites), atol=10 * tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not backend.gpu_available(), reason="no GPU with CuPy")
@precisions
def test_device_equals_host(dtype, tolerance):
    import cupy

    stack, sites = _scene(dtype)
    device, host = cupy.zeros(len(sites), dtype), np.zeros(len(sites), dtype)
    kernel.add_between(cupy.asarray(stack), cupy.asarray(sites), AFFINE, device)
    kernel.add_between(stack, sites, AFFINE, host)
    np.testing.assert_allclose(device.get(), host, atol=10 * tolerance)
