"""Lists of events and packed counts say what plain NumPy says."""

from __future__ import annotations

import numpy as np
import pytest

from stemtomo.kernels.electrons import add_events, gap_list, pack, total, unpack

TYPES = ["u1", "u2", "u4"]


def sparse(dtype: str, size: int = 4000, mean: float = 0.05) -> np.ndarray:
    return np.random.default_rng(1).poisson(mean, size).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mean", [0.0, 0.0005, 0.05, 3.0])
def test_a_list_of_gaps_leads_from_electron_to_electron(dtype: str, mean: float) -> None:
    counts = sparse(dtype, mean=mean)
    electrons = int(counts.sum())
    assert total(counts) == electrons
    symbols = gap_list(counts, electrons)
    steps = np.cumsum(symbols.astype(int))[symbols != 255]  # where an electron is counted
    np.testing.assert_array_equal(steps, np.repeat(np.arange(counts.size), counts))
    again = np.zeros_like(counts)
    add_events(symbols, again)
    np.testing.assert_array_equal(again, counts)


@pytest.mark.parametrize("where", [[0], [0, 0, 0], [254], [255], [256], [510], [0, 255, 765, 3999]])
def test_gaps_around_the_longest_symbol(where: list[int]) -> None:
    counts = np.bincount(where, minlength=4000).astype("u2")
    again = np.zeros_like(counts)
    add_events(gap_list(counts, len(where)), again)
    np.testing.assert_array_equal(again, counts)


def test_sums_are_those_of_64_bit() -> None:
    assert total(np.full(5000, 2**32 - 1, "u4")) == 5000 * (2**32 - 1)


@pytest.mark.parametrize("dtype", TYPES)
def test_four_counts_in_a_byte(dtype: str) -> None:
    counts = sparse(dtype, mean=1.0)
    counts[[0, 3999]] = 200
    large = counts[counts > 2]
    packed, rare = pack(counts, 4000)
    codes = np.minimum(counts, 3).astype(int).reshape(-1, 4)
    np.testing.assert_array_equal(packed, codes @ [1, 4, 16, 64])
    np.testing.assert_array_equal(rare, large)
    again = np.full_like(counts, 9)
    assert unpack(packed, rare, again) == len(large)
    np.testing.assert_array_equal(again, counts)
    assert pack(counts, len(large)) is not None
    assert pack(counts, len(large) - 1) is None


def test_damaged_lists_are_told() -> None:
    counts = sparse("u2")
    assert add_events(np.full(100, 254, "u1"), np.zeros_like(counts)) == counts.size
    assert unpack(np.full(1000, 255, "u1"), np.zeros(7, "u2"), counts) == -1
