"""Where ptychography meets the geometry of its specimen: the window, the mistilt and the thickness of a tilt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from stemtomo.algorithms.ptychography import adaptive, mistilt, solver
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.model import start_modes
from stemtomo.algorithms.ptychography.windows import ObjectGrid
from stemtomo.backend import Array, to_device_of
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.pipeline.config import PtychographySettings

#: Iterations over all chosen patterns once those of a quarter of them stand still.
_SETTLING_ITERATIONS = 20


class Found(NamedTuple):
    """Where a reconstruction starts from."""

    geometry: Geometry
    probe: Array
    """Modes (mode, y, x) on the first slice, in the frame of the object."""
    phase: Array | None
    """u of the tied slices, (1, Y, X), where all positions took part; else ``None``: vacuum."""
    path: np.ndarray
    """(iteration, 3): tilt x, y in mrad and thickness of the specimen in Å; empty where nothing was looked for."""

    @property
    def tied(self) -> bool:
        """Whether the geometry was found, with tied slices, which stay tied: free ones would trade it for a drift."""
        return len(self.path) > 0

    def tree(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it; probe and phase are in the state of the solver by then."""
        tilt = np.asarray(self.geometry.tilt_rad_xy)
        return {"tilt_rad_xy": tilt, "thickness": self.geometry.slice_thickness_angstrom, "path": self.path}

    @classmethod
    def of_tree(cls, tree: dict[str, Any], probe: Array) -> Found:
        """Return what :meth:`tree` kept, with a ``probe`` to go on with."""
        return cls(Geometry(tree["tilt_rad_xy"], float(tree["thickness"])), probe, None, tree["path"])

    def variables(self) -> dict[str, tuple[tuple[str], np.ndarray]]:
        """Return the path as variables of the result, where there is one."""
        names = ("mistilt_x_mrad", "mistilt_y_mrad", "thickness_angstrom") if self.tied else ()
        return {name: (("geometry_iteration",), self.path[:, n]) for n, name in enumerate(names)}

    def attrs(self, slices: int) -> dict[str, Any]:
        """Return what was told or found as attributes of the result."""
        return {
            "mistilt_mrad": (self.geometry.tilt_rad_xy * 1e3).tolist(),
            "thickness_angstrom": slices * self.geometry.slice_thickness_angstrom,
            "mistilt_convention": "positive where columns drift to +x, +y with depth",
        }


def find(
    optics: Optics,
    scan: Scan,
    grid: ObjectGrid,
    recorded: np.ndarray,
    counts: Array,
    electrons: float,
    settings: PtychographySettings,
    mask: Array | None = None,
) -> Found:
    """Return the geometry of a tilt, found from its patterns where the settings say so, and what follows from it.

    Parameters
    ----------
    grid
        Windows of the ``recorded`` positions (flat indices into the scan), in the order of ``counts``.
    mask
        (qy, qx) bool, zero frequency first, False where the detector tells nothing.
    """
    slices, thickness = settings.slices, settings.mean_slice_angstrom
    stack, data = prepared(optics, grid, counts, electrons, settings, mask)
    start = Geometry(np.asarray(settings.mistilt_mrad) / 1e3, thickness)
    free = mistilt.Free(settings.refine_mistilt, settings.refine_thickness)
    if slices == 1 or not any(free):
        return Found(start, adaptive.entering_probe(data.probe, start, stack), None, np.zeros((0, 3)))
    chosen = _regular(scan, recorded, settings.mistilt_patterns)
    few = _regular(scan, recorded, len(chosen) // 4)
    first = mistilt.fit(start, stack, data, few, settings.mistilt_iterations, free=free)
    second = mistilt.fit(first.geometry, stack, data, chosen, _SETTLING_ITERATIONS, first.phase, free)
    whole = len(chosen) == len(recorded)
    path = np.array(first.path + second.path)[:, :3] * [1e3, 1e3, slices]
    return Found(
        second.geometry,
        adaptive.entering_probe(data.probe, second.geometry, stack),
        second.phase if whole else None,
        path,
    )


def prepared(
    optics: Optics,
    grid: ObjectGrid,
    counts: Array,
    electrons: float,
    settings: PtychographySettings,
    mask: Array | None = None,
) -> tuple[Stack, mistilt.Data]:
    """Return what the geometry of a tilt is fitted with: tied slices, and the probe in its plane."""
    stack = Stack(
        grid,
        wavelength_angstrom(optics.energy_ev),
        settings.slices,
        loss=settings.loss,
        kind=settings.object,
        weights=settings.slice_weights,
    )
    # A probe that is told on the entrance surface goes half a slice; one in the middle of the stack, which is where the
    # lab's z = 0 lies, goes back to the first slice.
    stack = replace(stack, entry=stack.entrance if settings.c1_at == "entrance" else -stack.middle)
    plane = optics.defocus_plane_z_angstrom if settings.c1_at == "entrance" else 0.0
    probe = probe_wave(optics, grid.window_yx, grid.pixel_angstrom_yx, plane_z_angstrom=plane, intensity=electrons)
    data = mistilt.Data(to_device_of(start_modes(probe, settings.probe_modes), counts), counts, mask)
    return stack, data


def chosen_patterns(scan: Scan, recorded: np.ndarray, settings: PtychographySettings) -> np.ndarray:
    """Return which of the ``recorded`` positions :func:`find` looks at: none where nothing is to be found."""
    if settings.slices == 1 or not (settings.refine_mistilt or settings.refine_thickness):
        return np.arange(0)
    return _regular(scan, recorded, settings.mistilt_patterns)


def model_of(
    found: Found,
    grid: ObjectGrid,
    detector: Detector,
    optics: Optics,
    settings: PtychographySettings,
    mask: np.ndarray | None = None,
) -> solver.Model:
    """Return what a reconstruction holds fixed at the positions of ``grid``, in the memory of the probe of ``found``.

    ``mask`` is that of :func:`find`.
    """
    stack = Stack(grid, wavelength_angstrom(optics.energy_ev), settings.slices, weights=settings.slice_weights)
    return solver.Model(
        grid,
        adaptive.propagators_of(found.geometry, stack, np.arange(1), found.probe),
        settings.loss,
        settings.object,
        detector.shape_yx,
        None if mask is None else to_device_of(mask, found.probe),
        settings.detector_blur_px,
        settings.slice_weights,
    )


def _regular(scan: Scan, recorded: np.ndarray, most: int) -> np.ndarray:
    """Return up to about ``most`` of the recorded positions: every n-th row and column of a square in the middle.

    The stride stays small, since patterns must overlap: 1 if all fit, else 2, with the field cut where 2 is not enough.
    """
    if len(recorded) <= most:
        return np.arange(len(recorded))
    rows, columns = np.divmod(recorded, scan.shape_yx[1])
    edge = int(np.ceil(np.sqrt(most)))
    kept = (rows % 2 == 0) & (columns % 2 == 0)
    for place, count in ((rows, scan.shape_yx[0]), (columns, scan.shape_yx[1])):
        kept &= np.abs(place - (count - 1) / 2) <= edge
    return np.flatnonzero(kept)
