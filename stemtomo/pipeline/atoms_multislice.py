"""Atoms of a joint volume refined against the patterns of all tilts, by multislice through the atoms themselves.

A sum over tilts like joint tomography itself: the atoms, a small table, go to every tilt; their slices to its tiles;
what comes back are sums over the tilts of the derivatives in every atom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from stemtomo import backend
from stemtomo.algorithms.atoms.uncertainty import calibrated
from stemtomo.algorithms.joint.atom_refinement import AtomRules, Evaluation, information_of, refined_atoms
from stemtomo.algorithms.joint.atoms import AtomGradient, Atoms, Shapes, around, drawn, felt
from stemtomo.algorithms.joint.pose import SHIFTS, TURNS
from stemtomo.algorithms.joint.view import View
from stemtomo.algorithms.ptychography.solver import CURVATURE
from stemtomo.backend import Array
from stemtomo.distributed import Executor, Handle, Parts, PlanRow
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector, Optics, Pose, Scan
from stemtomo.io.store import Store
from stemtomo.pipeline.config import AtomSettings, JointSettings
from stemtomo.pipeline.joint import plan_row as plan_joint
from stemtomo.pipeline.joint_parts import Tilt, tilts_of
from stemtomo.pipeline.joint_steps import FOCUS, JointRun
from stemtomo.pipeline.progress import Progress

_STAGE = "multislice"
#: Share of the iterations that each half of the tilts gets: it starts where all of them ended.
_OF_HALVES = 0.5
#: Where the pixels of a tilt lie along x and y differs from tilt to tilt by these parts of one, which fill the square.
_STEPS_XY = (0.7548777, 0.5698403)


class PatternAtoms(NamedTuple):
    """Atoms refined against patterns.

    Parameters
    ----------
    model
        Positions in Å, intensities in V Å³, widths in Å.
    sigma_angstrom
        Standard deviations of the positions, (atom, 3); ``None`` if not asked for.
    loss
        Mean misfit per detector pixel before and after.
    """

    model: Atoms
    sigma_angstrom: np.ndarray | None
    loss: tuple[float, float]


def refine_against_patterns(
    store: Store,
    start: Atoms,
    labels: np.ndarray,
    settings: AtomSettings,
    executor: Executor,
    progress: Progress,
) -> PatternAtoms:
    """Refine ``start`` (intensities in V Å³) against the patterns that the joint volume of ``store`` was made from.

    Poses, shifts, changes of C1 and probes are those that joint tomography ended with, and so are the loss, the
    thickness of slices and how tilts are cut.
    """
    work = _Work.prepare(store, start, labels, executor, progress)
    rules = AtomRules(
        settings.multislice_iterations,
        settings.widths == "atom",
        settings.intensity_spread,
        CURVATURE[work.run.settings.loss],
    )
    every = range(len(work.views))
    halves = [every[0::2], every[1::2]] if settings.uncertainty and len(every) >= 4 else []
    fewer = replace(rules, iterations=max(1, round(_OF_HALVES * rules.iterations)))
    progress.start(f"find_atoms: {_STAGE}", rules.iterations + len(halves) * fewer.iterations, "iteration")
    begin = replace(start, intensity=work.sigma * start.intensity)
    first = work.evaluated(begin, every)
    model = refined_atoms(work.loss_of(every), begin, labels, first, rules)
    ends = [work.evaluated(model, tilts) for tilts in (halves or [every])]
    loss = sum(end.loss for end in ends)
    sigma = None
    if settings.uncertainty:
        sigma = _deviations(np.sum([end.information for end in ends], axis=0))
    if halves and sigma is not None:
        found = [
            refined_atoms(work.loss_of(half), model, labels, end, fewer).positions
            for half, end in zip(halves, ends, strict=True)
        ]
        expected = np.hypot(*(_deviations(end.information) for end in ends))
        sigma = calibrated(sigma, found[0] - found[1], expected, labels)
    progress.finish(f"find_atoms: {_STAGE}")
    model = replace(model, intensity=model.intensity / work.sigma)
    return PatternAtoms(model, sigma, (first.loss / work.run.pixels, loss / work.run.pixels))


def plan_row(
    scan: Scan,
    detector: Detector,
    optics: Optics,
    itemsize: int,
    poses: Sequence[Pose],
    settings: AtomSettings,
    told: JointSettings,
    workers: int = 1,
) -> PlanRow:
    """Say what that will hold, read and take after a joint run of settings ``told``."""
    # Two halves of the tilts, each half of the iterations, and three evaluations at the ends.
    epochs = 3 + math.ceil(settings.multislice_iterations * (1 + _OF_HALVES * settings.uncertainty))
    none = {"single_slice_epochs": 0, "sweeps": 0, "settling_sweeps": 0, "check_tilt_sign": False}
    alike = told.model_copy(update={**none, "accelerated_epochs": epochs})
    row = plan_joint(scan, detector, optics, itemsize, poses, alike, workers)
    return replace(row, stage=f"find_atoms, {_STAGE}", bytes_written=0)


@dataclass(frozen=True)
class _Work:
    """What all evaluations share."""

    run: JointRun
    views: list[View]
    probes: list[Handle]
    labels: np.ndarray
    sigma: float
    progress: Progress

    @classmethod
    def prepare(cls, store: Store, start: Atoms, labels: np.ndarray, executor: Executor, progress: Progress) -> _Work:
        told = store.provenance("joint")
        if told is None:
            raise ConfigurationError(f"{store.path} does not say how its joint volume was made: run joint anew")
        settings = JointSettings(**told["configuration"])
        tilts = tilts_of(store, settings)
        offsets = pixel_offsets(len(tilts))
        tilts = [_moved(tilt, offset) for tilt, offset in zip(tilts, offsets, strict=True)]
        run = JointRun.prepare(executor, tilts, settings)
        result = store.read("joint").load()
        poses = np.zeros((len(run.tilts), 6))
        shifts = [result[f"shift_{axis}_angstrom"].values for axis in "xy"]
        poses[:, SHIFTS] = np.stack(shifts, axis=-1) / float(result.attrs["voxel_angstrom"]) + offsets
        poses[:, TURNS] = np.radians(result["turn_deg"].values)
        poses[:, FOCUS] = result["focus_change_angstrom"].values
        views = [around(run.view_of(index, pose), start.positions) for index, pose in enumerate(poses)]
        dtype = np.complex64 if settings.precision == "single" else np.complex128
        probes = [executor.broadcast(np.ascontiguousarray(probe, dtype=dtype)) for probe in result["probe"].values]
        sigma = float(result.attrs["sigma_rad_per_volt_angstrom"])
        return cls(run, views, probes, labels, sigma, progress)

    def evaluated(self, model: Atoms, tilts: Sequence[int]) -> Evaluation:
        """Return what ``model`` is worth, summed over ``tilts`` in their order."""
        executor, settings = self.run.executor, self.run.settings
        atoms, collected = executor.broadcast((model, self.labels)), []
        for index in tilts:
            slices = executor.submit(_drawn, atoms, self.views[index], settings.precision)
            sums = self.run.gradients_of(index, self.views[index], slices, self.probes[index])
            collected.append(executor.submit(_felt, sums, atoms, self.views[index]))
        total = Parts(executor, tuple(collected), (None,) * len(collected)).sum()
        found = executor.gather(total)
        gradient = AtomGradient(*(found[name] for name in AtomGradient._fields))
        return Evaluation(float(found["loss"]), gradient, found["information"])

    def loss_of(self, tilts: Sequence[int]) -> Callable[[Atoms], Evaluation]:
        """Return :meth:`evaluated` over ``tilts`` as a function of the model, which counts as an iteration."""

        def evaluated(model: Atoms) -> Evaluation:
            found = self.evaluated(model, tilts)
            self.progress.advance(loss=found.loss / self.run.pixels * len(self.views) / len(tilts))
            return found

        return evaluated


def pixel_offsets(tilts: int) -> np.ndarray:
    """Return by what part of a pixel, x and y (tilt, 2), specimen and scan of each tilt are moved on its pixels.

    What an atom scatters beyond the band of the pixels folds back and pulls it by about a picometre, this way or that
    by its place within a pixel. Along a tilt axis, and in steps of whole pixels, that is the same at every tilt: an
    error of the atom's place which no two tilts disagree about. On pixels that lie differently it averages out.
    """
    return np.mod(np.outer(np.arange(tilts), _STEPS_XY) + 0.5, 1.0) - 0.5


def _moved(tilt: Tilt, offset_px: np.ndarray) -> Tilt:
    # Windows stay where they are: probes have room in them for a pixel more.
    return replace(tilt, grid=replace(tilt.grid, shifts_px=tilt.grid.shifts_px + offset_px))


def _deviations(information: np.ndarray) -> np.ndarray:
    """Return standard deviations (atom, 3) from information (atom, 3, 3)."""
    return np.sqrt(np.einsum("nii->ni", np.linalg.pinv(information, hermitian=True)))


def multislice_atoms(
    dataset: xr.Dataset, store: Store, settings: AtomSettings, executor: Executor, progress: Progress
) -> PatternAtoms:
    """Refine the atoms of ``dataset``, as the atoms stage made it from the joint volume; see the function above."""
    classes = [str(name) for name in dataset.attrs["classes"]]
    labels = np.array([classes.index(str(name)) for name in dataset["species"].values])
    start = Atoms(
        np.stack([dataset[axis].values for axis in "xyz"], axis=-1).astype(float),
        dataset["intensity"].values.astype(float),
        dataset["width_angstrom"].values.astype(float),
    )
    return refine_against_patterns(store, start, labels, settings, executor, progress)


# -- tasks ------------------------------------------------------------------------------------------------------------


def _drawn(atoms: tuple[Atoms, np.ndarray], view: View, precision: str) -> Array:
    like = np.zeros(0, np.float32 if precision == "single" else np.float64)
    like = backend.to_device(like) if backend.gpu_available() else like
    return drawn(*atoms, _shapes(atoms[1]), view, like)


def _felt(sums: dict[str, Any], atoms: tuple[Atoms, np.ndarray], view: View) -> dict[str, Any]:
    shapes = _shapes(atoms[1])
    gradient = felt(sums["phase"], *atoms, shapes, view)
    information = information_of(sums["illumination"], *atoms, shapes, view)
    return {**gradient._asdict(), "loss": float(sums["loss"]), "information": information}


def _shapes(labels: np.ndarray) -> Shapes:
    return Shapes.points(int(labels.max()) + 1)
