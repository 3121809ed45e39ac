"""Probe positions refined with the object, their gauges taken out, and the affine map of the scan that they tell.

A position's gradient comes from the wave's gradient on the first slice: a probe at X carries the phase -2 pi k.X, so
dL/dX = -2 pi sum_k k q(k), q = -Im(conj(B) U) with the probe's spectrum U there and the gradient B of it. The step is
Gauss-Newton's, with the curvature of each position from how its pattern changes as it moves: far less than what a shift
does to the wave, most of which is a phase that the detector does not see. A shift of all positions is one of the
object, and a stretched scan is a stretched object at another defocus: the first is always taken out, the affine rest
until it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stemtomo.algorithms.ptychography.model import CURVATURE, Model, State, patterns
from stemtomo.algorithms.ptychography.parameters import Chunk, Parameter
from stemtomo.algorithms.ptychography.windows import ObjectGrid
from stemtomo.backend import Array, array_namespace, to_device_of, to_host, together_bytes
from stemtomo.kernels.fourier import fft2
from stemtomo.physics.gaps import drift_ramps, gap_moments

_FLOOR = 0.1


@dataclass(frozen=True)
class Affine:
    """The affine map from told to refined positions: x -> matrix x + shift."""

    matrix: np.ndarray
    """(2, 2), x and y."""
    shift_angstrom: np.ndarray
    """(2,), x and y."""

    @property
    def scale_xy(self) -> tuple[float, float]:
        """Stretch along x and y, once the rotation is off."""
        stretch = self._stretch()
        return float(stretch[0, 0]), float(stretch[1, 1])

    @property
    def rotation_rad(self) -> float:
        """Right-handed rotation of the scan, of the polar decomposition."""
        left, _, right = np.linalg.svd(self.matrix)
        turn = left @ right
        return float(np.arctan2(turn[1, 0], turn[0, 0]))

    @property
    def shear(self) -> float:
        """What is left: the off-diagonal of the symmetric stretch."""
        return float(self._stretch()[0, 1])

    def _stretch(self) -> np.ndarray:
        _, values, right = np.linalg.svd(self.matrix)
        return right.T @ np.diag(values) @ right

    def to_attrs(self) -> dict[str, Any]:
        """Return JSON attributes with units in the names."""
        return {
            "scale_xy": list(self.scale_xy),
            "rotation_mrad": self.rotation_rad * 1e3,
            "shear": self.shear,
            "shift_angstrom_xy": self.shift_angstrom.tolist(),
        }


def affine_fit(told: np.ndarray, refined: np.ndarray) -> Affine:
    """Return the least-squares affine map from positions ``told`` to ``refined``, both (position, 2), x and y in Å."""
    basis = np.column_stack([told, np.ones(len(told))])
    solution = np.linalg.lstsq(basis, refined, rcond=None)[0]
    return Affine(solution[:2].T, solution[2])


def gauge_sums(moved: np.ndarray, told: np.ndarray, affine: bool) -> dict[str, np.ndarray]:
    """Return the normal equations of the gauge of displacements ``moved`` (position, 2): sums that add up over parts.

    The gauge is the mean displacement; with ``affine``, all that an affine map of the positions ``told`` explains.
    """
    basis = _basis(told, affine)
    return {"normal": basis.T @ basis, "right": basis.T @ moved}


def without_gauge(moved: np.ndarray, told: np.ndarray, sums: dict[str, np.ndarray], affine: bool) -> np.ndarray:
    """Return the displacements ``moved`` (position, 2) of a part less the gauge that ``sums`` over all parts tell."""
    # Unit diagonal: lengths of a scan in Å beside ones would spoil the condition. A scan of one row has no slope
    # along y, and the least-squares solution leaves it at zero.
    size = np.sqrt(np.diagonal(sums["normal"]))
    size = np.where(size > 0, size, 1.0)
    normal = sums["normal"] / np.outer(size, size)
    solution = np.linalg.lstsq(normal, sums["right"] / size[:, None], rcond=1e-10)[0] / size[:, None]
    return moved - _basis(told, affine) @ solution


def without_gauges(moved: np.ndarray, told: np.ndarray, affine: bool) -> np.ndarray:
    """Return the displacements ``moved`` (position, 2) less their mean, and less their affine part if ``affine``."""
    return without_gauge(moved, told, gauge_sums(moved, told, affine), affine)


def _basis(told: np.ndarray, affine: bool) -> np.ndarray:
    ones = np.ones((len(told), 1))
    return np.hstack([told, ones]) if affine else ones


def moved_grid(grid: ObjectGrid, moved_angstrom: np.ndarray) -> ObjectGrid:
    """Return ``grid`` with every position moved (position, 2; x, y in Å); the windows stay where they are."""
    pixels = moved_angstrom / np.asarray(grid.pixel_angstrom_yx)[::-1]
    return replace(grid, shifts_px=grid.shifts_px + pixels)


class Positions(Parameter):
    """Displacements of the positions, (position, 2), x and y in Å: a parameter of the solver, local to a part.

    Parameters
    ----------
    told_angstrom
        (position, 2), where the scan has them.
    curvature
        (position, 2, 2), from :func:`seen_curvature` once the object has taken shape.
    damping
        Share of the Gauss-Newton step that is taken.
    largest_step_angstrom
        No position moves by more at once.
    keep_affine
        Whether an affine change of the scan may stay; a free one trades with defocus.
    usual_curvature
        Median of the curvature over all parts; that of these positions unless given.
    """

    name = "positions"
    shared = False

    def __init__(
        self,
        told_angstrom: np.ndarray,
        curvature: Array,
        damping: float = 0.5,
        largest_step_angstrom: float = 0.05,
        keep_affine: bool = False,
        usual_curvature: float | None = None,
    ) -> None:
        self.told, self.damping = told_angstrom, damping
        self.largest, self.keep_affine = largest_step_angstrom, keep_affine
        # Where there is nothing to see a position by it stays, by a floor of a tenth of what is usual.
        usual = usual_curvature
        if usual is None:
            usual = float(array_namespace(curvature).median(curvature[:, (0, 1), (0, 1)]))
        self.curvature = curvature + to_device_of(_FLOOR * usual * np.eye(2), curvature)

    def start(self, like: Array) -> Array:
        """Return the value to begin with: nothing is displaced."""
        return to_device_of(np.zeros((len(self.told), 2)), like)

    def model_at(self, value: Array, model: Model) -> Model:
        """Return ``model`` with its positions displaced by ``value``."""
        return replace(model, grid=moved_grid(model.grid, to_host(value)))

    def zero(self, value: Array) -> Any:
        """Return the empty sums."""
        xp = array_namespace(value)
        return {"gradient": xp.zeros_like(value), "met": xp.zeros(len(value))}

    def on_chunk(self, sums: Any, value: Array, model: Model, chunk: Chunk) -> None:
        """Add the gradient of the chunk's positions."""
        xp = array_namespace(value)
        pixel, shape = model.grid.pixel_angstrom_yx, chunk.probe.shape[-2:]
        there = to_device_of(model.grid.shifts_px[chunk.where] * np.asarray(pixel)[::-1], value)
        spectra = fft2(chunk.probe)
        entering = (spectra[None] * drift_ramps(-there, shape, pixel, spectra)[:, None]).reshape(-1, *shape)
        moments = xp.zeros((len(entering), 3))
        gap_moments(fft2(chunk.gradient.copy()), entering, pixel, moments)
        sums["gradient"][chunk.where] += -2 * np.pi * moments[:, :2].reshape(-1, chunk.modes, 2).sum(axis=1)
        sums["met"][chunk.where] += 1

    def over_parts(self, value: Array, sums: Any) -> Any:
        """Return the gauge's sums of where the positions of this part would go."""
        return gauge_sums(to_host(self._moved(value, sums)), self.told, affine=not self.keep_affine)

    def step(self, value: Array, sums: Any, memory: Any, positions: int) -> tuple[Array, Any]:
        """Return the displacements after one damped Gauss-Newton step of the positions that were met."""
        moved = to_host(self._moved(value, sums))
        gauge = sums.get("over_parts") or gauge_sums(moved, self.told, affine=not self.keep_affine)
        return to_device_of(without_gauge(moved, self.told, gauge, affine=not self.keep_affine), value), memory

    def _moved(self, value: Array, sums: Any) -> Array:
        xp = array_namespace(value)
        met = xp.flatnonzero(sums["met"])
        step = xp.linalg.solve(self.curvature[met], sums["gradient"][met][..., None])[..., 0]
        moved = value.copy()
        moved[met] += xp.clip(-self.damping * step, -self.largest, self.largest)
        return moved


