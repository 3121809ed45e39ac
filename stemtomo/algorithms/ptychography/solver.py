"""Multislice ptychography of one part: sums over batches of patterns, and the loop that updates from them.

With the Wirtinger gradient G_t of the transmission t = exp(i u), G_u = -i conj(t) G_t; its real part is
Im(conj(t) G_t).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stemtomo.algorithms.ptychography import detection
from stemtomo.algorithms.ptychography.model import (
    CURVATURE,
    Gradients,
    Model,
    State,
    illumination,
    orthogonal_modes,
    patterns,
    probes_adjoint,
    probes_at,
    tied_gradient,
    transmission_of,
    untied,
)
from stemtomo.algorithms.ptychography.parameters import Chunk, Parameter
from stemtomo.algorithms.ptychography.rules import Nesterov, Rule
from stemtomo.algorithms.ptychography.windows import spread_batches
from stemtomo.backend import Array, array_namespace, real_dtype, to_device_of, to_host, together_bytes
from stemtomo.kernels import patches
from stemtomo.physics import multislice
from stemtomo.physics.propagation import prepared

__all__ = [
    "CURVATURE",
    "Gradients",
    "Model",
    "Nesterov",
    "Parameter",
    "Rule",
    "State",
    "gradients",
    "gradients_of",
    "illumination",
    "orthogonal_modes",
    "patterns",
    "probes_at",
    "solve",
    "steps",
    "transmission_of",
    "untied",
    "update",
]


def gradients(
    state: State,
    model: Model,
    counts: Array,
    batch: np.ndarray,
    parameters: Sequence[Parameter] = (),
    losses: np.ndarray | None = None,
) -> Gradients:
    """Return the sums of the loss and its gradients over the positions ``batch``.

    Parameters
    ----------
    counts
        Patterns of all positions of the part, (position, qy, qx), zero frequency first, electrons, any real dtype.
    batch
        Indices of positions.
    parameters
        Parameters beside object and probe, whose values are in ``state.extra``.
    losses
        (position,) of the part, in host memory: takes the loss of each position of the batch.
    """
    return gradients_of(state, model, [(batch, counts, batch)], parameters, losses)


def gradients_of(
    state: State,
    model: Model,
    groups: Iterable[tuple[np.ndarray, Array, np.ndarray]],
    parameters: Sequence[Parameter] = (),
    losses: np.ndarray | None = None,
) -> Gradients:
    """Return :func:`gradients` over positions whose patterns come in groups.

    Parameters
    ----------
    groups
        Indices of positions, patterns, and which of these patterns are theirs.
    """
    xp = array_namespace(state.phase)
    extra = {parameter.name: parameter.zero(state.extra[parameter.name]) for parameter in parameters}
    for parameter in parameters:
        model = parameter.model_at(state.extra[parameter.name], model)
    transmission = transmission_of(state, model.slices, model.weights)
    propagators = prepared(model.propagators)
    tied_apart = model.weights is not None and len(state.phase) == 1
    layers = [xp.zeros_like(transmission[0]) for _ in range(model.slices if tied_apart else len(state.phase))]
    # Tied slices that are alike add into the one layer that they share.
    transmission_gradient = layers * model.slices if len(layers) == 1 else layers
    lit = xp.zeros(model.grid.shape_yx, dtype=real_dtype(state.probe))
    probe_gradient = xp.zeros_like(state.probe)
    loss: Any = 0.0
    modes, met = len(state.probe), 0
    chunk = max(1, together_bytes(state.probe) // state.probe.nbytes)
    alike = probes_at(state.probe, model.grid, np.arange(chunk)) if model.grid.on_pixels else None
    for where, counts, rows in _chunks(groups, chunk):
        met += len(where)
        probes = probes_at(state.probe, model.grid, where) if alike is None else alike[: len(where)]
        for parameter in parameters:
            probes = parameter.probes(state.extra[parameter.name], probes, model, where)
        waves = probes.reshape(-1, *probes.shape[2:])
        corners = to_device_of(np.repeat(model.grid.corners[where], modes, axis=0), state.probe)
        patches.illuminate(waves, corners, lit)
        spectra, incident = multislice.forward(waves, transmission, corners, propagators)
        # A number of the device: reading it here would make the host wait for every chunk.
        each = _residual(spectra, counts, rows, state, model, parameters, extra)
        loss = loss + each.sum()
        if losses is not None:
            losses[where] = to_host(each)
        on_gap = _watcher(state, model, where, parameters, extra)
        back = multislice.adjoint(spectra, incident, transmission, corners, propagators, transmission_gradient, on_gap)
        for parameter in parameters:
            value = state.extra[parameter.name]
            parameter.on_chunk(extra[parameter.name], value, model, Chunk(where, modes, state.probe, back))
        probe_gradient += probes_adjoint(back.reshape(probes.shape), model.grid, where)
    phase_gradient = xp.stack([-1j * t.conj() * g for t, g in zip(transmission, layers, strict=False)])
    if tied_apart:
        phase_gradient = tied_gradient(phase_gradient, model.weights)
    if model.kind == "phase":
        phase_gradient = xp.ascontiguousarray(phase_gradient.real)
    return Gradients(phase_gradient, probe_gradient, lit, float(loss), met, extra)


def update(
    state: State,
    sums: Gradients,
    rule: Rule,
    update_probe: bool = True,
    peak_illumination: float | None = None,
    slices: int | None = None,
    parameters: Sequence[Parameter] = (),
    largest: float | None = None,
    along: Array | None = None,
) -> State:
    """Return the state after one step of ``rule`` from the ``sums`` over all parts.

    Parameters
    ----------
    peak_illumination
        max N over the whole object where ``sums`` hold only a window of it.
    slices
        Slices that the layers of the object stand for; as many as layers unless given.
    parameters
        Those that take a step, with their own rule.
    largest, along
        What :meth:`Rule.largest` and :meth:`Rule.along` are over the whole object where ``sums`` hold only a window.
    """
    peak = float(sums.illumination.max()) if peak_illumination is None else peak_illumination
    state = rule.object_step(state, sums, peak, slices or len(state.phase), largest, along)
    if update_probe:
        state = rule.probe_step_of(state, sums)
    for parameter in parameters:
        name = parameter.name
        value, memory = parameter.step(state.extra[name], sums.extra[name], state.memory.get(name), sums.positions)
        state = replace(state, extra={**state.extra, name: value}, memory={**state.memory, name: memory})
    return state


def solve(
    state: State,
    model: Model,
    counts: Array,
    *,
    rules: Sequence[Rule],
    batches: Sequence[int],
    probe_start: int,
    seed: int = 0,
    tied_epochs: int = 0,
    parameters: Sequence[Parameter] = (),
    parameters_start: int = 0,
    regularise: Callable[[State, int], State] | None = None,
    after_epoch: Callable[[State, int], State] | None = None,
    where: np.ndarray | None = None,
    on_epoch: Callable[[int, float, State], bool | None] | None = None,
    first_epoch: int = 0,
    last_losses: np.ndarray | None = None,
) -> tuple[State, list[float]]:
    """Run one epoch per rule on one part that holds all positions; return the last state and the loss per epoch.

    The loss of an epoch is summed over its batches as they are met, per pattern.

    Parameters
    ----------
    tied_epochs
        Epochs after which a state that was started tied gets a layer per slice.
    parameters, parameters_start
        Those beside object and probe, and the first epoch in which they move.
    regularise, after_epoch
        Called after every update, and after the last one of every epoch, with the state and the epoch; return the state
        to go on with.
    where
        Sorted indices of the positions that take part; all unless given.
    on_epoch
        Called after every epoch; the loop ends early where it returns True.
    first_epoch
        Epoch to begin with, when ``state`` comes from a checkpoint.
    last_losses
        (position,): takes the loss of every position as the last of ``rules`` meets it.
    """
    losses: list[float] = []
    taking_part = np.arange(len(counts)) if where is None else where
    for epoch, (rule, count) in list(enumerate(zip(rules, batches, strict=True)))[first_epoch:]:
        if epoch >= tied_epochs:
            state = untied(state, model.slices, model.weights)
        moving = parameters if epoch >= parameters_start else ()
        total, seen = 0.0, 0
        for batch in spread_batches(len(taking_part), count, seed + epoch):
            told = last_losses if epoch + 1 == len(rules) else None
            sums = gradients(state, model, counts, taking_part[batch], parameters, told)
            state = update(state, sums, rule, epoch >= probe_start, slices=model.slices, parameters=moving)
            state = state if regularise is None else regularise(state, epoch)
            total, seen = total + sums.loss, seen + sums.positions
        state = orthogonal_modes(state)
        state = state if after_epoch is None else after_epoch(state, epoch)
        losses.append(total / seen)
        if on_epoch is not None and on_epoch(epoch, losses[-1], state):
            break
    return state, losses


def steps(epochs: int, rule: Rule, batches: int, final_epochs: int) -> Iterator[tuple[Rule, int]]:
    """Yield rule and batches per epoch: ``batches`` first, then whole-scan steps that settle the noise of batches."""
    for epoch in range(epochs):
        yield (rule, batches) if epoch < epochs - final_epochs else (rule, 1)


def _chunks(
    groups: Iterable[tuple[np.ndarray, Array, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, Array, np.ndarray]]:
    for where, counts, rows in groups:
        for start in range(0, len(where), size):
            yield where[start : start + size], counts, rows[start : start + size]


def _residual(
    spectra: Array,
    counts: Array,
    rows: np.ndarray,
    state: State,
    model: Model,
    parameters: Sequence[Parameter],
    extra: dict[str, Any],
) -> Array:
    """Turn ``spectra`` into the loss's gradient; return the loss per position."""
    lights = [(p.name, p.background(state.extra[p.name])) for p in parameters]
    name, background = next(((name, light) for name, light in lights if light is not None), ("", None))
    return detection.residual(
        spectra,
        counts,
        model.loss,
        model.blur_px,
        where=to_device_of(np.ascontiguousarray(rows, dtype=np.int64), spectra),
        modes=len(state.probe),
        mask=model.mask,
        background=background,
        background_gradient=extra[name]["gradient"] if background is not None else None,
        floor_factor=model.floor_factor,
    )


def _watcher(
    state: State, model: Model, where: np.ndarray, parameters: Sequence[Parameter], extra: dict[str, Any]
) -> Callable[[int, Array, Array], None] | None:
    watching = [parameter for parameter in parameters if parameter.watches_gaps]
    if not watching:
        return None

    def on_gap(gap: int, gradient: Array, waves: Array) -> None:
        for parameter in watching:
            parameter.on_gap(extra[parameter.name], state.extra[parameter.name], model, where, gap, gradient, waves)

    return on_gap
