"""Local orbitals from images: places, missing and false atoms, probes over depth, gauges, stated errors."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import cKDTree

from stemtomo.algorithms.atoms.classification import classify
from stemtomo.algorithms.local_orbital.insertion import extended
from stemtomo.algorithms.local_orbital.model import Orbitals, images_of, slices_for, sums, wanted_at, weighted_residual
from stemtomo.algorithms.local_orbital.probes import (
    depth_of_focus,
    normalised,
    probes_over_depth,
    start_probes,
    without_gauges,
)
from stemtomo.algorithms.local_orbital.schedule import Schedule, held_out, solve
from stemtomo.algorithms.local_orbital.solver import (
    Free,
    Geometry,
    gradient_power,
    position_uncertainty,
    refine,
    summed_by_kind,
    worth_keeping,
)
from stemtomo.algorithms.local_orbital.specimens import amorphous_particle, focal_tilt_series
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Optics, TiltSeries

OPTICS = Optics(300e3, 60e-3, {"C10": 0.0})  # depth of field 11 Å
PIXEL, WINDOW, THICKNESS = 0.4, 20, 3.0
ROTATIONS = TiltSeries.from_degrees(np.arange(-70.0, 71, 20)).rotations
COUNT = 100


@pytest.fixture(scope="module")
def particle():
    return amorphous_particle(COUNT, seed=3)


def series_of(positions, sections=1, electrons=None):
    extent = 2 * np.linalg.norm(positions, axis=1).max()
    edge = 2 * int(np.ceil((extent + 8) / PIXEL / 2))
    defocus = np.linspace(-extent / 4, extent / 4, sections) if sections > 1 else np.zeros(1)
    return focal_tilt_series(
        positions,
        OPTICS,
        ROTATIONS,
        defocus,
        shape_yx=(edge, edge),
        pixel_angstrom=PIXEL,
        window_px=24,
        electrons_per_atom=electrons,
        dtype=np.float64,
    ), defocus


def model_of(positions, series, defocus):
    slices = slices_for(2 * np.linalg.norm(positions, axis=1).max() + 2, THICKNESS)
    count, images = len(positions), len(series)
    probes = start_probes(OPTICS, defocus, slices, THICKNESS, WINDOW, PIXEL)
    return Orbitals(
        positions,
        np.ones(count),
        np.full(count, 0.4),
        probes,
        THICKNESS,
        np.zeros((images, 2)),
        np.zeros((images, 3)),
    )


def geometry_of(series):
    return Geometry(
        series.rotations,
        series.sections,
        tuple(series.images.shape[1:]),
        PIXEL,
        gradient_power(series.images, PIXEL),
        np.arange(len(series)),
    )


def rms_pm(model, truth):
    _, index = cKDTree(truth).query(model.positions)
    assert len(np.unique(index)) == len(truth)
    error = model.positions - truth[index]
    return 100 * np.sqrt(((error - error.mean(axis=0)) ** 2).sum(axis=1).mean())


def test_a_particle_keeps_its_neighbours_at_the_distance_asked_for(particle):
    nearest = cKDTree(particle).query(particle, k=2)[0][:, 1]
    assert 2.32 <= nearest.min() <= nearest.max() <= 2.36
    density = COUNT / (4 / 3 * np.pi * np.linalg.norm(particle, axis=1).max() ** 3)
    assert density == pytest.approx(0.05, rel=0.2)
    with pytest.raises(ConfigurationError, match="do not settle"):
        amorphous_particle(60, density=0.5)


def test_a_probe_is_sharpest_in_its_focus_and_keeps_its_electrons():
    depths = np.arange(-30.0, 31, 3)
    focused = replace(OPTICS, aberrations={"C10": -9.0})
    probes = probes_over_depth(focused, depths, WINDOW, PIXEL)
    assert depth_of_focus(probes[None], 3.0)[0] == pytest.approx(9.0, abs=0.4)
    np.testing.assert_allclose(probes.sum(axis=(1, 2)), 1)
    # On the axis of a round aperture the intensity falls as sinc²(alpha² z / 2 lambda): 4 / pi² at z = lambda / alpha².
    fine = probes_over_depth(OPTICS, np.array([0.0, 0.0196875 / 0.06**2]), 96, 0.05)
    peaks = fine.max(axis=(1, 2))
    assert peaks[1] / peaks[0] == pytest.approx(4 / np.pi**2, rel=0.03)


def test_atoms_are_found_to_far_below_a_picometre_by_the_model_that_made_the_images(particle):
    series, defocus = series_of(particle, 1)
    truth = model_of(particle, series, defocus)
    series = replace(series, images=images_of(truth, series))
    start = replace(
        truth,
        positions=particle + np.random.default_rng(0).normal(0, 0.15, particle.shape),
        intensity=np.full(COUNT, 0.8),
        width_angstrom=np.full(COUNT, 0.5),
    )
    found = refine(start, lambda m, p: sums(m, series, None, p), geometry_of(series), Free(), 60, still=0.0)
    assert rms_pm(found.model, particle) < 0.01
    np.testing.assert_allclose(found.model.intensity, 1, atol=1e-4)
    np.testing.assert_allclose(found.model.width_angstrom, 0.4, atol=1e-4)


def test_missing_atoms_come_and_false_ones_go(particle):
    series, defocus = series_of(particle, 1)
    truth = model_of(particle, series, defocus)
    wanted, geometry = (lambda m, sites: wanted_at(m, series, sites)), geometry_of(series)
    missing = truth.kept(np.arange(COUNT) >= 7)
    longer, added = extended(missing, wanted, geometry, insertion=0.4, minimum_distance_angstrom=1.6)
    nearest = cKDTree(longer.positions[len(missing) :]).query(particle[:7])[0]
    assert added >= 7
    assert (nearest < 0.75).all()
    doubled = truth.with_atoms(particle[:2] + 0.5, np.full(2, 0.6), np.full(2, 0.4))
    faint = doubled.with_atoms(np.array([[0.0, 0.0, 40.0]]), np.array([0.1]), np.array([0.4]))
    good = worth_keeping(faint, 0.4, 1.6)
    kept, dropped = faint.kept(good), int((~good).sum())
    assert dropped == 3
    np.testing.assert_array_equal(kept.positions, particle)


def test_a_missing_atom_comes_to_its_place_between_the_sites_of_the_grid(particle):
    series, defocus = series_of(particle, 1)
    missing = model_of(particle, series, defocus).kept(np.arange(COUNT) >= 7)
    options = {"insertion": 0.4, "minimum_distance_angstrom": 1.6}
    wanted, geometry = (lambda m, sites: wanted_at(m, series, sites)), geometry_of(series)
    longer, _ = extended(missing, wanted, geometry, **options)
    new = longer.positions[len(missing) :]
    way = cKDTree(new).query(particle[:7])[0]
    # Half a diagonal of the grid would be 0.6 Å.
    assert np.sqrt((way**2).mean()) < 0.25
    # What was taken out just now is not put back before its neighbours had their time.
    others, _ = extended(missing, wanted, geometry, gone=particle[:7] + 0.3, **options)
    assert (cKDTree(particle[:7]).query(others.positions[len(missing) :])[0] > 0.75).all()


def test_atoms_that_are_out_of_place_do_not_breed_others(particle):
    series, defocus = series_of(particle, 1)
    rng = np.random.default_rng(4)
    astray = model_of(particle + rng.normal(0, 0.4, particle.shape), series, defocus)
    evaluate, geometry = (lambda m, p: sums(m, series, None, p)), geometry_of(series)
    schedule = Schedule(atom_iterations=3, probe_searches=0, rounds=6, shifts=False)
    counts = []
    solve(astray, evaluate, geometry, schedule, lambda number, step, model: counts.append(len(model)))
    assert max(counts) <= 1.25 * COUNT


def test_false_atoms_of_the_last_insertion_do_not_stay(particle):
    series, defocus = series_of(particle, 1)
    false = particle[:3] + np.array([1.1, 0.0, 0.6])
    start = model_of(particle, series, defocus).with_atoms(false, np.full(3, 0.9), np.full(3, 0.4))
    schedule = Schedule(atom_iterations=12, probe_searches=0, rounds=0, shifts=False, minimum_distance_angstrom=1.0)
    stages = []
    found = solve(
        start,
        lambda m, p: sums(m, series, None, p),
        geometry_of(series),
        schedule,
        lambda number, step, model: stages.append((step.stage, step.dropped)),
    )
    assert stages == [("start", 0), ("last", 3)]
    assert rms_pm(found, particle) < 2


def test_what_unfinished_probes_leave_is_not_taken_for_atoms(particle):
    """Sections a depth of field out of focus, of which the model knows nothing at first; no atom is missing."""
    series, _ = series_of(particle, 3)
    start, steps = model_of(particle, series, np.zeros(3)), []
    schedule = Schedule(
        atom_iterations=2, probe_iterations=2, probe_searches=3, last_iterations=2, rounds=0, shifts=False
    )
    evaluate, geometry = (lambda m, p: sums(m, series, None, p)), geometry_of(series)
    solve(start, evaluate, geometry, schedule, lambda number, step, model: steps.append(step))
    # The list stands, so that probes are not looked for again and again but to the end, once.
    assert [step.stage for step in steps] == ["start", "probes", "last"]
    assert not any(step.added or step.dropped for step in steps)


WIDTHS, SIGNALS = np.array([0.33, 0.46]), np.array([1.0, 2.2])


@pytest.fixture(scope="module")
def alloy(particle):
    """A particle of two species of different brightness and width, and a focal series of it."""
    kinds = (np.random.default_rng(5).random(COUNT) < 0.4).astype(int)
    truth = replace(
        model_of(particle, series_of(particle)[0], np.zeros(1)),
        intensity=SIGNALS[kinds],
        width_angstrom=WIDTHS[kinds],
        species=kinds,
    )
    series = focal_tilt_series(
        particle,
        OPTICS,
        ROTATIONS,
        np.zeros(1),
        shape_yx=series_of(particle)[0].images.shape[1:],
        pixel_angstrom=PIXEL,
        window_px=24,
        width_angstrom=WIDTHS[kinds],
        intensity=SIGNALS[kinds],
        dtype=np.float64,
    )
    return truth, series


def test_species_are_told_apart_and_each_has_its_width(alloy, particle):
    truth, series = alloy
    moved = particle + np.random.default_rng(0).normal(0, 0.1, particle.shape)
    start = replace(truth, positions=moved, intensity=np.ones(COUNT), width_angstrom=np.full(COUNT, 0.4), species=None)
    start = start.kept(np.arange(COUNT) >= 3)
    evaluate, geometry = (lambda m, p: sums(m, series, None, p)), geometry_of(series)
    options = {"probe_searches": 0, "shifts": False, "rounds": 3, "atom_iterations": 15, "last_iterations": 40}
    schedule, kinds_of = Schedule(width="species", **options), lambda intensity: classify(intensity, 2).labels
    found = solve(start, evaluate, geometry, schedule, kinds_of=kinds_of)
    index = cKDTree(found.positions).query(particle)[1]
    assert len(np.unique(index)) == len(found) == COUNT
    np.testing.assert_array_equal(found.kinds[index], truth.kinds)
    for kind in range(2):
        own = found.kinds == kind
        assert np.ptp(found.width_angstrom[own]) == 0
        assert found.width_angstrom[own][0] == pytest.approx(WIDTHS[kind], abs=0.01)
        assert np.median(found.intensity[own]) == pytest.approx(SIGNALS[kind], rel=0.02)
    together = refine(found, evaluate, geometry, Free(width="shared"), 30)
    assert together.losses[-1] > 2 * sums(found, series, None, False).loss
    assert rms_pm(found, particle) < 0.7 * rms_pm(together.model, particle)


def test_the_derivative_in_a_width_of_a_species_is_that_of_the_loss(alloy):
    truth, series = alloy
    model, step = replace(truth, intensity=truth.intensity * 1.1), 1e-5
    derivative = summed_by_kind(sums(model, series, None, False).width, model.kinds)
    assert derivative.shape == (2,)
    for kind in range(2):
        change = step * (model.kinds == kind)
        ends = [
            sums(replace(model, width_angstrom=model.width_angstrom + sign * change), series, None, False).loss
            for sign in (1, -1)
        ]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(derivative[kind], rel=1e-6)


def test_the_faintest_species_says_what_is_too_faint(alloy, particle):
    truth, _ = alloy
    false = truth.with_atoms(np.array([[0.0, 0.0, 40.0]]), np.array([0.3]), np.array([0.4]))
    bright = replace(false, intensity=np.where(false.kinds == 1, 5.0, false.intensity))
    good = worth_keeping(bright, 0.4, 1.6)
    kept, dropped = bright.kept(good), int((~good).sum())
    assert dropped == 1
    np.testing.assert_array_equal(kept.positions, particle)
    np.testing.assert_array_equal(kept.kinds, truth.kinds)


def test_an_image_of_a_blanked_beam_does_not_end_the_search(particle):
    series, defocus = series_of(particle)
    images = series.images.copy()
    images[0] = 0
    series = replace(series, images=images)
    model = model_of(particle + 0.05, series, defocus)
    free = Free(shifts=True)
    found = refine(model, lambda m, probes: sums(m, series, with_probes=probes), geometry_of(series), free, 3)
    assert found.losses[-1] < found.losses[0]
    assert np.isfinite(found.model.shifts_angstrom).all()


def test_a_search_ends_where_its_atoms_come_to_rest(particle):
    series, defocus = series_of(particle, 1)
    truth = model_of(particle, series, defocus)
    series = replace(series, images=images_of(truth, series))
    start = replace(truth, positions=particle + 0.05)
    evaluate, geometry = (lambda m, p: sums(m, series, None, p)), geometry_of(series)
    lengths = [len(refine(start, evaluate, geometry, Free(), 60, None, 0.0, rest).losses) for rest in (1e-2, 1e-4)]
    assert 10 == lengths[0] < lengths[1] < 60


def test_the_foci_of_sections_are_found_from_none(particle):
    series, defocus = series_of(particle, 3)
    start = model_of(particle + np.random.default_rng(1).normal(0, 0.1, particle.shape), series, np.zeros(3))
    schedule = Schedule(rounds=0, probe_searches=1, last_iterations=15, shifts=False)
    found = solve(start, lambda m, p: sums(m, series, None, p), geometry_of(series), schedule)
    assert rms_pm(found, particle) < 1
    focus = depth_of_focus(found.probes, THICKNESS)
    # Sections are in focus where the specimen cancels their defocus; slices and ends blunt the estimate.
    np.testing.assert_allclose(focus, -defocus, atol=2)
    assert focus[0] > 2 > -2 > focus[2]


def test_known_gauges_change_no_image(particle):
    series, defocus = series_of(particle, 3)
    rng = np.random.default_rng(2)
    model = model_of(particle, series, defocus)
    # One slice: where probes change with depth, a shift along the beam is seen.
    shifts = rng.normal(0, 0.3, model.shifts_angstrom.shape)
    model = replace(model, shifts_angstrom=shifts, probes=model.probes[:, 2:3])
    before = images_of(model, series)
    free = without_gauges(model, series.rotations, series.sections, np.arange(len(series)), PIXEL)
    np.testing.assert_allclose(images_of(free, series), before, atol=1e-4 * before.max())
    seen = np.swapaxes(series.rotations, 1, 2)[:, :2]
    left = np.einsum("kia,ki->a", seen, free.shifts_angstrom)
    np.testing.assert_allclose(left, 0, atol=1e-9)
    np.testing.assert_allclose(normalised(3 * model.probes), model.probes)


def test_stated_errors_are_those_that_are_made(particle):
    series, defocus = series_of(particle, 1, electrons=400)
    evaluate, geometry = (lambda m, p: sums(m, series, None, p)), geometry_of(series)
    found = refine(model_of(particle, series, defocus), evaluate, geometry, Free(), 30)
    residual, signal = weighted_residual(found.model, series)
    sigma = position_uncertainty(found.model, geometry, residual / signal)
    error = found.model.positions - particle
    assert 0.4 < np.mean(np.abs(error - error.mean(axis=0)) < sigma) < 0.8
    assert 1 < rms_pm(found.model, particle) < 8


def test_shifts_and_orientations_of_images_are_found(particle):
    series, defocus = series_of(particle, 1)
    truth, rng = model_of(particle, series, defocus), np.random.default_rng(7)
    shifts, turns = rng.normal(0, 0.1, (len(series), 2)), rng.normal(0, 4e-3, (len(series), 3))
    series = replace(series, images=images_of(replace(truth, shifts_angstrom=shifts, tilts_rad=turns), series))
    start = replace(truth, positions=particle + rng.normal(0, 0.05, particle.shape))
    evaluate, free = (lambda m, p: sums(m, series, None, p)), Free(shifts=True, tilts=True)
    found = refine(start, evaluate, geometry_of(series), free, 60, still=0.0).model
    # A turn and a shift of the whole specimen are of no account.
    seen = np.swapaxes(series.rotations, 1, 2)
    for left, gauge in (
        (found.tilts_rad - turns, seen.reshape(-1, 3)),
        (found.shifts_angstrom - shifts, seen[:, :2].reshape(-1, 3)),
    ):
        common = np.linalg.lstsq(gauge, left.reshape(-1), rcond=None)[0]
        rest = left.reshape(-1) - gauge @ common
        assert np.sqrt((rest**2).mean()) < (2e-4 if left.shape[1] == 3 else 3e-3)


def test_an_interrupted_schedule_goes_on_to_the_same_model(particle):
    series, defocus = series_of(particle, 1)
    start = model_of(particle[:-2] + 0.05, series, defocus)
    evaluate, geometry = (lambda m, p: sums(m, series, None, p)), geometry_of(series)
    options = {"probe_searches": 2, "rounds": 1, "last_iterations": 4, "shifts": False}
    schedule = Schedule(atom_iterations=4, probe_iterations=4, **options)
    kept = []
    whole = solve(start, evaluate, geometry, schedule, lambda number, step, model: kept.append((number, step, model)))
    again = solve(kept[1][2], evaluate, geometry, schedule, before=[step for _, step, _ in kept[:2]])
    np.testing.assert_array_equal(again.positions, whole.positions)
    np.testing.assert_array_equal(again.probes, whole.probes)
    assert len(kept) <= schedule.searches


def test_held_out_images_are_spread_over_the_series():
    chosen = held_out(np.zeros(71), 0.1)
    assert chosen.sum() == 7
    assert np.diff(np.flatnonzero(chosen)).min() >= 8
    assert not held_out(np.zeros(71), 0).any()
