from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stemtomo.distributed import Executor, Parts, Window, executor
from stemtomo.distributed.threads import ThreadExecutor
from tests.distributed import toy


def values(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "array": rng.normal(size=(3, 4)).astype(np.float32),
        "pair": (rng.normal(), seed),
        "list": [np.float64(seed)],
    }


def values_or_none(seed: int) -> dict[str, Any] | None:
    return None if seed % 3 == 0 else values(seed)


def window_image(seed: int, window: Window) -> dict[str, Any]:
    shape = tuple(stop - start for start, stop in window)
    rng = np.random.default_rng(seed)
    return {"complex": rng.normal(size=(2, *shape)) * (1 + 2j), "real": rng.normal(size=shape).astype(np.float32)}


def image_parts(workers: Executor, windows: list[Window]) -> Parts:
    return Parts.create(workers, same, list(range(len(windows)))).map(window_image, each=(windows,))


def same(spec: Any) -> Any:
    return spec


def scaled(state: np.ndarray, factor: float, offset: float) -> np.ndarray:
    return state * factor + offset


def dense_sum(shape: tuple[int, ...], windows: list[Window]) -> dict[str, np.ndarray]:
    """Sum plainly, in the order of the parts, into one array."""
    total = {"complex": np.zeros((2, *shape), complex), "real": np.zeros(shape, np.float32)}
    for seed, window in enumerate(windows):
        where = tuple(slice(*pair) for pair in window)
        for key, array in window_image(seed, window).items():
            total[key][(..., *where)] += array
    return total


def uneven_tiles(overlap: int) -> list[Window]:
    """Tiles of 2 to 9 pixels of a 24 x 20 image, each grown by ``overlap`` on all sides."""
    y_edges, x_edges = [0, 9, 11, 24], [0, 3, 5, 13, 20]
    return [
        ((max(0, y0 - overlap), min(24, y1 + overlap)), (max(0, x0 - overlap), min(20, x1 + overlap)))
        for y0, y1 in itertools.pairwise(y_edges)
        for x0, x1 in itertools.pairwise(x_edges)
    ]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 18])
