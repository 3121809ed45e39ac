"""Turning a volume by Fourier shears: unitary, so that its inverse is its adjoint, and exact for band-limited volumes.

A turn about an axis is a whole number of quarter turns (a permutation of voxels) and three shears
(tan, sin, tan; Unser et al., IEEE Trans. Image Process. 4, 1371 (1995)); a shear shifts every line by its own amount,
a phase in the Fourier space of that line. The volume is periodic: what leaves at one face comes back at the opposite
one, so the specimen should lie within the sphere inscribed in the box.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from stemtomo.backend import Array, array_namespace, fft1, fftfreq, ifft1
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Pose

Axis = Literal["x", "y", "z"]

# The two coordinates that a right-handed turn about each axis mixes, and the one it leaves, as axes of (z, y, x).
_PLANES: dict[Axis, tuple[int, int, int]] = {"x": (1, 0, 2), "y": (0, 2, 1), "z": (2, 1, 0)}


def to_laboratory(volume: Array, pose: Pose) -> Array:
    """Return the volume (z, y, x) as it stands in the laboratory at ``pose``: a feature at r is moved to R^T r.

    Shifts of the pose are not applied. Norms are kept, and :func:`to_sample` is both inverse and adjoint.

    Raises
    ------
    ConfigurationError
        If the volume's lengths differ along two axes that the pose mixes.
    """
    for axis, angle in (("z", pose.phi_rad), ("y", pose.theta_rad), ("x", pose.psi_rad)):
        volume = turn(volume, axis, -angle)  # type: ignore[arg-type]
    return volume


def to_sample(volume: Array, pose: Pose) -> Array:
    """Return the inverse, and adjoint, of :func:`to_laboratory`: a feature at q is moved to R q."""
    for axis, angle in (("x", pose.psi_rad), ("y", pose.theta_rad), ("z", pose.phi_rad)):
        volume = turn(volume, axis, angle)  # type: ignore[arg-type]
    return volume


def turn(volume: Array, axis: Axis, angle_rad: float) -> Array:
    """Turn the content of ``volume`` (z, y, x), real or complex, about ``axis`` (right-handed) and index n // 2.

    Raises
    ------
    ConfigurationError
        If the volume's lengths differ along the two axes that the turn mixes.
    """
    if angle_rad == 0:
        return volume
    first, second, rest = _PLANES[axis]
    if volume.shape[first] != volume.shape[second]:
        raise ConfigurationError(
            f"a volume of shape {tuple(volume.shape)} (z, y, x) cannot be turned about {axis}: "
            f"axes {'zyx'[first]} and {'zyx'[second]} must be equally long; pad the shorter one"
        )
    quarters = round(angle_rad / (math.pi / 2))
    rest_rad = angle_rad - quarters * math.pi / 2
    # The two steps do not commute on the grid: the opposite turn takes them in the opposite order, as an inverse must.
    if angle_rad < 0:
        return _quarter_turns(_small_turn(volume, first, second, rest, rest_rad), first, second, quarters % 4)
    return _small_turn(_quarter_turns(volume, first, second, quarters % 4), first, second, rest, rest_rad)


def _small_turn(volume: Array, first: int, second: int, rest: int, angle_rad: float) -> Array:
    if angle_rad == 0:
        return volume
    packed = _packed(volume, rest)
    half = math.tan(angle_rad / 2)
    # Content moves by the angle where values are read at minus the angle.
    for along, across, amount in ((first, second, half), (second, first, -math.sin(angle_rad)), (first, second, half)):
        packed = _shear(packed, along, across, amount)
    return _unpacked(packed, volume, rest)


def _quarter_turns(volume: Array, first: int, second: int, count: int) -> Array:
    """Turn by ``count`` right angles from axis ``first`` towards ``second``, about index n // 2, periodically."""
    xp = array_namespace(volume)
    for _ in range(count):
        # New coordinates: (a, b) -> (-b, a); the value at (a, b) is read at (b, -a).
        flipped = xp.flip(xp.swapaxes(volume, first, second), axis=first)
        volume = xp.roll(flipped, 1 - volume.shape[first] % 2, axis=first)
    return xp.ascontiguousarray(volume)


def _shear(packed: Array, along: int, across: int, amount: float) -> Array:
    """Return values read at coordinate ``along`` + ``amount`` times coordinate ``across``."""
    xp = array_namespace(packed)
    length = packed.shape[along]
    frequency = fftfreq(length, 1.0, packed)
    if length % 2 == 0:
        frequency[length // 2] = 0  # the Nyquist frequency has no sign: leaving it alone keeps real volumes real
    offset = amount * (xp.arange(packed.shape[across]) - packed.shape[across] // 2)
    shape_along = [length if i == along else 1 for i in range(3)]
    shape_across = [packed.shape[across] if i == across else 1 for i in range(3)]
    phase = xp.exp(2j * np.pi * frequency.reshape(shape_along) * offset.reshape(shape_across)).astype(packed.dtype)
    spectrum = fft1(packed, along)
    spectrum *= phase
    return ifft1(spectrum, along)


def _packed(volume: Array, rest: int) -> Array:
    """Put neighbouring planes across ``rest`` of a real volume into the real and imaginary parts of one plane."""
    xp = array_namespace(volume)
    if xp.iscomplexobj(volume):
        return volume
    planes = xp.moveaxis(volume, rest, 0)
    dtype = np.result_type(volume.dtype, np.complex64)
    packed = xp.zeros(((len(planes) + 1) // 2, *planes.shape[1:]), dtype)
    packed.real = planes[::2]
    packed.imag[: len(planes) // 2] = planes[1::2]
    return xp.moveaxis(packed, 0, rest)


def _unpacked(packed: Array, volume: Array, rest: int) -> Array:
    xp = array_namespace(packed)
    if xp.iscomplexobj(volume):
        return packed
    out = xp.empty_like(volume)
    planes, source = xp.moveaxis(out, rest, 0), xp.moveaxis(packed, rest, 0)
    planes[::2] = source.real
    planes[1::2] = source.imag[: len(planes) // 2]
    return out
