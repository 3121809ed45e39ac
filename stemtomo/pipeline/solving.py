"""How one tilt is solved as [ptychography] says: rules, parameters, constraints, stopping and restart.

The epochs are cut where a parameter begins to move. Whatever is needed to go on is in one tree per checkpoint, so that
a run that was killed continues to the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from stemtomo.algorithms.ptychography import held_out, solver
from stemtomo.algorithms.ptychography.constraints import Constraints
from stemtomo.algorithms.ptychography.parameters import Background
from stemtomo.algorithms.ptychography.positions import Positions, moved_grid, seen_curvature
from stemtomo.algorithms.ptychography.regularisation import blurred_along_beam
from stemtomo.algorithms.ptychography.rules import Adam, LeastSquares
from stemtomo.algorithms.ptychography.search import settle
from stemtomo.algorithms.ptychography.variation import Variation
from stemtomo.backend import Array, array_namespace, real_dtype, to_host
from stemtomo.distributed import Checkpoint
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.positions import position_phases

#: What is done to a state after an update or an epoch, whose number it is told.
_Change = Callable[[solver.State, int], solver.State]


class Tilt(NamedTuple):
    """One tilt to be solved."""

    model: solver.Model
    counts: Array
    told_angstrom: np.ndarray
    """(position, 2), x and y, where the scan has the recorded positions."""
    width_slices: float
    """Blur along the beam."""
    tied: bool
    """The slices stay tied."""
    seed: int


class Solved(NamedTuple):
    """A tilt that is solved."""

    state: solver.State
    model: solver.Model
    """With the refined positions in it."""
    losses: list[float]
    """Per pattern, after every epoch."""
    held_out: list[float]
    """The same of the patterns held out; empty without."""
    best_epoch: int
    """Epoch whose state this is."""
    parameters: list[solver.Parameter]
    seen: Callable[[np.ndarray], Array] | None = None
    """Patterns (position, qy, qx) of the model at positions, where the model is not the solver's."""
    last_losses: np.ndarray | None = None
    """Loss of every position as met in the last epoch, where every position was."""

    def patterns(self, where: np.ndarray) -> Array:
        """Return the patterns that the model has at the positions ``where``."""
        if self.seen is not None:
            return self.seen(where)
        return solver.patterns(self.state, self.model, where, self.beside_positions)

    @property
    def beside_positions(self) -> list[solver.Parameter]:
        """The parameters that are not in the model already."""
        return [parameter for parameter in self.parameters if parameter.name != Positions.name]


def extra_variables(solved: Solved, detector: Detector, per_pixel: float) -> dict[str, Any]:
    """Return what a tilt has beside object and probe as variables of its result; ``per_pixel`` scales losses."""
    found: dict[str, Any] = {}
    if solved.held_out:
        found["held_out_loss"] = (("epoch",), np.array(solved.held_out) * per_pixel)
    background = solved.state.extra.get(Background.name)
    if background is not None:
        centred = np.roll(to_host(background), tuple(round(c) for c in detector.centre_yx), axis=(0, 1))
        found["background"] = (("ky", "kx"), centred)
    variation = solved.state.extra.get(Variation.name)
    if variation is not None:
        found["variation_modes"] = (("variation", "window_y", "window_x"), to_host(variation["modes"]))
        found["variation_weights"] = (("position", "variation"), to_host(variation["weights"]))
    return found


