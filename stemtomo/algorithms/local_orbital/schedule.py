"""The order in which local orbitals are freed: atoms first, until the list is complete, then probes, then angles.

Refining positions while atoms are missing moves their neighbours in their place, and probes freed then would learn that
mistake; so atoms come and go by the residual before the probes are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from stemtomo.algorithms.local_orbital.insertion import Wanted, extended
from stemtomo.algorithms.local_orbital.model import Orbitals
from stemtomo.algorithms.local_orbital.solver import Evaluate, Free, Geometry, refine, worth_keeping

#: Share of the atoms that may still come or go when the list is complete.
_SETTLED = 5e-4
#: An atom that is missing when the probes are known stands out whole; what unfinished probes leave is fainter.
_LATE_INSERTION = 0.5
#: A round in which more atoms come than go has to lower the loss by this share; another may raise it by so much, since
#: false atoms explain some noise.
_WORTH, _TOLERATED = 1e-3, 0.02


@dataclass(frozen=True)
class Schedule:
    """What is freed, for how long, and when atoms come and go.

    Parameters
    ----------
    atom_iterations, probe_iterations, tilt_iterations, last_iterations
        Most iterations of each search over the atoms alone, with the probes too, with the tilts too, and of the last,
        over all that is free.
    probe_searches
        Searches with the probes; 0 keeps them as they are told.
    rounds
        Most rounds in which atoms come and go before the probes are freed.
    shifts, tilts
        Whether the images' shifts and orientations are refined.
    width
        One width for all atoms, for each species, or for each atom.
    insertion, pruning
        Intensity in the residual at which an atom is inserted, and below which one is dropped, of the median
        atom of the faintest species.
    minimum_distance_angstrom
        Closest pair of atoms.
    still_angstrom
        Root mean square of the atoms' way over 5 iterations at which a search ends.
    """

    atom_iterations: int = 14
    probe_searches: int = 3
    probe_iterations: int = 15
    tilt_iterations: int = 25
    last_iterations: int = 40
    rounds: int = 10
    shifts: bool = True
    tilts: bool = False
    width: Literal["none", "shared", "species", "atom"] = "shared"
    insertion: float = 0.3
    pruning: float = 0.4
    minimum_distance_angstrom: float = 1.6
    still_angstrom: float = 2e-4

    @property
    def searches(self) -> int:
        """Most searches there will be."""
        return len(_searches(self))


class Step(NamedTuple):
    """What a search has come to."""

    number: int
    """Searches of the schedule that are done with it."""
    stage: str
    losses: list[float]
    added: int
    dropped: int


#: Called after every search with the searches done, what it did, and the model so far.
OnStep = Callable[[int, Step, Orbitals], None]

#: Numbers of the kinds of atoms, 0 the faintest, (atom,), from their intensities (atom,).
KindsOf = Callable[[np.ndarray], np.ndarray]


#: A model with its probes at the foci that its atoms explain the images best with.
Focused = Callable[[Orbitals], Orbitals]


def solve(
    model: Orbitals,
    evaluate: Evaluate,
    geometry: Geometry,
    schedule: Schedule | None = None,
    on_step: OnStep | None = None,
    before: Sequence[Step] = (),
    kinds_of: KindsOf | None = None,
    focused: Focused | None = None,
    wanted: Wanted | None = None,
) -> Orbitals:
    """Refine ``model`` by the whole schedule; return the last model.

    Parameters
    ----------
    before
        Searches that a run before this one did, whose ``model`` this is: where to go on.
    kinds_of
        How atoms are told apart after every search; they are all of one kind if not given.
    focused
        What puts the foci of the sections where the atoms of now say, before every search until probes are freed.
    wanted
        Where the residual asks for atoms; by ``evaluate`` if not given, which takes longer.
    """
    wanted = wanted or _wanted_by(evaluate)
    schedule = schedule or Schedule()
    searches = _searches(schedule)
    done = before[-1].number if before else 0
    lowest = min((step.losses[-1] for step in before if step.losses), default=np.inf)
    rested = bool(before) and len(before[-1].losses) < searches[done - 1].iterations
    settled = stands = False
    kept = model
    for number, search in enumerate(searches, start=1):
        late = search.stage == "probes" and search.insertion is not None
        if number <= done or (search.stage == "atoms" and settled) or (late and stands):
            continue
        if focused is not None and not any(one.free.probes for one in searches[: number - 1]):
            model = focused(model)
        model, added, dropped = _changed(model, wanted, geometry, schedule, search)
        settled = search.stage == "atoms" and added + dropped <= _SETTLED * len(model)
        stands = added + dropped == 0
        # Where the list stands, what is left is for the last search, unless the one before it came to rest.
        if settled or (stands and (late or (search.stage == "last" and rested))):
            continue
        found = refine(
            model, evaluate, geometry, search.free, search.iterations, still_angstrom=schedule.still_angstrom
        )
        if search.stage == "atoms" and found.losses and found.losses[-1] > (1 - _worth(added, dropped)) * lowest:
            # What came and went explains nothing more: the list stands as it was.
            model, settled = kept, True
            continue
        model = found.model if kinds_of is None else replace(found.model, species=kinds_of(found.model.intensity))
        kept = model
        rested = len(found.losses) < search.iterations
        lowest = min(lowest, found.losses[-1]) if found.losses else lowest
        if on_step is not None:
            on_step(number, Step(number, search.stage, found.losses, added, dropped), model)
    return model


class _Search(NamedTuple):
    """One search: what it is called, what it changes and for how long."""

    stage: str
    free: Free
    iterations: int
    prunes: bool = False
    insertion: float | None = None
    """Intensity from which atoms come before it; none come if not given."""


def _changed(
    model: Orbitals, wanted: Wanted, geometry: Geometry, schedule: Schedule, search: _Search
) -> tuple[Orbitals, int, int]:
    """Return the model with the atoms that come and go before ``search``, how many came, and how many went."""
    added = dropped = 0
    gone = None
    if search.prunes:
        good = worth_keeping(model, schedule.pruning, schedule.minimum_distance_angstrom)
        gone, model, dropped = model.positions[~good], model.kept(good), int((~good).sum())
    if search.insertion is not None:
        closest = schedule.minimum_distance_angstrom
        model, added = extended(
            model, wanted, geometry, insertion=search.insertion, minimum_distance_angstrom=closest, gone=gone
        )
    return model, added, dropped


def _wanted_by(evaluate: Evaluate) -> Wanted:
    def wanted(model: Orbitals, sites: np.ndarray) -> np.ndarray:
        width = np.full(len(sites), np.median(model.width_angstrom))
        return evaluate(model.with_atoms(sites, np.zeros(len(sites)), width), False).intensity[len(model) :]

    return wanted


def _worth(added: int, dropped: int) -> float:
    return _WORTH if added > dropped else -_TOLERATED


def _searches(schedule: Schedule) -> list[_Search]:
    """Return every search there may be, in order."""
    atoms = Free(width=schedule.width, shifts=schedule.shifts)
    probes = replace(atoms, probes=True)
    plan = [_Search("start", atoms, schedule.atom_iterations)]
    plan += [_Search("atoms", atoms, schedule.atom_iterations, True, schedule.insertion)] * schedule.rounds
    late = max(schedule.insertion, _LATE_INSERTION)
    for number in range(schedule.probe_searches):
        # What unfinished probes leave looks like atoms: none come before the probes were looked for once.
        insertion = late if number else None
        plan.append(_Search("probes", probes, schedule.probe_iterations, True, insertion))
    last = probes if schedule.probe_searches else atoms
    if schedule.tilts:
        last = replace(last, tilts=True)
        plan.append(_Search("tilts", last, schedule.tilt_iterations))
    # What was inserted last and turned out faint goes; none comes.
    plan.append(_Search("last", last, schedule.last_iterations, True))
    return plan


def held_out(sections: np.ndarray, share: float) -> np.ndarray:
    """Return which images (image,) are kept for a test of the model: about ``share`` of all, evenly over the series."""
    count = len(sections)
    chosen = np.zeros(count, dtype=bool)
    if share > 0:
        every = (np.arange(round(count * share)) + 0.5) / share - 0.5
        chosen[np.unique(np.round(every).astype(int).clip(0, count - 1))] = True
    return chosen
