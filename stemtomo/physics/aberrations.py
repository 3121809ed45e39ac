"""The aberration function of the probe-forming lens."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from stemtomo.backend import Array, array_namespace
from stemtomo.errors import ConfigurationError

_COEFFICIENT = re.compile(r"C([1-5])([0-6])")


def aberration_phase(kx: Array, ky: Array, wavelength: float, aberrations: Mapping[str, float]) -> Array:
    """Return chi(k) in rad on the broadcast grid of ``kx`` and ``ky`` (1/Å).

    chi = 2 pi / lambda * sum_nm 1/(n+1) C_nm alpha^(n+1) cos(m (phi - phi_nm)), alpha = lambda |k| (Krivanek's
    notation; Kirkland 2010, ch. 2). The probe's spectrum is A(k) exp(-i chi). C10 > 0 is overfocus.

    Parameters
    ----------
    aberrations
        ``C10``, ``C12``, ``C21``, ``C30`` ... in Å with azimuths ``phi12``, ``phi21`` ... in rad.

    Raises
    ------
    ConfigurationError
        For a name that is not an aberration coefficient, or an azimuth without its coefficient.
    """
    xp = array_namespace(kx, ky)
    _check_names(aberrations)
    alpha = wavelength * xp.sqrt(kx**2 + ky**2)
    azimuth = xp.arctan2(ky, kx)
    chi = xp.zeros(alpha.shape, dtype=alpha.dtype)
    for name, coefficient in aberrations.items():
        match = _COEFFICIENT.fullmatch(name)
        if match is None or coefficient == 0:
            continue
        n, m = int(match[1]), int(match[2])
        term = coefficient * alpha ** (n + 1) / (n + 1)
        if m:
            term = term * xp.cos(m * (azimuth - aberrations.get(f"phi{n}{m}", 0.0)))
        chi += term
    return 2 * math.pi / wavelength * chi


def _check_names(aberrations: Mapping[str, float]) -> None:
    for name in aberrations:
        coefficient = "C" + name.removeprefix("phi")
        known = _COEFFICIENT.fullmatch(coefficient if name.startswith("phi") else name)
        # C_nm exists for m <= n + 1 with n + m odd: C10 C12 C21 C23 C30 C32 C34 ...
        allowed = known is not None and int(known[2]) <= int(known[1]) + 1 and (int(known[1]) + int(known[2])) % 2 == 1
        if not allowed:
            raise ConfigurationError(
                f"aberration {name!r} is unknown; allowed: C10, C12, C21, C23, C30 ... (Å) and phi12, phi21 ... (rad)"
            )
        if name.startswith("phi") and coefficient not in aberrations:
            raise ConfigurationError(f"azimuth {name!r} is given without its coefficient {coefficient!r}")