def solve_tilt(
    tilt: Tilt,
    start: solver.State,
    settings: PtychographySettings,
    checkpoint: Checkpoint | None = None,
    beside: dict[str, Any] | None = None,
) -> Solved:
    """Solve ``tilt`` from ``start``, or from its last ``checkpoint``.

    Parameters
    ----------
    beside
        What a checkpoint keeps beside the state of the solver, for the caller.
    """
    used, held = held_out.split(len(tilt.counts), settings.held_out, tilt.seed)
    follower = _Follower(tilt, settings, held, checkpoint, beside or {})
    state, first = follower.resume(start)
    searching = settings.settling_of(settings.epochs) if settings.rule == "lbfgs" else 0
    descending = settings.epochs - searching
    rules, batches = epochs_of(settings)
    update, epoch_end = _constraints(tilt, settings)
    for begin, end in itertools.pairwise(_bounds(settings, descending)):
        if begin >= first and follower.over:
            break
        # Of epochs that a checkpoint has behind it, what moved in them still has a part in the model.
        state = follower.begin(state, begin, fresh=begin >= first)
        if end <= first or follower.over:
            continue
        state, _ = solver.solve(
            state,
            tilt.model,
            tilt.counts,
            rules=rules[:end],
            batches=batches[:end],
            probe_start=settings.probe_update_start_epoch,
            seed=tilt.seed,
            tied_epochs=settings.epochs if tilt.tied else 0,
            parameters=follower.parameters,
            regularise=update,
            after_epoch=epoch_end,
            where=used,
            on_epoch=follower,
            first_epoch=max(begin, first),
            last_losses=follower.last_losses if end == descending else None,
        )
    if searching and not follower.over:
        state = state if tilt.tied else solver.untied(state, tilt.model.slices, tilt.model.weights)
        state, _ = settle(
            state,
            tilt.model,
            tilt.counts,
            searching,
            width_slices=tilt.width_slices,
            update_probe=settings.probe_update_start_epoch < settings.epochs,
            damping=settings.damping,
            where=used,
            parameters=follower.parameters,
            on_iteration=lambda number, loss, now: follower(descending + number, loss, now),
        )
    return follower.solved(state)


def epochs_of(settings: PtychographySettings) -> tuple[tuple[solver.Rule, ...], tuple[int, ...]]:
    """Return the update rule and the number of batches of every epoch that is not left to L-BFGS."""
    settling = settings.settling_of(settings.epochs)
    searching = settling if settings.rule == "lbfgs" else 0
    schedule = list(
        solver.steps(settings.epochs - searching, rule_of(settings), settings.batches_per_epoch, settling - searching)
    )
    return tuple(rule for rule, _ in schedule), tuple(batches for _, batches in schedule)


def alone_epochs(settings: PtychographySettings, epochs: int) -> int:
    """Return how many of ``epochs`` stitched tiles are on their own for; the others are exact."""
    polish = settings.stitch_polish_epochs or max(1, settings.settling_of(epochs))
    return max(1, epochs - polish)


def refuse_in_tiles(settings: PtychographySettings) -> None:
    """Refuse what needs a tilt in one piece.

    Raises
    ------
    ConfigurationError
        Naming the settings that a tilt in tiles cannot have.
    """
    unlike = {
        "rule = lbfgs with tiles that are stitched (a search is of one object)": settings.rule == "lbfgs"
        and settings.tile_mode == "stitch",
        "mistilt_map_smoothing_angstrom with tiles that are stitched (a search is of one object)": bool(
            settings.mistilt_map_smoothing_angstrom
        )
        and settings.tile_mode == "stitch",
        "held_out with tiles that are stitched (they end at different times)": settings.held_out > 0
        and settings.tile_mode == "stitch",
    }
    names = [name for name, asked in unlike.items() if asked]
    if names:
        raise ConfigurationError(
            f"[ptychography] {'; '.join(names)}: not there for a tilt that is cut into tiles, and this one does not fit"
            " a worker otherwise; leave it out, or give workers more memory (ptychography.memory_gib, resources)"
        )


def rule_of(settings: PtychographySettings) -> solver.Rule:
    """Return the rule by which batches move object and probe."""
    curvature = solver.CURVATURE[settings.loss]
    if settings.rule == "adam":
        return Adam(settings.step, settings.probe_step)
    if settings.rule == "lsqml":
        return LeastSquares(settings.step, settings.probe_step, settings.damping, curvature)
    return solver.Nesterov(settings.step, settings.probe_step, settings.momentum, settings.damping, curvature)


