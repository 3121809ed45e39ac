"""One tilt as the joint reconstruction sees it: the volume turned to the laboratory and cut into slices.

The volume holds phase per voxel, u = sigma V a in rad. A slice is the sum of ``voxels_per_slice`` planes of the turned
volume and stands at their mean z; every step is linear and comes with its adjoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stemtomo.algorithms.ptychography.phase import centred
from stemtomo.backend import Array, array_namespace, fft2, ifft2
from stemtomo.geometry import Pose
from stemtomo.physics import rotation
from stemtomo.physics.probe import shift_ramp
from stemtomo.physics.propagation import fresnel_propagator


@dataclass(frozen=True)
class Box:
    """The volume of the specimen on cubic voxels.

    Parameters
    ----------
    shape_zyx
        Voxels; the rotation centre is index n // 2 of each axis.
    voxel_angstrom
        Edge of a voxel, which is a pixel of the objects.
    """

    shape_zyx: tuple[int, int, int]
    voxel_angstrom: float

    def __repr__(self) -> str:
        z, y, x = (f"{count * self.voxel_angstrom:.1f}" for count in self.shape_zyx)
        return f"Box({z} x {y} x {x} Å (z, y, x), voxels of {self.voxel_angstrom:.4g} Å)"


@dataclass(frozen=True)
class View:
    """How one tilt sees the box.

    Parameters
    ----------
    pose
        Turn of the specimen; its shifts are in the scan positions.
    box
        Volume of the specimen.
    object_yx
        Pixels of the object that the scan reaches, centred like the box.
    voxels_per_slice
        Planes of the turned volume that make one slice.
    first, slices
        First plane of the first slice, and how many slices are kept: planes outside are empty.
    shift_px
        x and y in pixels: where the rotation centre is seen on the object.
    focus_angstrom
        What C1 of this tilt is larger by than the probe's.
    """

    pose: Pose
    box: Box
    object_yx: tuple[int, int]
    voxels_per_slice: int
    first: int
    slices: int
    shift_px: tuple[float, float] = (0.0, 0.0)
    focus_angstrom: float = 0.0

    @classmethod
    def whole(cls, pose: Pose, box: Box, object_yx: tuple[int, int], voxels_per_slice: int) -> View:
        """Return the view of all planes; the last slice may hold fewer."""
        depth = box.shape_zyx[0]
        return cls(pose, box, object_yx, voxels_per_slice, 0, -(-depth // voxels_per_slice))

    @property
    def slice_thickness_angstrom(self) -> float:
        """Distance between slices."""
        return self.voxels_per_slice * self.box.voxel_angstrom

    @property
    def first_slice_z_angstrom(self) -> float:
        """Laboratory z of the first slice."""
        middle = self.first + (self.voxels_per_slice - 1) / 2 - self.box.shape_zyx[0] // 2
        return middle * self.box.voxel_angstrom

    def within(self, support: np.ndarray) -> View:
        """Return the view of only those slices that ``support`` (z, y, x), bool, can fill."""
        turned = rotation.to_laboratory(support.astype(np.float32), self.pose)
        planes = np.flatnonzero(turned.max(axis=(1, 2)) > 0.5)
        if not planes.size:
            return self
        # Slices keep their places: only whole ones are dropped.
        begin = (planes[0] - self.first) // self.voxels_per_slice
        end = -(-(planes[-1] + 1 - self.first) // self.voxels_per_slice)
        return replace(self, first=self.first + int(begin) * self.voxels_per_slice, slices=int(end - begin))

    def propagators(self, window_yx: tuple[int, int], wavelength: float, dtype: np.dtype) -> tuple[np.ndarray, ...]:
        """Return H(k) of every gap between slices, one array that is named several times."""
        pixel = (self.box.voxel_angstrom, self.box.voxel_angstrom)
        gap = fresnel_propagator(window_yx, pixel, wavelength, self.slice_thickness_angstrom, dtype=dtype)
        return (gap,) * (self.slices - 1)


def slices_of(volume: Array, view: View) -> Array:
    """Return the phase of each slice, (slice, Y, X) in rad, of ``volume`` (z, y, x) in rad per voxel."""
    return slices_from(planes_of(rotation.to_laboratory(volume, view.pose), view), view)


def planes_of(laboratory: Array, view: View) -> Array:
    """Return the planes of the turned volume (z, y, x) that the slices of ``view`` are made of."""
    return laboratory[view.first : view.first + view.slices * view.voxels_per_slice]


def slices_from(planes: Array, view: View) -> Array:
    """Return the slices (slice, Y, X) that are sums of ``planes``, shifted, on the object's pixels."""
    xp = array_namespace(planes)
    summed = xp.zeros((view.slices, *planes.shape[1:]), dtype=planes.dtype)
    for offset in range(view.voxels_per_slice):
        part = planes[offset :: view.voxels_per_slice]
        summed[: len(part)] += part
    return centred(_shifted(summed, view.shift_px), view.object_yx)


def slices_adjoint(slices: Array, view: View) -> Array:
    """Adjoint of :func:`slices_of`: spread (slice, Y, X) over the planes and turn back, (z, y, x)."""
    xp = array_namespace(slices)
    depth, height, width = view.box.shape_zyx
    back = _shifted(centred(slices, (height, width)), (-view.shift_px[0], -view.shift_px[1]))
    spread = xp.repeat(back, view.voxels_per_slice, axis=0)
    laboratory = xp.zeros((depth, height, width), dtype=slices.dtype)
    planes = min(len(spread), depth - view.first)
    laboratory[view.first : view.first + planes] = spread[:planes]
    return rotation.to_sample(laboratory, view.pose)


def _shifted(slices: Array, shift_px: tuple[float, float]) -> Array:
    """Return slices (slice, y, x) moved by ``shift_px`` (x, y); unitary, so that the opposite shift is the adjoint."""
    if shift_px == (0.0, 0.0):
        return slices
    xp = array_namespace(slices)
    ramp = shift_ramp(xp.asarray([shift_px]), slices.shape[-2:], slices)[0]
    return xp.ascontiguousarray(ifft2(fft2(slices) * ramp).real).astype(slices.dtype)
