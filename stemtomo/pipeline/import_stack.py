"""The verb ``import_stack``: a tilt stack of another program becomes the projections of a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stemtomo.algorithms.imaging.scan_distortion import (
    averaged,
    corrected,
    drift_of,
    matrix_of_drift,
    matrix_of_lattice,
)
from stemtomo.algorithms.ptychography.phase import vacuum_background
from stemtomo.algorithms.tomography.diagnosis import require_sound
from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.io.provenance import Provenance, file_digest
from stemtomo.io.stacks import angles_beside, read_angles, read_stack
from stemtomo.io.store import Store
from stemtomo.physics.electron import interaction_parameter
from stemtomo.pipeline.config import StackSettings

GROUP = "projections"


def import_stack(
    path: str | Path,
    store: Store | str | Path,
    settings: StackSettings | None = None,
    *,
    angles: str | Path | None = None,
) -> dict[str, Any]:
    """Make a store at ``store`` whose projections are the images of the stack ``path``; ``align`` goes on from there.

    Parameters
    ----------
    path
        See :func:`stemtomo.io.stacks.read_stack`; of repeated frames (tilt, frame, y, x) the mean is taken after their
        drift was taken out.
    angles
        Text file with theta, or theta, phi and psi, of every image in degrees; that of the name of the stack
        (``.rawtlt``, ``.tlt``, ``.txt``, ``.csv``) if not given.

    Returns
    -------
    dict
        ``store``, ``tilts``, ``shape_yx``, ``pixel_angstrom``, ``theta_deg``: smallest and largest, ``valid_fraction``,
        ``drift_px_per_frame``: (x, y) of every tilt, where its frames were repeated.

    Raises
    ------
    FormatError
        If a file is not what it should be, or an image cannot be used.
    ConfigurationError
        If nothing says the pixel, or there are no angles.
    """
    settings, path = settings or StackSettings(), Path(path)
    images, said = read_stack(path, settings.array, repeats=True)
    pixel = settings.pixel_angstrom or said
    if pixel is None:
        raise ConfigurationError(f"{path}: does not say its pixel; give pixel_angstrom (--pixel-angstrom)")
    tilts = _angles(path, angles)
    valid = np.isfinite(images) if settings.nan_as_missing else np.ones(images.shape, bool)
    whole = (len(images), -1, images.shape[-1])
    require_sound(images.reshape(whole), valid.reshape(whole), tilts)
    images, valid, drifts = _straightened(images, valid, settings)
    images = np.where(valid, settings.scale * images, 0).astype(np.float32)
    if settings.axis == "x":
        images, valid = (np.ascontiguousarray(stack.transpose(0, 2, 1)) for stack in (images, valid))
    if settings.background != "none":
        pairs = zip(images, valid, strict=True)
        images = np.stack([image - vacuum_background(image, mask, settings.background) * mask for image, mask in pairs])
    dataset = _dataset(images, valid, np.add(tilts, (0.0, settings.axis_deg, 0.0)), pixel, settings)
    store = _opened(store, path.stem)
    told = {**settings.model_dump(), "angles_deg": tilts.tolist(), "file": path.name}
    store.write(GROUP, dataset, Provenance.start("import_stack", told, {"stack": file_digest(path)}))
    return {
        "store": str(store.path),
        "tilts": len(images),
        "shape_yx": list(images.shape[1:]),
        "pixel_angstrom": pixel,
        "theta_deg": [float(tilts[:, 0].min()), float(tilts[:, 0].max())],
        "valid_fraction": float(valid.mean()),
        "drift_px_per_frame": drifts,
    }


def scan_distortion(path: str | Path, spots: Sequence[str | Sequence[float]] | None = None) -> dict[str, Any]:
    """Return the linear distortion of the scan of an image, or of repeated frames of one place.

    Parameters
    ----------
    path
        Image (y, x) or frames (frame, y, x), see :func:`stemtomo.io.stacks.read_stack`.
    spots
        Frequencies (x, y) in cycles per px, or ``"x,y"``, that a lattice in the (mean) image should have; the drift
        between frames decides if there are none.

    Returns
    -------
    dict
        ``scan_matrix`` (xx, xy, yx, yy) for :func:`import_stack`; ``drift_px_per_frame`` (x, y) or ``None``.

    Raises
    ------
    CalibrationError
        If there is one frame and no lattice, or a spot is not there.
    """
    frames, _ = read_stack(path, single=True)
    require_sound(frames, np.ones(frames.shape, bool))
    if spots:
        try:
            known = [[float(k) for k in (spot.split(",") if isinstance(spot, str) else spot)] for spot in spots]
        except ValueError:
            raise ConfigurationError(
                f"spots {list(spots)!r}: give two numbers each, cycles per px along x and y"
            ) from None
        matrix = matrix_of_lattice(frames.mean(axis=0), np.array(known))
        return {"scan_matrix": matrix.ravel().tolist(), "drift_px_per_frame": None}
    drift = drift_of(frames).per_frame_px
    return {
        "scan_matrix": matrix_of_drift(drift, frames.shape[1]).ravel().tolist(),
        "drift_px_per_frame": drift.tolist(),
    }


def _straightened(
    images: np.ndarray, valid: np.ndarray, settings: StackSettings
) -> tuple[np.ndarray, np.ndarray, list[list[float]] | None]:
    """Return one image (y, x) per tilt, without drift and distortion, where it is known, and the drifts."""
    drifts = None
    if images.ndim == 4:
        means = [averaged(frames, mask) for frames, mask in zip(images, valid, strict=True)]
        images, valid = np.stack([each.image for each in means]), np.stack([each.known for each in means])
        drifts = [each.drift.per_frame_px.tolist() for each in means]
    if settings.scan_matrix is not None:
        matrix = np.reshape(settings.scan_matrix, (2, 2))
        straight = [corrected(image, mask, matrix) for image, mask in zip(images, valid, strict=True)]
        images, valid = np.stack([pair[0] for pair in straight]), np.stack([pair[1] for pair in straight])
    return images, valid, drifts


def _angles(path: Path, angles: str | Path | None) -> np.ndarray:
    """Return theta, phi, psi (tilt, 3) in degrees."""
    file = Path(angles) if angles is not None else angles_beside(path)
    if file is None:
        raise ConfigurationError(f"{path}: has no angles beside it (.rawtlt, .tlt, .txt, .csv); give --angles FILE")
    found = read_angles(file)
    return np.stack([found, 0 * found, 0 * found], axis=1) if found.ndim == 1 else found


def _dataset(
    images: np.ndarray, valid: np.ndarray, tilts: np.ndarray, pixel: float, settings: StackSettings
) -> xr.Dataset:
    dims = ("tilt", "y", "x")
    angles = {f"{name}_deg": (("tilt",), tilts[:, k]) for k, name in enumerate(("theta", "phi", "psi"))}
    energy = settings.energy_kev
    # Intensities have no relation to volts: the volume is then intensity per Å.
    sigma = 1.0 if energy is None else float(interaction_parameter(energy * 1e3))
    attrs: dict[str, Any] = {"pixel_angstrom": pixel, "sigma_rad_per_volt_angstrom": sigma, "periodic": False}
    attrs["quantity"] = "intensity" if energy is None else "phase"
    if energy is not None:
        attrs["energy_kev"] = energy
    return xr.Dataset({"phase": (dims, images), "valid": (dims, valid), **angles}, attrs=attrs)


def _opened(store: Store | str | Path, name: str) -> Store:
    if not isinstance(store, Store):
        if not Store.is_store(store):
            return Store.create(store, name)
        store = Store.open(store, "r+")
    if store.tilt_count:
        raise FormatError(f"{store.path}: is a store with frames, whose projections come from them; give a new path")
    return store