def _bounds(settings: PtychographySettings, epochs: int) -> list[int]:
    """Epochs at which something begins to move, with the first and the last."""
    starts = [*position_phases(settings, settings.epochs)]
    starts.append(settings.background_from_epoch if settings.background != "none" else None)
    starts.append(settings.probe_variations_from_epoch if settings.probe_variations else None)
    return sorted({0, epochs, *(min(start, epochs) for start in starts if start is not None)})


def pixelwise(settings: PtychographySettings) -> Constraints:
    """Return the constraints that hold pixel by pixel, which parts of an object can keep on their own."""
    return Constraints(settings.positive_phase, settings.amplitude_limits)


def filters_of(
    settings: PtychographySettings, told_angstrom: np.ndarray, pixel_angstrom_yx: tuple[float, float]
) -> Constraints:
    """Return the constraints after an epoch that look at the whole object, beside the total variation.

    ``told_angstrom`` is where the scan has the recorded positions, (position, 2), x and y.
    """
    notch = None
    if settings.notch_scan_raster:
        steps = [np.diff(np.unique(np.round(told_angstrom[:, axis], 4))) for axis in (1, 0)]
        notch = tuple(float(np.median(s)) / p for s, p in zip(steps, pixel_angstrom_yx, strict=True))
    return Constraints(
        kz_weight=settings.kz_filter,
        vacuum_percentile=settings.vacuum_percentile,
        notch_px=(notch[0], notch[1]) if notch is not None else None,
    )


def variation_of(settings: PtychographySettings, seed: int) -> Variation | None:
    """Return how the probe may vary along the scan; ``None`` where it does not."""
    return Variation(settings.probe_variations, loss=settings.loss, seed=seed) if settings.probe_variations else None


def _constraints(tilt: Tilt, settings: PtychographySettings) -> tuple[_Change, _Change]:
    grid = tilt.model.grid
    constraints = replace(
        filters_of(settings, tilt.told_angstrom, grid.pixel_angstrom_yx),
        positive=settings.positive_phase,
        amplitude_limits=settings.amplitude_limits,
        tv_weight_rad=settings.tv_weight_rad,
    )

    def update(state: solver.State, _: int) -> solver.State:
        blurred = replace(state, phase=blurred_along_beam(state.phase, tilt.width_slices, tilt.model.weights))
        return constraints.after_update(blurred)

    def epoch_end(state: solver.State, _: int) -> solver.State:
        lit = state.phase[0].real
        if settings.vacuum_percentile is not None:
            lit = solver.illumination(state.probe, grid)
        return constraints.after_epoch(state, lit)

    return update, epoch_end


