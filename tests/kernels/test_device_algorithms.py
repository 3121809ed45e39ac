"""Array functions beside the main stages on a pretended GPU: numbers as on the host, nothing CuPy would refuse."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.atoms import projected as atoms_projected
from stemtomo.algorithms.atoms import splitting, uncertainty
from stemtomo.algorithms.imaging import denoising, noise_spectrum, resolution, sparsity, unwrapping
from stemtomo.algorithms.joint import atoms as joint_atoms
from stemtomo.algorithms.joint import pose, solver, transfer, view
from stemtomo.algorithms.local_orbital import model as local_orbital
from stemtomo.algorithms.ptychography import adaptive, constraints, gauges, mistilt, regularisation
from stemtomo.algorithms.ptychography.windows import object_grid
from stemtomo.algorithms.tomography import conjugate, genfire, matching, quality, refinement
from stemtomo.algorithms.tomography.solver import Measurement
from stemtomo.backend import to_host
from stemtomo.geometry import Pose, rotation_about
from stemtomo.physics.projection import POSE_COLUMNS, TiltGeometry
from tests.kernels import host_cuda, pretend_device

pytestmark = pytest.mark.skipif(host_cuda.COMPILER is None, reason="no C++ compiler to run the CUDA source on the host")

ROTATIONS = np.stack([rotation_about("y", angle) for angle in (-0.5, 0.0, 0.5)])
GEOMETRY = TiltGeometry(ROTATIONS, np.zeros((3, 2)), (8, 9, 8), (9, 11))
VIEW = view.View((Pose(0.3, 0.1, 0.2)), view.Box((12, 12, 12), 1.0), (14, 13), 3, 0, 4, (0.3, 0.4))


def real(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def offsets(put):
    images, places = put(real(2, 16, 15)), matching.offsets_px(1.0)
    found = matching.probabilities(matching.overlaps(images, images, places), 9.0, 1.0, places, np.ones(2))
    return *matching.expected(found, places), matching.averaged(images, found, places)


def object_constraints(put):
    u = put(real(3, 16, 15) + 1j * real(3, 16, 15, seed=1))
    yield constraints.kz_filtered(u, 1.0)
    yield constraints.notched(u, (4.0, 4.0))
    yield constraints.vacuum_at_zero(u, put(np.ones((16, 15))), 10.0)
    yield constraints.flattened(put(real(2, 16, 15)), 0.1)
    yield regularisation.blurred_along_beam(u, 1.0, (1.0, 0.5, 1.5))
    yield gauges.without(u, gauges.Gauge(np.ones(3), np.full(2, 0.01), np.full(2, 0.3)), np.array([8.0, 7.0]))


def fitted_geometry(put):
    positions = np.stack(np.meshgrid(np.arange(3) * 1.3, np.arange(3) * 1.1), axis=-1).reshape(-1, 2) - 1
    grid = object_grid(positions, (16, 18), (0.4, 0.5))
    probe = put(real(2, 16, 18) + 1j * real(2, 16, 18, seed=1))
    data = mistilt.Data(probe, put(np.random.default_rng(2).poisson(3, size=(9, 16, 18)).astype(np.float64)))
    stack = adaptive.Stack(grid, 0.02, 3, weights=(1.0, 0.5, 1.5))
    found = mistilt.fit(
        adaptive.Geometry(np.zeros(2), 5.0), stack, data, np.arange(9), 2, free=mistilt.Free(focus=True)
    )
    return found.phase, found.geometry.tilt_rad_xy, np.array(found.path)


def images_of_crystals(put):
    image, valid = put(real(40, 41)), put(np.ones((40, 41), bool))
    noise = noise_spectrum.noise_of_halves(image, put(real(40, 41, seed=1)), valid)
    yield denoising.denoise_lowrank(image, noise)
    yield sparsity.fourier_sparse(
        image, noise, threshold=4, keep_below=0.05, radius=0.03, column_width_px=1.5, protect_above=4
    ).image
    yield resolution.shell_correlation(image, put(real(40, 41, seed=2)), 1.0, put(np.ones((40, 41))), (1.0, 0.0)).value
    yield unwrapping.phase_sum(put(np.exp(3j * real(2, 20, 21))), put(np.ones((20, 21)))).phase


def joint(put):
    volume, lit = put(real(12, 12, 12)), put(np.ones((14, 13)))
    slices = view.slices_of(volume, VIEW)
    yield view.slices_adjoint(slices, VIEW)
    yield pose.pose_step(pose.turn_changes(volume, VIEW), slices, lit, 1.0)
    gain = transfer.frequency_gain(put(real(1, 16, 16) + 0j), (14, 13), 10.0)
    for peak in (None, 3.0):
        yield solver.descended(slices, {"phase": slices, "illumination": lit}, solver.SweepRule(), 1.0, peak, gain)
    model = joint_atoms.Atoms(real(3, 3), np.ones(3), np.full(3, 0.8))
    yield from joint_atoms.felt(slices, model, np.zeros(3, int), joint_atoms.Shapes.points(1), VIEW)


def volumes(put):
    measured = Measurement(put(real(3, 9, 11)), put(np.ones((3, 9, 11), bool)), put(np.ones(3)))
    control, zero = conjugate.begin(measured), put(np.zeros((8, 9, 8)))
    windows = (GEOMETRY.whole_volume, GEOMETRY.whole_image)
    block = conjugate.Block(volume=zero, direction=zero, gradient=zero)
    block = conjugate.gradient(block, GEOMETRY, *windows, control["residual"])
    squared = conjugate.squared_norm(block)
    block = conjugate.turn(block, squared, 0.0)
    control = conjugate.advance(conjugate.project_direction(block, GEOMETRY, *windows), squared, control, measured)
    yield conjugate.travel(block, control["step"])["volume"]
    yield quality.factors(control["images"], measured, np.ones((3, 9, 11), bool)).r1
    images = (control["images"], measured.images, control["residual"], measured.valid)
    yield refinement.gauss_newton_poses(GEOMETRY, *images, POSE_COLUMNS, 1.0, refinement.Prior(ROTATIONS, 0.01))
    fourier = genfire.gridded(real(3, 9, 11), ROTATIONS, np.zeros((3, 2)), 16)
    yield genfire.reconstruct(fourier, (8, 9, 8), 3, like=put(np.zeros(1, np.float32))).volume


def atoms(put):
    model = atoms_projected.AtomModel(real(4, 3), np.ones(4), np.full(4, 0.8))
    measured = atoms_projected.ProjectedImages(
        put(real(3, 20, 22)), put(np.ones((3, 20, 22), bool)), ROTATIONS, np.zeros((3, 2)), 0.5
    )
    weighed = replace(measured, weights=atoms_projected.noise_weights(model, measured), background_angstrom=2.0)
    yield atoms_projected.loss(model, weighed)[1].positions
    yield splitting.elongation(model, weighed).significance
    yield uncertainty.position_covariance(model, weighed)
    yield measured.binned(2).images


def orbitals(put):
    probes = np.abs(real(1, 4, 6, 6))
    model = local_orbital.Orbitals(
        real(4, 3), np.ones(4), np.full(4, 0.6), probes, 1.0, np.zeros((3, 2)), np.zeros((3, 3))
    )
    series = local_orbital.FocalSeries(put(real(3, 20, 22)), ROTATIONS, np.zeros(3, int), 0.5)
    sums = local_orbital.sums(model, series)
    return sums.positions, sums.probes, np.array(local_orbital.weighted_residual(model, series))


@pytest.mark.parametrize(
    "function",
    [offsets, object_constraints, fitted_geometry, images_of_crystals, joint, volumes, atoms, orbitals],
    ids=lambda function: function.__name__,
)
def test_host_and_device_agree(function, monkeypatch):
    on_host = [np.asarray(found) for found in function(np.asarray)]
    on_device = [to_host(found) for found in function(pretend_device.use(monkeypatch))]
    for host, device in zip(on_host, on_device, strict=True):
        np.testing.assert_allclose(device, host, rtol=1e-5, atol=1e-5 * np.abs(host).max())
