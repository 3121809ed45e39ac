"""Multislice: a probe through a stack of thin slices to the detector, and the exact adjoint.

psi_0 = probe; psi_{s+1} = F^-1 H F (t_s psi_s); the detector sees |F (t_{S-1} psi_{S-1})|². There is no propagation
behind the last slice: it would only turn phases on the detector. Gradients are Wirtinger gradients G = 2 dL/d conj(z).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stemtomo.backend import Array, array_namespace
from stemtomo.kernels import patches, slices
from stemtomo.kernels.fourier import Transfer, ifft2
from stemtomo.physics.propagation import propagate_adjoint


def forward(
    probes: Array, transmission: Array, corners: Array, propagators: Sequence[Array | Transfer]
) -> tuple[Array, list[Array]]:
    """Propagate ``probes`` through their windows of ``transmission`` to the detector.

    Parameters
    ----------
    probes
        Waves incident on the first slice, (position, y, x), complex.
    transmission
        exp(i sigma V) of each slice, (slice, Y, X), complex.
    corners
        Corner of each position's window, (position, 2), int64 rows and columns.
    propagators
        H(k) of each gap between slices, (ky, kx); one fewer than slices.

    Returns
    -------
    spectra
        Waves on the detector, (position, ky, kx), zero frequency first, orthonormal.
    incident
        The waves incident on each slice, for :func:`adjoint`.
    """
    incident, fits = [probes], slices.fused(probes, transmission[0], corners)
    for slice_transmission, propagator in zip(transmission[:-1], propagators, strict=True):
        incident.append(slices.transmit_convolve(incident[-1], slice_transmission, corners, propagator, fits))
    return slices.transmit_fft2(incident[-1], transmission[-1], corners, fits), incident


def adjoint(
    spectra_gradient: Array,
    incident: Sequence[Array],
    transmission: Array,
    corners: Array,
    propagators: Sequence[Array | Transfer],
    transmission_gradient: Array,
    on_gap: Callable[[int, Array, Array], None] | None = None,
) -> Array:
    """Carry a gradient on the detector back through the slices.

    Adds each slice's gradient into ``transmission_gradient`` (slice, Y, X) and returns the gradient of the probes
    (position, y, x). ``spectra_gradient`` (position, ky, kx) is consumed.

    ``on_gap(gap, gradient, waves)`` is called for every gap between slices, from the last to the first, with the
    gradient of the waves behind the gap and these waves, both (position, y, x), to read only: what a parameter of the
    propagator needs.
    """
    gradient = ifft2(spectra_gradient, overwrite=True)
    fits = slices.fused(gradient, transmission[0], corners)
    for index in range(len(transmission) - 1, 0, -1):
        at_slice = (incident[index], transmission[index], corners, transmission_gradient[index])
        if on_gap is None:
            gradient = slices.transmit_adjoint_convolve(gradient, *at_slice, propagators[index - 1], fits)
        else:
            patches.transmit_adjoint(gradient, *at_slice)
            on_gap(index - 1, gradient, incident[index])
            gradient = propagate_adjoint(gradient, propagators[index - 1])
    patches.transmit_adjoint(gradient, incident[0], transmission[0], corners, transmission_gradient[0])
    return gradient


def intensities(probes: Array, transmission: Array, corners: Array, propagators: Sequence[Array | Transfer]) -> Array:
    """Return the diffraction patterns (position, ky, kx) of ``probes``, zero frequency first, in electrons."""
    spectra, _ = forward(probes, transmission, corners, propagators)
    xp = array_namespace(spectra)
    return xp.square(spectra.real) + xp.square(spectra.imag)