def test_sum_of_parts_is_the_plain_sum_in_a_fixed_order(workers: Executor, count: int) -> None:
    total = workers.gather(Parts.create(workers, values, range(count)).sum())
    expected = sum(values(seed)["array"].astype(np.float64) for seed in range(count))
    np.testing.assert_allclose(total["array"], expected, rtol=0, atol=1e-5)
    assert total["array"].dtype == np.float32
    assert total["pair"] == pytest.approx(
        (sum(values(seed)["pair"][0] for seed in range(count)), count * (count - 1) // 2)
    )
    assert total["list"] == [count * (count - 1) / 2]
    again = ThreadExecutor(3)
    assert np.array_equal(total["array"], again.gather(Parts.create(again, values, range(count)).sum())["array"])


def test_parts_that_contribute_nothing_are_skipped(workers: Executor) -> None:
    total = workers.gather(Parts.create(workers, values_or_none, range(8)).sum())
    assert total["pair"][1] == 1 + 2 + 4 + 5 + 7
    assert workers.gather(Parts.create(workers, values_or_none, [0, 3]).sum()) is None


def test_sum_changes_no_part() -> None:
    pool = ThreadExecutor(2)
    parts = Parts.create(pool, values, range(6))
    before = [state["array"].copy() for state in parts.gather()]
    pool.gather(parts.sum())
    for state, copy in zip(parts.gather(), before, strict=True):
        assert np.array_equal(state["array"], copy)


def test_parts_of_different_structure_or_shape_are_refused() -> None:
    pool = ThreadExecutor(1)
    with pytest.raises(ValueError, match="differ in structure"):
        pool.gather(Parts.create(pool, same, [{"a": 1}, {"b": 1}]).sum())
    with pytest.raises(ValueError, match="shapes"):
        pool.gather(Parts.create(pool, np.zeros, [2, 3]).sum())


def test_map_takes_shared_values_handles_and_one_item_per_part(workers: Executor) -> None:
    parts = Parts.create(workers, np.full, [3, 3], workers.submit(same, 2.0))
    factor = np.arange(3.0)
    result = parts.map(scaled, factor, each=([10.0, 20.0],)).gather()
    assert np.array_equal(result, [2 * factor + 10, 2 * factor + 20])
    other = parts.map(scaled, workers.submit(same, 3.0), each=(parts.pick(0),)).gather()
    assert np.array_equal(other, np.full((2, 3), 8.0))
    with pytest.raises(ValueError, match="one per part"):
        parts.map(scaled, 1.0, each=([1.0],))


def test_large_shared_array_is_sent_once(client: Any) -> None:
    cluster = executor(client)
    parts = Parts.create(cluster, np.full, [1] * 6, 1.0).map(scaled, np.ones(1 << 16), 0.0)
    assert [state.sum() for state in parts.gather()] == [1 << 16] * 6


@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_halo_sum_is_the_dense_sum_and_bit_identical_where_windows_meet(workers: Executor, overlap: int) -> None:
    windows = uneven_tiles(overlap)  # with an overlap of 5, tiles of 2 pixels are smaller than their halo
    expected = dense_sum((24, 20), windows)
    summed = image_parts(workers, windows).halo_sum(windows).gather()
    for state, (y, x) in zip(summed, windows, strict=True):
        assert state["real"].dtype == np.float32
        assert np.array_equal(state["complex"], expected["complex"][:, slice(*y), slice(*x)])
        assert np.array_equal(state["real"], expected["real"][slice(*y), slice(*x)])


@pytest.mark.parametrize("rank", [1, 3])
def test_halo_sum_works_along_one_and_three_axes(workers: Executor, rank: int) -> None:
    windows: list[Window] = [((0, 7),) * rank, ((4, 9),) * rank, ((6, 15),) * rank]
    expected = dense_sum((15,) * rank, windows)
    for state, window in zip(image_parts(workers, windows).halo_sum(windows).gather(), windows, strict=True):
        assert np.array_equal(state["real"], expected["real"][tuple(slice(*pair) for pair in window)])


def test_window_that_does_not_fit_its_array_is_refused() -> None:
    pool = ThreadExecutor(1)
    parts = image_parts(pool, [((0, 4), (0, 4))])
    with pytest.raises(ValueError, match="does not fit its window"):
        pool.gather(parts.sum_into((9, 9), [((0, 5), (0, 4))]))
    with pytest.raises(ValueError, match="beyond the shape"):
        parts.sum_into((3, 3), [((0, 4), (0, 4))])
    with pytest.raises(ValueError, match="overlaps no part"):
        parts.exchange([((0, 4), (0, 4))], onto=[((4, 5), (0, 4))])
    with pytest.raises(ValueError, match="one per part"):
        parts.halo_sum([])


@pytest.mark.parametrize("overlap", [0, 4])
def test_sum_into_adds_rectangles_into_the_full_array(workers: Executor, overlap: int) -> None:
    windows = [tuple((start + 1, stop + 1) for start, stop in window) for window in uneven_tiles(overlap)]
    expected = dense_sum((26, 22), windows)
    total = workers.gather(image_parts(workers, windows).sum_into((26, 22), windows))
    np.testing.assert_allclose(total["complex"], expected["complex"], rtol=0, atol=1e-13)
    assert total["real"].dtype == np.float32
    assert not total["real"][0].any()
    assert not total["real"][:, -1].any()
    again = ThreadExecutor(1)
    bits = again.gather(image_parts(again, windows).sum_into((26, 22), windows))
    assert np.array_equal(bits["complex"], total["complex"])


def test_cut_is_the_adjoint_of_sum_into(workers: Executor) -> None:
    windows = uneven_tiles(2)
    parts = image_parts(workers, windows).pick("real")
    image = np.random.default_rng(3).normal(size=(5, 24, 20))
    cuts = parts.cut(image, windows).gather()
    assert [cut.shape for cut in cuts] == [(5, y1 - y0, x1 - x0) for (y0, y1), (x0, x1) in windows]
    total = workers.gather(parts.sum_into((24, 20), windows))
    inside = sum(np.sum(cut * own) for cut, own in zip(cuts, parts.gather(), strict=True))
    assert inside == pytest.approx(np.sum(image * total), rel=1e-5)


def test_exchange_sends_blocks_to_other_owners(workers: Executor) -> None:
    windows = uneven_tiles(1)
    rows: list[Window] = [((0, 24), (0, 6)), ((0, 24), (6, 20)), ((3, 3), (0, 20))]
    expected = dense_sum((24, 20), windows)["complex"]
    states = image_parts(workers, windows).exchange(windows, onto=rows).pick("complex").gather()
    for state, (y, x) in zip(states, rows, strict=True):
        assert np.array_equal(state, expected[:, slice(*y), slice(*x)])


@pytest.mark.parametrize("count", [2, 5])
def test_many_parts_give_the_numbers_of_one(workers: Executor, count: int) -> None:
    image, scale, losses = toy.solve(ThreadExecutor(1), 1, steps=30)
    assert losses[-1] < 0.2 * losses[0]
    cut_image, cut_scale, cut_losses = toy.solve(workers, count, steps=30)
    np.testing.assert_allclose(cut_image, image, rtol=0, atol=1e-12)
    np.testing.assert_allclose(cut_losses, losses, rtol=1e-12)
    assert cut_scale == pytest.approx(scale, abs=1e-12)


def test_threads_and_cluster_give_the_same_bits(client: Any) -> None:
    in_process = toy.solve(ThreadExecutor(2), 3, steps=6)
    on_cluster = toy.solve(executor(client), 3, steps=6)
    assert np.array_equal(in_process[0], on_cluster[0], equal_nan=True)
    assert in_process[1:] == on_cluster[1:]
