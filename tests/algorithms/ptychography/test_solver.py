from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.noise import expected_loss
from stemtomo.algorithms.ptychography.windows import object_grid, spread_batches
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator

DETECTOR = Detector((32, 32), 1 / 12.8)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 120.0})
PIXEL = DETECTOR.object_pixel_angstrom_yx


def atoms_phase(grid, count=14, seed=0):
    """Band-limited bumps of about half a radian, away from the border."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(grid.shape_yx)
    phase = np.zeros(grid.shape_yx)
    for centre in rng.uniform(0.35, 0.65, size=(count, 2)) * np.array(grid.shape_yx):
        phase += 0.5 * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * 1.3**2))
    return phase


def experiment(slices=1, kind="phase", step=1.2, dtype=np.complex64, electrons=2e4, loss="anscombe", size=12):
    scan = Scan((size, size), (step, step))
    grid = object_grid(scan.positions(), DETECTOR.shape_yx, PIXEL)
    propagator = fresnel_propagator(DETECTOR.shape_yx, PIXEL, wavelength_angstrom(300e3), 30.0, dtype=dtype)
    model = solver.Model(grid, (propagator,) * (slices - 1), loss, kind)
    probe = probe_wave(OPTICS, DETECTOR.shape_yx, PIXEL, intensity=electrons, dtype=dtype)
    start = solver.State.start(model, probe)
    truth = np.stack([atoms_phase(grid, seed=s) for s in range(slices)]).astype(start.phase.dtype)
    state = solver.State(truth, probe[None])
    expected = solver.patterns(state, model, np.arange(scan.count))
    return model, start, truth, expected


@pytest.mark.parametrize("kind", ["phase", "complex"])
@pytest.mark.parametrize("slices", [1, 3])
def test_the_object_gradient_agrees_with_finite_differences(slices, kind):
    model, _, truth, expected = experiment(slices, kind, step=1.13, dtype=np.complex128, size=4)
    rng = np.random.default_rng(0)
    counts = rng.poisson(expected).astype(np.float64)
    everything = np.arange(len(counts))
    noise = rng.normal(size=truth.shape) + 1j * rng.normal(size=truth.shape)
    phase = 0.8 * truth + 0.05 * (noise if kind == "complex" else noise.real)
    probe = probe_wave(OPTICS, DETECTOR.shape_yx, PIXEL, intensity=1.8e4, dtype=np.complex128)

    def sums(p, w):
        return solver.gradients(solver.State(p, w[None]), model, counts, everything)

    at = sums(phase, probe)
    direction = rng.normal(size=phase.shape) + 1j * rng.normal(size=phase.shape)
    direction = direction if kind == "complex" else direction.real
    step = 1e-6
    numeric = (sums(phase + step * direction, probe).loss - sums(phase - step * direction, probe).loss) / (2 * step)
    assert numeric == pytest.approx(np.vdot(at.phase, direction).real, rel=1e-6)
    turn = rng.normal(size=probe.shape) + 1j * rng.normal(size=probe.shape)
    numeric = (sums(phase, probe + step * turn).loss - sums(phase, probe - step * turn).loss) / (2 * step)
    assert numeric == pytest.approx(np.vdot(at.probe[0], turn).real, rel=1e-6)


def test_gradients_of_batches_add_up_to_the_gradient_of_all():
    model, start, _, expected = experiment(2, dtype=np.complex128)
    counts = np.random.default_rng(1).poisson(expected)
    whole = solver.gradients(start, model, counts, np.arange(len(counts)))
    pieces = [solver.gradients(start, model, counts, batch) for batch in spread_batches(len(counts), 5, 0)]
    np.testing.assert_allclose(sum(p.phase for p in pieces), whole.phase, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(sum(p.illumination for p in pieces), whole.illumination, rtol=1e-12)
    assert sum(p.loss for p in pieces) == pytest.approx(whole.loss, rel=1e-12)


def recover(model, start, counts, epochs=30, probe_start=99):
    rules, batches = zip(*solver.steps(epochs, solver.Nesterov(), 8, 10), strict=True)
    return solver.solve(start, model, counts, rules=rules, batches=batches, probe_start=probe_start)


def correlation(a, b, mask):
    return float(np.corrcoef(a[mask], b[mask])[0, 1])


def scanned(model):
    mask = np.zeros(model.grid.shape_yx, bool)
    mask[model.grid.corners[:, 0].min() + 16 : model.grid.corners[:, 0].max() + 16,
         model.grid.corners[:, 1].min() + 16 : model.grid.corners[:, 1].max() + 16] = True  # fmt: skip
    return mask


def test_noise_free_patterns_give_the_phase_back():
    model, start, truth, expected = experiment(electrons=1e6)
    state, losses = recover(model, start, expected)
    assert correlation(state.phase[0], truth[0], scanned(model)) > 0.99
    assert losses[-1] < 0.02 * losses[0]


def test_counted_patterns_give_the_phase_at_the_noise_floor():
    model, start, truth, expected = experiment()
    counts = np.random.default_rng(0).poisson(expected).astype(np.uint16)
    state, losses = recover(model, start, counts)
    pixels = np.prod(DETECTOR.shape_yx)
    assert correlation(state.phase[0], truth[0], scanned(model)) > 0.95
    # The fit follows some of the noise, so it ends a little below what the truth itself leaves.
    assert 0.85 < losses[-1] / pixels / expected_loss(expected, "anscombe") < 1.05


def test_a_wrong_sign_of_defocus_or_a_transposed_scan_ends_clearly_worse():
    model, start, _, expected = experiment()
    counts = np.random.default_rng(0).poisson(expected)
    _, right = recover(model, start, counts)
    flipped = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": -120.0})
    probe = probe_wave(flipped, DETECTOR.shape_yx, PIXEL, intensity=2e4)
    _, wrong_sign = recover(model, solver.State.start(model, probe), counts)
    order = np.arange(144).reshape(12, 12).T.ravel()
    _, transposed = recover(model, start, counts[order])
    assert wrong_sign[-1] > 1.15 * right[-1]
    assert transposed[-1] > 1.15 * right[-1]


def test_the_probe_update_takes_back_an_error_of_defocus():
    model, _, _, expected = experiment(electrons=1e5)
    off = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 135.0})
    start = solver.State.start(model, probe_wave(off, DETECTOR.shape_yx, PIXEL, intensity=1e5))
    _, fixed = recover(model, start, expected)
    state, updated = recover(model, start, expected, epochs=60, probe_start=3)
    true_probe = probe_wave(OPTICS, DETECTOR.shape_yx, PIXEL, intensity=1e5)

    def distance(probe):
        """Distance between normalised waves, but for their global phase."""
        overlap = np.abs(np.vdot(true_probe, probe)) / (np.linalg.norm(true_probe) * np.linalg.norm(probe))
        return np.sqrt(2 - 2 * overlap)

    assert distance(state.probe[0]) < 0.5 * distance(start.probe[0])
    assert updated[-1] < 0.3 * fixed[-1]


def test_dead_pixels_change_nothing():
    model, start, _, expected = experiment(dtype=np.complex128)
    spoilt = expected.copy()
    spoilt[:, 3, 5] = 1e7
    mask = np.ones(DETECTOR.shape_yx, bool)
    mask[3, 5] = False
    everything = np.arange(len(expected))
    model = replace(model, mask=mask)
    with_dead = solver.gradients(start, model, spoilt, everything)
    clean = solver.gradients(start, model, expected, everything)
    assert with_dead.loss == clean.loss
    np.testing.assert_array_equal(with_dead.phase, clean.phase)
