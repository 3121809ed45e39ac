"""How crystalline each atom's surroundings are: averaged Steinhardt order parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stemtomo.algorithms.atoms.neighbours import neighbour_list, open_box

#: Averaged q4 and q6 of the perfect face-centred cubic crystal with its 12 neighbours.
FCC_Q4, FCC_Q6 = 0.190941, 0.574524


@dataclass(frozen=True)
class BondOrder:
    """Bond-orientational order of atoms.

    Parameters
    ----------
    q4, q6
        Steinhardt's order parameters averaged over an atom and its neighbours, (atom,) each.
    order
        sqrt(q4² + q6²), one in the perfect fcc crystal, (atom,).
    neighbours
        Atoms within the cutoff, (atom,).
    """

    q4: np.ndarray
    q6: np.ndarray
    order: np.ndarray
    neighbours: np.ndarray


def bond_order(positions: np.ndarray, cutoff_angstrom: float) -> BondOrder:
    """Return the averaged Steinhardt order of atoms at ``positions`` (atom, 3) in Å.

    The complex q_lm of an atom over its neighbours within ``cutoff_angstrom`` are averaged over the atom and these
    neighbours before their norm is taken (Lechner and Dellago, J. Chem. Phys. 129, 114707 (2008)). So the result needs
    atoms within twice the cutoff. The normalised order, and 0.5 as the least of a crystalline atom, are those used for
    metallic glasses by atomic electron tomography (Yang et al., Nature 592, 60 (2021)).

    Atoms without any neighbour have order 0.
    """
    import freud

    box, points = open_box(positions, cutoff_angstrom)
    if len(points) == 0:
        empty = np.zeros(0)
        return BondOrder(empty, empty, empty, np.zeros(0, dtype=np.int64))
    bonds = neighbour_list(box, points, cutoff_angstrom)
    averaged = []
    for degree in (4, 6):
        steinhardt = freud.order.Steinhardt(degree, average=True)
        values = steinhardt.compute((box, points), neighbors=bonds).particle_order
        averaged.append(np.nan_to_num(np.asarray(values, dtype=np.float64)))
    q4, q6 = averaged
    order = np.sqrt(q4**2 + q6**2) / np.hypot(FCC_Q4, FCC_Q6)
    return BondOrder(q4, q6, order, np.asarray(bonds.neighbor_counts, dtype=np.int64))
