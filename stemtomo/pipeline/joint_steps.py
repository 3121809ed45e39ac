"""Joint tomography on the engine: a visit of one tilt, an epoch of all tilts, and what a checkpoint holds.

The volume lives on one worker and is sent to where a tilt is turned; patterns stay where they were loaded. Per visit a
tilt's slices go to its tiles, whose gradients come back as sums over windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.joint import solver
from stemtomo.algorithms.joint.pose import (
    FOCUS_AHEAD_ANGSTROM,
    SHIFTS,
    TURNS,
    focus_step,
    pose_step,
    shift_changes,
    turn_changes,
)
from stemtomo.algorithms.joint.transfer import frequency_gain
from stemtomo.algorithms.joint.view import View, slices_adjoint
from stemtomo.algorithms.ptychography.solver import CURVATURE
from stemtomo.algorithms.ptychography.windows import spread_batches
from stemtomo.algorithms.tomography.alignment import without_translation
from stemtomo.algorithms.tomography.poses import euler_deg, turned, without_rotation
from stemtomo.algorithms.total_variation import smoothed
from stemtomo.backend import Array
from stemtomo.distributed import Executor, Handle, Parts
from stemtomo.geometry import Pose
from stemtomo.pipeline.joint_parts import Tilt, levelled, missed_rays
from stemtomo.pipeline.joint_patterns import load_tile, tile_gradients
from stemtomo.pipeline.joint_probes import (
    at_first_slice,
    focus_slope_task,
    new_probe,
    on_device,
    peak_light,
    seen_curvature,
)
from stemtomo.pipeline.settings.joint import JointSettings

#: Column of the focus in the poses of a standing.
FOCUS = 5


@dataclass
class Standing:
    """Where a reconstruction stands after an epoch: what a checkpoint holds, and what the next epoch needs."""

    volume: Parts
    """One part: ``coefficients`` (z, y, x) in rad per voxel, ``support`` or ``None``, and FISTA's momentum."""
    probes: list[Handle]
    poses: np.ndarray
    """(tilt, 6): shift x and y in px, turn about the laboratory's x, y and z in rad, focus in Å, all as changes."""
    vacuum: np.ndarray
    """(tilt,), share of what is lit that is vacuum, whose phase was taken off; 0 where none was."""
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class JointRun:
    """What all epochs of one reconstruction share."""

    executor: Executor
    tilts: list[Tilt]
    settings: JointSettings
    patterns: list[Parts]
    gains: dict[int, Handle] = field(default_factory=dict)
    outlines: dict[int, Handle] = field(default_factory=dict)
    """Where rays of a tilt miss the support, as long as that stays."""

    @classmethod
    def prepare(cls, executor: Executor, tilts: list[Tilt], settings: JointSettings) -> JointRun:
        """Load the patterns of every tilt where its tiles will be worked on."""
        jobs = [(tilt, index) for tilt in tilts for index in range(len(tilt.tiles))]
        loaded = Parts.create(executor, load_tile, jobs, settings)
        patterns, first = [], 0
        for tilt in tilts:
            last = first + len(tilt.tiles)
            patterns.append(Parts(executor, loaded.handles[first:last], loaded.places[first:last]))
            first = last
        return cls(executor, tilts, settings, patterns)

    def start(self, probes: list[Array], poses: np.ndarray, volume: np.ndarray | None = None) -> Standing:
        """Return the first standing: an empty volume, or ``volume`` (z, y, x) in rad per voxel."""
        dtype = np.float32 if self.settings.precision == "single" else np.float64
        shape = self.tilts[0].view.box.shape_zyx
        first = np.zeros(shape, dtype) if volume is None else volume.astype(dtype)
        kept = Parts.create(self.executor, _placed, [{"coefficients": first, "support": None}])
        sent = [self.executor.broadcast(probe) for probe in probes]
        return Standing(kept, sent, poses, np.zeros(len(self.tilts)))

    @property
    def constraint(self) -> solver.Constraint:
        """What every volume must obey."""
        told = self.settings
        return solver.Constraint(told.positivity, told.soft_threshold_rad, told.element_width_px)

    def sweep(self, now: Standing, epoch: int, step: float, batches: int, single: bool) -> Standing:
        """Return the standing after one visit of every tilt, in a random order; waits for the loss."""
        rng = np.random.default_rng((self.settings.seed, epoch))
        rule = solver.SweepRule(step, self.settings.damping, batches)
        probes, poses, losses, vacuum = list(now.probes), np.array(now.poses), [], {}
        refined = self._refined(epoch, single)
        volume = now.volume.handles[0]
        for index in rng.permutation(len(self.tilts)):
            view = self._view(index, poses[index], single)
            view_handle = self.executor.submit(_fitted, view, volume)
            visit = self._visit(index, view_handle, volume, probes[index], rule, int(rng.integers(1 << 31)))
            closed = self.executor.submit(levelled, visit, self._empty(index, volume), self.settings.vacuum_level)
            vacuum[index] = self.executor.submit(getitem, closed, "vacuum")
            volume = self.executor.submit(_close, volume, closed, view_handle, self.constraint, step)
            losses.append(self.executor.submit(getitem, visit, "loss"))
            if self.settings.probe != "fixed":
                self._refine_probe(probes, index, visit, view_handle)
            if refined:
                told = (view_handle, refined, self._curvature, self.constraint)
                steps = [self.executor.submit(_pose_step, visit, *told)]
                if "focus" in refined:
                    steps.append(self._focus_step(index, poses[index], volume, probes[index], rule))
                poses[index] += np.sum(self.executor.gather(steps), axis=0)
        if self.settings.tv_weight_rad:
            volume = self.executor.submit(_flatten, volume, self.settings.tv_weight_rad, self.settings.positivity)
        poses = self._without_gauge(poses, refined)
        loss = float(np.sum(self.executor.gather(losses)))
        shares = np.array(self.executor.gather([vacuum[index] for index in range(len(self.tilts))]))
        parts = replace(now.volume, handles=(volume,))
        return Standing(parts, probes, poses, shares, [*now.losses, loss / self.pixels])

    def accelerate(self, now: Standing) -> Standing:
        """Return the standing after one accelerated step along the sum of all tilts; waits for the loss."""
        volume, probes, collected = now.volume.handles[0], list(now.probes), []
        for index in range(len(self.tilts)):
            view = self.executor.submit(_fitted, self._view(index, now.poses[index], False), volume)
            slices = self.executor.submit(_ahead, volume, view, self.constraint)
            sums = self._sums(index, view, slices, probes[index], None)
            collected.append(self.executor.submit(_collect, sums, view, self._curvature))
            if self.settings.probe == "free":
                self._refine_probe(probes, index, self.executor.submit(_visited, sums), view)
        total = Parts(self.executor, tuple(collected), (None,) * len(collected)).sum()
        volume = self.executor.submit(_accelerated, volume, total, self.constraint)
        if self.settings.tv_weight_rad:
            volume = self.executor.submit(_flatten, volume, self.settings.tv_weight_rad, self.settings.positivity)
        loss = float(self.executor.gather(self.executor.submit(getitem, total, "loss")))
        parts, losses = replace(now.volume, handles=(volume,)), [*now.losses, loss / self.pixels]
        return replace(now, volume=parts, probes=probes, losses=losses)

    def losses(self, now: Standing) -> np.ndarray:
        """Return the mean misfit per detector pixel of every tilt, (tilt,), of the volume as it stands."""
        volume, single, found = now.volume.handles[0], self.settings.single_slice, []
        for index in range(len(self.tilts)):
            view = self.executor.submit(_fitted, self._view(index, now.poses[index], single), volume)
            slices = self.executor.submit(_sliced, volume, view, self.constraint)
            sums = self._sums(index, view, slices, now.probes[index], None)
            found.append(self.executor.submit(getitem, sums, "loss"))
        return np.array(self.executor.gather(found), dtype=float) / [tilt.pixels for tilt in self.tilts]

    @property
    def pixels(self) -> int:
        """Detector pixels of all patterns: what losses are means over."""
        return sum(tilt.pixels for tilt in self.tilts)

    def view_of(self, index: int, change: np.ndarray) -> View:
        """Return how tilt ``index`` sees the box after ``change``, a row of the poses of a standing."""
        return self._view(index, change, self.settings.single_slice)

    def gradients_of(self, index: int, view: Handle, slices: Handle, probe: Handle) -> Handle:
        """Return the sums over all patterns of tilt ``index``, of ``slices`` (slice, Y, X) that ``view`` sees."""
        return self._sums(index, view, slices, probe, None)

    def find_support(self, now: Standing) -> Standing:
        """Return the standing with the support around what the volume shows."""
        found = now.volume.map(_supported, self.constraint, self.tilts[0].view.box.voxel_angstrom)
        self.outlines.clear()
        return replace(now, volume=found)

    def _empty(self, index: int, volume: Handle) -> Handle | None:
        """Return where the rays of a tilt, as its pose was told, miss the support."""
        if not self.settings.vacuum_level:
            return None
        if index not in self.outlines:
            self.outlines[index] = self.executor.submit(missed_rays, volume, self.tilts[index].single)
        return self.outlines[index]

    def _visit(
        self, index: int, view: Handle, volume: Handle, probe: Handle, rule: solver.SweepRule, seed: int
    ) -> Handle:
        state = self.executor.submit(_open, volume, view, self.constraint)
        peak = None
        if self.settings.whole_illumination:
            peak = self.executor.submit(peak_light, probe, view, self.tilts[index])
        count, gain = len(self.tilts[index].recorded), self._gain(index, probe)
        curvature = self.executor.submit(seen_curvature, probe, self.settings.loss, self.settings.most_electrons)
        for wanted in spread_batches(count, rule.batches or count, seed):
            slices = self.executor.submit(getitem, state, "slices")
            sums = self._sums(index, view, slices, probe, None if rule.batches == 1 else wanted)
            state = self.executor.submit(_descend, state, sums, rule, curvature, peak, gain)
        return state

    def _gain(self, index: int, probe: Handle) -> Handle | None:
        """Return the gain of low frequencies, which only changes with the probe."""
        most = self.settings.low_frequency_gain
        if most > 1 and (self.settings.probe != "fixed" or index not in self.gains):
            self.gains[index] = self.executor.submit(frequency_gain, probe, self.tilts[index].grid.shape_yx, most)
        return self.gains.get(index)

    def _sums(self, index: int, view: Handle, slices: Handle, probe: Handle, wanted: np.ndarray | None) -> Handle:
        tilt, parts = self.tilts[index], self.patterns[index]
        wave = self.executor.submit(at_first_slice, probe, view, tilt)
        cuts = [slices] if len(parts) == 1 else parts.cut(slices, tilt.windows)
        local = parts.map(tile_gradients, view, self.settings.loss, wanted, wave, each=[cuts])
        windows = local.pick("windows").sum_into(tilt.grid.shape_yx, tilt.windows)
        return self.executor.submit(_joined, windows, local.pick("totals").sum())

    def _refine_probe(self, probes: list[Handle], index: int, visit: Handle, view: Handle) -> None:
        step = self.settings.probe_step
        moved = self.executor.submit(new_probe, probes[index], visit, view, self.tilts[index], step, self._curvature)
        if self.settings.probe == "shared":
            probes[:] = [moved] * len(probes)
        else:
            probes[index] = moved

    def _focus_step(
        self, index: int, pose: np.ndarray, volume: Handle, probe: Handle, rule: solver.SweepRule
    ) -> Handle:
        """Return the step (6,) of the focus of one tilt, from the patterns of one batch."""
        count = len(self.tilts[index].recorded)
        wanted = spread_batches(count, min(rule.batches or 4, 4), index)[0]
        ahead = np.array(pose)
        ahead[FOCUS] += FOCUS_AHEAD_ANGSTROM
        slopes = []
        for place in (pose, ahead):
            view = self.executor.submit(_fitted, self._view(index, place, False), volume)
            slices = self.executor.submit(_sliced, volume, view, self.constraint)
            sums = self._sums(index, view, slices, probe, wanted)
            slopes.append(self.executor.submit(focus_slope_task, sums, view, probe, self.tilts[index]))
        return self.executor.submit(_newton_focus, *slopes)

    def pose(self, index: int, change: np.ndarray) -> Pose:
        """Return the angles of one tilt after ``change``, a row of the poses of a standing."""
        told = self.tilts[index].view.pose
        if not change[TURNS].any():
            return told
        theta, phi, psi = euler_deg(turned(told.rotation[None], change[None, TURNS]))
        return Pose(math.radians(theta[0]), math.radians(phi[0]), math.radians(psi[0]))

    def _refined(self, epoch: int, single: bool) -> tuple[str, ...]:
        """Return what is refined in ``epoch``: one slice tells the shift, but little of angles and focus."""
        settings, asked = self.settings, []
        if epoch >= max(2, settings.single_slice_epochs // 2) and settings.refine_shifts:
            asked.append("shifts")
        if not single and epoch >= 2:
            asked += ["angles"] * settings.refine_angles + ["focus"] * settings.refine_focus
        return tuple(asked)

    def _without_gauge(self, poses: np.ndarray, refined: tuple[str, ...]) -> np.ndarray:
        """Return ``poses`` less what a turn or a translation of the whole specimen explains."""
        told = np.stack([tilt.view.pose.rotation for tilt in self.tilts])
        if "angles" in refined:
            poses[:, TURNS] = without_rotation(poses[:, TURNS], told)
        if "shifts" in refined:
            poses[:, SHIFTS] = without_translation(poses[:, SHIFTS], turned(told, poses[:, TURNS]))
        return poses

    def _view(self, index: int, pose: np.ndarray, single: bool) -> View:
        tilt = self.tilts[index]
        view = tilt.single if single else tilt.view
        shift = (float(pose[0]), float(pose[1]))
        return replace(view, pose=self.pose(index, pose), shift_px=shift, focus_angstrom=float(pose[FOCUS]))

    @property
    def _curvature(self) -> float:
        return CURVATURE[self.settings.loss]


# -- tasks ------------------------------------------------------------------------------------------------------------


def _placed(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "coefficients": on_device(state["coefficients"])}


def _fitted(view: View, volume: dict[str, Any]) -> View:
    """Return ``view`` without the slices that the support leaves empty."""
    if volume["support"] is None or view.slices == 1:
        return view
    return view.within(backend.to_host(volume["support"]))


def _open(volume: dict[str, Any], view: View, constraint: solver.Constraint) -> dict[str, Any]:
    slices = solver.start_slices(volume["coefficients"], view, constraint)
    sums = {"loss": 0.0, "probe": 0.0, "positions": 0, "phase": 0.0, "light": 0.0}
    return {"from": volume["coefficients"], "start": slices, "slices": slices, **sums}


def _descend(
    state: dict[str, Any],
    sums: dict[str, Any],
    rule: solver.SweepRule,
    curvature: float,
    peak: float | None,
    gain: np.ndarray | None,
) -> dict[str, Any]:
    slices = solver.descended(state["slices"], sums, rule, curvature, peak, gain)
    summed = {key: state[key] + sums[key] for key in ("loss", "probe", "positions", "phase")}
    return {**state, **summed, "slices": slices, "light": state["light"] + sums["illumination"]}


def _visited(sums: dict[str, Any]) -> dict[str, Any]:
    return {"probe": sums["probe"], "positions": sums["positions"]}


def _joined(windows: dict[str, Any], totals: dict[str, Any]) -> dict[str, Any]:
    return {**windows, **totals}


def _close(
    volume: dict[str, Any], visit: dict[str, Any], view: View, constraint: solver.Constraint, share: float
) -> dict[str, Any]:
    change = visit["slices"] - visit["start"]
    found = solver.turned_back(volume["coefficients"], change, view, constraint, volume["support"], share)
    return {"coefficients": found, "support": volume["support"]}


def _pose_step(
    visit: dict[str, Any],
    view: View,
    refined: tuple[str, ...],
    curvature: float,
    constraint: solver.Constraint,
) -> np.ndarray:
    """Return the step (6,) of what is ``refined`` of one tilt; see :class:`Standing` for its columns."""
    step, columns, changes = np.zeros(6), [], []
    if "shifts" in refined:
        columns += [0, 1]
        changes.append(shift_changes(visit["start"]))
    if "angles" in refined:
        columns += [2, 3, 4]
        changes.append(turn_changes(solver.elements(visit["from"], constraint.element_width_px), view))
    if columns:
        every = backend.array_namespace(changes[0]).concatenate(changes)
        step[columns] = pose_step(every, visit["phase"], visit["light"], curvature)
    return step


def _newton_focus(slope: float, ahead: float) -> np.ndarray:
    step = np.zeros(6)
    step[FOCUS] = focus_step(slope, ahead)
    return step


def _flatten(volume: dict[str, Any], weight: float, positive: bool) -> dict[str, Any]:
    """Return ``volume`` after the proximal step of its total variation; a look-ahead point moves along."""
    found = smoothed(volume["coefficients"], weight, positive)
    if volume["support"] is not None:
        found = backend.array_namespace(found).where(volume["support"], found, 0)
    moved = {"ahead": volume["ahead"] + (found - volume["coefficients"])} if "ahead" in volume else {}
    return {**volume, "coefficients": found.astype(volume["coefficients"].dtype), **moved}


def _sliced(volume: dict[str, Any], view: View, constraint: solver.Constraint) -> Array:
    return solver.start_slices(volume["coefficients"], view, constraint)


def _ahead(volume: dict[str, Any], view: View, constraint: solver.Constraint) -> Array:
    return solver.start_slices(volume.get("ahead", volume["coefficients"]), view, constraint)


def _collect(sums: dict[str, Any], view: View, curvature: float) -> dict[str, Any]:
    planes = view.slices * view.voxels_per_slice
    bound = 2 * curvature * float(sums["illumination"].max()) * planes
    return {"volume": slices_adjoint(sums["phase"], view), "loss": sums["loss"], "bound": bound}


def _accelerated(volume: dict[str, Any], total: dict[str, Any], constraint: solver.Constraint) -> dict[str, Any]:
    now = solver.Momentum(
        volume["coefficients"],
        volume.get("ahead", volume["coefficients"]),
        volume.get("t", 1.0),
        volume.get("loss", float("inf")),
        volume.get("step", solver.Momentum.step),
    )
    new = solver.accelerated(now, total["volume"], total["loss"], total["bound"], constraint, volume["support"])
    momentum = {"ahead": new.ahead, "t": new.t, "loss": new.loss, "step": new.step}
    return {"coefficients": new.coefficients, "support": volume["support"], **momentum}


def _supported(volume: dict[str, Any], constraint: solver.Constraint, voxel_angstrom: float) -> dict[str, Any]:
    shown = solver.elements(volume["coefficients"], constraint.element_width_px)
    return {**volume, "support": solver.auto_support(shown, voxel_angstrom)}
