"""The filters of projected phases: which noise, which filter, what is kept beside; used by the stage projections."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stemtomo.algorithms.imaging.denoising import BM3D_LICENCE, bm3d_installed, denoise_bm3d, denoise_lowrank
from stemtomo.algorithms.imaging.noise_spectrum import NoiseSpectrum, noise_of_halves, noise_of_region, white_noise
from stemtomo.algorithms.imaging.sparsity import fourier_sparse
from stemtomo.algorithms.ptychography.phase import vacuum
from stemtomo.errors import ConfigurationError
from stemtomo.pipeline.config import ProjectionSettings

#: Radius around a peak in units of one over the size of the specimen.
_PEAK_RADIUS = 1.5


class Halves(NamedTuple):
    """Two phases of one tilt, (y, x) in rad, flattened like the whole one, and where both were observed."""

    first: np.ndarray
    second: np.ndarray
    valid: np.ndarray


class Filtered(NamedTuple):
    """Filtered phase (y, x) in rad, and numbers on what was done."""

    phase: np.ndarray
    noise_rad: float
    noise_source: str
    removed_rad: float
    kept_fraction: float
    protected_fraction: float


def resolved(settings: ProjectionSettings) -> ProjectionSettings:
    """Return ``settings`` with the filter that ``auto`` stands for here, so that a result says what made it.

    Raises
    ------
    ConfigurationError
        If BM3D is asked for and not installed.
    """
    if settings.denoise == "auto":
        return settings.model_copy(update={"denoise": "bm3d" if bm3d_installed() else "lowrank"})
    if settings.denoise == "bm3d" and not bm3d_installed():
        denoise_bm3d(np.zeros((1, 1)), white_noise(np.zeros((2, 2))))
    return settings


def wanted(settings: ProjectionSettings) -> bool:
    """Whether ``settings`` ask for any filter."""
    return settings.denoise != "none" or settings.fourier_sparsity > 0


def notes(settings: ProjectionSettings) -> list[str]:
    """Return what a user must be told about the filters that were used."""
    said = [BM3D_LICENCE] if settings.denoise == "bm3d" else []
    if wanted(settings):
        said.append("Filters can make a lattice out of noise: compare with phase_raw before a defect is believed.")
    return said


def filtered(
    flat: np.ndarray, valid: np.ndarray, pixel_angstrom: float, settings: ProjectionSettings, halves: Halves | None
) -> Filtered:
    """Return ``flat`` (y, x) in rad after the filters of ``settings``.

    Raises
    ------
    ConfigurationError
        If the noise is to be learnt from what is not there, or the image is too small.
    """
    empty = vacuum(flat, valid)
    noise = _noise(flat, valid, empty, settings, halves)
    image = flat
    if settings.denoise in ("lowrank", "bm3d"):
        image = (denoise_bm3d if settings.denoise == "bm3d" else denoise_lowrank)(flat, noise)
    kept, protected = 1.0, 0.0
    if settings.fourier_sparsity > 0:
        sparse = fourier_sparse(
            flat,
            noise,
            threshold=settings.fourier_sparsity,
            keep_below=settings.sparsity_keep_inv_angstrom * pixel_angstrom,
            radius=_radius(valid & ~empty, pixel_angstrom, settings),
            column_width_px=settings.column_width_angstrom / pixel_angstrom,
            protect_above=settings.protect_above_sigma,
            valid=valid,
            cleaned=image,
        )
        image, kept, protected = sparse.image, float(sparse.kept.mean()), float(sparse.protected[valid].mean())
    result = np.where(valid, image, 0).astype(np.float32)
    return Filtered(result, noise.sigma, noise.source, float((flat - result)[valid].std()), kept, protected)


def _noise(
    flat: np.ndarray, valid: np.ndarray, empty: np.ndarray, settings: ProjectionSettings, halves: Halves | None
) -> NoiseSpectrum:
    kind = settings.noise
    if kind in ("auto", "vacuum"):
        found = noise_of_region(flat, empty)
        if found is not None:
            return found
        if kind == "vacuum":
            raise ConfigurationError(
                "projections.noise = 'vacuum': too little vacuum is in view to learn the noise from; use 'halves'"
                " (after stemtomo resolution --halves positions) or 'white'"
            )
    if halves is not None and kind in ("auto", "halves"):
        return noise_of_halves(halves.first, halves.second, halves.valid)
    if kind == "halves":
        raise ConfigurationError(
            "projections.noise = 'halves': no half scans of every tilt are in the store; make them with"
            " stemtomo resolution --halves positions, or use 'vacuum' or 'white'"
        )
    return white_noise(flat, valid)


def _radius(specimen: np.ndarray, pixel_angstrom: float, settings: ProjectionSettings) -> float:
    """Return the radius around peaks in cycles per pixel."""
    if settings.sparsity_radius_inv_angstrom is not None:
        return settings.sparsity_radius_inv_angstrom * pixel_angstrom
    return _PEAK_RADIUS / max(2 * float(np.sqrt(np.count_nonzero(specimen) / np.pi)), 1.0)


def numbers(found: list[Filtered]) -> dict[str, Any]:
    """Return what the filters of all tilts did, for the caller and the report."""
    return {
        "noise_rad": [item.noise_rad for item in found],
        "noise_source": [item.noise_source for item in found],
        "removed_rad": [item.removed_rad for item in found],
        "kept_fraction": [item.kept_fraction for item in found],
        "protected_fraction": [item.protected_fraction for item in found],
    }
