"""Dark-field images by multislice: against abTEM, and how they differ from a sum over atoms."""

import numpy as np
import pytest

from stemtomo.algorithms.local_orbital.scattered import DarkField, dark_field_image
from stemtomo.algorithms.local_orbital.specimens import amorphous_particle, focal_tilt_series
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Optics, TiltSeries

PIXEL = 0.36
OPTICS = Optics(300e3, 25e-3, {"C10": 40.0})
STILL = {"phonon_rms_angstrom": 0.0, "finer": 3, "window_px": 100}


@pytest.mark.heavy
def test_it_is_the_image_that_abtem_computes():
    abtem = pytest.importorskip("abtem", reason="abtem is not installed: no independent simulator to compare with")
    ase = pytest.importorskip("ase", reason="ase is not installed")
    # On pixels of the waves: abTEM interpolates potentials between pixels, which damps high frequencies.
    pixels = np.array([[-12, 7], [8, -10], [2, 16], [12, 4], [-8, -6]]) * PIXEL / 3
    positions = np.c_[pixels, [-3.0, -1.0, 1.1, 3.0, 2.0]]
    numbers = np.full(5, 14)
    setup = DarkField(OPTICS, inner_mrad=32, outer_mrad=50, **STILL)
    ours = dark_field_image(positions, numbers, np.eye(3), setup, shape_yx=(24, 24), pixel_angstrom=PIXEL)
    edge = 100 * PIXEL / 3
    # Slices begin 1 Å above the first atom.
    middle, depth = edge / 2, positions[:, 2] + 4.0
    atoms = ase.Atoms("Si5", positions=np.c_[positions[:, :2] + middle, depth], cell=(edge, edge, 8.0))
    potential = abtem.Potential(
        atoms, gpts=100, slice_thickness=2.0, parametrization="lobato", projection="infinite", periodic=False
    )
    # The probe of abTEM is defined where the first slice acts, 3 Å above our rotation centre.
    probe = abtem.Probe(energy=300e3, semiangle_cutoff=25, defocus=-(40.0 - 3.0), gpts=100, extent=edge)
    rows = np.array([[10, 9], [13, 10], [12, 12], [9, 14], [15, 13], [11, 16]])
    scan = abtem.CustomScan((rows[:, ::-1] - 12) * PIXEL + middle)
    theirs = probe.scan(potential, scan=scan, detectors=abtem.AnnularDetector(32, 50)).compute().array
    np.testing.assert_allclose(ours[rows[:, 0], rows[:, 1]], theirs, rtol=0.02, atol=2e-5)


@pytest.mark.parametrize("defocus", [60.0, -60.0])
def test_focus_and_orientation_are_those_of_the_incoherent_images(defocus):
    positions = amorphous_particle(25, seed=3)
    rotation = TiltSeries.from_degrees((35.0,)).rotations
    optics = Optics(300e3, 25e-3, {"C10": defocus})
    shape = (46, 44)
    scattered = dark_field_image(
        positions, np.full(25, 14), rotation[0], DarkField(optics, window_px=80), shape_yx=shape, pixel_angstrom=PIXEL
    )
    alike = []
    for change in (0.0, -2 * defocus):
        options = {"shape_yx": shape, "pixel_angstrom": PIXEL, "width_angstrom": 0.2}
        summed = focal_tilt_series(positions, optics, rotation, np.array([change]), **options).images[0]
        alike.append(np.corrcoef(scattered.ravel(), summed.ravel())[0, 1])
    assert alike[0] > max(0.95, alike[1])


def test_a_detector_beyond_the_grid_is_refused():
    setup = DarkField(OPTICS, inner_mrad=80)
    with pytest.raises(ConfigurationError, match="raise finer"):
        dark_field_image(np.zeros((1, 3)), np.array([14]), np.eye(3), setup, shape_yx=(8, 8), pixel_angstrom=PIXEL)
