"""Crystals for the tests, from ASE, which knows nothing of ours."""

import numpy as np
from ase.build import bulk
from ase.spacegroup import crystal
from scipy.spatial.transform import Rotation


def fcc(a=4.08, half=25.0):
    """Return the sites of an fcc crystal in a cube of side 2 ``half`` about the origin, (n, 3) in Å."""
    return repeated(bulk("Au", "fcc", a=a, cubic=True), half)


def spinel(half=18.0):
    """Return positions and symbols of Co3O4 (a = 8.08 Å, u = 0.2631) in a cube about the origin."""
    cell = crystal(
        ["Co", "Co", "O"],
        [(1 / 8, 1 / 8, 1 / 8), (1 / 2, 1 / 2, 1 / 2), (0.2631, 0.2631, 0.2631)],
        spacegroup=227,
        setting=2,
        cellpar=[8.08, 8.08, 8.08, 90, 90, 90],
    )
    return repeated(cell, half), repeated_symbols(cell, half)


def repeated(cell, half):
    return _all(cell, half)[0]


def repeated_symbols(cell, half):
    return _all(cell, half)[1]


def _all(cell, half):
    edge = cell.cell.lengths().max()
    count = int(np.ceil(half / edge)) + 1
    many = cell * (2 * count, 2 * count, 2 * count)
    positions = many.get_positions() - count * cell.cell.array.sum(axis=0)
    inside = (np.abs(positions) < half).all(axis=1)
    return positions[inside], np.array(many.get_chemical_symbols())[inside]


def turned(seed=3):
    return Rotation.random(rng=seed).as_matrix()


def strained(strain, rotation):
    """Return the matrix (1 + strain) R."""
    return (np.eye(3) + strain) @ rotation


def polar(matrix):
    """Return R and V - 1 of matrix = V R."""
    u, _, vt = np.linalg.svd(matrix)
    return u @ vt, matrix @ (u @ vt).T - np.eye(3)


def angle_deg(a, b):
    """Return the least angle between cubic lattices of orientation ``a`` and ``b``: over the 24 rotations of a cube."""
    best = 180.0
    for cube in Rotation.create_group("O").as_matrix():
        best = min(best, float(np.degrees(Rotation.from_matrix(a @ cube @ b.T).magnitude())))
    return best