def seen_curvature(state: State, model: Model, step_angstrom: float = 0.02) -> Array:
    """Return Gauss-Newton's curvature of the loss in every position, (position, 2, 2), x and y, per Å².

    It is 2 sum J J^T of the roots of the intensities (twice that for the Poisson loss), with J from patterns on either
    side of each position: two gradients' worth of work.
    """
    xp = array_namespace(state.probe)
    # Differences of patterns that lie so close lose five digits: of single precision, too many would be left.
    state, model = _in_double(state), replace(model, propagators=[h.astype(np.complex128) for h in model.propagators])
    offset = 0.0 if model.loss == "amplitude" else 0.375
    count = len(model.grid.corners)
    found = xp.zeros((count, 2, 2))
    chunk = max(1, together_bytes(state.probe) // state.probe.nbytes)
    for start in range(0, count, chunk):
        where = np.arange(start, min(start + chunk, count))
        slopes = []
        for axis in (0, 1):
            roots = []
            for sign in (1, -1):
                moved = np.zeros((count, 2))
                moved[:, axis] = sign * step_angstrom
                seen = patterns(state, replace(model, grid=moved_grid(model.grid, moved)), where)
                roots.append(xp.sqrt(seen + offset))
            slope = (roots[0] - roots[1]) / (2 * step_angstrom)
            slopes.append((slope if model.mask is None else slope * model.mask).reshape(len(where), -1))
        for row in (0, 1):
            for column in (0, 1):
                found[start : start + len(where), row, column] = (slopes[row] * slopes[column]).sum(axis=1)
    return 2 * CURVATURE[model.loss] * found


def _in_double(state: State) -> State:
    phase = state.phase.astype(np.complex128 if state.phase.dtype.kind == "c" else np.float64)
    return State(phase, state.probe.astype(np.complex128))
