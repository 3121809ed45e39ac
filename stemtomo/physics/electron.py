"""Relativistic electrons: wavelength and interaction parameter, from the CODATA constants of SciPy."""

from __future__ import annotations

import math

from scipy import constants

from stemtomo.errors import ConfigurationError

_REST_ENERGY_EV = constants.m_e * constants.c**2 / constants.e
_HC_EV_ANGSTROM = constants.h * constants.c / constants.e * 1e10


def _check_energy(energy_ev: float) -> None:
    if not (math.isfinite(energy_ev) and energy_ev > 0):
        raise ConfigurationError(f"beam energy is {energy_ev!r} eV; allowed: a positive number (300 kV is 300e3)")


def wavelength_angstrom(energy_ev: float) -> float:
    """Relativistic electron wavelength in Å: h / sqrt(2 m e E (1 + e E / 2 m c²)).

    Raises
    ------
    ConfigurationError
        If the energy is not positive and finite.
    """
    _check_energy(energy_ev)
    return _HC_EV_ANGSTROM / math.sqrt(energy_ev * (2 * _REST_ENERGY_EV + energy_ev))


def interaction_parameter(energy_ev: float) -> float:
    """Interaction parameter sigma in rad / (V Å): phase = sigma * projected potential.

    sigma = 2 pi m e lambda / h², with the relativistic mass (Kirkland 2010, eq. 5.6).

    Raises
    ------
    ConfigurationError
        If the energy is not positive and finite.
    """
    wavelength = wavelength_angstrom(energy_ev)
    return 2 * math.pi / (wavelength * energy_ev) * (_REST_ENERGY_EV + energy_ev) / (2 * _REST_ENERGY_EV + energy_ev)
