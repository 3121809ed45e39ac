"""What joint tomography lays out before it starts: the box, and how every tilt sees it and is cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from stemtomo.algorithms.joint.solver import LEAST_VACUUM, without_level
from stemtomo.algorithms.joint.view import Box, View, slices_of
from stemtomo.algorithms.ptychography.windows import ObjectGrid, tile
from stemtomo.backend import Array
from stemtomo.distributed.windows import Window
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector, Optics, Pose, Scan
from stemtomo.io.store import Store
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.pipeline.ptychography import grid_of
from stemtomo.pipeline.settings.joint import JointSettings

#: Patterns times pixels times slices of one part: seconds of work for a core.
_PIXEL_SLICES_PER_PART = 4_000_000_000
#: Slices in a depth of field, unless the thickness of a slice is given.
_SLICES_PER_DEPTH_OF_FIELD = 10
#: A ray misses the support where it crosses less than this many voxels of it.
_RAY_VOXELS = 0.5


@dataclass(frozen=True)
class Tilt:
    """One tilt of a store: its views, its positions in tiles, and where the counts are."""

    path: str
    number: int
    single: View
    view: View
    grid: ObjectGrid
    detector_yx: tuple[int, int]
    recorded: np.ndarray
    tiles: tuple[np.ndarray, ...]
    optics: Optics

    @property
    def pixels(self) -> int:
        """Pixels of all its patterns."""
        return len(self.recorded) * math.prod(self.detector_yx)

    @property
    def windows(self) -> list[Window]:
        """Part of the object that each tile sees."""
        return [self.local(where)[1] for where in self.tiles]

    def local(self, where: np.ndarray) -> tuple[ObjectGrid, Window]:
        """Return the grid of the positions ``where``, and its window of the object."""
        if self.grid.periodic or len(self.tiles) == 1:
            grid = replace(self.grid, corners=self.grid.corners[where], shifts_px=self.grid.shifts_px[where])
            return grid, ((0, self.grid.shape_yx[0]), (0, self.grid.shape_yx[1]))
        return tile(self.grid, where)


def tilts_of(store: Store, settings: JointSettings) -> list[Tilt]:
    """Return every tilt of ``store``, from its metadata alone.

    Raises
    ------
    ConfigurationError
        If pixels of the objects are not square, or differ between tilts: voxels are cubes.
    """
    box = box_of(store, settings)
    found = []
    for number in range(store.tilt_count):
        detector, optics = store.detector(number), store.optics(number)
        grid = joint_grid(store.scan(number), detector, settings)
        recorded = np.flatnonzero(store.valid(number))
        grid = replace(grid, corners=grid.corners[recorded], shifts_px=grid.shifts_px[recorded])
        pose = store.pose(number)
        per_slice = voxels_per_slice(settings, box, optics)
        single = View.whole(pose, box, grid.shape_yx, box.shape_zyx[0])
        view = single if settings.single_slice else View.whole(pose, box, grid.shape_yx, per_slice)
        cuts = tile_cuts(len(recorded), grid, view.slices, settings)
        found.append(Tilt(str(store.path), number, single, view, grid, detector.shape_yx, recorded, cuts, optics))
    return found


def tile_cuts(count: int, grid: ObjectGrid, slices: int, settings: JointSettings) -> tuple[np.ndarray, ...]:
    """Return the positions of every tile of a tilt of ``count`` patterns, runs of the rows of its scan."""
    work = count * math.prod(grid.window_yx) * slices
    tiles = settings.tiles or max(1, work // _PIXEL_SLICES_PER_PART)
    return tuple(part for part in np.array_split(np.arange(count), tiles) if part.size)


def joint_grid(scan: Scan, detector: Detector, settings: JointSettings) -> ObjectGrid:
    """Return the object grid of a tilt: windows are larger than the detector by the padding, and pixels smaller."""
    return grid_of(scan, detector, settings.detector_padding)


def box_of(store: Store, settings: JointSettings) -> Box:
    """Return the box of the specimen in ``store``, see :func:`box_for`; pixels must be alike at every tilt."""
    pixels = np.array([store.detector(i).object_pixel_angstrom_yx for i in range(store.tilt_count)])
    if np.ptp(pixels) > 1e-6 * pixels.max():
        raise ConfigurationError(
            f"{store.path}: object pixels are {pixels.min():.5g} to {pixels.max():.5g} Å; joint tomography needs the"
            " same square pixel at every tilt: crop the patterns to a square with one reciprocal pixel"
        )
    poses = [store.pose(i) for i in range(store.tilt_count)]
    grid = joint_grid(store.scan(0), store.detector(0), settings)
    return box_for(store.scan(0), float(np.mean(grid.pixel_angstrom_yx)), poses, settings)


def box_for(scan: Scan, voxel_angstrom: float, poses: Sequence[Pose], settings: JointSettings) -> Box:
    """Return the box of the specimen: as wide as the scanned field, and as deep as it is wide along x."""
    extent_y, extent_x = scan.extent_angstrom_yx
    width = _even(settings.extent_angstrom or extent_x, voxel_angstrom)
    height = _even(extent_y, voxel_angstrom)
    if settings.refine_angles or any(pose.phi_rad or pose.psi_rad for pose in poses):
        width = height = max(width, height)  # turns about x and z mix y with the other axes
    return Box((width, height, width), voxel_angstrom)


def voxels_per_slice(settings: JointSettings, box: Box, optics: Optics) -> int:
    """Return how many planes of voxels make a slice."""
    wanted = settings.slice_thickness_angstrom
    if wanted is None:
        depth_of_field = wavelength_angstrom(optics.energy_ev) / optics.semiangle_rad**2
        wanted = depth_of_field / _SLICES_PER_DEPTH_OF_FIELD
    return min(max(1, round(wanted / box.voxel_angstrom)), box.shape_zyx[0])


def first_probe(tilt: Tilt, electrons: float, settings: JointSettings) -> np.ndarray:
    """Return the probe (1, y, x) of the metadata in the plane of the rotation centre: a single mode."""
    pixel = tilt.view.box.voxel_angstrom
    dtype = np.complex64 if settings.precision == "single" else np.complex128
    probe = probe_wave(
        tilt.optics,
        tilt.grid.window_yx,
        (pixel, pixel),
        plane_z_angstrom=0.0,
        intensity=electrons,
        soft_edge=settings.soft_edge,
        dtype=dtype,
    )
    return probe[None]


def _even(extent_angstrom: float, voxel_angstrom: float) -> int:
    return 2 * max(1, math.ceil(round(extent_angstrom / voxel_angstrom / 2, 6)))


def missed_rays(volume: dict[str, Any], view: View) -> Array | None:
    """Return where rays of ``view``, of one slice, miss the support, (Y, X) bool; ``None`` without a support."""
    if volume["support"] is None:
        return None
    return slices_of(volume["support"].astype(volume["coefficients"].dtype), view)[0] < _RAY_VOXELS


def levelled(visit: dict[str, Any], empty: Array | None, wanted: bool | Literal["auto"]) -> dict[str, Any]:
    """Return ``visit`` with slices without the phase of their vacuum, and how much of that there is."""
    if wanted is False:
        return {**visit, "vacuum": 0.0}
    slices, share = without_level(visit["slices"], visit["light"], empty)
    if wanted is True and share < LEAST_VACUUM:
        slices, share = without_level(visit["slices"], visit["light"])
    return {**visit, "slices": slices, "vacuum": share if share >= LEAST_VACUUM else 0.0}
