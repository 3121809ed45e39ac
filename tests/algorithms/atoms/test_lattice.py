"""A known crystal is registered: orientation, strain, vacancies, displacements; from atoms and from volumes."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from stemtomo.algorithms.atoms.bragg import spectrum
from stemtomo.algorithms.atoms.crystals import STRUCTURES, named_crystal
from stemtomo.algorithms.atoms.lattice import assign_sites, complete_lattice, register_atoms
from stemtomo.algorithms.atoms.strain import local_strain
from stemtomo.errors import ConfigurationError
from tests.algorithms.atoms.crystalline import angle_deg, fcc, polar, repeated, spinel, strained, turned

STRAIN = np.array([[0.005, 0.001, 0], [0.001, -0.003, 0.002], [0, 0.002, 0.004]])


def specimens():
    from ase.build import bulk

    yield "fcc", 4.08, ("Au",), None, fcc(4.08, 23.0)
    yield "bcc", 2.87, ("Fe",), None, repeated(bulk("Fe", "bcc", a=2.87, cubic=True), 20.0)
    yield "diamond", 5.43, ("Si",), None, repeated(bulk("Si", "diamond", a=5.43, cubic=True), 22.0)
    positions, symbols = spinel(24.0)
    yield "spinel", 8.08, ("Co", "O"), ("Co",), positions[symbols == "Co"]


@pytest.mark.parametrize(("name", "a", "species", "only", "sites"), list(specimens()), ids=lambda v: str(v)[:8])
def test_orientation_strain_and_vacancies_of_a_known_crystal(name, a, species, only, sites):
    rng = np.random.default_rng(5)
    matrix = strained(STRAIN, turned())
    ideal = sites @ matrix.T + [0.7, -0.3, 1.1]
    vacant = rng.random(len(ideal)) < 0.05
    atoms = ideal[~vacant] + rng.normal(0, 0.2 / np.sqrt(3), (int((~vacant).sum()), 3))
    crystal = named_crystal(name, a, species, tuple(1.0 for _ in species)).only(only)
    found = register_atoms(atoms, crystal)
    rotation, strain = polar(matrix)
    assert angle_deg(found.rotation, rotation) < 0.05
    np.testing.assert_allclose(found.strain, strain, atol=5e-4)
    on = assign_sites(atoms, found)
    assert (on.basis >= 0).mean() > 0.999
    assert np.sqrt((on.displacement**2).sum(axis=1).mean()) == pytest.approx(0.2, rel=0.05)
    lattice = complete_lattice(on, crystal)
    empty = found.positions(lattice.cell, lattice.basis)[lattice.atom < 0]
    true = int((cKDTree(ideal[vacant]).query(empty)[0] < 0.5).sum())
    assert 2 * true / (len(empty) + vacant.sum()) >= 0.98


def test_a_perfect_ball_has_no_vacancies_and_no_sites_outside():
    sites = fcc(4.08, 20.0)
    sites = sites[np.linalg.norm(sites - [0.3, 0.8, -0.4], axis=1) < 18]
    crystal = named_crystal("fcc", 4.08, ("Au",), (1.0,))
    found = register_atoms(sites @ turned().T, crystal)
    lattice = complete_lattice(assign_sites(sites @ turned().T, found), crystal)
    assert len(lattice.atom) == len(sites)


def test_a_displacement_that_grows_beyond_half_a_neighbour_keeps_its_site():
    sites = fcc(4.08, 60.0)
    sites = sites[(np.abs(sites[:, 1:]) < 10).all(axis=1)]
    bent = sites.copy()
    bent[:, 1] += 3.0 * (sites[:, 0] / 60) ** 3  # up to 3 Å, more than a nearest neighbour
    crystal = named_crystal("fcc", 4.08, ("Au",), (1.0,))
    found = register_atoms(bent, crystal)
    on = assign_sites(bent, found)
    assert (on.basis >= 0).all()
    # Sites of atoms are apart as the unbent atoms are.
    point = (on.cell + crystal.fractional[on.basis]) @ crystal.cell
    np.testing.assert_allclose(
        np.linalg.norm(point - point[0], axis=1), np.linalg.norm(sites - sites[0], axis=1), atol=1e-6
    )


def test_spinel_is_that_of_ase():
    positions, symbols = spinel(17.0)
    numbers = np.where(symbols == "Co", 27.0, 8.0)
    crystal = named_crystal("spinel", 8.08, ("Co", "O"), (27.0, 8.0))
    assert crystal.only(("Co",)).nearest_angstrom == pytest.approx(2.857, abs=1e-3)
    assert crystal.nearest_angstrom == pytest.approx(1.92, abs=0.01)
    reflections = crystal.reflections(0.6)
    inside = ((positions > -8.08 - 1e-6) & (positions < -1e-6)).all(axis=1)
    assert inside.sum() == 56
    other = np.exp(-2j * np.pi * (reflections.vectors @ positions[inside].T)) @ numbers[inside]
    np.testing.assert_allclose(np.abs(reflections.factors), np.abs(other), atol=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_can_be_named(structure):
    crystal = named_crystal(structure, 4.0, ("Au",), (79.0,))
    assert ((crystal.fractional >= 0) & (crystal.fractional < 1)).all()
    assert len(np.unique(crystal.fractional.round(6), axis=0)) == len(crystal.symbols)


def test_a_glass_or_a_wrong_edge_is_refused():
    crystal = named_crystal("fcc", 4.08, ("Au",), (1.0,))
    with pytest.raises(ConfigurationError):
        register_atoms(np.random.default_rng(0).uniform(-20, 20, (3000, 3)), crystal)
    with pytest.raises(ConfigurationError):
        register_atoms(fcc(3.3, 18.0), crystal)
    with pytest.raises(ConfigurationError, match="kinds of sites"):
        named_crystal("perovskite", 3.9, ("Sr", "Ti"), (38.0, 22.0))


def test_a_wave_has_its_peak_at_its_frequency_and_phase_zero_at_the_centre():
    grid = np.arange(-32, 32) * 0.4
    z, y, x = np.meshgrid(grid, grid, grid, indexing="ij")
    k = np.array([0.31, -0.12, 0.2])
    found = spectrum(np.cos(2 * np.pi * (k[0] * x + k[1] * y + k[2] * z)).astype(np.float32), 0.4)
    peak = np.rint(found.at(k[None])).astype(int)[0]
    assert found.amplitude[tuple(peak)] == pytest.approx(found.amplitude.max(), rel=0.2)
    assert abs(np.angle(found.values[tuple(peak)])) < 0.05


def test_a_linear_displacement_gives_its_gradient_at_the_surface_too():
    rng = np.random.default_rng(0)
    sites = fcc(4.08, 16.0)
    gradient = np.array([[0.005, 0.001, 0], [-0.002, -0.003, 0.002], [0, 0.001, 0.004]])
    found = local_strain(sites, sites @ gradient.T + 0.3, len(sites), 4.0)
    np.testing.assert_allclose(found.gradient, np.broadcast_to(gradient, found.gradient.shape), atol=1e-9)
    np.testing.assert_allclose(
        found.rotation, np.broadcast_to([-0.0005, 0.0, -0.0015], found.rotation.shape), atol=1e-9
    )
    # The stated error is the deviation that random displacements cause.
    noisy = local_strain(sites, sites @ gradient.T + rng.normal(0, 0.1, sites.shape), len(sites), 4.0)
    off = np.sqrt(((noisy.gradient - gradient) ** 2).mean())
    assert np.sqrt((noisy.error**2).mean()) == pytest.approx(off, rel=0.1)


def test_a_step_of_strain_is_resolved_to_the_stated_width():
    sites = fcc(4.08, 30.0)
    sites = sites[(np.abs(sites[:, 1:]) < 16).all(axis=1)]
    u = np.zeros_like(sites)
    u[:, 0] = 0.005 * np.maximum(sites[:, 0], 0)
    middle = (np.abs(sites[:, 1:]) < 8).all(axis=1)
    found = local_strain(sites, u, len(sites), 4.0).strain[:, 0, 0]
    far = np.abs(sites[:, 0]) > 10
    np.testing.assert_allclose(found[far], np.where(sites[far, 0] > 0, 0.005, 0), atol=5e-4)
    # 2.35 s: the step from 12 to 88 % of a Gaussian's integral.
    near = found[middle & (np.abs(sites[:, 0]) < 1)]
    assert 0.0015 < near.mean() < 0.0035


def test_lone_atoms_have_no_strain():
    found = local_strain(np.eye(3) * 50, np.zeros((3, 3)), 3, 4.0)
    assert np.isnan(found.error).all()
