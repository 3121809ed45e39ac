"""Scattering factors and projected potentials against published values, exact atoms and an independent simulator."""

import numpy as np
import pytest

from stemtomo.errors import ConfigurationError
from stemtomo.physics import potential

BOHR_ANGSTROM = 0.529177


@pytest.mark.parametrize(
    ("symbol", "published"),
    # Doyle and Turner, Acta Cryst. A24, 390 (1968): relativistic Hartree-Fock f_e(0) in Å.
    [("C", 2.509), ("O", 1.983), ("Si", 5.828), ("Fe", 7.165), ("Cu", 5.600), ("Ag", 8.671), ("Au", 10.573)],
)
def test_forward_scattering_is_the_published_one(symbol, published):
    value = potential.scattering_factor(potential.atomic_number(symbol), np.zeros(1))[0]
    assert value == pytest.approx(published, rel=0.03)


def test_hydrogen_is_the_exact_atom():
    # Mott-Bethe with the exact 1s form factor 1 / (1 + x / 4)², x = (2 pi k a0)².
    k = np.linspace(0, 3, 50)
    x = (2 * np.pi * k * BOHR_ANGSTROM) ** 2
    exact = 2 * BOHR_ANGSTROM * (8 + x) / (4 + x) ** 2
    np.testing.assert_allclose(potential.scattering_factor(1, k), exact, rtol=2e-3)


@pytest.mark.parametrize("number", [6, 14, 29, 79])
def test_large_angles_are_rutherford_scattering(number):
    # f_e -> Z / (2 pi² a0 k²): the bare nucleus (Mott-Bethe without electrons).
    k = np.array([40.0])
    bare = number / (2 * np.pi**2 * BOHR_ANGSTROM * k**2)
    np.testing.assert_allclose(potential.scattering_factor(number, k), bare, rtol=0.03)


@pytest.mark.parametrize(("symbol", "cell_angstrom", "volts"), [("Cu", 3.615, 22.7), ("Au", 4.078, 29.9)])
def test_mean_inner_potential_of_fcc_metals(symbol, cell_angstrom, volts):
    # Of isolated atoms: 47.878 V Å² n f_e(0) / cell volume with Doyle and Turner's f_e(0).
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]) * cell_angstrom
    numbers = np.full(4, potential.atomic_number(symbol))
    pixel = cell_angstrom / 48
    slices = potential.slice_potentials(
        basis, numbers, (48, 48), (pixel, pixel), np.array([0, cell_angstrom]), dtype=np.float64
    )
    assert slices.mean() / cell_angstrom == pytest.approx(volts, rel=0.03)


@pytest.mark.parametrize("symbol", ["Cu", "Au"])
def test_projected_potential_agrees_with_abtem_to_a_thousandth(symbol):
    abtem = pytest.importorskip("abtem", reason="abtem is not installed: no independent simulator to compare with")
    ase = pytest.importorskip("ase", reason="ase is not installed")
    extent, count = 12.0, 240
    # On a pixel of the grid: abTEM interpolates between pixels, which damps high frequencies by a few per cent.
    atoms = ase.Atoms(symbol, positions=[(5.0, 6.2, 5)], cell=(extent, extent, 10))
    theirs = abtem.Potential(
        atoms, gpts=count, slice_thickness=10, parametrization="lobato", projection="infinite", periodic=False
    )
    theirs = theirs.build(lazy=False).project().compute().array
    pixel = extent / count
    positions = np.array([[5.0 - extent / 2, 6.2 - extent / 2, 5.0]])
    edges = np.array([0.0, 10.0])
    ours = potential.slice_potentials(
        positions, atoms.numbers, (count, count), (pixel, pixel), edges, dtype=np.float64, band_limit=1.0
    )[0].T
    k = np.fft.fftfreq(count, pixel)
    inside = np.hypot(k[:, None], k[None, :]) < 2
    ours, theirs = (np.fft.ifft2(np.fft.fft2(array) * inside).real for array in (ours, theirs))
    assert np.abs(ours - theirs).max() < 1e-3 * ours.max()


def test_an_atom_sits_at_its_position_to_a_millionth_of_an_angstrom():
    pixel, shape = 0.2, (60, 48)
    position = np.array([[1.234, -2.345, 0.1]])
    image = potential.slice_potentials(
        position, np.array([29]), shape, (pixel, pixel), np.array([0.0, 1.0]), dtype=np.float64
    )[0]
    centre = np.zeros(shape)
    centre[shape[0] // 2, shape[1] // 2] = 1
    phase = np.angle(np.fft.fft2(image) / np.fft.fft2(centre)) / (-2 * np.pi)
    assert phase[1, 0] * shape[0] * pixel == pytest.approx(-2.345, abs=1e-6)
    assert phase[0, 1] * shape[1] * pixel == pytest.approx(1.234, abs=1e-6)


def test_slices_share_out_the_projection():
    rng = np.random.default_rng(3)
    positions = rng.uniform(-4, 4, (40, 3))
    numbers = rng.choice([29, 79], 40)
    grid = ((48, 64), (0.25, 0.2))
    whole = potential.slice_potentials(positions, numbers, *grid, np.array([-4.0, 4.0]), dtype=np.float64)
    cut = potential.slice_potentials(positions, numbers, *grid, np.linspace(-4, 4, 9), dtype=np.float64)
    np.testing.assert_allclose(cut.sum(axis=0), whole[0], atol=1e-9 * whole.max())
    lowest = int(np.argmin(positions[:, 2]))
    first = potential.slice_potentials(
        positions[[lowest]], numbers[[lowest]], *grid, np.linspace(-4, 4, 9), dtype=np.float64
    )
    assert first[0].sum() > 0
    assert not first[1:].any()


def test_single_precision_is_the_double_one_to_rounding():
    rng = np.random.default_rng(4)
    positions = rng.uniform(-4, 4, (20, 3)) + np.array([500.0, 0, 0])
    numbers, edges = np.full(20, 79), np.array([-4.0, 0.0, 4.0])
    single = potential.slice_potentials(positions, numbers, (64, 64), (0.2, 0.2), edges)
    double = potential.slice_potentials(positions, numbers, (64, 64), (0.2, 0.2), edges, dtype=np.float64)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, atol=3e-6 * double.max())


def test_thermal_motion_damps_by_debye_and_waller():
    k = np.linspace(0, 2, 9)
    ratio = potential.projected_potential_spectrum(79, k, 0.08) / potential.projected_potential_spectrum(79, k)
    np.testing.assert_allclose(ratio, np.exp(-2 * (np.pi * 0.08 * k) ** 2), rtol=1e-12)


def test_transmission_turns_phase_only():
    volts = np.array([[[0.0, 1000.0, 2000.0]]])
    values = potential.transmission_functions(volts, 300e3)
    np.testing.assert_allclose(np.abs(values), 1)
    np.testing.assert_allclose(np.angle(values[0, 0]), [0, 0.65262, 1.30523], atol=1e-4)


def test_what_does_not_exist_is_refused():
    with pytest.raises(ConfigurationError, match="'Xx' is not a chemical symbol"):
        potential.atomic_number("Xx")
    with pytest.raises(ConfigurationError, match="atomic number 120"):
        potential.scattering_factor(120, np.zeros(1))
    with pytest.raises(ConfigurationError, match="1 of 1 atoms lie outside the slices"):
        potential.slice_potentials(np.array([[0, 0, 9.0]]), np.array([29]), (8, 8), (0.2, 0.2), np.array([0.0, 1.0]))
    assert potential.chemical_symbol(potential.atomic_number("Lr")) == "Lr"
