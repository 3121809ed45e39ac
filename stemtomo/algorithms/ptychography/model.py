"""What a reconstruction holds fixed, what it changes, and the sums it changes it by.

The object is u = phase + i absorption with t = exp(i u), so phases never wrap and a pure phase object is the real part
alone. It has one layer per slice, or a single layer that all slices share (tied slices). The probe is a mixed state:
modes (mode, y, x) that add up in intensity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.fft import next_fast_len

from stemtomo.algorithms.ptychography.detection import blurred
from stemtomo.algorithms.ptychography.windows import ObjectGrid
from stemtomo.backend import Array, array_namespace, real_dtype, to_device_of, together_bytes
from stemtomo.kernels import patches
from stemtomo.physics import multislice
from stemtomo.physics.probe import shifted_probes, shifted_probes_adjoint

ObjectKind = Literal["phase", "complex"]

#: Curvature of each loss in the modulus of a wave, in units of that of the amplitude loss, at its minimum.
CURVATURE = {"amplitude": 1.0, "anscombe": 1.0, "poisson": 2.0}
#: Pixels of windows over those of the object from which one convolution is less than a sum over windows.
_CONVOLVED = 30


@dataclass(frozen=True)
class Model:
    """What a reconstruction holds fixed: geometry, propagators, detector and the loss.

    Parameters
    ----------
    propagators
        One per gap between slices, (ky, kx); gaps may differ.
    detector_yx
        Pixels of the detector where it is smaller than a window, so that what scatters beyond it does not fold back;
        ``None`` where they are the same.
    mask
        (qy, qx) bool, zero frequency first, False where the detector tells nothing; ``None`` is all True.
    blur_px
        Standard deviation of the detector's point spread, in its pixels.
    floor_factor
        Times the counts under the loss's roots: above 1, patterns are compared as if they had fewer electrons, and
        weak pixels tell less.
    """

    grid: ObjectGrid
    propagators: Sequence[Array]
    loss: patches.Loss = "amplitude"
    kind: ObjectKind = "phase"
    detector_yx: tuple[int, int] | None = None
    mask: Array | None = None
    blur_px: float = 0.0
    weights: tuple[float, ...] | None = None
    """Thickness of every slice over their mean, where they differ: tied slices are as thick in phase."""
    floor_factor: float = 1.0

    @property
    def slices(self) -> int:
        """Number of slices."""
        return len(self.propagators) + 1


class Gradients(NamedTuple):
    """Sums over a batch of positions; every field adds up over parts."""

    phase: Array
    """G_u, (layer, Y, X); real for a phase object."""
    probe: Array
    """Wirtinger gradient of the modes, (mode, y, x)."""
    illumination: Array
    """Sum of |psi|² on the first slice, (Y, X)."""
    loss: float
    positions: int
    extra: Any = None
    """What each further parameter sums: a dict of trees by its name."""


@dataclass(frozen=True)
class State:
    """What a reconstruction changes: object, probe, further parameters, and what their update rules remember."""

    phase: Array
    """u, (layer, Y, X), one layer per slice or one for all: real, or complex with the absorption as imaginary part."""
    probe: Array
    """Modes, (mode, y, x), strongest first."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further parameters by name: arrays, or dicts of them."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What update rules remember, a tree by the name of the parameter; empty at the start."""

    @classmethod
    def start(cls, model: Model, probe: Array, tied: bool = False, extra: dict[str, Any] | None = None) -> State:
        """Return vacuum in every slice (one layer for all if ``tied``) and the probe (y, x) or modes (mode, y, x)."""
        xp = array_namespace(probe)
        dtype = probe.dtype if model.kind == "complex" else real_dtype(probe)
        phase = xp.zeros((1 if tied else model.slices, *model.grid.shape_yx), dtype=dtype)
        return cls(phase, probe if probe.ndim == 3 else probe[None], dict(extra or {}))

    def tree(self) -> dict[str, Any]:
        """Return the state as plain dicts and arrays, for a checkpoint; ``State(**tree)`` is the state again."""
        return {"phase": self.phase, "probe": self.probe, "extra": self.extra, "memory": self.memory}


def untied(state: State, slices: int, weights: Sequence[float] | None = None) -> State:
    """Return ``state`` with a layer of its own for each of ``slices`` slices; what rules remember goes with it.

    With ``weights``, as in :class:`Model`, each has so many times what the layer has.
    """
    if len(state.phase) == slices:
        return state
    xp = array_namespace(state.phase)
    shape = state.phase.shape

    def spread(leaf: Any) -> Any:
        if isinstance(leaf, dict):
            return {key: spread(value) for key, value in leaf.items()}
        if getattr(leaf, "shape", None) != shape:
            return leaf
        return xp.repeat(leaf, slices, axis=0) if weights is None else weighted(leaf, weights)

    memory = {**state.memory, **({"object": spread(state.memory["object"])} if "object" in state.memory else {})}
    return State(spread(state.phase), state.probe, state.extra, memory)


def weighted(layer: Array, weights: Sequence[float]) -> Array:
    """Return slices (slice, Y, X) that have ``weights`` times the one ``layer`` (1, Y, X)."""
    return array_namespace(layer).asarray(weights, dtype=real_dtype(layer))[:, None, None] * layer


def tied_gradient(gradient: Array, weights: Sequence[float] | None) -> Array:
    """Return the gradient (1, Y, X) of the layer that :func:`weighted` slices share, from theirs (slice, Y, X)."""
    xp = array_namespace(gradient)
    return xp.tensordot(xp.asarray(weights, dtype=real_dtype(gradient)), gradient, axes=1)[None]


def transmission_of(state: State, slices: int | None = None, weights: Sequence[float] | None = None) -> Array:
    """Return t = exp(i u), (slice, Y, X), in the probe's precision; tied slices that are alike are views of one."""
    xp, phase = array_namespace(state.phase), state.phase
    if weights is not None and len(phase) == 1:
        phase = weighted(phase, weights)
    if xp.iscomplexobj(phase):
        transmission = xp.exp(1j * phase).astype(state.probe.dtype)
    else:
        # Real sine and cosine are vector instructions where a complex exponential is not.
        transmission = xp.empty(phase.shape, dtype=state.probe.dtype)
        transmission.real, transmission.imag = xp.cos(phase), xp.sin(phase)
    if slices is None or len(transmission) == slices:
        return transmission
    return xp.broadcast_to(transmission, (slices, *transmission.shape[1:]))


