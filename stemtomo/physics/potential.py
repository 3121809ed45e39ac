"""Electrostatic potentials of atoms: electron scattering factors and the projected potentials of thin slices.

The parametrisation is that of I. Lobato and D. Van Dyck, Acta Cryst. A70, 636 (2014), for neutral atoms to Z = 103;
its coefficients are in ``data/lobato_van_dyck_2014.csv``. Atoms are placed in Fourier space: positions are exact to
any fraction of a pixel, and the band limit is part of the sum rather than a filter behind it.
"""

from __future__ import annotations

import csv
import functools
import math
from importlib import resources

import numpy as np
from scipy import constants

from stemtomo.backend import Array, array_namespace, fftfreq, ifft2, to_host
from stemtomo.errors import ConfigurationError
from stemtomo.physics.electron import interaction_parameter

#: h² / (2 pi m0 e) in V Å²: the Fourier transform of a potential is this times the scattering factor in Å.
VOLT_ANGSTROM_SQUARED = constants.h**2 / (2 * math.pi * constants.m_e * constants.e) * 1e20

#: Frequencies beyond this fraction of Nyquist would fold back when a wave is multiplied by a transmission function.
BAND_LIMIT = 2 / 3


@functools.cache
def _table() -> tuple[dict[int, np.ndarray], dict[str, int]]:
    """Return the coefficients (2, 5) by atomic number, and the atomic number by symbol."""
    text = resources.files("stemtomo.physics").joinpath("data/lobato_van_dyck_2014.csv").read_text(encoding="ascii")
    coefficients, numbers = {}, {}
    for row in csv.DictReader(line for line in text.splitlines() if not line.startswith("#")):
        number = int(row["number"])
        coefficients[number] = np.array([[float(row[f"{name}{i}"]) for i in range(1, 6)] for name in "ab"])
        numbers[row["symbol"]] = number
    return coefficients, numbers


def atomic_number(symbol: str) -> int:
    """Return the atomic number of a chemical ``symbol`` ("Au" is 79).

    Raises
    ------
    ConfigurationError
        For a symbol that is not an element up to Z = 103.
    """
    numbers = _table()[1]
    if symbol not in numbers:
        raise ConfigurationError(
            f"{symbol!r} is not a chemical symbol up to Z = {max(numbers.values())}; write it as 'Au'"
        )
    return numbers[symbol]


def chemical_symbol(number: int) -> str:
    """Return the chemical symbol of an atomic ``number`` (79 is "Au").

    Raises
    ------
    ConfigurationError
        For a number outside 1 to 103.
    """
    for symbol, known in _table()[1].items():
        if known == number:
            return symbol
    raise ConfigurationError(f"atomic number {number} is outside 1 to {max(_table()[0])}")


def scattering_factor(number: int, k: Array) -> Array:
    """Return the electron scattering factor f_e(k) in Å of the neutral atom of atomic ``number``; ``k`` in 1/Å.

    f_e = sum_i a_i (2 + b_i k²) / (1 + b_i k²)² (Lobato and Van Dyck 2014), first Born approximation, without the
    relativistic mass. ``k`` is |k| = 2 sin(theta) / lambda, not s = k / 2.

    Raises
    ------
    ConfigurationError
        If the table holds no such element.
    """
    coefficients = _table()[0].get(int(number))
    if coefficients is None:
        raise ConfigurationError(f"no scattering factor for atomic number {number}; allowed: 1 to {max(_table()[0])}")
    squared = k * k
    total = 0.0 * squared
    for a, b in coefficients.T.tolist():
        total = total + a * (2 + b * squared) / (1 + b * squared) ** 2
    return total


def projected_potential_spectrum(number: int, k: Array, rms_displacement_angstrom: float = 0.0) -> Array:
    """Return the Fourier transform of the potential of one atom projected along the beam, in V Å³; ``k`` in 1/Å.

    ``rms_displacement_angstrom`` is the thermal amplitude along one axis (Debye-Waller factor); 0 is an atom at rest.
    """
    xp = array_namespace(k)
    damping = xp.exp(-2 * math.pi**2 * rms_displacement_angstrom**2 * k * k)
    return VOLT_ANGSTROM_SQUARED * scattering_factor(number, k) * damping


