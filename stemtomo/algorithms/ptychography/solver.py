"""Multislice ptychography of one part: gradients of a batch of patterns, and the preconditioned update with momentum.

The object is u = phase + i absorption with t = exp(i u), so phases never wrap and a pure phase object is the real part
alone. With the Wirtinger gradient G_t of the transmission, G_u = -i conj(t) G_t; its real part is Im(conj(t) G_t).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from stemtomo.algorithms.ptychography.windows import ObjectGrid, spread_batches
from stemtomo.backend import Array, array_namespace, real_dtype, to_device_of, together_bytes
from stemtomo.kernels import patches
from stemtomo.physics import multislice
from stemtomo.physics.probe import shifted_probes, shifted_probes_adjoint

ObjectKind = Literal["phase", "complex"]

#: Curvature of each loss in the modulus of a wave, in units of that of the amplitude loss, at its minimum.
CURVATURE = {"amplitude": 1.0, "anscombe": 1.0, "poisson": 2.0}


@dataclass(frozen=True)
class Model:
    """What a reconstruction holds fixed: geometry, propagators and the loss."""

    grid: ObjectGrid
    propagators: Sequence[Array]
    loss: patches.Loss = "amplitude"
    kind: ObjectKind = "phase"

    @property
    def slices(self) -> int:
        """Number of slices."""
        return len(self.propagators) + 1


class Gradients(NamedTuple):
    """Sums over a batch of positions; every field adds up over parts."""

    phase: Array
    """G_u, (slice, Y, X); real for a phase object."""
    probe: Array
    """Wirtinger gradient of the probe, (y, x)."""
    illumination: Array
    """Sum of |psi|² on the first slice, (Y, X)."""
    loss: float
    positions: int


@dataclass(frozen=True)
class State:
    """What a reconstruction changes: object, probe and their momenta."""

    phase: Array
    """u, (slice, Y, X): real, or complex with the absorption as imaginary part."""
    probe: Array
    phase_momentum: Array
    probe_momentum: Array

    @classmethod
    def start(cls, model: Model, probe: Array) -> State:
        """Return vacuum in every slice and the given probe (y, x)."""
        xp = array_namespace(probe)
        dtype = probe.dtype if model.kind == "complex" else real_dtype(probe)
        phase = xp.zeros((model.slices, *model.grid.shape_yx), dtype=dtype)
        return cls(phase, probe, xp.zeros_like(phase), xp.zeros_like(probe))


@dataclass(frozen=True)
class UpdateRule:
    """Steps of the preconditioned gradient with momentum.

    The object's step at a pixel is ``step / slices`` times its gradient over 2 x ((1 - damping) N + damping max N), N
    the illumination of the batch: where all of N falls on a pixel, a step of 1 removes the residual of the phase.
    ``curvature`` is that of the loss (:data:`CURVATURE`).
    """

    step: float = 1.0
    probe_step: float = 0.5
    momentum: float = 0.5
    damping: float = 0.1
    curvature: float = 1.0


def gradients(state: State, model: Model, counts: Array, batch: np.ndarray, mask: Array | None = None) -> Gradients:
    """Return the sums of the loss and its gradients over the positions ``batch``.

    Parameters
    ----------
    counts
        Patterns of all positions of the part, (position, ky, kx), zero frequency first, electrons, any real dtype.
    batch
        Indices of positions.
    mask
        (ky, kx) bool, False where the detector tells nothing; ``None`` is all True.
    """
    xp = array_namespace(state.phase)
    transmission = transmission_of(state)
    transmission_gradient = xp.zeros_like(transmission)
    illumination = xp.zeros(model.grid.shape_yx, dtype=real_dtype(state.probe))
    probe_gradient = xp.zeros_like(state.probe)
    loss: Any = 0.0
    chunk = max(1, together_bytes(state.probe) // state.probe.nbytes)
    alike = probes_at(state.probe, model.grid, batch[:chunk]) if model.grid.on_pixels else None
    for start in range(0, len(batch), chunk):
        where = batch[start : start + chunk]
        corners = to_device_of(model.grid.corners[where], state.probe)
        probes = probes_at(state.probe, model.grid, where) if alike is None else alike[: len(where)]
        patches.illuminate(probes, corners, illumination)
        spectra, incident = multislice.forward(probes, transmission, corners, model.propagators)
        # A number of the device: reading it here would make the host wait for every chunk.
        loss = loss + patches.residual(spectra, _measured(counts, where, mask, spectra), model.loss).sum()
        back = multislice.adjoint(spectra, incident, transmission, corners, model.propagators, transmission_gradient)
        probe_gradient += _probes_adjoint(back, model.grid, where)
    phase_gradient = -1j * transmission.conj() * transmission_gradient
    if model.kind == "phase":
        phase_gradient = xp.ascontiguousarray(phase_gradient.real)
    return Gradients(phase_gradient, probe_gradient, illumination, float(loss), len(batch))


def update(
    state: State, sums: Gradients, rule: UpdateRule, update_probe: bool, peak_illumination: float | None = None
) -> State:
    """Return the state after one preconditioned step with momentum, from the ``sums`` over all parts.

    ``peak_illumination`` is max N over the whole object where ``sums`` hold only a window of it.
    """
    peak = float(sums.illumination.max()) if peak_illumination is None else peak_illumination
    weight = 2 * rule.curvature * ((1 - rule.damping) * sums.illumination + rule.damping * peak)
    slices = state.phase.shape[0]
    momentum = rule.momentum * state.phase_momentum - (rule.step / slices) * sums.phase / weight
    # Nesterov's look-ahead, in the form that keeps the point at which gradients are taken.
    phase = state.phase + rule.momentum * momentum - (rule.step / slices) * sums.phase / weight
    state = replace(state, phase=phase, phase_momentum=momentum)
    if not update_probe:
        return state
    # |t| is close to 1, so the probe's curvature is the number of positions, the same everywhere.
    change = (rule.probe_step / (2 * rule.curvature * sums.positions)) * sums.probe
    probe_momentum = rule.momentum * state.probe_momentum - change
    return replace(state, probe=state.probe + rule.momentum * probe_momentum - change, probe_momentum=probe_momentum)


def solve(
    state: State,
    model: Model,
    counts: Array,
    *,
    rules: Sequence[UpdateRule],
    batches: Sequence[int],
    probe_start: int,
    seed: int = 0,
    mask: Array | None = None,
    on_epoch: Callable[[int, float, State], None] | None = None,
) -> tuple[State, list[float]]:
    """Run one epoch per rule on one part that holds all positions; return the last state and the loss per epoch.

    The loss of an epoch is summed over its batches as they are met, per pattern.
    """
    losses: list[float] = []
    for epoch, (rule, count) in enumerate(zip(rules, batches, strict=True)):
        total, seen = 0.0, 0
        for batch in spread_batches(len(counts), count, seed + epoch):
            sums = gradients(state, model, counts, batch, mask)
            state = update(state, sums, rule, update_probe=epoch >= probe_start)
            total, seen = total + sums.loss, seen + sums.positions
        losses.append(total / seen)
        if on_epoch is not None:
            on_epoch(epoch, losses[-1], state)
    return state, losses


def transmission_of(state: State) -> Array:
    """Return t = exp(i u), (slice, Y, X), in the probe's precision."""
    xp = array_namespace(state.phase)
    if xp.iscomplexobj(state.phase):
        return xp.exp(1j * state.phase).astype(state.probe.dtype)
    # Real sine and cosine are vector instructions where a complex exponential is not.
    transmission = xp.empty(state.phase.shape, dtype=state.probe.dtype)
    transmission.real, transmission.imag = xp.cos(state.phase), xp.sin(state.phase)
    return transmission


