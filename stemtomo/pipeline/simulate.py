"""Simulated 4D-STEM tilt series of known atoms, written into a store as a detector would have filled it.

The generator is kept apart from the reconstruction: atoms are rotated, not voxels; the grid is finer and the slices
are thinner; atoms vibrate (frozen phonons: patterns are means over configurations); patterns are cropped to the
detector and drawn as Poisson counts. Frames go to the store shard by shard and are never all in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
from pydantic import Field

from stemtomo.distributed import Executor, PlanRow
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError, StoreError
from stemtomo.geometry import Detector, Optics, Pose, Scan, TiltSeries
from stemtomo.io.frames import shard_regions
from stemtomo.io.provenance import Provenance, fingerprint_of
from stemtomo.io.schema import SHARD_POSITIONS, tilt_name
from stemtomo.io.store import Store
from stemtomo.physics import multislice
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.potential import BAND_LIMIT, slice_potentials, transmission_functions
from stemtomo.physics.probe import probe_wave, reciprocal_grid, shifted_probes
from stemtomo.physics.propagation import fresnel_propagator
from stemtomo.pipeline.config import Count, Finite, NonNegative, Positive, Section
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.specimen import Specimen

_BATCH = 4  # positions propagated together: their waves stay in the processor's cache
_VACUUM_ANGSTROM = 4.0  # beside the specimen, so that no atom's potential wraps into the field
#: Processor seconds per slice, pattern and n² log2(n²) of its n² pixels, measured on one core.
_SECONDS_PER_STEP = 7e-10


class SimulationSettings(Section):
    """What is simulated: optics, scan, detector, tilts, dose and the accuracy of the generator."""

    energy_kev: Positive = Field(default=300.0, description="Beam energy in keV.")
    semiangle_mrad: Positive = Field(default=21.0, description="Convergence semiangle in mrad.")
    defocus_c1_angstrom: Finite = Field(default=200.0, description="C1 in Å, positive for overfocus.")
    defocus_plane_z_angstrom: Finite = Field(
        default=0.0, description="Laboratory z in Å of the plane that C1 refers to."
    )
    tilt_deg: tuple[Finite, ...] = Field(
        default=tuple(float(angle) for angle in range(-70, 71, 10)), description="Tilts about y in degrees."
    )
    scan_shape: tuple[Count, Count] = Field(default=(24, 24), description="Positions along y and x.")
    scan_step_angstrom: Positive = Field(default=1.6, description="Distance between neighbours in Å.")
    detector_px: int = Field(default=64, ge=8, description="Pixels of the square detector along an edge.")
    object_pixel_angstrom: Positive = Field(default=0.4, description="1 / (pixels times reciprocal pixel), in Å.")
    dose_per_square_angstrom: Positive = Field(default=2e5, description="Electrons per Å² of the whole series.")
    oversampling: float = Field(default=2.5, gt=1, description="Pixels of the generator per object pixel.")
    slice_thickness_angstrom: Positive = Field(default=1.6, description="Thickness of the generator's slices in Å.")
    phonon_configurations: Count = Field(default=2, description="Frozen-phonon configurations that a pattern averages.")
    phonon_rms_angstrom: NonNegative = Field(default=0.1, description="Thermal displacement in Å, rms in 3D.")
    seed: int = Field(default=1, ge=0, description="Seed of vibrations and counts.")

    @property
    def optics(self) -> Optics:
        """The probe-forming optics."""
        return Optics(
            energy_ev=self.energy_kev * 1e3,
            semiangle_rad=self.semiangle_mrad * 1e-3,
            aberrations={"C10": self.defocus_c1_angstrom},
            defocus_plane_z_angstrom=self.defocus_plane_z_angstrom,
        )

    @property
    def scan(self) -> Scan:
        """The raster of positions, the same at every tilt."""
        return Scan(self.scan_shape, (self.scan_step_angstrom, self.scan_step_angstrom))

    @property
    def detector(self) -> Detector:
        """The detector."""
        return Detector((self.detector_px, self.detector_px), 1 / (self.detector_px * self.object_pixel_angstrom))

    @property
    def tilts(self) -> TiltSeries:
        """The poses."""
        return TiltSeries.from_degrees(self.tilt_deg)

    @property
    def electrons_per_pattern(self) -> float:
        """Incident electrons of one pattern."""
        return self.dose_per_square_angstrom / len(self.tilt_deg) * self.scan_step_angstrom**2

    @property
    def dtype(self) -> np.dtype:
        """Type of the counts: the narrowest that no pattern can overflow."""
        return np.dtype(np.uint16 if self.electrons_per_pattern < 5e4 else np.uint32)

    @property
    def window_px(self) -> int:
        """Edge of the generator's window; it spans the same Å as the detector's, so reciprocal pixels are equal."""
        return round(self.detector_px * self.oversampling / 2) * 2

    @property
    def fine_pixel_angstrom(self) -> float:
        """Pixel of the generator's grid in Å."""
        return self.detector_px * self.object_pixel_angstrom / self.window_px


