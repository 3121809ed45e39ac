"""How strongly patterns tell each frequency of a weak phase, and steps that make up for it.

A phase of a low frequency changes patterns little: where the disc overlaps with both of its displaced images these
cancel, unless defocus turns them. Plain gradients therefore leave low frequencies behind by some ten sweeps, and
positivity makes a haze of what they lack.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from stemtomo.backend import Array, irfft2, rfft2, to_device_of, to_host

#: Part of the brightest pixel of the probe's spectrum above which a pixel is in the disc.
_IN_DISC = 0.1


def phase_transfer(probe: np.ndarray, reach: int) -> np.ndarray:
    """Return what patterns tell of a weak phase of each frequency, over what one displaced disc alone would.

    The phase e cos(2 pi q.r) changes the moduli |psi(k)| behind it, in the mean square over all positions, by e²/8
    times |conj(n(k)) psi(k - q) - n(k) conj(psi(k + q))|² with n = psi / |psi|, summed over the disc. Outside of it the
    phase of a wave is as good as random, and half of what falls there counts. The sum is given over that of |psi|².

    Parameters
    ----------
    probe
        (mode, y, x), the wave in the plane of the phase.
    reach
        Largest frequency asked for, in steps of the window.

    Returns
    -------
    numpy.ndarray
        (2 reach + 1, 2 reach + 1), frequencies from -reach to reach along y and x; zero in the middle.
    """
    spectra = np.fft.fft2(probe, norm="ortho")
    modulus = np.abs(spectra)
    disc = modulus > _IN_DISC * modulus.max()
    turn = np.where(disc, spectra / np.maximum(modulus, 1e-30), 0).conj()
    # The square is that of both discs less twice what they have in common, which is only looked for in the disc.
    squared = turn**2
    wide = np.pad(spectra, ((0, 0), (reach, reach), (reach, reach)), mode="wrap")
    (height, width), common = spectra.shape[1:], np.zeros((2 * reach + 1, 2 * reach + 1))
    for y, x in np.ndindex(reach + 1, 2 * reach + 1):
        ahead = wide[:, reach - y : reach - y + height, 2 * reach - x : 2 * reach - x + width]
        behind = wide[:, reach + y : reach + y + height, x : x + width]
        common[reach + y, x] = common[reach - y, 2 * reach - x] = np.vdot(squared.conj(), ahead * behind).real
    return np.maximum(2 - 2 * common / (modulus**2).sum(), 0)


def frequency_gain(probe: Array, shape_yx: tuple[int, int], most: float, reach: int = 12) -> np.ndarray:
    """Return by how much the steps of every frequency of slices of ``shape_yx`` grow, at most ``most``.

    One over :func:`phase_transfer` where that is below one, up to ``reach`` steps of the window; (ky, kx), as of rfft2.
    """
    host = to_host(probe)
    reach = min(reach, min(host.shape[-2:]) // 4)
    told = phase_transfer(host, reach)
    ky = np.fft.fftfreq(shape_yx[0])[:, None] * host.shape[-2]
    kx = np.fft.rfftfreq(shape_yx[1])[None, :] * host.shape[-1]
    places = np.stack(np.broadcast_arrays(ky + reach, kx + reach))
    here = ndimage.map_coordinates(told, places, order=1, mode="constant", cval=1.0)
    return 1 / np.clip(here, 1 / most, 1.0)


def amplified(direction: Array, gain: np.ndarray) -> Array:
    """Return ``direction`` (slice, Y, X) with each frequency times its ``gain`` (ky, kx); its own adjoint."""
    spectrum = rfft2(direction) * to_device_of(gain.astype(direction.dtype, copy=False), direction)
    return irfft2(spectrum, direction.shape[-2:]).astype(direction.dtype, copy=False)
