"""Sums of local-orbital tomography over parts of the images, and the atoms that it begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.atoms.tracing import trace_atoms
from stemtomo.algorithms.local_orbital import focus
from stemtomo.algorithms.local_orbital import model as orbital
from stemtomo.algorithms.local_orbital.model import FocalSeries, Orbitals
from stemtomo.algorithms.tomography.solver import Measurement
from stemtomo.distributed import Executor, Parts
from stemtomo.errors import ConfigurationError
from stemtomo.io.store import Store
from stemtomo.physics.projection import TiltGeometry
from stemtomo.pipeline.config import TomographySettings
from stemtomo.pipeline.descent import Problem
from stemtomo.pipeline.focal_series import GROUP as SERIES
from stemtomo.pipeline.focal_series import rotations_of
from stemtomo.pipeline.reconstruction import reconstruct
from stemtomo.pipeline.settings.local_orbital import LocalOrbitalSettings

Tree = dict[str, Any]


#: Derivatives that belong to atoms, and so are summed in blocks of them.
_OF_ATOMS = ("positions", "intensity", "width")


@dataclass(frozen=True)
class Sums:
    """Sums over all images, which stay in parts on their workers; only models and sums travel.

    Derivatives of atoms are summed over the parts in blocks of ``atoms_per_block``, each by itself, so that no sum
    holds those of all atoms several times over, and spread over the workers. Where they are cut changes no bit.
    """

    executor: Executor
    parts: Parts
    images: int
    atoms_per_block: int

    @classmethod
    def over(
        cls, executor: Executor, path: Path, numbers: np.ndarray, settings: LocalOrbitalSettings, images: int
    ) -> Sums:
        """Read the images ``numbers`` of the store at ``path`` into parts, in order."""
        cuts = np.array_split(numbers, -(-len(numbers) // settings.images_per_part))
        parts = Parts.create(executor, load_part, cuts, str(path), settings.precision)
        return cls(executor, parts, images, settings.atoms_per_block)

    def __call__(self, model: Orbitals, with_probes: bool = True) -> orbital.Sums:
        """Return the sums at ``model``; images of other parts count nothing for a shift or tilt."""
        handle = self.executor.broadcast(model)
        found = self.parts.map(part_sums, handle, with_probes, self.images, self.atoms_per_block)
        starts = range(0, len(model), self.atoms_per_block)
        sums = [found.map(_block, number).sum() for number in range(len(starts))]
        total = self.executor.gather(found.pick("rest").sum())
        whole: Tree = {name: np.empty((len(model), *([3] if name == "positions" else []))) for name in _OF_ATOMS}
        for start, block in zip(starts, sums, strict=True):
            for name, values in self.executor.gather(block).items():
                whole[name][start : start + self.atoms_per_block] = values
        return orbital.Sums(**total, **whole)

    def wanted(self, model: Orbitals, sites: np.ndarray) -> np.ndarray:
        """Return the loss's derivative in the intensity that atoms of none at ``sites`` (site, 3) have, (site,)."""
        handle, at = self.executor.broadcast(model), self.executor.broadcast(sites)
        found: np.ndarray = self.executor.gather(self.parts.map(part_wanted, handle, at).sum())
        return found

    def misfit(self, model: Orbitals, numbers: np.ndarray) -> np.ndarray:
        """Return the share of the images ``numbers`` that ``model`` does not explain, by section; see :mod:`.focus`."""
        found = self.parts.map(part_overlap, self.executor.broadcast(model), numbers).sum()
        return focus.Overlap(*self.executor.gather(found)).misfit

    def variance(self, model: Orbitals) -> float:
        """Return the residual's variance where the specimen is."""
        residual, signal = self.executor.gather(self.parts.map(part_residual, self.executor.broadcast(model)).sum())
        return float(residual / signal) if signal > 0 else 0.0


def load_part(numbers: np.ndarray, path: str, precision: str) -> Tree:
    """Return the images ``numbers`` with their geometry; runs in a worker."""
    series = read_images(Store.open(path), precision, numbers)
    place = backend.to_device if backend.gpu_available() else np.asarray
    return {
        "numbers": numbers,
        "images": place(series.images),
        "rest": (series.rotations, series.sections, series.pixel_angstrom),
    }


