"""The order in which local orbitals are freed: atoms first, until the list is complete, then probes, then angles.

Refining positions while atoms are missing moves their neighbours in their place, and probes freed then would learn that
mistake; so atoms come and go by the residual before the probes are touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from stemtomo.algorithms.local_orbital.model import Orbitals
from stemtomo.algorithms.local_orbital.solver import Evaluate, Free, Geometry, extended, pruned, refine

#: Share of the atoms that may still come or go when the list is complete.
_SETTLED = 5e-4
#: After the probes were refined, so many more rounds of coming and going.
_LATE_ROUNDS = 2
#: A round in which more atoms come than go has to lower the loss by this share; another may raise it by so much, since
#: false atoms explain some noise.
_WORTH, _TOLERATED = 1e-3, 0.02


@dataclass(frozen=True)
class Schedule:
    """What is freed, for how long, and when atoms come and go.

    Parameters
    ----------
    atom_iterations, probe_iterations, tilt_iterations
        Iterations of each search over the atoms alone, with the probes too, and with the tilts too.
    probe_searches
        Searches with the probes; 0 keeps them as they are told.
    rounds
        Most rounds in which atoms come and go before the probes are freed.
    shifts, tilts
        Whether the images' shifts and orientations are refined.
    width
        One width for all atoms, or one for each.
    insertion, pruning
        Intensity in the residual at which an atom is inserted, and below which one is dropped, of the median atom.
    minimum_distance_angstrom
        Closest pair of atoms.
    """

    atom_iterations: int = 12
    probe_searches: int = 3
    probe_iterations: int = 25
    tilt_iterations: int = 25
    rounds: int = 8
    shifts: bool = True
    tilts: bool = False
    width: Literal["none", "shared", "atom"] = "shared"
    insertion: float = 0.3
    pruning: float = 0.4
    minimum_distance_angstrom: float = 1.6

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


def solve(
    model: Orbitals,
    evaluate: Evaluate,
    geometry: Geometry,
    schedule: Schedule | None = None,
    on_step: OnStep | None = None,
    done: int = 0,
    lowest: float = np.inf,
) -> Orbitals:
    """Refine ``model`` by the whole schedule; return the last model.

    Parameters
    ----------
    done
        Searches that a run before this one did, whose ``model`` this is: where to go on.
    lowest
        Lowest loss that their searches ended with.
    """
    schedule = schedule or Schedule()
    settled, kept = False, model
    for number, (stage, free, iterations, changes) in enumerate(_searches(schedule), start=1):
        if number <= done or (stage == "atoms" and settled):
            continue
        added = dropped = 0
        if changes or stage == "last":
            model, dropped = pruned(model, schedule.pruning, schedule.minimum_distance_angstrom)
        if stage == "last" and not dropped:
            continue
        if changes:
            rules = {"insertion": schedule.insertion, "minimum_distance_angstrom": schedule.minimum_distance_angstrom}
            model, added = extended(model, evaluate, geometry, **rules)
            settled = added + dropped <= _SETTLED * len(model)
            if settled and stage == "atoms":
                continue
        found = refine(model, evaluate, geometry, free, iterations)
        if stage == "atoms" and found.losses and found.losses[-1] > (1 - _worth(added, dropped)) * lowest:
            # What came and went explains nothing more: the list stands as it was.
            model, settled = kept, True
            continue
        model, kept = found.model, found.model
        lowest = min(lowest, found.losses[-1]) if found.losses else lowest
        if on_step is not None:
            on_step(number, Step(number, stage, found.losses, added, dropped), model)
    return model


def _worth(added: int, dropped: int) -> float:
    return _WORTH if added > dropped else -_TOLERATED


def _searches(schedule: Schedule) -> list[tuple[str, Free, int, bool]]:
    """Return stage, what is free, iterations, and whether atoms come and go before it, of every search."""
    atoms = Free(width=schedule.width, shifts=schedule.shifts)
    probes = replace(atoms, probes=True)
    plan = [("start", atoms, schedule.atom_iterations, False)]
    plan += [("atoms", atoms, schedule.atom_iterations, True)] * schedule.rounds
    plan += [
        ("probes", probes, schedule.probe_iterations, 0 < number <= _LATE_ROUNDS)
        for number in range(schedule.probe_searches)
    ]
    last = probes if schedule.probe_searches else atoms
    if schedule.tilts:
        last = replace(last, tilts=True)
        plan.append(("tilts", last, schedule.tilt_iterations, False))
    # What was inserted last and turned out faint goes; none comes.
    plan.append(("last", last, schedule.probe_iterations if last.probes else schedule.atom_iterations, False))
    return plan


def held_out(sections: np.ndarray, share: float) -> np.ndarray:
    """Return which images (image,) are kept for a test of the model: about ``share`` of all, evenly over the series."""
    count = len(sections)
    chosen = np.zeros(count, dtype=bool)
    if share > 0:
        every = (np.arange(round(count * share)) + 0.5) / share - 0.5
        chosen[np.unique(np.round(every).astype(int).clip(0, count - 1))] = True
    return chosen
