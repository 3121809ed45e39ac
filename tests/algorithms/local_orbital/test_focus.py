"""Foci of sections from atoms that are known only roughly: the images are those of the generator, not of the model."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.local_orbital.focus import look_for_foci, overlap, spread_over
from stemtomo.algorithms.local_orbital.model import Orbitals, images_of, slices_for
from stemtomo.algorithms.local_orbital.probes import start_probes
from stemtomo.geometry import Optics
from stemtomo.io.store import Store
from stemtomo.pipeline.focal_series import add_focal_series, simulate_particle
from stemtomo.pipeline.local_orbital_parts import read_images

OPTICS = Optics(300e3, 50e-3, {"C10": 0.0})
DEPTH_OF_FIELD = 15.75


@pytest.fixture(scope="module")
def rough(tmp_path_factory):
    folder = tmp_path_factory.mktemp("focus")
    made = simulate_particle(folder / "p.npz", atoms=600, semiangle_mrad=50, theta_deg=(-50.0, 10.0, 60.0))
    store = add_focal_series(folder / "s.zarr", folder / "p.npz")
    series = read_images(Store.open(store.path), "double")
    with np.load(folder / "p.npz") as members:
        known = members["atoms_xyz_A"]
    rng = np.random.default_rng(0)
    positions = known[rng.random(len(known)) < 0.85]  # fifteen in a hundred are missing, the others 20 pm off
    positions = positions + rng.normal(0, 0.2, positions.shape)
    slices = slices_for(made["diameter_angstrom"] + 4, 4.0)
    probes = start_probes(OPTICS, np.zeros(3), slices, 4.0, 32, series.pixel_angstrom)
    count = len(positions)
    still = np.zeros((len(series), 2)), np.zeros((len(series), 3))
    model = Orbitals(positions, np.ones(count), np.full(count, 0.45), probes, 4.0, *still)
    return model, series, np.asarray(made["defocus_angstrom"])


def test_rough_atoms_tell_the_focus_of_every_section_within_a_quarter_of_the_depth_of_field(rough):
    model, series, expected = rough
    numbers = np.arange(len(series))

    def misfit(offsets):
        probes = start_probes(OPTICS, offsets, model.slices, 4.0, 32, series.pixel_angstrom)
        return overlap(replace(model, probes=probes), series, numbers).misfit

    found = look_for_foci(misfit, 3, reach_angstrom=16.0, step_angstrom=DEPTH_OF_FIELD / 4)
    np.testing.assert_allclose(found, expected, atol=DEPTH_OF_FIELD / 4)
    # Foci that are left where they were explain the outer sections worse.
    assert (misfit(found)[[0, 2]] < misfit(np.zeros(3))[[0, 2]]).all()


def test_misfit_knows_no_brightness_and_is_nothing_for_the_model_itself(rough):
    model, series, _ = rough
    numbers = np.arange(len(series))
    own = replace(series, images=7 * images_of(model, series, numbers))
    np.testing.assert_allclose(overlap(model, own, numbers).misfit, 0, atol=1e-12)
    parts = [overlap(model, own.part(part), part) for part in (numbers[:4], numbers[4:], numbers[:0])]
    whole = overlap(model, own, numbers)
    for summed, expected in zip(map(sum, zip(*parts, strict=True)), whole, strict=True):
        np.testing.assert_allclose(summed, expected, rtol=1e-12)


def test_the_vertex_of_a_misfit_is_found_and_a_flat_one_moves_nothing():
    vertex = np.array([3.3, -31.0, 0.0])

    def misfit(offsets):
        return np.array([1, 1, 0]) * (offsets - vertex) ** 2 / 1e3 + 0.1

    # The second lies beyond the reach, the third section is no better anywhere.
    np.testing.assert_allclose(look_for_foci(misfit, 3, reach_angstrom=12.0, step_angstrom=4.0), vertex, atol=1e-9)


def test_a_search_that_knows_where_foci_were_asks_less_and_finds_the_same():
    vertex, asked = np.array([3.3, -31.0, 9.0]), []

    def misfit(offsets):
        asked.append(offsets)
        return (offsets - vertex) ** 2 / 1e3 + 0.1

    # The last one was three steps off: the search goes on where it is best at an end.
    before = vertex + np.array([1.0, -2.0, 12.0])
    found = look_for_foci(misfit, 3, reach_angstrom=40.0, step_angstrom=4.0, before=before)
    np.testing.assert_allclose(found, vertex, atol=1e-9)
    few = len(asked)
    look_for_foci(misfit, 3, reach_angstrom=40.0, step_angstrom=4.0)
    assert few < 0.6 * (len(asked) - few)


def test_a_told_focus_stays_where_another_is_hardly_better():
    found = look_for_foci(lambda offsets: 0.1 + 1e-6 * (offsets - 1) ** 2, 1, reach_angstrom=8.0, step_angstrom=4.0)
    assert found == [0]


def test_images_are_taken_evenly_from_every_section():
    sections = np.tile([0, 1], 10)
    numbers = np.arange(2, 20)
    chosen = spread_over(sections, numbers, 3)
    assert set(chosen) <= set(numbers)
    assert [int((sections[chosen] == section).sum()) for section in (0, 1)] == [3, 3]
    assert {2, 3, 18, 19} <= set(chosen)
