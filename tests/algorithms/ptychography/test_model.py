"""Gradients of everything the model has against finite differences, and what no measurement can see."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.model import (
    State,
    illumination,
    orthogonal_modes,
    seen_by_detector,
    start_modes,
    untied,
)
from stemtomo.algorithms.ptychography.parameters import Background
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator

DETECTOR = Detector((16, 16), 1 / 8.0)
OPTICS = Optics(energy_ev=300e3, semiangle_rad=21e-3, aberrations={"C10": 60.0})


def setup(layers=3, modes=2, kind="phase", loss="anscombe", window=20, seed=0):
    """A 3 x 4 scan off the pixels, slices of unequal thickness, a window larger than the detector, counts of noise."""
    rng = np.random.default_rng(seed)
    pixel = (8.0 / window, 8.0 / window)
    grid = object_grid(Scan((3, 4), (1.1, 0.9)).positions(), (window, window), pixel)
    wavelength = wavelength_angstrom(300e3)
    gaps = (10.0, 25.0)
    propagators = tuple(fresnel_propagator((window, window), pixel, wavelength, d, dtype=np.complex128) for d in gaps)
    mask = np.ones((16, 16), bool)
    mask[3, 4] = False
    model = solver.Model(grid, propagators, loss, kind, detector_yx=(16, 16), mask=mask)
    probe = probe_wave(OPTICS, (window, window), pixel, intensity=3e3, dtype=np.complex128)
    noise = rng.normal(size=(modes, window, window)) + 1j * rng.normal(size=(modes, window, window))
    weights = np.array([1.0, 0.4, 0.2, 0.1])[:modes, None, None]
    phase = 0.3 * rng.normal(size=(layers, *grid.shape_yx))
    if kind == "complex":
        phase = phase + 0.1j * rng.normal(size=phase.shape)
    background = rng.uniform(0.2, 0.6, size=(16, 16))
    state = State(phase, weights * (probe + 0.3 * noise), {"background": background})
    counts = rng.poisson(solver.patterns(state, model, np.arange(12)) * 1.3 + 0.5).astype(np.float64)
    return model, state, counts, rng


def loss_of(state, model, counts):
    return solver.gradients(state, model, counts, np.arange(len(counts)), [Background()]).loss


@pytest.mark.parametrize("loss", ["amplitude", "anscombe", "poisson"])
@pytest.mark.parametrize(("layers", "modes", "kind"), [(3, 2, "phase"), (1, 1, "phase"), (1, 3, "complex")])
def test_every_gradient_agrees_with_finite_differences(layers, modes, kind, loss):
    model, state, counts, rng = setup(layers, modes, kind, loss)
    sums = solver.gradients(state, model, counts, np.arange(12), [Background()])
    turned = 1j * rng.normal(size=state.phase.shape) if kind == "complex" else 0
    directions = {
        "phase": rng.normal(size=state.phase.shape) + turned,
        "probe": rng.normal(size=state.probe.shape) + 1j * rng.normal(size=state.probe.shape),
        "background": rng.normal(size=(16, 16)),
    }
    found = {"phase": sums.phase, "probe": sums.probe, "background": sums.extra["background"]["gradient"]}
    step = 1e-6
    for name, direction in directions.items():
        ends = []
        for sign in (1, -1):
            if name == "background":
                moved = replace(state, extra={name: state.extra[name] + sign * step * direction})
            else:
                moved = replace(state, **{name: getattr(state, name) + sign * step * direction})
            ends.append(loss_of(moved, model, counts))
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert numeric == pytest.approx(np.vdot(found[name], direction).real, rel=1e-6), name


@pytest.mark.parametrize("loss", ["amplitude", "anscombe", "poisson"])
def test_exact_data_leave_nothing_to_do(loss):
    model, state, _, _ = setup(loss=loss)
    exact = solver.patterns(state, model, np.arange(12)) + state.extra["background"]
    sums = solver.gradients(state, model, exact, np.arange(12), [Background()])
    assert sums.loss == pytest.approx(0, abs=1e-12)
    scale = np.abs(solver.gradients(state, model, 2 * exact, np.arange(12), [Background()]).phase).max()
    assert np.abs(sums.phase).max() < 1e-6 * scale
    assert np.abs(sums.extra["background"]["gradient"]).max() < 1e-6


def gauges(state):
    rng = np.random.default_rng(1)
    unitary = np.linalg.qr(rng.normal(size=(2, 2)) + 1j * rng.normal(size=(2, 2)))[0]
    factor = 1.3 * np.exp(0.4j)
    yield "a phase per slice", replace(state, phase=state.phase + np.array([0.3, -1.2, 2.0])[:, None, None])
    yield "modes mixed among themselves", replace(state, probe=np.einsum("mn,nyx->myx", unitary, state.probe))
    yield (
        "a scale between object and probe",
        replace(state, phase=state.phase - 1j * np.log(factor) / 3, probe=state.probe / factor),
    )
    y, x = np.indices(state.phase.shape[1:])
    yield "whole turns", replace(state, phase=state.phase + 2 * np.pi * ((y + 2 * x) // 7))
    yield (
        "a global phase of a mode",
        replace(state, probe=state.probe * np.exp(1j * np.array([0.2, 2.0]))[:, None, None]),
    )


def test_what_no_measurement_can_see_changes_no_loss():
    model, state, counts, _ = setup(kind="complex")
    loss = loss_of(state, model, counts)
    for name, other in gauges(state):
        assert loss_of(other, model, counts) == pytest.approx(loss, rel=1e-12), name


def test_a_ramp_on_one_slice_and_its_inverse_on_the_probe_cannot_be_seen():
    model, state, counts, _ = setup(layers=1)
    window, (height, width) = 20, model.grid.shape_yx
    # On whole pixels, and with a period that fits the window: exp(2 pi i (2 x - y) / 20).
    grid = replace(model.grid, shifts_px=np.zeros_like(model.grid.shifts_px))
    model = replace(model, grid=grid, propagators=())

    def ramp(rows, columns):
        return 2 * np.pi * (2 * np.arange(columns)[None, :] - np.arange(rows)[:, None]) / window

    other = replace(
        state,
        phase=state.phase + ramp(height, width),
        probe=state.probe * np.exp(-1j * ramp(window, window)),
    )
    assert loss_of(other, model, counts) == pytest.approx(loss_of(state, model, counts), rel=1e-12)


def test_tied_slices_are_equal_slices_with_their_gradients_summed():
    model, state, counts, _ = setup(layers=1)
    free = untied(state, 3)
    tied_sums = solver.gradients(state, model, counts, np.arange(12), [Background()])
    free_sums = solver.gradients(free, model, counts, np.arange(12), [Background()])
    assert tied_sums.loss == pytest.approx(free_sums.loss, rel=1e-13)
    np.testing.assert_allclose(tied_sums.phase[0], free_sums.phase.sum(axis=0), atol=1e-10)


def test_untying_takes_the_momentum_along():
    model, state, counts, _ = setup(layers=1)
    sums = solver.gradients(state, model, counts, np.arange(12), [Background()])
    moved = untied(solver.update(state, sums, solver.Nesterov(), slices=3), 3)
    assert moved.phase.shape == moved.memory["object"]["momentum"].shape == (3, *model.grid.shape_yx)


@pytest.mark.parametrize("count", [1, 3, 60])
def test_any_number_of_modes_to_begin_with_shares_the_electrons_of_the_probe(count):
    probe = np.random.default_rng(0).normal(size=(16, 16)) + 0j
    modes = start_modes(probe, count)
    flat = modes.reshape(count, -1)
    power = np.abs(flat @ flat.conj().T) / np.linalg.norm(probe) ** 2
    np.testing.assert_allclose(power, np.diag(np.diag(power)), atol=1e-12)
    assert np.trace(power) == pytest.approx(1)
    assert power[0, 0] >= 0.5


def test_modes_become_orthogonal_and_sorted_and_show_the_same():
    model, state, _, rng = setup(layers=1, modes=3)
    mixed = replace(state, probe=np.einsum("mn,nyx->myx", rng.normal(size=(3, 3)), state.probe))
    found = orthogonal_modes(mixed)
    flat = found.probe.reshape(3, -1)
    gram = flat.conj() @ flat.T
    np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-9 * gram[0, 0].real)
    assert (np.diff(np.diag(gram).real) < 0).all()
    where = np.arange(12)
    np.testing.assert_allclose(solver.patterns(found, model, where), solver.patterns(mixed, model, where), rtol=1e-11)


def test_probe_and_object_may_move_together():
    model, state, counts, _ = setup(layers=1)
    # A probe that ends before its window does, in one slice and on pixels: nothing wraps around.
    inside = np.zeros(state.probe.shape[1:], bool)
    inside[3:-3, 3:-3] = True
    grid = replace(model.grid, shifts_px=np.zeros_like(model.grid.shifts_px))
    state, model = replace(state, probe=state.probe * inside), replace(model, grid=grid, propagators=())
    moved = [np.roll(leaf, (1, -2), axis=(1, 2)) for leaf in (state.phase, state.probe)]
    other = replace(state, phase=moved[0], probe=moved[1])
    assert loss_of(other, model, counts) == pytest.approx(loss_of(state, model, counts), rel=1e-12)


def test_what_has_the_period_of_the_raster_may_go_from_object_to_probe():
    model, state, counts, rng = setup(layers=1)
    period, grid = 4, model.grid
    raster = period * np.stack(np.meshgrid([0, 1], [0, 1, 2], indexing="ij"), axis=-1).reshape(-1, 2)
    raster = np.concatenate([raster, raster])[: len(grid.corners)] % (np.array(grid.shape_yx) - 20 + 1)
    assert (raster % period == 0).all()
    grid = replace(grid, corners=raster.astype(grid.corners.dtype), shifts_px=np.zeros_like(grid.shifts_px))
    model = replace(model, grid=grid, propagators=())
    tile = 0.5 * rng.normal(size=(period, period))
    pattern = np.tile(tile, (20, 20))
    height, width = grid.shape_yx
    phase, probe = pattern[:height, :width], pattern[: state.probe.shape[1], : state.probe.shape[2]]
    other = replace(state, phase=state.phase + phase, probe=state.probe * np.exp(-1j * probe))
    assert loss_of(other, model, counts) == pytest.approx(loss_of(state, model, counts), rel=1e-12)


def test_a_focus_of_the_probe_is_a_height_of_the_object():
    model, state, counts, _ = setup(layers=3)
    vacuum, gap = np.zeros_like(state.phase[:1]), model.propagators[0]
    low = replace(state, phase=np.concatenate([vacuum, state.phase[:2]]))
    high = replace(
        state, phase=np.concatenate([state.phase[:2], vacuum]), probe=np.fft.ifft2(np.fft.fft2(state.probe) * gap)
    )
    model = replace(model, propagators=(gap, gap))
    assert loss_of(high, model, counts) == pytest.approx(loss_of(low, model, counts), rel=1e-12)


@pytest.mark.parametrize(("count", "window"), [(6, 9), (7, 9), (6, 8), (7, 8), (8, 8)])
def test_a_smaller_detector_sees_the_low_frequencies(count, window):
    frequencies = np.fft.fftfreq(window, 1 / window)
    both = np.add.outer(100 * frequencies, frequencies)
    seen = np.fft.fftfreq(count, 1 / count)
    np.testing.assert_array_equal(seen_by_detector(both, (count, count)), np.add.outer(100 * seen, seen))


def test_a_state_is_a_plain_tree():
    _, state, _, _ = setup()
    again = State(**state.tree())
    assert again.phase is state.phase
    assert set(state.tree()) == {"phase", "probe", "extra", "memory"}


@pytest.mark.parametrize("recorded", [1.0, 0.3])
def test_the_illumination_of_positions_on_pixels_is_the_sum_over_windows(recorded):
    rng = np.random.default_rng(0)
    told = Scan((24, 20), (0.8, 0.8)).positions()
    told = told[rng.random(len(told)) < recorded]
    grid = object_grid(told, (32, 40), (0.2, 0.2))
    probe = rng.normal(size=(2, 32, 40, 2)) @ [1, 1j]
    expected = np.zeros(grid.shape_yx)
    for y, x in grid.corners:
        expected[y : y + 32, x : x + 40] += (np.abs(probe) ** 2).sum(axis=0)
    found = illumination(probe, grid)
    np.testing.assert_allclose(found, expected, atol=1e-13 * expected.max())
    np.testing.assert_array_equal(found > 0, expected > 0)
