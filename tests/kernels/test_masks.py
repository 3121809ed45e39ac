"""The one pass over frames against plain array arithmetic: numba, the CUDA source run on the host, and a GPU."""

import numpy as np
import pytest

from stemtomo.backend import to_host
from stemtomo.errors import FormatError
from stemtomo.kernels import cuda, masks
from tests.kernels import host_cuda

SCAN, DETECTOR = (9, 11), (6, 7)  # 99 frames: more than one run of frames for a device thread


@pytest.fixture(
    params=[
        "numba",
        pytest.param("host", marks=pytest.mark.skipif(host_cuda.COMPILER is None, reason="no C++ compiler")),
        pytest.param("cupy", marks=pytest.mark.gpu),
    ]
)
def on(request, monkeypatch):
    """Return the function that puts an array where the backend under test wants it."""
    if request.param == "host":
        monkeypatch.setattr(cuda, "launch", host_cuda.launch)
        monkeypatch.setattr(masks, "is_device_array", lambda array: True)
    if request.param == "cupy":
        import cupy

        return cupy.asarray
    return np.array


def make(dtype, seed=0):
    rng = np.random.default_rng(seed)
    frames = rng.poisson(3.0, size=(*SCAN, *DETECTOR)).astype(dtype)
    frames[3, 4, 2, 5] = 200
    weights = np.stack(
        [np.ones(DETECTOR), rng.random(DETECTOR) > 0.5, np.indices(DETECTOR)[0] - 3.0, rng.normal(size=DETECTOR)]
    )
    return frames, weights


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int16, np.float32, np.float64])
def test_one_pass_equals_three(on, dtype, real):
    frames, weights = make(dtype)
    weights = weights.astype(real)
    sums = masks.frame_sums(on(frames), on(weights))
    expected = np.einsum("yxab,kab->yxk", frames.astype(np.float64), weights.astype(np.float64))
    np.testing.assert_allclose(to_host(sums.weighted), expected, rtol=3e-6, atol=1e-4 if real is np.float32 else 1e-12)
    np.testing.assert_array_equal(to_host(sums.pattern_sum), frames.sum(axis=(0, 1), dtype=np.float64))
    np.testing.assert_array_equal(to_host(sums.pattern_maximum), frames.max(axis=(0, 1)))
    assert sums.weighted.dtype == real
    assert sums.pattern_sum.dtype == np.float64
    assert sums.pattern_maximum.dtype == dtype


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int16, np.float32, np.float64])
def test_superpixels_are_plain_sums_of_their_pixels(on, dtype, real):
    frames, weights = make(dtype)
    labels = np.array([[-1, 0, 0, 1, 1, -1, 2], [0, 0, 2, 2, -1, 1, 1], *[[-1] * 7] * 3, [3, 3, 3, 3, 3, 3, 3]])
    sums = masks.frame_sums(on(frames), on(weights.astype(real)), labels)
    for number in range(4):
        expected = frames[:, :, labels == number].sum(axis=-1, dtype=np.float64)
        np.testing.assert_allclose(to_host(sums.superpixels)[..., number], expected, rtol=1e-6)
    assert sums.superpixels.shape == (*SCAN, 4)
    assert masks.frame_sums(on(frames), on(weights.astype(real))).superpixels.shape == (*SCAN, 0)


def test_lines_of_one_weight_are_summed_like_any_other(on):
    frames, _ = make(np.uint16)
    weights = np.stack([np.zeros(DETECTOR), np.full(DETECTOR, 2.5), np.indices(DETECTOR)[0] - 3.0, np.eye(*DETECTOR)])
    expected = np.einsum("yxab,kab->yxk", frames.astype(np.float64), weights)
    np.testing.assert_allclose(to_host(masks.frame_sums(on(frames), on(weights)).weighted), expected, atol=1e-10)


def test_sums_of_large_counts_are_exact(on):
    frames = np.full((2, 1, 4, 4), 2**31 + 1, dtype=np.uint32)
    sums = masks.frame_sums(on(frames), on(np.ones((1, 4, 4))))
    np.testing.assert_array_equal(to_host(sums.weighted)[..., 0], 16.0 * (2**31 + 1))
    np.testing.assert_array_equal(to_host(sums.pattern_sum), 2.0 * (2**31 + 1))


def test_negative_frames_keep_their_maximum(on):
    frames = -np.ones((2, 2, 3, 3), dtype=np.float32)
    assert (to_host(masks.frame_sums(on(frames), on(np.ones((1, 3, 3)))).pattern_maximum) == -1).all()


def test_a_mask_of_another_detector_is_refused():
    with pytest.raises(FormatError, match=r"\(1, 1, 4, 4\).*\(1, 4, 5\)"):
        masks.frame_sums(np.zeros((1, 1, 4, 4)), np.zeros((1, 4, 5)))
    with pytest.raises(FormatError, match="labels"):
        masks.frame_sums(np.zeros((1, 1, 4, 4)), np.zeros((1, 4, 4)), np.zeros((4, 5), int))
