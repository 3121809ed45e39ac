"""Where atoms may be missing, and where exactly: gaps of a grid, and vertices between its sites."""

import numpy as np
from scipy.spatial import cKDTree

from stemtomo.algorithms.local_orbital.insertion import _gaps, _summits, _vertices


def test_gaps_are_between_the_atoms_of_a_box_and_not_around_it():
    axes = np.arange(4) * 3.0
    corners = np.stack(np.meshgrid(axes, axes, axes, indexing="ij"), axis=-1).reshape(-1, 3)
    ((sites, index),) = _gaps(cKDTree(corners), 2.0, 0.5)
    slabs = list(_gaps(cKDTree(corners), 2.0, 0.5, together=300))
    assert len(slabs) > 2
    np.testing.assert_array_equal(np.concatenate([some for some, _ in slabs]), sites)
    nearest = cKDTree(corners).query(sites)[0]
    assert (nearest > 2.0).all()
    np.testing.assert_allclose(sites - sites[0], 0.5 * (index - index[0]), atol=1e-12)
    for cube in np.stack(np.meshgrid(*[axes[:3] + 1.5] * 3, indexing="ij"), axis=-1).reshape(-1, 3):
        assert np.abs(sites - cube).max(axis=1).min() < 0.3
    assert np.abs(sites - 4.5).max() < 4.5 + 1.6 * 3.0


def test_the_vertex_of_a_parabola_is_found_between_sites_and_only_where_neighbours_are():
    index = np.stack(np.meshgrid(*[np.arange(5)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    top = np.array([2.3, 1.8, 2.45])
    strength = 1 - 0.1 * ((index - top) ** 2).sum(axis=1)
    chosen = np.flatnonzero((index == 2).all(axis=1))
    np.testing.assert_allclose(index[chosen] + _vertices(index, strength, chosen), [top], atol=1e-12)
    # One neighbour along y is no site: an atom stands there.
    kept = ~(index == [2, 3, 2]).all(axis=1)
    chosen = np.flatnonzero((index[kept] == 2).all(axis=1))
    found = _vertices(index[kept], strength[kept], chosen)
    np.testing.assert_allclose(found, [[0.3, 0, 0.45]], atol=1e-12)


def test_summits_are_the_strongest_and_apart():
    sites = np.array([[0.0, 0, 0], [1.0, 0, 0], [3.0, 0, 0], [9.0, 0, 0]])
    assert _summits(sites, np.array([2.0, 3.0, 1.0, 2.5]), 1.5, 9).tolist() == [1, 3, 2]
    assert _summits(sites, np.array([2.0, 3.0, 1.0, 2.5]), 1.5, 2).tolist() == [1, 3]