def patterns(state: State, model: Model, where: np.ndarray, parameters: Sequence[Any] = ()) -> Array:
    """Return the model's patterns (position, qy, qx), zero frequency first, of the positions ``where``.

    ``parameters`` are those beside object and probe (:mod:`~stemtomo.algorithms.ptychography.parameters`).
    """
    xp = array_namespace(state.phase)
    modes = len(state.probe)
    for parameter in parameters:
        model = parameter.model_at(state.extra[parameter.name], model)
    corners = to_device_of(np.repeat(model.grid.corners[where], modes, axis=0), state.probe)
    probes = probes_at(state.probe, model.grid, where)
    for parameter in parameters:
        probes = parameter.probes(state.extra[parameter.name], probes, model, where)
    waves = probes.reshape(-1, *state.probe.shape[1:])
    transmission = transmission_of(state, model.slices, model.weights)
    spectra, _ = multislice.forward(waves, transmission, corners, model.propagators)
    intensity = (xp.square(spectra.real) + xp.square(spectra.imag)).reshape(-1, modes, *spectra.shape[1:]).sum(axis=1)
    seen = seen_by_detector(blurred(intensity, model.blur_px), model.detector_yx)
    for parameter in parameters:
        background = parameter.background(state.extra[parameter.name])
        seen = seen if background is None else seen + background
    return seen