def patterns(state: State, model: Model, where: np.ndarray) -> Array:
    """Return the model's patterns (position, ky, kx), zero frequency first, of the positions ``where``."""
    corners = to_device_of(model.grid.corners[where], state.probe)
    probes = probes_at(state.probe, model.grid, where)
    return multislice.intensities(probes, transmission_of(state), corners, model.propagators)


def illumination(probe: Array, grid: ObjectGrid) -> Array:
    """Return the sum of |probe|² over all positions, (Y, X), in electrons."""
    xp = array_namespace(probe)
    total = xp.zeros(grid.shape_yx, dtype=real_dtype(probe))
    chunk = max(1, together_bytes(probe) // probe.nbytes)
    for start in range(0, len(grid.corners), chunk):
        where = np.arange(start, min(start + chunk, len(grid.corners)))
        patches.illuminate(probes_at(probe, grid, where), to_device_of(grid.corners[where], probe), total)
    return total


def probes_at(probe: Array, grid: ObjectGrid, where: np.ndarray) -> Array:
    """Return the probe at each of the positions ``where``, in its window: (position, y, x)."""
    if grid.on_pixels:
        return array_namespace(probe).repeat(probe[None], len(where), axis=0)
    return shifted_probes(probe, to_device_of(grid.shifts_px[where], probe))


def _probes_adjoint(gradient: Array, grid: ObjectGrid, where: np.ndarray) -> Array:
    if grid.on_pixels:
        return gradient.sum(axis=0)
    return shifted_probes_adjoint(gradient, to_device_of(grid.shifts_px[where], gradient))


def _measured(counts: Array, where: np.ndarray, mask: Array | None, like: Array) -> Array:
    xp = array_namespace(like)
    measured = xp.asarray(counts[to_device_of(where, counts)], dtype=real_dtype(like))
    return measured if mask is None else xp.where(mask, measured, -1)


def steps(epochs: int, rule: UpdateRule, batches: int, final_epochs: int) -> Iterator[tuple[UpdateRule, int]]:
    """Yield rule and batches per epoch: ``batches`` first, then whole-scan steps that settle the noise of batches."""
    for epoch in range(epochs):
        yield (rule, batches) if epoch < epochs - final_epochs else (rule, 1)
