"""Nuclei of ordered atoms, followed from state to state: what became of each, and by what events."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

EVENTS = ("nucleation", "growth", "shrinkage", "persistence", "dissolution", "merging", "division", "exchange")


class Event(NamedTuple):
    """What happened to nuclei between state ``step`` and the next: ``parents`` there became ``children`` here.

    Numbers are those of the nuclei in their states; ``shared`` atoms are in both.
    """

    step: int
    kind: str
    parents: tuple[int, ...]
    children: tuple[int, ...]
    atoms_before: int
    atoms_after: int
    shared: int


@dataclass(frozen=True)
class Track:
    """One nucleus through the states.

    ``nuclei`` are (state, number) pairs; ``fate`` sums up its sizes: growing, shrinking, fluctuating or steady; and
    ``end`` says how it ended: present (in the last state), dissolution, merging or division.
    """

    number: int
    nuclei: tuple[tuple[int, int], ...]
    atoms: tuple[int, ...]
    fate: str
    end: str


def overlaps(before: np.ndarray, after: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return how many atoms nuclei share, (nucleus before, nucleus after).

    ``before`` (n,) and ``after`` (m,) are the nucleus of each atom, -1 for none; ``pairs`` (pair, 2) of one atom.
    """
    a, b = before[pairs[:, 0]], after[pairs[:, 1]]
    both = (a >= 0) & (b >= 0)
    table = np.zeros((int(before.max(initial=-1)) + 1, int(after.max(initial=-1)) + 1), dtype=np.int64)
    np.add.at(table, (a[both], b[both]), 1)
    return table


def events_between(
    step: int, table: np.ndarray, before: np.ndarray, after: np.ndarray, least_share: float, change: float
) -> list[Event]:
    """Return the events of one step.

    Parameters
    ----------
    table
        Shared atoms, (nucleus before, nucleus after).
    before, after
        Atoms of each nucleus.
    least_share
        Two nuclei are related if they share at least this part of the smaller one.
    change
        A nucleus persists if its atoms change by less than this factor minus one.
    """
    smaller = np.minimum(before[:, None], after[None, :])
    linked = table >= np.maximum(least_share * smaller, 1)
    rows, columns = np.nonzero(linked)
    count = len(before) + len(after)
    graph = coo_matrix((np.ones(len(rows)), (rows, columns + len(before))), shape=(count, count))
    label = connected_components(graph, directed=False)[1]
    events = []
    for family in range(label.max(initial=-1) + 1):
        members = np.flatnonzero(label == family)
        parents = tuple(int(m) for m in members if m < len(before))
        children = tuple(int(m) - len(before) for m in members if m >= len(before))
        sizes = (int(before[list(parents)].sum()), int(after[list(children)].sum()))
        shared = int(table[np.ix_(parents, children)].sum()) if parents and children else 0
        kind = _kind(len(parents), len(children), *sizes, change)
        events.append(Event(step, kind, parents, children, *sizes, shared))
    return events


def _kind(parents: int, children: int, before: int, after: int, change: float) -> str:
    if parents == 0:
        return "nucleation"
    if children == 0:
        return "dissolution"
    if parents == 1 and children == 1:
        if after >= before * (1 + change):
            return "growth"
        return "shrinkage" if before >= after * (1 + change) else "persistence"
    if children == 1:
        return "merging"
    return "division" if parents == 1 else "exchange"


def tracks_of(events: list[Event], sizes: list[np.ndarray], change: float) -> list[Track]:
    """Return the tracks of nuclei, given the atoms ``sizes`` of those of each state.

    A track goes on where one nucleus becomes one. Merging and division end tracks and begin others.
    """
    following = {(e.step, e.parents[0]): e.children[0] for e in events if len(e.parents) == len(e.children) == 1}
    ends = {(e.step, p): e.kind for e in events for p in e.parents if not (len(e.parents) == len(e.children) == 1)}
    continued = {(step + 1, child) for (step, _), child in following.items()}
    tracks: list[Track] = []
    for state, counts in enumerate(sizes):
        for number in range(len(counts)):
            if (state, number) in continued:
                continue
            nuclei = [(state, number)]
            while nuclei[-1] in following:
                nuclei.append((nuclei[-1][0] + 1, following[nuclei[-1]]))
            atoms = tuple(int(sizes[s][n]) for s, n in nuclei)
            tracks.append(
                Track(len(tracks), tuple(nuclei), atoms, _fate(atoms, change), ends.get(nuclei[-1], "present"))
            )
    return tracks


def _fate(atoms: tuple[int, ...], change: float) -> str:
    rises = any(b >= a * (1 + change) for a, b in itertools.pairwise(atoms))
    falls = any(a >= b * (1 + change) for a, b in itertools.pairwise(atoms))
    if rises and falls:
        return "fluctuating"
    return "growing" if rises else "shrinking" if falls else "steady"
