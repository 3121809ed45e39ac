"""Atoms added where the projections show more than the model, and dropped where they show less, until neither is left.

Refining an incomplete list makes it worse: neighbours move and grow to stand in for the missing atom. So refinement,
dropping of what stayed too faint, and insertion at the peaks of the back-projected residual alternate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from stemtomo.algorithms.atoms.classification import classify
from stemtomo.algorithms.atoms.gaps import REACH, residual_peaks
from stemtomo.algorithms.atoms.peaks import separate
from stemtomo.algorithms.atoms.projected import AtomModel, ProjectedImages, noise_weights, without_slow
from stemtomo.algorithms.atoms.refinement import RefinedAtoms, refine_atoms
from stemtomo.algorithms.atoms.splitting import elongation
from stemtomo.algorithms.atoms.thresholds import bright_level

#: Pixels while atoms come and go, in widths of an atom: averages of smaller ones, which lose nothing but time.
_COARSE_WIDTHS = 0.9
#: Inserted atoms begin with this part of a light atom's intensity.
_START = 0.8
#: A site is tried this often: what was dropped there twice is no atom.
_TRIALS = 2
#: Share of two classes in the middle fifth between their means, if they are two: halves of one have a tenth there.
_HALF_WAY = 0.04
#: Distance of the means of the halves of one Gaussian in standard deviations of a half, 2 / sqrt(pi / 2 - 1); and what
#: n values exceed it by in one case of a hundred, times sqrt(n).
_OF_HALVES, _BY_CHANCE = 2.647, 5.6
#: In minimum distances: half of the distance at which the two parts of a split atom begin, and the least half distance,
#: which an expansion to second order makes too short, that an atom is split for.
_SPLIT_HALF, _SPLIT_REACH = 0.6, 0.25
#: Atoms fainter than this many light ones are seldom two: they are split by one standard deviation more.
_BRIGHTER = 1.1
#: The least half distance while atoms still come and go: what is not at its place yet is elongated too.
_FAR_REACH = 0.34
#: Share of the atoms that may still come or go when the alternation ends.
_SETTLED = 2e-4
#: In that many last rounds of a phase atoms are split even if this share still comes and goes: many never settle.
_LATE_ROUNDS, _NEARLY_SETTLED = 4, 5e-3


class _Phase(NamedTuple):
    """Distances in minimum distances: of insertion from other atoms, of merging; noise that an insertion and the
    splitting of one atom into two exceed.
    """

    inserted: float
    merged: float
    significant: float
    split: float


#: While many atoms are missing, those present stand beside their places; then the last gaps, by clear evidence only.
_PHASES = (_Phase(1.0, 0.85, 3.0, np.inf), _Phase(0.85, 0.7, 4.5, 3.0))


@dataclass(frozen=True)
class CompletionRules:
    """When atoms are added and dropped.

    Parameters
    ----------
    insertion
        Faintest peak of the residual at which an atom is inserted, as a fraction of a light atom's intensity: the
        neighbours of a missing atom have taken most of it.
    pruning
        Faintest atom that is kept after refinement, as the same fraction.
    minimum_distance_angstrom
        Smallest distance between two atoms in Å, give or take what places are wrong by while atoms are missing.
    threshold
        Faintest atom that is kept, as a fraction of the bright ones, whatever the lightest class seems to be.
    rounds
        Most alternations of each phase.
    iterations
        Iterations of each refinement but the last.
    splitting
        Split atoms that the projections show elongated. Projections of a volume have the elongation of its wedge.
    """

    insertion: float = 0.2
    pruning: float = 0.6
    minimum_distance_angstrom: float = 1.5
    threshold: float = 0.25
    rounds: int = 12
    iterations: int = 15
    splitting: bool = True


@dataclass(frozen=True)
class CompletedAtoms:
    """Refined atoms, their classes, and what came and went.

    Parameters
    ----------
    refined
        The atoms.
    labels
        Class of each, (atom,), faintest first.
    origin
        Index of each atom in the list that was given, -1 for those that were added, (atom,).
    history
        Number of atoms added and dropped in each round.
    """

    refined: RefinedAtoms
    labels: np.ndarray
    origin: np.ndarray
    history: tuple[tuple[int, int], ...]


def complete_atoms(
    positions: np.ndarray,
    projected: ProjectedImages,
    classes: int,
    *,
    labels: np.ndarray | None = None,
    width_angstrom: float = 0.5,
    rules: CompletionRules | None = None,
    iterations: int = 60,
    refine_shifts: bool = False,
    intensity_spread: float | None = None,
    weigh: bool = True,
    widths: Literal["class", "atom"] = "class",
    background_angstrom: float = 0.0,
) -> CompletedAtoms:
    """Refine ``positions`` (atom, 3) in Å while atoms are added and dropped, to convergence.

    Parameters
    ----------
    projected
        What the atoms have to explain.
    classes
        Number of species, told apart by intensity after every refinement.
    labels
        Classes to begin with, (atom,); all alike if not given.
    width_angstrom
        Width to begin with.
    rules
        When atoms are added and dropped.
    iterations, refine_shifts, intensity_spread, widths
        Of the last refinement; see :func:`~stemtomo.algorithms.atoms.refinement.refine_atoms`.
    weigh, background_angstrom
        Weigh pixels by their noise in the last refinement; leave out the running mean over this width where atoms leave
        something slow behind, 0 for never.
    """
    rules = rules or CompletionRules()
    state = _State.start(np.asarray(positions, dtype=np.float64), labels, width_angstrom)
    history: list[tuple[int, int]] = []
    coarse = projected.binned(max(int(_COARSE_WIDTHS * width_angstrom / projected.pixel_angstrom), 1))
    for phase in _PHASES:
        state, changes = state.alternated(coarse, projected, classes, rules, phase)
        history += changes
        if background_angstrom:
            projected, coarse = (without_slow(state.model, each, background_angstrom) for each in (projected, coarse))
    if not state.known_intensity:
        state, refined = state.refined(projected, classes, rules.iterations)
    projected = replace(projected, weights=noise_weights(state.model, projected)) if weigh else projected
    for last in (False, False, True):
        state, refined = state.refined(projected, classes, iterations, refine_shifts, intensity_spread, widths)
        shorter, dropped = state.pruned(rules, _PHASES[0])
        if dropped == 0 or last:
            break
        history.append((0, dropped))
        state, iterations = shorter, max(iterations // 2, 1)
    return CompletedAtoms(refined, state.labels, state.origin, tuple(history))


@dataclass(frozen=True)
class _State:
    """Atoms between two steps, and the sites where some were dropped."""

    model: AtomModel
    labels: np.ndarray
    origin: np.ndarray
    dropped: np.ndarray
    fresh: np.ndarray
    known_intensity: bool
    divided: np.ndarray
    """Where atoms were split in two, (n, 3): what has become one again there is left so."""

    @classmethod
    def start(cls, positions: np.ndarray, labels: np.ndarray | None, width_angstrom: float) -> _State:
        count = len(positions)
        model = AtomModel(positions, np.ones(count), np.full(count, float(width_angstrom)))
        labels = np.zeros(count, dtype=np.int64) if labels is None else np.asarray(labels)
        return cls(
            model, labels, np.arange(count), np.empty((0, 3)), np.zeros(count, dtype=bool), False, np.empty((0, 3))
        )

    def light(self, rules: CompletionRules) -> float:
        """Return the intensity of an atom of the lightest class.

        Classes that do not stand apart are one class cut in two: the lightest may then be missing altogether, and the
        faintest atom that is kept, whatever the lightest class seems to be, says how light it can be.
        """
        intensity, lightest = self.model.intensity, self.labels == self.labels.min()
        found = float(np.median(intensity[lightest]))
        if lightest.all() or _stands_apart(intensity, self.labels):
            return found
        return min(found, rules.threshold * bright_level(intensity, rules.threshold))

    def refined(
        self,
        projected: ProjectedImages,
        classes: int,
        iterations: int,
        refine_shifts: bool = False,
        spread: float | None = None,
        widths: Literal["class", "atom"] = "class",
    ) -> tuple[_State, RefinedAtoms]:
        """Return the state after refinement, with the classes of its new intensities, and what refinement says."""
        refined = refine_atoms(
            self.model.positions,
            self.labels,
            projected,
            width_angstrom=self.model.width_angstrom,
            intensity=self.model.intensity if self.known_intensity else None,
            iterations=iterations,
            refine_shifts=refine_shifts,
            intensity_spread=spread if self.known_intensity else None,
            widths=widths,
        )
        labels = _classes(refined.intensity, classes)
        return replace(self, model=refined.model, labels=labels, known_intensity=True), refined

    def pruned(self, rules: CompletionRules, phase: _Phase) -> tuple[_State, int]:
        """Return the state without atoms that are too faint, halves of one atom merged, and how many went."""
        merged = self.merged(phase.merged * rules.minimum_distance_angstrom)
        intensity = merged.model.intensity
        faintest = rules.threshold * bright_level(intensity, rules.threshold)
        good = intensity > max(rules.pruning * self.light(rules), faintest)
        faint = merged.model.positions[~good]
        state = replace(merged.kept(good), dropped=np.concatenate([self.dropped, faint]))
        return state, len(self.labels) - len(state.labels)

    def alternated(
        self, coarse: ProjectedImages, projected: ProjectedImages, classes: int, rules: CompletionRules, phase: _Phase
    ) -> tuple[_State, list[tuple[int, int]]]:
        """Return the state after one phase, and how many atoms each of its rounds added and dropped."""
        state, history = replace(self, dropped=np.empty((0, 3))), []
        for number in range(rules.rounds):
            state, _ = state.refined(coarse, classes, rules.iterations)
            state, dropped = state.pruned(rules, phase)
            state, added = state.extended(coarse, rules, phase)
            settled, late = added + dropped <= _SETTLED * len(state.labels), rules.rounds - number <= _LATE_ROUNDS
            nearly = late and added + dropped <= _NEARLY_SETTLED * len(state.labels)
            # The second part of an atom split in the last round would never be refined.
            if (settled or nearly) and number + 1 < rules.rounds:
                state, split = state.split(projected, rules, phase, _SPLIT_REACH if settled else _FAR_REACH)
                added += split
            history.append((added, dropped))
            if added + dropped <= _SETTLED * len(state.labels):
                break
        else:
            state = state.kept(~state.fresh)
        return state, history

    def merged(self, distance_angstrom: float) -> _State:
        """Return the state with the closest pairs within ``distance_angstrom`` replaced by one atom for both."""
        pairs = cKDTree(self.model.positions).query_pairs(distance_angstrom, output_type="ndarray")
        if len(pairs) == 0:
            return self
        positions, intensity = self.model.positions.copy(), self.model.intensity.copy()
        length = np.linalg.norm(positions[pairs[:, 0]] - positions[pairs[:, 1]], axis=1)
        good = np.ones(len(positions), dtype=bool)
        taken = np.zeros(len(positions), dtype=bool)
        for pair in pairs[np.argsort(length, kind="stable")]:
            if taken[pair].any():
                continue
            taken[pair] = True
            strong, weak = pair if intensity[pair[0]] >= intensity[pair[1]] else pair[::-1]
            share = np.maximum(intensity[[strong, weak]], 0)
            if share.sum() > 0:
                positions[strong] = (share[:, None] * positions[[strong, weak]]).sum(axis=0) / share.sum()
                intensity[strong] = share.sum()
            good[weak] = False
        model = replace(self.model, positions=positions, intensity=intensity)
        return replace(self, model=model).kept(good)

    def kept(self, good: np.ndarray) -> _State:
        """Return the state with the atoms that are ``good`` (atom,)."""
        chosen = {name: getattr(self, name)[good] for name in ("model", "labels", "origin", "fresh")}
        return replace(self, **chosen)

    def split(
        self, projected: ProjectedImages, rules: CompletionRules, phase: _Phase, reach: float
    ) -> tuple[_State, int]:
        """Return the state with atoms that the projections show elongated replaced by two, and how many.

        ``reach`` is the least half distance that an atom is split for, in minimum distances.
        """
        # In one species there is no brighter one that two could be taken for.
        if not (rules.splitting and np.isfinite(phase.split)) or (self.labels == self.labels[0]).all():
            return self, 0
        model = self.model
        found = elongation(model, projected)
        bright = model.intensity > _BRIGHTER * self.light(rules)
        chosen = found.significance > np.where(bright, phase.split, phase.split + 1)
        chosen &= found.half_distance_angstrom > reach * rules.minimum_distance_angstrom
        if len(self.divided):
            chosen &= cKDTree(self.divided).query(model.positions)[0] > rules.minimum_distance_angstrom / 2
        which = np.flatnonzero(chosen)
        half = _SPLIT_HALF * rules.minimum_distance_angstrom * found.axis[which]
        positions, intensity = model.positions.copy(), model.intensity.copy()
        positions[which] -= half
        intensity[which] = np.maximum(intensity[which] / 2, _START * self.light(rules))
        longer = AtomModel(
            np.concatenate([positions, model.positions[which] + half]),
            np.concatenate([intensity, intensity[which]]),
            np.concatenate([model.width_angstrom, model.width_angstrom[which]]),
        )
        state = replace(
            self,
            model=longer,
            labels=np.concatenate([self.labels, self.labels[which]]),
            origin=np.concatenate([self.origin, np.full(len(which), -1)]),
            fresh=np.arange(len(longer)) >= len(model),
            divided=np.concatenate([self.divided, model.positions[which]]),
        )
        return state, len(which)

    def extended(self, projected: ProjectedImages, rules: CompletionRules, phase: _Phase) -> tuple[_State, int]:
        """Return the state with atoms at the peaks of the residual, and how many."""
        light, model = self.light(rules), self.model
        sites, intensity = residual_peaks(model, projected, rules.insertion * light, phase.significant)
        tree = cKDTree(model.positions)
        spacing = float(np.median(tree.query(model.positions, k=2)[0][:, 1]))
        nearest = tree.query(sites)[0] if len(sites) else np.empty(0)
        good = (nearest > phase.inserted * rules.minimum_distance_angstrom) & (nearest < REACH * spacing)
        sites, intensity = sites[good], intensity[good]
        chosen = separate(sites, intensity, rules.minimum_distance_angstrom)
        sites, intensity = sites[chosen], intensity[chosen]
        if len(sites) and len(self.dropped):
            near = cKDTree(self.dropped).query_ball_point(
                sites, rules.minimum_distance_angstrom / 2, return_length=True
            )
            sites, intensity = sites[near < _TRIALS], intensity[near < _TRIALS]
        count = len(sites)
        width = float(np.median(model.width_angstrom[self.labels == self.labels.min()]))
        longer = AtomModel(
            np.concatenate([model.positions, sites]),
            np.concatenate([model.intensity, np.maximum(intensity, _START * light)]),
            np.concatenate([model.width_angstrom, np.full(count, width)]),
        )
        labels = np.concatenate([self.labels, np.full(count, self.labels.min())])
        fresh = np.arange(len(labels)) >= len(self.labels)
        origin = np.concatenate([self.origin, np.full(count, -1)])
        return replace(self, model=longer, labels=labels, origin=origin, fresh=fresh), count


def _stands_apart(intensity: np.ndarray, labels: np.ndarray) -> bool:
    """Whether the lightest class and the next are two: further apart than the halves of one, or few atoms half-way."""
    pair = [intensity[labels == label] for label in np.unique(labels)[:2]]
    light, heavy = (float(part.mean()) for part in pair)
    spread, count = float(np.sqrt(np.mean([part.var() for part in pair]))), sum(len(part) for part in pair)
    if heavy - light > (_OF_HALVES + _BY_CHANCE / np.sqrt(count)) * spread:
        return True
    between = (np.concatenate(pair) - light) / (heavy - light)
    return float(np.mean(np.abs(between - 0.5) < 0.1)) < _HALF_WAY


def _classes(intensity: np.ndarray, classes: int) -> np.ndarray:
    return (
        classify(intensity, classes).labels if len(np.unique(intensity)) >= classes else np.zeros(len(intensity), int)
    )
