"""Traced atoms refined against projections: of the tilts, or of a joint volume."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stemtomo.algorithms.atoms.completion import CompletedAtoms, CompletionRules, complete_atoms
from stemtomo.algorithms.atoms.projected import ProjectedImages
from stemtomo.algorithms.atoms.refinement import RefinedAtoms
from stemtomo.algorithms.atoms.tracing import TracedAtoms
from stemtomo.algorithms.atoms.uncertainty import position_uncertainty
from stemtomo.io.store import Store
from stemtomo.pipeline.alignment import aligned_images, aligned_rotations, series_of
from stemtomo.pipeline.config import AtomSettings

#: Share of the projections' variance below which Gaussian atoms are no model of them, and traced positions are kept.
_LEAST_EXPLAINED = 0.6
#: Share of it that the atoms of a joint volume explain where noise is small. Below, refined intensities tell atoms from
#: maxima of noise less well than the volume, which is never negative: what tracing found stays.
_WITHOUT_NOISE = 0.9
#: Width of the running mean that projections are compared without, in widths of an atom.
_BACKGROUND_WIDTHS = 3.0


class Model(NamedTuple):
    """Atoms to be written, which of ``traced`` each was (-1: none, it was added), and what refinement did."""

    traced: TracedAtoms
    origin: np.ndarray
    positions: np.ndarray
    intensity: np.ndarray
    width_angstrom: np.ndarray
    refinement: str
    refined: RefinedAtoms | None
    sigma_angstrom: np.ndarray | None = None


def traced_model(traced: TracedAtoms, reason: str) -> Model:
    """Return the atoms as traced, and the ``reason`` why they are not refined."""
    every = np.arange(len(traced))
    return Model(traced, every, traced.positions, traced.integrated, traced.width_angstrom, reason, None)


def refined_model(store: Store, source: str, traced: TracedAtoms, labels: np.ndarray, settings: AtomSettings) -> Model:
    """Return the atoms refined against the projections, without faint and double ones; or as traced, and why."""
    alignment = store.read("alignment").attrs if source == "volume" and store.fingerprint("alignment") else {}
    if not alignment.get("wholly_in_view", True):
        return traced_model(traced, "left out: atoms beyond the field of view are in the projections")
    projected = _projected(store) if source == "volume" else _projected_jointly(store)
    width = float(np.median(traced.width_angstrom))
    width = max(0.5 * projected.pixel_angstrom, np.sqrt(max(width**2 - settings.smoothing_angstrom**2, 0.0)))
    slow = _BACKGROUND_WIDTHS * width if settings.background_angstrom is None else settings.background_angstrom
    # While atoms are missing, slow frequencies show them; where that fails, as at few electrons, it goes without.
    judged = settings.background_angstrom is None
    for begin in (0.0, slow)[: 1 + (source != "volume")] if judged else (slow,):
        seen, rest, done = replace(projected, background_angstrom=begin), slow - begin, "done"
        measured = source == "volume"
        found = _completed(traced, seen, labels, width, settings, measured=measured, background_angstrom=rest)
        if not measured and settings.complete and found.refined.explained < _WITHOUT_NOISE:
            done = (
                f"done, none added or dropped: noise (atoms explain {found.refined.explained:.0%} of the projections)"
            )
            alone = settings.model_copy(update={"complete": False, "pruning_fraction": 0.0, "threshold": 0.0})
            found = _completed(traced, seen, labels, width, alone, measured=measured, background_angstrom=rest)
        refined, old = found.refined, found.origin >= 0
        moved = np.linalg.norm(refined.positions[old] - traced.positions[found.origin[old]], axis=1)
        typical = float(np.median(moved)) if old.any() else np.inf
        if refined.explained >= _LEAST_EXPLAINED and typical <= settings.minimum_distance_angstrom / 4:
            break
        reason = f"atoms explain {refined.explained:.0%} of the projections, half of them moved by {typical:.2f} Å"
    else:
        return traced_model(traced, f"failed: {reason}")
    sigma = float(store.read("projections" if source == "volume" else source).attrs["sigma_rad_per_volt_angstrom"])
    errors = position_uncertainty(refined, found.labels, projected) if settings.uncertainty else None
    model = refined.model
    return Model(
        traced, found.origin, model.positions, model.intensity / sigma, model.width_angstrom, done, refined, errors
    )


def _completed(
    traced: TracedAtoms,
    projected: ProjectedImages,
    labels: np.ndarray,
    width_angstrom: float,
    settings: AtomSettings,
    *,
    measured: bool,
    background_angstrom: float,
) -> CompletedAtoms:
    """Return the ``traced`` atoms refined, with those that are missing; of ``measured`` projections, or a volume's."""
    rules = CompletionRules(
        insertion=settings.insertion_fraction,
        pruning=settings.pruning_fraction,
        minimum_distance_angstrom=settings.minimum_distance_angstrom,
        threshold=settings.threshold,
        rounds=settings.completion_rounds if settings.complete else 0,
        splitting=measured,
    )
    return complete_atoms(
        traced.positions,
        projected,
        settings.species if isinstance(settings.species, int) else len(settings.species),
        labels=labels,
        width_angstrom=width_angstrom,
        rules=rules,
        iterations=settings.refine_iterations,
        refine_shifts=measured,
        intensity_spread=settings.intensity_spread,
        weigh=settings.weigh_noise,
        widths=settings.widths,
        background_angstrom=background_angstrom,
    )


def _projected(store: Store) -> ProjectedImages:
    """Return the projections with the shifts that the volume was made with."""
    projections, volume = store.read("projections").load(), store.read("volume")
    alignment = store.read("alignment") if store.fingerprint("alignment") else None
    shifts = np.zeros((projections.sizes["tilt"], 2))
    for source in (alignment, volume):
        if source is not None and "shift_x_angstrom" in source:
            shifts = np.stack([source[f"shift_{axis}_angstrom"].values for axis in "xy"], axis=-1)
    return ProjectedImages(
        images=aligned_images(projections, alignment),
        valid=projections["valid"].values,
        rotations=aligned_rotations(projections, alignment),
        shifts_angstrom=shifts,
        pixel_angstrom=float(projections.attrs["pixel_angstrom"]),
    )


def _projected_jointly(store: Store) -> ProjectedImages:
    """Return the projections of the joint volume: there, and only there, the patterns determine it."""
    result = store.read("joint").load()
    images = result["projection"].values.astype(np.float32)
    return ProjectedImages(
        images=images,
        valid=np.ones(images.shape, dtype=bool),
        rotations=series_of(result).rotations,
        shifts_angstrom=np.zeros((len(images), 2)),
        pixel_angstrom=float(result.attrs["voxel_angstrom"]),
    )
