"""Where ptychography finds a mistilt for every position of a tilt: bent crystals, and grains beside one another."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stemtomo.algorithms.ptychography import adaptive, solver
from stemtomo.algorithms.ptychography.adaptive import Geometry, Stack
from stemtomo.algorithms.ptychography.mistilt import Data
from stemtomo.algorithms.ptychography.mistilt_map import MapFit, RasterGaussian, Smoothing, fit_map
from stemtomo.algorithms.ptychography.model import seen_by_detector
from stemtomo.backend import Array
from stemtomo.geometry import Scan
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.mistilt import Found
from stemtomo.pipeline.solving import Solved


class MappedTilt(NamedTuple):
    """A tilt that is solved with a map of mistilts."""

    fit: MapFit
    stack: Stack
    data: Data
    model: solver.Model

    def solved(self) -> Solved:
        """Return it as a result of the solver; the probe is that of the mean mistilt."""
        mean = self._mean()
        probe = adaptive.entering_probe(self.data.probe, mean, self.stack)
        losses = self.fit.losses
        return Solved(solver.State(self.fit.phase, probe), self.model, losses, [], len(losses) - 1, [], self.patterns)

    def patterns(self, where: np.ndarray) -> Array:
        """Return the model's patterns of the positions ``where`` on the detector."""
        seen = adaptive.patterns(self.fit.phase, self.data.probe, self.fit.geometry, self.stack, where)
        return seen_by_detector(seen, self.model.detector_yx)

    def variables(self) -> dict[str, tuple[tuple[str], np.ndarray]]:
        """Return the map as variables of the result."""
        tilt = self.fit.geometry.tilt_rad_xy * 1e3
        return {f"mistilt_map_{axis}_mrad": (("position",), tilt[:, n]) for n, axis in enumerate("xy")}

    def attrs(self) -> dict[str, Any]:
        """Return the mean of the map as the mistilt of the tilt."""
        return {"mistilt_mrad": (self._mean().tilt_rad_xy * 1e3).tolist()}

    def _mean(self) -> Geometry:
        geometry = self.fit.geometry
        return Geometry(geometry.tilt_rad_xy.mean(axis=0), geometry.slice_thickness_angstrom)


def solve_map(
    found: Found,
    stack: Stack,
    data: Data,
    model: solver.Model,
    scan: Scan,
    valid: np.ndarray,
    settings: PtychographySettings,
) -> MappedTilt:
    """Fit object and map from the one mistilt ``found`` for all; every epoch is one iteration of the search.

    ``valid`` (y, x) says which positions of ``scan`` are recorded.
    """
    smoothing = Smoothing.of(gaussian_of(scan, settings), valid)
    fit = fit_map(found.geometry, stack, data, smoothing, settings.epochs, found.phase)
    return MappedTilt(fit, stack, data, model)


def gaussian_of(scan: Scan, settings: PtychographySettings) -> RasterGaussian:
    """Return the Gaussian over neighbouring positions that the map is smooth by."""
    width = settings.mistilt_map_smoothing_angstrom
    assert width is not None
    return RasterGaussian(scan.step_angstrom_yx, width)