def part_sums(part: Tree, model: Orbitals, with_probes: bool, images: int, atoms_per_block: int) -> Tree:
    """Return the sums over a part: ``atoms``, derivatives of blocks of atoms, and the ``rest``.

    Shifts and tilts are those of all ``images``, zero where they are not its own.
    """
    series = FocalSeries(part["images"], *part["rest"])
    found = orbital.sums(model, series, part["numbers"], with_probes)._asdict()
    for name, width in (("shifts", 2), ("tilts", 3)):
        whole = np.zeros((images, width))
        whole[part["numbers"]] = found[name]
        found[name] = whole
    of_atoms = {name: found.pop(name) for name in _OF_ATOMS}
    blocks = [
        {name: values[start : start + atoms_per_block] for name, values in of_atoms.items()}
        for start in range(0, len(model), atoms_per_block)
    ]
    return {"atoms": blocks, "rest": found}


def _block(sums: Tree, number: int) -> Tree:
    return sums["atoms"][number]


def part_wanted(part: Tree, model: Orbitals, sites: np.ndarray) -> np.ndarray:
    """Return the part's sum of :func:`~stemtomo.algorithms.local_orbital.model.wanted_at`."""
    return orbital.wanted_at(model, FocalSeries(part["images"], *part["rest"]), sites, part["numbers"])


def part_residual(part: Tree, model: Orbitals) -> tuple[float, float]:
    """Return the weighted residual of a part and its weight."""
    return orbital.weighted_residual(model, FocalSeries(part["images"], *part["rest"]), part["numbers"])


def part_overlap(part: Tree, model: Orbitals, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the sums of :class:`.focus.Overlap` over those images of a part that are among ``numbers``."""
    mine = np.flatnonzero(np.isin(part["numbers"], numbers))
    series = FocalSeries(part["images"], *part["rest"]).part(mine)
    return tuple(focus.overlap(model, series, part["numbers"][mine]))


def read_images(store: Store, precision: str, numbers: np.ndarray | None = None) -> FocalSeries:
    """Return a stored focal series, or the images ``numbers`` of it, in host memory."""
    stored = store.read(SERIES)
    chosen = stored if numbers is None else stored.isel(image=numbers)
    dtype = np.float32 if precision == "single" else np.float64
    images = np.ascontiguousarray(chosen["images"].values, dtype=dtype)
    sections = chosen["section"].values.astype(np.int64)
    return FocalSeries(images, rotations_of(chosen), sections, float(stored.attrs["pixel_angstrom"]))


def first_atoms(series: FocalSeries, settings: LocalOrbitalSettings, executor: Executor) -> np.ndarray:
    """Return positions (atom, 3) in Å of atoms traced in a linear reconstruction from the mean section of every tilt.

    Raises
    ------
    ConfigurationError
        If it shows no atoms.
    """
    tilts, which = np.unique(series.rotations.round(9), axis=0, return_inverse=True)
    which = which.reshape(-1)
    images = np.stack([series.images[which == tilt].mean(axis=0) for tilt in range(len(tilts))]).astype(np.float32)
    edge = max(images.shape[1:])
    geometry = TiltGeometry(
        np.asarray(tilts), np.zeros((len(tilts), 2)), (edge, images.shape[1], edge), (images.shape[1], images.shape[2])
    )
    measured = Measurement(images, np.ones(images.shape, bool), np.ones(len(images), np.float32))
    problem = Problem(measured, geometry, series.pixel_angstrom, 1.0)
    coarse = TomographySettings(iterations=settings.coarse_iterations, refine_shifts=False)
    volume = reconstruct(problem, coarse, executor).coefficients
    traced = trace_atoms(
        volume, series.pixel_angstrom, minimum_distance_angstrom=settings.minimum_distance_angstrom, threshold=0.25
    )
    if len(traced) < 2:
        raise ConfigurationError(
            "the linear reconstruction shows no atoms; look at the images, or give atoms to begin with "
            "(local_orbital.atoms)"
        )
    return np.asarray(traced.positions, dtype=np.float64)
