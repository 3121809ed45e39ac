"""Tracing of a volume in a store, block by block, by the workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.atoms.classification import atoms_and_others
from stemtomo.algorithms.atoms.reclassification import reclassify_locally
from stemtomo.algorithms.atoms.thresholds import near_bright
from stemtomo.algorithms.atoms.tracing import (
    Region,
    TracedAtoms,
    TracingRules,
    atom_profiles,
    measure_atoms,
    trace_blocks,
)
from stemtomo.distributed import Executor, PlanRow, available_memory_bytes
from stemtomo.io.store import Store
from stemtomo.pipeline.config import AtomSettings, ResourceSettings
from stemtomo.pipeline.plan import worker_limits

#: What a block takes while it is traced, in bytes per sample: read, sharpened, smoothed, compared; and its fits.
_BYTES_PER_SAMPLE, _BYTES_FOR_FITS = 24, 200 * 2**20
#: Part of the free memory that blocks may fill, and the smallest edge worth its margins.
_SHARE_OF_MEMORY, _SMALLEST_EDGE = 0.25, 64
#: Voxels around a block that it is judged with, for the estimate of its size alone.
_MARGIN = 24


@dataclass(frozen=True)
class StoredVolume:
    """A volume in a store, read region by region wherever it is needed."""

    path: str
    group: str

    def __call__(self, region: Region) -> np.ndarray:
        """Return the potential in ``region`` (z, y, x)."""
        z, y, x = region
        return np.asarray(Store.open(self.path).read(self.group)["potential"][z, y, x].values)


def tracing_rules(settings: AtomSettings) -> TracingRules:
    """Return what ``settings`` say of tracing."""
    return TracingRules(
        smoothing_angstrom=settings.smoothing_angstrom,
        minimum_distance_angstrom=settings.minimum_distance_angstrom,
        threshold=settings.threshold,
        margin_angstrom=settings.margin_angstrom,
        upsampling=settings.upsampling,
        deconvolution_angstrom=settings.deconvolution_angstrom,
        deconvolution_noise=settings.deconvolution_noise,
        fit=settings.fit,
    )


def traced_in_blocks(store: Store, group: str, settings: AtomSettings, workers: Executor) -> TracedAtoms:
    """Return the atoms of the volume in ``group`` of ``store``; where ``workers`` hold one block each."""
    shape, voxel = _shape_and_voxel(store, group)
    edge = block_edge(shape, settings, memory_of_task(workers))
    read = StoredVolume(str(store.path), group)
    rules = tracing_rules(settings)
    return trace_blocks(shape, read, voxel, rules, block_voxels=edge, run=_mapper(workers))


def measured_in_blocks(
    store: Store, group: str, positions: np.ndarray, settings: AtomSettings, workers: Executor
) -> TracedAtoms:
    """Return what tracing says of atoms at ``positions`` (atom, 3) in Å."""
    shape, voxel = _shape_and_voxel(store, group)
    edge = block_edge(shape, settings, memory_of_task(workers))
    read = StoredVolume(str(store.path), group)
    rules = tracing_rules(settings)
    return measure_atoms(shape, read, voxel, positions, rules, block_voxels=edge, run=_mapper(workers))


def atoms_alone(traced: TracedAtoms, count: int) -> TracedAtoms:
    """Return ``traced`` without the class that is fainter than all ``count`` species."""
    good = atoms_and_others(traced.integrated, count)
    return TracedAtoms(*(getattr(traced, field.name)[good] for field in fields(TracedAtoms)))


def near_bright_ones(traced: TracedAtoms, settings: AtomSettings) -> TracedAtoms:
    """Return ``traced`` without what is farther than ``reach_angstrom`` from every bright atom."""
    if settings.reach_angstrom is None or not len(traced):
        return traced
    good = near_bright(traced.positions, traced.integrated, settings.threshold, settings.reach_angstrom)
    return TracedAtoms(*(getattr(traced, field.name)[good] for field in fields(TracedAtoms)))


def with_local_species(
    atoms: xr.Dataset, store: Store, group: str, settings: AtomSettings, workers: Executor
) -> xr.Dataset:
    """Return ``atoms`` with the species that their profiles in the volume have among the atoms around them."""
    shape, voxel = _shape_and_voxel(store, group)
    edge = block_edge(shape, settings, memory_of_task(workers))
    positions = np.stack([atoms[axis].values for axis in "xyz"], axis=-1)
    read = StoredVolume(str(store.path), group)
    run = _mapper(workers)
    profiles = atom_profiles(shape, read, voxel, positions, tracing_rules(settings), block_voxels=edge, run=run)
    names = list(atoms.attrs["classes"])
    labels = np.array([names.index(str(name)) for name in atoms["species"].values])
    found = reclassify_locally(positions, profiles, labels, settings.reclassify_radius_angstrom)
    # Symbols, or numbers where species have no names.
    kinds = np.array(names).astype(atoms["species"].dtype)
    count = np.bincount(found.labels, minlength=len(names))
    totals = np.bincount(found.labels, atoms["intensity"].values, minlength=len(names))
    changed = {
        "species": atoms["species"].variable.copy(data=kinds[found.labels]),
        "confidence": atoms["confidence"].variable.copy(data=found.confidence),
    }
    return atoms.assign(changed).assign_attrs(class_intensity=(totals / np.maximum(count, 1)).tolist())


def block_edge(shape_zyx: tuple[int, ...], settings: AtomSettings, memory_bytes: float) -> int:
    """Return the edge in voxels of blocks that each have ``memory_bytes``, or the one asked for."""
    if settings.block_voxels is not None:
        return settings.block_voxels
    room = _SHARE_OF_MEMORY * memory_bytes - _BYTES_FOR_FITS
    edge = int(np.cbrt(max(room, 0) / _BYTES_PER_SAMPLE) / settings.upsampling) - 2 * _MARGIN
    return min(max(edge, _SMALLEST_EDGE), max(shape_zyx))


def memory_of_task(workers: Executor) -> float:
    """Return the bytes of memory that each of the tasks has which run at once where ``workers`` are."""
    limit, _, threads = worker_limits(workers, ResourceSettings())
    return limit / threads


def plan_block(shape_zyx: tuple[int, int, int], settings: AtomSettings) -> PlanRow:
    """Say what tracing a volume of ``shape_zyx`` will hold and read, one block at a time."""
    edge = block_edge(shape_zyx, settings, available_memory_bytes())
    held = int(np.prod([min(edge + 2 * _MARGIN, count) for count in shape_zyx]))
    blocks = int(np.prod([-(-count // edge) for count in shape_zyx]))
    return PlanRow(
        stage="find_atoms",
        tasks=blocks,
        bytes_per_task=_BYTES_PER_SAMPLE * settings.upsampling**3 * held + _BYTES_FOR_FITS,
        bytes_read=4 * int(np.prod(shape_zyx)),
    )


def _shape_and_voxel(store: Store, group: str) -> tuple[tuple[int, ...], float]:
    volume = store.read(group)
    return volume["potential"].shape, float(volume.attrs["voxel_angstrom"])


def _mapper(workers: Executor) -> Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]:
    """Return a ``map`` that keeps every worker busy with one item."""

    def run(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        results: list[Any] = [None] * len(items)
        for index, result in workers.map_bounded(function, items, window=workers.workers):
            results[index] = result
        return results

    return run