def seen_by_detector(patterns: Array, detector_yx: tuple[int, int] | None) -> Array:
    """Return the low frequencies of ``patterns`` (..., ky, kx), zero frequency first, that a smaller detector sees."""
    for axis, count in zip((-2, -1), detector_yx or patterns.shape[-2:], strict=True):
        length = patterns.shape[axis]
        if count < length:
            kept = np.r_[np.arange((count + 1) // 2), np.arange(length - count // 2, length)]
            patterns = array_namespace(patterns).take(patterns, to_device_of(kept, patterns), axis=axis)
    return patterns


def illumination(probe: Array, grid: ObjectGrid) -> Array:
    """Return the sum of |probe|² over all positions and modes, (Y, X), in electrons."""
    xp = array_namespace(probe)
    probe = probe if probe.ndim == 3 else probe[None]
    patterns = len(grid.corners) * math.prod(grid.window_yx)
    if grid.on_pixels and not grid.periodic and patterns > _CONVOLVED * math.prod(grid.shape_yx):
        return _convolved((xp.abs(probe) ** 2).sum(axis=0), grid)
    total = xp.zeros(grid.shape_yx, dtype=real_dtype(probe))
    chunk = max(1, together_bytes(probe) // probe.nbytes)
    for start in range(0, len(grid.corners), chunk):
        where = np.arange(start, min(start + chunk, len(grid.corners)))
        waves = probes_at(probe, grid, where).reshape(-1, *probe.shape[1:])
        corners = to_device_of(np.repeat(grid.corners[where], len(probe), axis=0), probe)
        patches.illuminate(waves, corners, total)
    return total


def _convolved(power: Array, grid: ObjectGrid) -> Array:
    """Return the sum of ``power`` (y, x) at all corners of a grid whose windows are alike, as one convolution."""
    xp = array_namespace(power)
    starts = np.zeros(grid.shape_yx)
    np.add.at(starts, (grid.corners[:, 0], grid.corners[:, 1]), 1.0)
    shape, wide = power.shape, tuple(next_fast_len(n, real=True) for n in grid.shape_yx)
    product = xp.fft.rfft2(to_device_of(starts, power), wide) * xp.fft.rfft2(power.astype(np.float64), wide)
    found = xp.fft.irfft2(product, wide)[: grid.shape_yx[0], : grid.shape_yx[1]]
    # What no window reaches stays dark: rounding would leave a little there.
    reached = np.zeros((grid.shape_yx[0] + 1, grid.shape_yx[1] + 1))
    reached[1:, 1:] = starts.cumsum(axis=0).cumsum(axis=1)
    y, x = (np.arange(1, n + 1) for n in grid.shape_yx)
    before_y, before_x = np.maximum(y - shape[0], 0), np.maximum(x - shape[1], 0)
    inside = reached[np.ix_(y, x)] - reached[np.ix_(before_y, x)] - reached[np.ix_(y, before_x)]
    inside += reached[np.ix_(before_y, before_x)]
    lit = to_device_of(inside > 0.5, power)
    return xp.where(lit, xp.maximum(found, 0), 0).astype(power.dtype)


def probes_at(probe: Array, grid: ObjectGrid, where: np.ndarray) -> Array:
    """Return the modes (mode, y, x) at each of the positions ``where``, in its window: (position, mode, y, x).

    A single ``probe`` (y, x) gives (position, y, x).
    """
    if grid.on_pixels:
        return array_namespace(probe).repeat(probe[None], len(where), axis=0)
    return shifted_probes(probe, to_device_of(grid.shifts_px[where], probe))


def probes_adjoint(gradient: Array, grid: ObjectGrid, where: np.ndarray) -> Array:
    """Adjoint of :func:`probes_at`: (mode, y, x) from ``gradient`` (position, mode, y, x), which is consumed."""
    if grid.on_pixels:
        return gradient.sum(axis=0)
    return shifted_probes_adjoint(gradient, to_device_of(grid.shifts_px[where], gradient))


def start_modes(probe: np.ndarray, count: int, share: float = 0.02) -> np.ndarray:
    """Return ``count`` orthogonal modes (mode, y, x) of the intensity of ``probe`` (y, x), the others ``share`` each.

    They are the probe and its derivatives along x, y, xx, xy ...: what a source of some size makes of a probe. However
    many they are, half of the intensity stays in the first.
    """
    ky, kx = (np.fft.fftfreq(length) for length in probe.shape)
    spectrum = np.fft.fft2(probe)
    found: list[np.ndarray] = []
    orders = ((total - along_y, along_y) for total in range(count) for along_y in range(total + 1))
    for (order_x, order_y), _ in zip(orders, range(count), strict=False):
        mode = np.fft.ifft2(spectrum * kx[None, :] ** order_x * ky[:, None] ** order_y).ravel()
        for other in found:
            mode = mode - np.vdot(other, mode) * other
        found.append(mode / np.linalg.norm(mode))
    power = np.full(count, min(share, 0.5 / count))
    power[0] = 1 - power[1:].sum()
    modes = np.sqrt(power)[:, None] * np.stack(found) * np.linalg.norm(probe)
    return modes.reshape(count, *probe.shape).astype(probe.dtype)


def orthogonal_modes(state: State) -> State:
    """Return ``state`` with the modes rotated among themselves until orthogonal, strongest first.

    The rotation is unitary, so that no intensity changes; momenta of the probe are rotated with it.
    """
    modes = len(state.probe)
    if modes == 1:
        return state
    xp = array_namespace(state.probe)
    flat = state.probe.reshape(modes, -1)
    _, vectors = xp.linalg.eigh((flat @ flat.conj().T).astype(np.complex128))
    # The Gram matrix is A A^H with A = probe; its eigenvectors, strongest first, give the modes V^H A.
    turn = xp.ascontiguousarray(vectors[:, ::-1].conj().T).astype(state.probe.dtype)
    # A global phase per mode is free; keeping the diagonal real and positive lets nothing jump between epochs.
    diagonal = xp.diagonal(turn)
    size = xp.abs(diagonal)
    turn = turn * xp.where(size > 0, diagonal.conj() / xp.maximum(size, 1e-30), 1)[:, None]

    def rotate(leaf: Any) -> Any:
        if isinstance(leaf, dict):
            return {key: rotate(value) for key, value in leaf.items()}
        if getattr(leaf, "shape", None) != state.probe.shape or leaf.dtype.kind != "c":
            return leaf
        return (turn @ leaf.reshape(modes, -1)).reshape(leaf.shape)

    memory = {**state.memory, **({"probe": rotate(state.memory["probe"])} if "probe" in state.memory else {})}
    return State(state.phase, rotate(state.probe), state.extra, memory)
