"""Chemical order on an fcc lattice: L1_0 and L1_2 by the occupation of its four sublattices around each atom.

The fcc lattice is four simple cubic ones. In L1_0 two of them hold A and two B; in L1_2 one or three hold A. Relative
to an atom (sublattice 0) a neighbour perpendicular to the cubic axis j lies on sublattice j, and sublattice i seen from
there is i XOR j. So the occupation of the four can be gathered from neighbours of neighbours without a global lattice,
and an antiphase boundary is where it changes.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.atoms.frames import SLOT_AXIS, Frames
from stemtomo.algorithms.atoms.neighbours import connected_sets

#: Sublattices that hold A, one row per variant, and the phase that it is.
VARIANTS = np.array([np.isin(range(4), s) for n in (1, 2, 3) for s in itertools.combinations(range(4), n)])
_PHASE = {1: "L1_2 AB3", 2: "L1_0", 3: "L1_2 A3B"}
PHASES = ("A1", "L1_0", "L1_2 AB3", "L1_2 A3B")
VARIANT_PHASE = np.array([PHASES.index(_PHASE[int(row.sum())]) for row in VARIANTS])
#: The cubic axis (1, 2, 3) that L1_0 layers are perpendicular to; 0 for L1_2.
VARIANT_AXIS = np.array([np.bitwise_xor.reduce(np.flatnonzero(r)) if r.sum() == 2 else 0 for r in VARIANTS])
VARIANT_AXIS = np.where(VARIANTS.sum(axis=1) == 2, VARIANT_AXIS, 0)


class ChemicalOrder(NamedTuple):
    """Chemical order of atoms.

    Parameters
    ----------
    order
        That of the best variant: 0 for the chance of its surroundings' composition, 1 for perfect, (atom,).
    variant
        Row of :data:`VARIANTS`, seen from the atom, (atom,).
    antisite
        Whether the atom is of the other species than its sublattice in this variant, (atom,).
    """

    order: np.ndarray
    variant: np.ndarray
    antisite: np.ndarray


def chemical_order(frames: Frames, is_a: np.ndarray) -> ChemicalOrder:
    """Return the chemical order of atoms, A where ``is_a`` (atom,) boolean, on ``frames`` in one setting.

    An atom, its neighbours and theirs are counted by sublattice and species, near ones more often. A variant's order is
    (matches - expected) / (sites - expected), with the matches expected if the atoms counted were put on the sites at
    random.
    """
    present = np.ones(len(is_a))
    counts = np.stack([_by_sublattice(frames, values) for values in (is_a.astype(np.float64), present)])
    a, all_ = counts
    total, of_a = all_.sum(axis=1), a.sum(axis=1)
    best = np.full(len(is_a), -np.inf)
    variant = np.zeros(len(is_a), dtype=np.int64)
    share = of_a / total
    for number, holds_a in enumerate(VARIANTS):
        matches = a[:, holds_a].sum(axis=1) + (all_ - a)[:, ~holds_a].sum(axis=1)
        expected = share * all_[:, holds_a].sum(axis=1) + (1 - share) * all_[:, ~holds_a].sum(axis=1)
        order = (matches - expected) / np.maximum(total - expected, 1e-9)
        better = order > best
        best[better], variant[better] = order[better], number
    return ChemicalOrder(best, variant, VARIANTS[variant, 0] != is_a)


def _by_sublattice(frames: Frames, values: np.ndarray) -> np.ndarray:
    """Return sums of ``values`` (atom,) over the sites around each atom by relative sublattice, (atom, 4)."""
    start = np.zeros((len(values), 4))
    start[:, 0] = values
    return _spread(frames, _spread(frames, start))


def _spread(frames: Frames, values: np.ndarray) -> np.ndarray:
    """Return an atom's ``values`` (atom, 4) plus those of its neighbours, seen from it."""
    result = values.copy()
    for slot, axis in enumerate(SLOT_AXIS):
        index = frames.neighbour[:, slot]
        there = index >= 0
        for sublattice in range(4):
            result[there, sublattice] += values[index[there], sublattice ^ axis]
    return result


def ordered_grains(
    frames: Frames, found: ChemicalOrder, orientation_grain: np.ndarray, threshold: float, fewest: int
) -> np.ndarray:
    """Return the number of the chemically ordered grain of each atom, (atom,), -1 for none; the largest is 0.

    A grain is a connected set of neighbours of one orientation, whose order is at least ``threshold`` and whose
    variants are one continued: across an antiphase boundary, or where the axis or the phase changes, begins another.
    """
    member = (found.order >= threshold) & (orientation_grain >= 0)
    bonds = []
    continued = _seen_from_neighbours()
    for slot, axis in enumerate(SLOT_AXIS):
        index = frames.neighbour[:, slot]
        atoms = np.flatnonzero(index >= 0)
        other = index[atoms]
        same = (continued[found.variant[atoms], axis] == found.variant[other]) & (
            orientation_grain[atoms] == orientation_grain[other]
        )
        bonds.append(np.stack([atoms[same], other[same]]))
    first, second = np.concatenate(bonds, axis=1)
    return connected_sets(len(member), first, second, member, fewest)


def _seen_from_neighbours() -> np.ndarray:
    """Return the variant (row of VARIANTS) that each is from a neighbour perpendicular to axis j, (variant, 4)."""
    rows = {tuple(row): number for number, row in enumerate(VARIANTS.tolist())}
    return np.array([[rows[tuple(row[[s ^ j for s in range(4)]].tolist())] for j in range(4)] for row in VARIANTS])