def slice_potentials(
    positions: Array,
    atomic_numbers: np.ndarray,
    shape_yx: tuple[int, int],
    pixel_angstrom_yx: tuple[float, float],
    slice_edges_angstrom: np.ndarray,
    *,
    rms_displacement_angstrom: float = 0.0,
    band_limit: float = BAND_LIMIT,
    dtype: np.dtype | type = np.float32,
) -> Array:
    """Return the projected potential of each slice, (slice, y, x), in V Å, on a periodic grid.

    Every atom goes whole into the slice that holds its centre. Cost: one FFT per slice, and atoms x pixels
    multiply-adds in matrix products.

    Parameters
    ----------
    positions
        Laboratory positions (n, 3), columns x, y, z in Å. x = y = 0 is pixel n // 2; x and y wrap at the grid's edges.
    atomic_numbers
        Atomic number of each atom, (n,).
    shape_yx, pixel_angstrom_yx
        The grid.
    slice_edges_angstrom
        Rising z of the slices' faces, (slices + 1,); slice s holds edges[s] <= z < edges[s + 1].
    rms_displacement_angstrom
        Thermal amplitude along one axis, for mean potentials; 0 for atoms at rest or displaced one by one.
    band_limit
        Largest |k| as a fraction of Nyquist.

    Raises
    ------
    ConfigurationError
        If an atom lies outside the slices, or an element is unknown.
    """
    xp = array_namespace(positions)
    numbers = np.asarray(atomic_numbers)
    members = _slice_members(positions[:, 2], slice_edges_angstrom)
    ky = fftfreq(shape_yx[0], pixel_angstrom_yx[0], positions)[:, None]
    kx = fftfreq(shape_yx[1], pixel_angstrom_yx[1], positions)[None, :]
    k = xp.sqrt(ky**2 + kx**2)
    inside = k <= band_limit / 2 / max(pixel_angstrom_yx)
    # The orthonormal FFT of a sampled function is its Fourier integral over (pixel area * sqrt(pixels)).
    scale = 1 / (pixel_angstrom_yx[0] * pixel_angstrom_yx[1] * math.sqrt(shape_yx[0] * shape_yx[1]))
    spectra = {
        int(z): xp.where(inside, scale * projected_potential_spectrum(int(z), k, rms_displacement_angstrom), 0)
        for z in np.unique(numbers)
    }
    spectra = {z: spectrum.astype(dtype) for z, spectrum in spectra.items()}
    xy = positions[:, :2] + xp.asarray(
        [n // 2 * p for n, p in zip(shape_yx[::-1], pixel_angstrom_yx[::-1], strict=True)]
    )
    out = xp.zeros((len(members), *shape_yx), dtype=dtype)
    for index, indices in enumerate(members):
        if len(indices):
            of_species = {int(z): xp.asarray(indices[numbers[indices] == z]) for z in np.unique(numbers[indices])}
            total = sum(spectra[z] * _structure_factor(xy[chosen], ky, kx, dtype) for z, chosen in of_species.items())
            out[index] = ifft2(total, overwrite=True).real
    return out


def _structure_factor(xy: Array, ky: Array, kx: Array, dtype: np.dtype | type) -> Array:
    """Return sum_j exp(-2 pi i k.r_j) of the points ``xy`` (n, 2), columns x, y, on the grid of ``ky`` and ``kx``."""
    xp = array_namespace(xy)
    complex_dtype = np.result_type(dtype, np.complex64)
    # Phases in double: a position of 1000 Å at 2 1/Å would lose 1e-3 rad in single precision.
    along_y = xp.exp(-2j * math.pi * ky * xy[None, :, 1]).astype(complex_dtype)
    along_x = xp.exp(-2j * math.pi * kx * xy[:, 0, None]).astype(complex_dtype)
    return along_y @ along_x


def transmission_functions(potentials: Array, energy_ev: float) -> Array:
    """Return exp(i sigma V) of projected ``potentials`` (slice, y, x) in V Å, complex of the same precision."""
    xp = array_namespace(potentials)
    phase = potentials.dtype.type(interaction_parameter(energy_ev)) * potentials
    return xp.cos(phase) + np.result_type(potentials.dtype, np.complex64).type(1j) * xp.sin(phase)


def _slice_members(z: Array, edges: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the atoms of each slice."""
    heights = to_host(z)
    index = np.searchsorted(np.asarray(edges), heights, side="right") - 1
    slices = len(edges) - 1
    outside = int(np.count_nonzero((index < 0) | (index >= slices)))
    if outside:
        raise ConfigurationError(
            f"{outside} of {len(heights)} atoms lie outside the slices: "
            f"z = {heights.min():.2f} to {heights.max():.2f} Å, slices {edges[0]:.2f} to {edges[-1]:.2f} Å; "
            "widen the edges"
        )
    order = np.argsort(index, kind="stable")
    return np.split(order, np.searchsorted(index[order], np.arange(1, slices)))
