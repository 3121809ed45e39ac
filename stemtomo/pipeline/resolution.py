"""The verb ``resolution``: how fine the detail of a volume is along every axis, and how far two halves agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import xarray as xr

from stemtomo.algorithms.imaging.resolution import (
    Correlation,
    Spectrum,
    axis_spectra,
    corrected,
    randomised_correlation,
    shell_correlation,
    soft_edge,
)
from stemtomo.algorithms.tomography.wedge import missing_wedge
from stemtomo.distributed import Executor
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError
from stemtomo.io.provenance import Provenance
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.io.volume_files import read_volume
from stemtomo.pipeline.alignment import series_of
from stemtomo.pipeline.config import ResolutionSettings
from stemtomo.pipeline.progress import Progress, Silent

GROUP = "resolution"
_AXES = ("z", "y", "x")
#: Phases are randomised from where the curve falls below this.
_RANDOMISE_BELOW = 0.8
#: Softness of a mask of the specimen, in Å.
_MASK_BLUR_ANGSTROM = 2.0


def resolution(
    volume: Store | str | Path,
    other: str | Path | None = None,
    settings: ResolutionSettings | None = None,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Say the resolution of a volume along every axis, what its missing wedge is, and how far two halves agree.

    Parameters
    ----------
    volume
        A store with a volume, opened with mode ``"r+"``, whose result is written to ``resolution``; or a file with one
        (``.mrc``, ``.npy``), for which nothing is written.
    other
        A second volume, from the other half of the data: the two are correlated, their mean is looked at. Without it,
        ``settings.halves`` says what the halves of a store are, if any.
    settings
        See :class:`~stemtomo.pipeline.config.ResolutionSettings`.

    Returns
    -------
    dict
        ``axes``: per axis ``resolution_angstrom`` of the last significant spectral peak (``None`` without a peak),
        ``frequency_inv_angstrom``, ``step_inv_angstrom`` and the number of ``peaks``; ``wedge``: see
        :func:`~stemtomo.algorithms.tomography.wedge.missing_wedge`; ``fsc``: frequencies in 1/Å and resolutions in Å at
        ``0.143``, ``0.5``, ``half_bit`` and ``one_bit`` (``None``: beyond Nyquist), ``directional`` the same along x,
        y, z; ``frc``: the same per tilt; ``halves``, ``voxel_angstrom``.

    Raises
    ------
    StoreError
        If the store has no volume, or what the halves need.
    FormatError, ConfigurationError
        If a file is no volume, or two volumes are not on one grid.
    """
    settings = settings or ResolutionSettings()
    progress = progress or Silent()
    path = volume.path if isinstance(volume, Store) else Path(volume)
    if other is not None or not Store.is_store(path):
        return _of_files(path, other, settings, progress)
    store = Store.of(volume)
    executor = executor or default_executor()
    names = ["volume", "projections", "alignment", *(f"ptychography/{tilt_name(i)}" for i in range(store.tilt_count))]
    inputs = {name: store.fingerprint(name) for name in names}
    provenance = Provenance.start(GROUP, settings.model_dump(), inputs)
    progress.start(GROUP, 1, "volume")
    if not store.is_complete(GROUP, provenance.fingerprint):
        store.write(GROUP, _of_store(store, settings, executor, progress), provenance)
    progress.advance()
    progress.finish(GROUP)
    return dict(store.read(GROUP).attrs["numbers"])


#: Heading of :func:`table_rows`.
HEAD = ("resolution (Å)", "z", "y", "x", "all")
_CRITERIA = {"0.143": "FSC = 0.143", "0.5": "FSC = 0.5", "half_bit": "FSC, half bit", "one_bit": "FSC, one bit"}


