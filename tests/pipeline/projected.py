"""Stores with projections of a ball of atoms, written down and not reconstructed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from stemtomo.geometry import TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from tests.algorithms.tomography import phantom

SIGMA = 6.5e-4
"""Interaction parameter in rad / (V Å)."""
VOLTS = 150.0
"""Potential of an atom of weight one, integrated over space, in V Å^3."""


def projected_store(
    path: Path,
    series: TiltSeries,
    atoms: tuple[np.ndarray, np.ndarray],
    shifts_px: np.ndarray,
    shape_yx: tuple[int, int],
    noise: float = 0.0,
) -> Store:
    """Store the phases of ``atoms`` (positions in Å, weights); ``noise`` is relative to the brightest pixel."""
    phase = SIGMA * VOLTS * phantom.images(*atoms, series.rotations, shifts_px, shape_yx)
    phase += noise * phase.max() * np.random.default_rng(7).normal(size=phase.shape)
    return phase_store(path, series, phase.astype(np.float32))


def phase_store(path: Path, series: TiltSeries, phase: np.ndarray, valid: np.ndarray | None = None) -> Store:
    """Store ``phase`` (tilt, y, x) in rad as the result ``projections``."""
    store = Store.create(path, "projected")
    angles = {
        f"{name}_deg": (("tilt",), np.degrees([getattr(pose, f"{name}_rad") for pose in series]))
        for name in ("theta", "phi", "psi")
    }
    dims = ("tilt", "y", "x")
    valid = np.ones(phase.shape, bool) if valid is None else valid
    attrs = {"pixel_angstrom": phantom.PIXEL_ANGSTROM, "sigma_rad_per_volt_angstrom": SIGMA}
    dataset = xr.Dataset({"phase": (dims, phase), "valid": (dims, valid), **angles}, attrs=attrs)
    store.write("projections", dataset, Provenance.start("projections", {}))
    return store
