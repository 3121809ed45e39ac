"""Atoms cut into compact blocks with halos, so that what needs only neighbours is computed block by block."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stemtomo.errors import ConfigurationError


class Block(NamedTuple):
    """Indices of the atoms that a block owns, (own,), and of those around it, own ones first, (own + halo,)."""

    own: np.ndarray
    around: np.ndarray


def atom_blocks(positions: np.ndarray, atoms_per_block: int, halo_angstrom: float) -> list[Block]:
    """Cut ``positions`` (atom, 3) into blocks of at most ``atoms_per_block`` atoms, each atom in exactly one.

    Halves along the longest side until small enough. Everything within ``halo_angstrom`` of a block's bounding box is
    around it, so a result that depends on that neighbourhood alone does not depend on how the atoms were cut.

    Raises
    ------
    ConfigurationError
        If the positions are not (atom, 3) and finite.
    """
    require_positions(positions)
    blocks, waiting = [], [np.arange(len(positions))]
    while waiting:
        own = waiting.pop()
        if len(own) <= atoms_per_block:
            if len(own):
                blocks.append(own)
            continue
        inside = positions[own]
        axis = int(np.argmax(np.ptp(inside, axis=0)))
        order = np.argpartition(inside[:, axis], len(own) // 2)
        waiting += [np.sort(own[order[: len(own) // 2]]), np.sort(own[order[len(own) // 2 :]])]
    return [_with_halo(positions, own, halo_angstrom) for own in blocks]


def require_positions(positions: np.ndarray) -> None:
    """Raise ConfigurationError unless ``positions`` are finite and (atom, 3)."""
    if positions.ndim != 2 or positions.shape[1] != 3 or not np.isfinite(positions).all():
        raise ConfigurationError(f"positions must be finite and (atom, 3), columns x, y, z in Å; got {positions.shape}")


def _with_halo(positions: np.ndarray, own: np.ndarray, halo: float) -> Block:
    low, high = positions[own].min(axis=0) - halo, positions[own].max(axis=0) + halo
    near = ((positions >= low) & (positions <= high)).all(axis=1)
    near[own] = False
    return Block(own, np.concatenate([own, np.flatnonzero(near)]))