@dataclass
class _Follower:
    """Follows the epochs of a tilt: losses, patterns held out, checkpoints, and the parameters that move."""

    tilt: Tilt
    settings: PtychographySettings
    held: np.ndarray
    checkpoint: Checkpoint | None
    beside: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    parameters: list[solver.Parameter] = field(default_factory=list)
    best: solver.State | None = None
    curvature: Array | None = None

    def __post_init__(self) -> None:
        self.stopping = held_out.Stopping(self.settings.held_out_patience)
        all_met = not len(self.held) and self.settings.rule != "lbfgs"
        self.last_losses = np.zeros(len(self.tilt.counts)) if all_met else None

    @property
    def over(self) -> bool:
        """Whether the held-out patterns say that it is enough."""
        return len(self.held) > 0 and self.stopping.best >= 0 and self.stopping.over

    def __call__(self, epoch: int, loss: float, state: solver.State) -> bool:
        """Note an epoch; return whether it is to be the last."""
        self.losses.append(loss)
        if len(self.held):
            sums = solver.gradients(state, self.tilt.model, self.tilt.counts, self.held, self.parameters)
            if self.stopping.tell(sums.loss / len(self.held)):
                self.best = state
        descending = self.settings.rule != "lbfgs" or epoch < self.settings.epochs - self.settings.settling_of(
            self.settings.epochs
        )
        if self.checkpoint is not None and descending and (epoch + 1) % self.settings.checkpoint_every == 0:
            self._save(epoch + 1, state)
        return self.over

    def begin(self, state: solver.State, epoch: int, fresh: bool) -> solver.State:
        """Set the parameters that move from ``epoch`` on; return ``state`` with a value for each.

        Without ``fresh`` the epochs are continued, with the curvature that they began with.
        """
        settings, tilt = self.settings, self.tilt
        extra = dict(state.extra)
        self.parameters = []
        first, affine_from = position_phases(settings, settings.epochs)
        if first is not None and epoch >= first:
            moved = extra.get(Positions.name)
            if fresh or self.curvature is None:
                grid = tilt.model.grid if moved is None else moved_grid(tilt.model.grid, to_host(moved))
                self.curvature = seen_curvature(state, replace(tilt.model, grid=grid))
            free = affine_from is not None and epoch >= affine_from
            positions = Positions(tilt.told_angstrom, self.curvature, keep_affine=free)
            extra.setdefault(Positions.name, positions.start(self.curvature))
            self.parameters.append(positions)
        if settings.background != "none" and epoch >= settings.background_from_epoch:
            background = Background(uniform=settings.background == "uniform")
            shape = tilt.counts.shape[1:]
            xp = array_namespace(state.probe)
            extra.setdefault(background.name, xp.zeros(shape, dtype=real_dtype(state.probe)))
            self.parameters.append(background)
        variation = variation_of(settings, tilt.seed)
        if variation is not None and epoch >= settings.probe_variations_from_epoch:
            if variation.name not in extra:
                extra[variation.name] = variation.start(state.probe, len(tilt.counts))
            self.parameters.append(variation)
        return replace(state, extra=extra)

    def solved(self, state: solver.State) -> Solved:
        """Return the result: the last state, or the one that the held-out patterns like best."""
        last = len(self.losses) - 1
        if self.best is not None:
            state, last = self.best, self.stopping.best
        model, moved = self.tilt.model, state.extra.get(Positions.name)
        if moved is not None:
            model = replace(model, grid=moved_grid(model.grid, to_host(moved)))
        parameters = [p for p in self.parameters if p.name in state.extra]
        solved = Solved(state, model, self.losses, self.stopping.losses, last, parameters)
        return solved._replace(last_losses=self.last_losses)

    def resume(self, start: solver.State) -> tuple[solver.State, int]:
        """Return the state of the last checkpoint and the epoch that follows it, or ``start`` and 0."""
        mark = self.checkpoint.latest() if self.checkpoint is not None else None
        if mark is None:
            return start, 0
        saved: Any = mark.shared
        self.losses, self.curvature = list(saved["losses"]), saved["curvature"]
        self.last_losses = None if saved["last_losses"] is None else np.array(saved["last_losses"])
        self.stopping.losses, self.stopping.best = list(saved["held_out"]), int(saved["best_epoch"])
        self.best = None if saved["best"] is None else solver.State(**saved["best"])
        return solver.State(**saved["state"]), mark.step

    def _save(self, epoch: int, state: solver.State) -> None:
        assert self.checkpoint is not None
        tree = {
            "state": state.tree(),
            "losses": self.losses,
            "last_losses": self.last_losses,
            "held_out": self.stopping.losses,
            "best_epoch": self.stopping.best,
            "best": None if self.best is None else self.best.tree(),
            "curvature": self.curvature,
            "beside": self.beside,
            "shown": {
                "slices": self.tilt.model.slices,
                "pixel_angstrom": np.array(self.tilt.model.grid.pixel_angstrom_yx),
            },
        }
        self.checkpoint.begin(epoch, 0)
        self.checkpoint.commit(epoch, [], tree)