def table_rows(numbers: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return ``numbers`` of :func:`resolution` as rows under :data:`HEAD`; ``<`` where a curve reaches Nyquist."""
    rows: list[tuple[str, ...]] = []
    if "axes" in numbers:
        peaks = (numbers["axes"][axis]["resolution_angstrom"] for axis in _AXES)
        rows.append(("last spectral peak", *("-" if peak is None else f"{peak:.2f}" for peak in peaks), "-"))
    if "fsc" in numbers:
        finest = 1 / numbers["fsc"]["nyquist_inv_angstrom"]
        curves = [*(numbers["fsc"]["directional"][axis] for axis in _AXES), numbers["fsc"]]
        for key, label in _CRITERIA.items():
            rows.append((label, *(_said(curve["resolution_angstrom"][key], finest) for curve in curves)))
    for key, label in _CRITERIA.items():
        limits = [curve["resolution_angstrom"][key] for curve in numbers.get("frc", {}).values()]
        if limits:
            known = [limit for limit in limits if limit is not None]
            middle = f"{float(np.median(known)):.2f}" if len(known) > len(limits) / 2 else "beyond Nyquist"
            name = f"half scans, {label.replace('FSC', 'FRC')}, {len(limits)} tilts"
            rows.append((name, "-", "-", "-", middle))
    return rows


def wedge_text(numbers: dict[str, Any]) -> str:
    """Return one sentence on the missing wedge; empty without poses."""
    wedge = numbers.get("wedge")
    if wedge is None:
        return ""
    direction = ", ".join(f"{value:.2f}" for value in wedge["worst_direction_xyz"])
    text = (
        f"Missing wedge: {wedge['measured_fraction']:.0%} of all directions measured; the nearest plane is"
        f" {wedge['missing_half_angle_deg']:.1f}° away along (x, y, z) = ({direction})"
    )
    if wedge["elongation"] is not None:
        text += f", a point is {wedge['elongation']:.2f} times as long along the beam"
    return f"{text}; steps of {wedge['spacing_deg']:.2f}° resolve {wedge['crowther_angstrom']:.2f} Å across the field."


def _said(limit: float | None, finest: float) -> str:
    return f"< {finest:.2f}" if limit is None else f"{limit:.2f}"


def _of_files(path: Path, other: str | Path | None, settings: ResolutionSettings, progress: Progress) -> dict[str, Any]:
    progress.start(GROUP, 1, "volume")
    volumes = [read_volume(each, settings.voxel_angstrom) for each in (path, other) if each is not None]
    shapes, voxels = {volume.shape for volume, _ in volumes}, [voxel for _, voxel in volumes]
    if len(shapes) > 1 or max(voxels) - min(voxels) > 1e-3 * voxels[0]:
        raise ConfigurationError(
            f"{path} and {other} are not on one grid: shapes {sorted(shapes)}, voxels {voxels} Å; resample one of them"
        )
    if other is None and settings.halves != "none":
        raise ConfigurationError(f"{path}: halves are made from a store; for two files give both")
    halves = tuple(volume for volume, _ in volumes) if other is not None else ()
    whole = (volumes[0][0] + volumes[1][0]) / 2 if halves else volumes[0][0]
    progress.advance()
    progress.finish(GROUP)
    return _measured(whole, halves, voxels[0], settings).attrs["numbers"]


def _of_store(store: Store, settings: ResolutionSettings, executor: Executor, progress: Progress) -> xr.Dataset:
    from stemtomo.pipeline import halves

    frc = xr.Dataset(attrs={"numbers": {}})
    pair: tuple[np.ndarray, ...] = ()
    if settings.halves == "positions":
        tilts = list(range(store.tilt_count)) if settings.tilts is None else list(settings.tilts)
        if not tilts or not all(0 <= tilt < store.tilt_count for tilt in tilts):
            raise ConfigurationError(f"tilts = {tilts}: the store has the tilts 0 to {store.tilt_count - 1}")
        halves.half_scans(store, tilts, executor, progress)
        frc = _ring_correlations(store, tilts, settings)
        if settings.tilts is None and store.fingerprint("volume"):
            pair = halves.position_volumes(store, executor, progress)
        elif not store.fingerprint("volume"):
            return frc
    result = store.read("volume")
    if settings.halves == "tilts":
        pair = halves.tilt_volumes(store, executor, progress)
    voxel = float(result.attrs["voxel_angstrom"])
    found = _measured(result["potential"].values, pair, voxel, settings)
    numbers = {**found.attrs["numbers"], **frc.attrs["numbers"], "halves": settings.halves}
    if store.fingerprint("projections"):
        diameter = float(result.sizes["x"]) * voxel
        numbers["wedge"] = missing_wedge(series_of(store.read("projections")).rotations, diameter)
    return xr.merge([found.drop_attrs(deep=False), frc.drop_attrs(deep=False)]).assign_attrs(numbers=numbers)


def _measured(
    whole: np.ndarray, halves: tuple[np.ndarray, ...], voxel: float, settings: ResolutionSettings
) -> xr.Dataset:
    """Return curves and numbers of a volume and, if there are, its two halves."""
    spectra = axis_spectra(whole, voxel, settings.significance, halves, settings.taper_fraction)
    variables: dict[str, Any] = {}
    for name, spectrum in zip(_AXES, spectra, strict=True):
        dims = (f"frequency_{name}",)
        variables[f"frequency_{name}"] = (dims, spectrum.frequency, {"units": "1/Å"})
        variables[f"amplitude_{name}"] = (dims, spectrum.amplitude, {"units": "1", "long_name": "spectral amplitude"})
        variables[f"background_{name}"] = (dims, spectrum.background, {"units": "1"})
    numbers: dict[str, Any] = {
        "axes": {name: _axis_numbers(spectrum) for name, spectrum in zip(_AXES, spectra, strict=True)},
        "voxel_angstrom": voxel,
        "peaks_in_both_halves": bool(halves),
    }
    if halves:
        numbers["fsc"] = _shells(halves[0], halves[1], voxel, settings, variables)
    return xr.Dataset(variables, attrs={"numbers": numbers})


def _axis_numbers(spectrum: Spectrum) -> dict[str, Any]:
    last = spectrum.resolution_angstrom
    return {
        "resolution_angstrom": last,
        "frequency_inv_angstrom": None if last is None else 1 / last,
        "step_inv_angstrom": float(spectrum.frequency[1]),
        "peaks": int(spectrum.peaks.size),
    }


def _shells(
    first: np.ndarray, second: np.ndarray, voxel: float, settings: ResolutionSettings, variables: dict[str, Any]
) -> dict[str, Any]:
    """Add the shell correlations of two volumes to ``variables`` and return their limits."""
    mask = soft_edge(first.shape, settings.taper_fraction)
    if settings.mask == "specimen":
        mask = mask * _specimen(first + second, voxel)
    curve = shell_correlation(first, second, voxel, mask)
    beyond = curve.limit(_RANDOMISE_BELOW) or float(curve.frequency[1])
    chance = randomised_correlation(first, second, voxel, mask, beyond)
    true = corrected(curve, chance, beyond)
    directional = {
        name: shell_correlation(first, second, voxel, mask, np.eye(3)[axis], np.radians(settings.cone_deg))
        for axis, name in enumerate(_AXES)
    }
    said = {"units": "1"}
    variables["fsc_frequency"] = (("shell",), curve.frequency, {"units": "1/Å"})
    variables["fsc"] = (("shell",), curve.value, {**said, "long_name": "correlation of the half volumes"})
    variables["fsc_randomised"] = (("shell",), chance.value, {**said, "long_name": "the same with random phases"})
    variables["fsc_corrected"] = (("shell",), true.value, {**said, "long_name": "without what the mask makes"})
    variables["fsc_half_bit"] = (("shell",), curve.bits(0.5), said)
    variables["fsc_one_bit"] = (("shell",), curve.bits(1.0), said)
    for name, cone in directional.items():
        variables[f"fsc_{name}"] = (("shell",), cone.value, {**said, "long_name": f"in a cone along {name}"})
    return {
        **_limits(true),
        "directional": {name: _limits(cone) for name, cone in directional.items()},
        "nyquist_inv_angstrom": 0.5 / voxel,
        "randomised_beyond_inv_angstrom": beyond,
        "mask": settings.mask,
    }


def _limits(curve: Correlation) -> dict[str, Any]:
    """Return frequency and resolution where a curve ends, by every criterion; ``None`` where it reaches Nyquist."""
    found = {
        "0.143": curve.limit(0.143),
        "0.5": curve.limit(0.5),
        "half_bit": curve.limit(curve.bits(0.5)),
        "one_bit": curve.limit(curve.bits(1.0)),
    }
    return {
        "frequency_inv_angstrom": found,
        "resolution_angstrom": {name: None if not limit else 1 / limit for name, limit in found.items()},
    }


def _specimen(volume: np.ndarray, voxel: float) -> np.ndarray:
    """Return a soft mask of where ``volume`` is, from its blurred self."""
    blur = _MASK_BLUR_ANGSTROM / voxel
    smooth = scipy.ndimage.gaussian_filter(volume, blur)
    inside = smooth > 0.25 * np.quantile(smooth, 0.99)
    if not inside.any():
        raise ConfigurationError("mask = 'specimen': nothing stands out of the volume; use mask = 'edges'")
    grown = scipy.ndimage.gaussian_filter(inside.astype(np.float32), blur)
    return np.asarray(np.clip(4 * grown, 0, 1))


def _ring_correlations(store: Store, tilts: list[int], settings: ResolutionSettings) -> xr.Dataset:
    """Return the ring correlation of the two half scans of ``tilts``."""
    from stemtomo.pipeline.projections import half_phases

    curves = []
    for tilt in tilts:
        first, second, valid, pixel = half_phases(store, tilt)
        weight = scipy.ndimage.gaussian_filter(valid.astype(np.float32), 2.0) * valid
        mask = soft_edge(valid.shape, settings.taper_fraction) * weight
        curves.append(shell_correlation(first, second, pixel, mask))
    numbers = {"frc": {str(tilt): _limits(curve) for tilt, curve in zip(tilts, curves, strict=True)}}
    said = {"units": "1"}
    ring = ("ring",)
    return xr.Dataset(
        {
            "frc_tilt": (("half_tilt",), np.array(tilts), said),
            "frc_frequency": (ring, curves[0].frequency, {"units": "1/Å"}),
            "frc": (("half_tilt", *ring), np.stack([curve.value for curve in curves]), said),
            "frc_half_bit": (ring, curves[0].bits(0.5), said),
            "frc_one_bit": (ring, curves[0].bits(1.0), said),
        },
        attrs={"numbers": numbers},
    )
