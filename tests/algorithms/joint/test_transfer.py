"""What patterns tell of each frequency of a phase, against patterns; and steps that make up for it."""

import numpy as np
import pytest

from stemtomo.algorithms.joint.transfer import amplified, frequency_gain, phase_transfer
from stemtomo.geometry import Optics
from stemtomo.physics.probe import probe_wave

PIXEL = (0.4, 0.4)


def probe(c10, edge=32):
    optics = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": c10})
    return probe_wave(optics, (edge, edge), PIXEL, intensity=100.0, dtype=np.complex128)[None]


@pytest.mark.parametrize("frequency", [(0, 1), (1, 0), (2, -1), (0, 4)])
def test_the_transfer_is_how_much_moduli_change(frequency):
    # A wave that has no dark pixels, so that every change is linear in the phase.
    rng = np.random.default_rng(0)
    spectrum = (1 + 0.5 * rng.random((16, 16))) * np.exp(2j * np.pi * rng.random((16, 16)))
    wave, small = np.fft.ifft2(spectrum, norm="ortho"), 1e-5
    y, x = np.indices((16, 16))
    changes = []
    for start in np.arange(8) / 8:
        phase = small * np.cos(2 * np.pi * ((frequency[0] * y + frequency[1] * x) / 16 + start))
        moduli = [np.abs(np.fft.fft2(wave * np.exp(1j * sign * phase), norm="ortho")) for sign in (1, -1)]
        changes.append(((moduli[0] - moduli[1]) ** 2).sum() / 4)
    told = phase_transfer(wave[None], 4)[4 + frequency[0], 4 + frequency[1]]
    assert 8 * np.mean(changes) / small**2 / (np.abs(spectrum) ** 2).sum() == pytest.approx(told, rel=1e-6)


def test_no_pattern_tells_a_constant_and_low_frequencies_only_in_proportion():
    told = phase_transfer(probe(0.0, 64), 8)[8, 8:]
    assert told[0] == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(told[2:6] / np.arange(2, 6), told[2] / 2, rtol=0.1)


def test_steps_grow_where_little_is_told_and_nowhere_else():
    gain = frequency_gain(probe(200.0), (48, 40), 8.0)
    assert gain.shape == (48, 21)
    assert gain[0, 0] == gain.max() == 8
    assert gain.min() == 1
    assert (gain[16:32] == 1).all()


def test_the_gain_is_symmetric_and_positive():
    gain = frequency_gain(probe(200.0), (24, 20), 8.0)
    a, b = np.random.default_rng(1).normal(size=(2, 3, 24, 20))
    assert np.vdot(amplified(a, gain), b) == pytest.approx(np.vdot(a, amplified(b, gain)), rel=1e-12)
    assert np.vdot(a, amplified(a, gain)) > np.vdot(a, a)