def simulate(
    path: str | Path,
    specimen: Specimen,
    settings: SimulationSettings | None = None,
    *,
    name: str = "simulated",
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Simulate a tilt series of ``specimen`` into the store at ``path``, made here or continued; one task per tilt.

    Parameters
    ----------
    path
        Store to make or to continue.
    specimen
        Atoms in sample coordinates. They are not written into the store.
    name
        Name of the series.

    Returns
    -------
    dict
        ``tilts``, ``patterns``, ``electrons_per_pattern``, ``atoms`` and ``simulated_tilts`` (the tilts of this call).

    Raises
    ------
    ConfigurationError
        If the specimen does not fit the settings.
    StoreError
        If the store holds another series.
    """
    settings = settings or SimulationSettings()
    progress = progress or Silent()
    provenance = Provenance.start("simulate", settings.model_dump(), {"specimen": _fingerprint(specimen)})
    store = Store.open(path, "r+") if Store.is_store(path) else Store.create(path, name)
    missing = _prepare(store, settings, provenance)
    workers = executor or default_executor()
    progress.start("simulate", len(missing), "tilt")
    for done, shards in workers.map_bounded(_simulate_tilt, missing, str(store.path), specimen, settings):
        store.record_frames(missing[done], range(shards))
        store.complete_tilt(missing[done], provenance.finish())
        progress.advance()
    if not store.is_complete("tilt", provenance.fingerprint):
        store.complete_tilts(provenance)
    progress.finish("simulate")
    return {
        "tilts": len(settings.tilt_deg),
        "patterns": len(settings.tilt_deg) * math.prod(settings.scan_shape),
        "electrons_per_pattern": settings.electrons_per_pattern,
        "atoms": len(specimen),
        "simulated_tilts": len(missing),
    }


def plan_simulate(specimen: Specimen, settings: SimulationSettings | None = None) -> PlanRow:
    """Return what :func:`simulate` would hold, write and take."""
    settings = settings or SimulationSettings()
    slices = math.ceil(2 * specimen.radius_angstrom / settings.slice_thickness_angstrom) + 1
    field, window = math.prod(_field_shape(specimen, settings)), settings.window_px**2
    patterns, configurations = math.prod(settings.scan_shape), settings.phonon_configurations
    pixels = settings.detector_px**2
    shard = math.prod(min(count, SHARD_POSITIONS) for count in settings.scan_shape) * pixels
    steps = len(settings.tilt_deg) * patterns * configurations * slices * window * math.log2(window)
    return PlanRow(
        stage="simulate",
        tasks=len(settings.tilt_deg),
        # Transmissions of all slices; waves of a batch before every slice; a shard as means, as drawn, as stored.
        bytes_per_task=configurations * slices * field * 8 + (slices + 4) * _BATCH * window * 8 + 20 * shard,
        bytes_written=len(settings.tilt_deg) * patterns * pixels * settings.dtype.itemsize,
        seconds=steps * _SECONDS_PER_STEP,
    )


@dataclass(frozen=True)
class _Column:
    """Everything one tilt's patterns are made of: a stack of slices per configuration, and what crosses it."""

    transmissions: tuple[np.ndarray, ...]
    propagators: tuple[np.ndarray, ...]
    probe: np.ndarray


def diffraction_patterns(
    specimen: Specimen, pose: Pose, positions: np.ndarray, settings: SimulationSettings, tilt: int = 0
) -> np.ndarray:
    """Return the mean patterns, (position, ky, kx), of probes at laboratory ``positions`` (position, 2; x, y; Å).

    The incident electrons sum to 1; the zero beam is at index n // 2 of both detector axes. ``tilt`` numbers the
    vibrations.
    """
    return _patterns(_column(specimen, pose, settings, tilt), positions, _field_shape(specimen, settings), settings)


def _prepare(store: Store, settings: SimulationSettings, provenance: Provenance) -> list[int]:
    """Declare the tilts, and return those that are not complete yet."""
    source = {"simulation": provenance.fingerprint}
    for index in range(store.tilt_count):
        begun = (store.path / "tilt" / tilt_name(index)).exists() and store.tilt_attrs(index).get("source")
        if begun and begun != source:
            raise StoreError(
                f"{store.path}: tilt {index} is of another series ({begun}); simulate into another store, or remove "
                "this one"
            )
    store.declare_tilts(len(settings.tilt_deg))
    shape = (*settings.scan_shape, settings.detector_px, settings.detector_px)
    missing = []
    for index, pose in enumerate(settings.tilts):
        if store.is_complete(f"tilt/{tilt_name(index)}", provenance.fingerprint):
            continue
        store.create_tilt(
            index, shape, settings.dtype, settings.optics, settings.scan, settings.detector, pose,
            source=source,
        )  # fmt: skip
        store.remove_leftovers(index)
        missing.append(index)
    return missing


def _simulate_tilt(index: int, path: str, specimen: Specimen, settings: SimulationSettings) -> int:
    """Write the counts of tilt ``index`` shard by shard; return the number of shards."""
    store = Store.open(path, "r+")
    field = _field_shape(specimen, settings)
    column = _column(specimen, settings.tilts[index], settings, index)
    positions = settings.scan.positions().reshape(*settings.scan_shape, 2)
    shards = 0
    for number, (y0, y1, x0, x1) in shard_regions(store.frames(index, require_complete=False)):
        region = positions[y0:y1, x0:x1]
        means = _patterns(column, region.reshape(-1, 2), field, settings) * settings.electrons_per_pattern
        counts = np.random.default_rng([settings.seed, 2, index, number]).poisson(means)
        block = counts.astype(settings.dtype).reshape(*region.shape[:2], *means.shape[1:])
        store.write_frames(index, y0, x0, block)
        shards += 1
    return shards


def _column(specimen: Specimen, pose: Pose, settings: SimulationSettings, tilt: int) -> _Column:
    """Return the slices of all configurations at one tilt, and the probe at the plane of the first."""
    atoms = pose.to_laboratory(specimen.positions)
    amplitude = settings.phonon_rms_angstrom / math.sqrt(3)
    margin = 6 * amplitude + 1e-3
    lowest, highest = atoms[:, 2].min() - margin, atoms[:, 2].max() + margin
    edges = np.linspace(lowest, highest, math.ceil((highest - lowest) / settings.slice_thickness_angstrom) + 1)
    pixel = (settings.fine_pixel_angstrom, settings.fine_pixel_angstrom)
    field = _field_shape(specimen, settings)
    transmissions = []
    for configuration in range(settings.phonon_configurations):
        rng = np.random.default_rng([settings.seed, 1, tilt, configuration])
        vibration = np.clip(rng.normal(0, 1, atoms.shape), -6, 6) * amplitude
        volts = slice_potentials(atoms + vibration, specimen.atomic_numbers, field, pixel, edges)
        transmissions.append(transmission_functions(volts, settings.optics.energy_ev))
    # Every slice acts at its middle; the probe starts there, and so do the steps between slices.
    thickness = edges[1] - edges[0]
    window = (settings.window_px, settings.window_px)
    probe = probe_wave(settings.optics, window, pixel, plane_z_angstrom=float(edges[0] + thickness / 2))
    step = fresnel_propagator(window, pixel, wavelength_angstrom(settings.optics.energy_ev), float(thickness))
    ky, kx = reciprocal_grid(window, pixel)
    step = step * (np.hypot(ky, kx) <= BAND_LIMIT / 2 / settings.fine_pixel_angstrom)
    return _Column(tuple(transmissions), (step.astype(np.complex64),) * (len(edges) - 2), probe)


def _patterns(
    column: _Column, positions: np.ndarray, field: tuple[int, int], settings: SimulationSettings
) -> np.ndarray:
    """Return the mean patterns (position, ky, kx) over the configurations, cropped to the detector."""
    window, detector = settings.window_px, settings.detector_px
    centres = positions / settings.fine_pixel_angstrom  # columns x, y
    nearest = np.rint(centres).astype(np.int64)
    rest = centres - nearest
    corners = nearest[:, ::-1] + np.array(field) // 2 - window // 2
    first = window // 2 - detector // 2
    out = np.empty((len(positions), detector, detector), dtype=np.float32)
    for start in range(0, len(positions), _BATCH):
        batch = slice(start, start + _BATCH)
        probes = _probes_at(column.probe, rest[batch])
        total: np.ndarray | float = 0.0
        for transmission in column.transmissions:
            total = total + multislice.intensities(probes, transmission, corners[batch], column.propagators)
        mean = np.fft.fftshift(np.asarray(total) / len(column.transmissions), axes=(-2, -1))
        out[batch] = mean[:, first : first + detector, first : first + detector]
    return out


def _probes_at(probe: np.ndarray, rest_px: np.ndarray) -> np.ndarray:
    """Return the probe shifted by the fractions of a pixel ``rest_px`` (position, 2; x, y)."""
    if np.abs(rest_px).max() < 1e-6:
        return np.repeat(probe[None], len(rest_px), axis=0)
    return shifted_probes(probe, rest_px)


def _field_shape(specimen: Specimen, settings: SimulationSettings) -> tuple[int, int]:
    """Return the grid (y, x) that holds every probe's window and, at any tilt, every atom; quick to transform."""
    reach = np.abs(settings.scan.positions()).max(axis=0)[::-1] + settings.window_px * settings.fine_pixel_angstrom / 2
    reach = np.maximum(reach, specimen.radius_angstrom + _VACUUM_ANGSTROM)
    counts: Sequence[int] = [
        scipy.fft.next_fast_len(math.ceil(2 * r / settings.fine_pixel_angstrom) + 2) for r in reach
    ]
    if max(counts) > 16384:
        raise ConfigurationError(
            f"the specimen ({2 * specimen.radius_angstrom:.0f} Å) and the scan need a grid of {max(counts)} pixels of "
            f"{settings.fine_pixel_angstrom:.3f} Å; lower oversampling or the scan's extent"
        )
    return (counts[0], counts[1])


def _fingerprint(specimen: Specimen) -> str:
    return fingerprint_of({"positions": np.round(specimen.positions, 6), "numbers": specimen.atomic_numbers})
