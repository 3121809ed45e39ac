"""What runs on a GPU, run on a pretended one: the same numbers as on the host, and nothing that CuPy would refuse."""

from dataclasses import replace

import numpy as np
import pytest

from stemtomo import backend
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.tomography import refinement
from stemtomo.algorithms.tomography import solver as tomography_solver
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.distributed.trees import sum_trees
from stemtomo.distributed.windows import cut
from stemtomo.geometry import Detector, Optics, Pose, TiltSeries
from stemtomo.kernels import atoms, cuda, masks
from stemtomo.physics import potential
from stemtomo.physics.projection import TiltGeometry, backproject, project
from stemtomo.physics.rotation import to_laboratory
from stemtomo.pipeline import descent, lookup
from stemtomo.pipeline import reconstruction as tomography_stage
from stemtomo.pipeline.config import QuicklookSettings, TomographySettings
from stemtomo.pipeline.ptychography import ptychography
from tests.algorithms.ptychography.test_solver import experiment
from tests.kernels import host_cuda, pretend_device
from tests.pipeline.series import make_series

pytestmark = pytest.mark.skipif(host_cuda.COMPILER is None, reason="no C++ compiler to run the CUDA source on the host")


@pytest.fixture
def place(monkeypatch):
    return pretend_device.use(monkeypatch)


def on_device(model, state, place):
    model = replace(model, propagators=tuple(map(place, model.propagators)), mask=place(model.mask))
    return model, solver.State.start(model, place(state.probe))


@pytest.mark.parametrize(("kind", "step"), [("phase", 1.2), ("complex", 1.13)])
@pytest.mark.parametrize("loss", ["anscombe", "poisson"])
def test_ptychography(place, kind, step, loss):
    model, start, _, expected = experiment(2, kind, step, np.complex128, loss=loss, size=5)
    counts = np.random.default_rng(0).poisson(expected).astype(np.uint16)
    mask = np.ones(counts.shape[1:], bool)
    mask[2, 3] = False
    options = {"rules": [solver.Nesterov()] * 2, "batches": [3, 1], "probe_start": 0}
    model = replace(model, mask=mask)
    state, losses = solver.solve(start, model, counts, **options)
    there, begin = on_device(model, start, place)
    device, device_losses = solver.solve(begin, there, place(counts), **options)
    assert backend.is_device_array(device.phase)
    np.testing.assert_allclose(device.phase.get(), state.phase, atol=1e-10)
    np.testing.assert_allclose(device.probe.get(), state.probe, atol=1e-10 * np.abs(state.probe).max())
    assert device_losses == pytest.approx(losses, rel=1e-10)


def test_projector_and_tomography_with_shifts(place):
    rng = np.random.default_rng(0)
    rotations = TiltSeries.from_degrees([-40.0, 5.0, 50.0], phi_deg=[0.0, 1.0, 2.0]).rotations
    geometry = TiltGeometry(rotations, rng.normal(size=(3, 2)), (12, 10, 12), (10, 12))
    volume, images = rng.random((12, 10, 12)), rng.random((3, 10, 12))
    whole, image = geometry.whole_volume, geometry.whole_image
    projected = project(geometry, place(volume), whole, image)
    np.testing.assert_allclose(projected.get(), project(geometry, volume, whole, image), atol=1e-12)
    back = backproject(geometry, place(images), image, whole)
    np.testing.assert_allclose(back.get(), backproject(geometry, images, image, whole), atol=1e-12)
    valid = np.ones((3, 10, 12), bool)
    geometry = TiltGeometry(rotations, np.zeros((len(images), 2)), (images.shape[2],) * 3, images.shape[1:])
    arguments = (refinement.POSE_COLUMNS, 1.0, refinement.Prior(rotations, 0.03))
    seen = refinement.gauss_newton_poses(geometry, images, 3 * images, images - 0.5, valid, *arguments)
    there = refinement.gauss_newton_poses(
        geometry, place(images), place(3 * images), place(images - 0.5), place(valid), *arguments
    )
    np.testing.assert_allclose(there, seen, atol=1e-9)


def test_the_stages_choose_the_device_and_leave_the_same_results(place, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    geometry = TiltGeometry(
        TiltSeries.from_degrees([-50.0, 0.0, 40.0]).rotations, np.zeros((3, 2)), (16, 16, 16), (16, 16)
    )
    images = rng.random((3, 16, 16)).astype(np.float32)
    measured = tomography_solver.Measurement(images, np.ones(images.shape, bool), np.ones(3, np.float32), 0.8)
    problem = descent.Problem(measured, geometry, 0.4, 6.5e-4)
    settings = TomographySettings(iterations=10, blocks=2)
    on_host = tomography_stage.reconstruct(problem, settings, ThreadExecutor(1))
    monkeypatch.setattr(backend, "gpu_available", lambda: True)
    there = tomography_stage.reconstruct(problem, settings, ThreadExecutor(1))
    np.testing.assert_allclose(there.coefficients, on_host.coefficients, atol=1e-4 * on_host.coefficients.max())
    np.testing.assert_allclose(there.shifts_px, on_host.shifts_px, atol=1e-3)
    store = make_series(tmp_path / "tiny.zarr", tilts=1)
    numbers = ptychography(store, executor=ThreadExecutor(1))
    assert numbers["loss"][0][-1] == pytest.approx(numbers["noise_floor"][0], rel=0.15)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "u1", "<f4"])
def test_the_first_look(place, dtype, monkeypatch):
    """Images, patterns and superpixels of a store are those of the host, though pieces went to a GPU one by one."""
    frames = np.random.default_rng(0).poisson(3.0, (8, 12, 24, 24)).astype(dtype)
    told = lookup.detectors(Optics(300e3, 21e-3), Detector((24, 24), 0.12), QuicklookSettings())
    results = []
    for gpu in (True, False):
        monkeypatch.setattr(backend, "gpu_available", lambda gpu=gpu: gpu)
        look = lookup.BlockLook((0, 8, 0, 12), told[0], told[1].labels)
        for y in (0, 4):
            look.add(y, 0, frames[y : y + 4])
        results.append(look.result())
    device, host = results
    for kind in ("images", "patterns"):
        for name, values in host[kind].items():
            assert type(device[kind][name]) is np.ndarray
            np.testing.assert_allclose(device[kind][name], values, rtol=2e-5, atol=1e-4, err_msg=name)


def test_masks_atoms_rotation_and_potential(place):
    rng = np.random.default_rng(0)
    frames, weights = rng.poisson(3.0, (3, 4, 6, 7)).astype(np.uint16), rng.random((2, 6, 7)).astype(np.float32)
    sums = masks.frame_sums(place(frames), place(weights))
    np.testing.assert_allclose(sums.weighted.get(), masks.frame_sums(frames, weights).weighted, rtol=1e-5)
    table = [rng.uniform(3, 12, 5), rng.uniform(3, 12, 5), rng.random(5), np.full(5, 1.2)]
    image, there = np.zeros((16, 16)), place(np.zeros((16, 16)))
    atoms.render(image, *table, 5)
    atoms.render(there, *map(place, table), 5)
    np.testing.assert_allclose(there.get(), image, atol=1e-12)
    volume, pose = rng.random((8, 8, 8)), Pose(theta_rad=0.7, phi_rad=-0.2)
    np.testing.assert_allclose(to_laboratory(place(volume), pose).get(), to_laboratory(volume, pose), atol=1e-12)
    positions, edges = rng.uniform(-3, 3, (6, 3)), np.array([-4.0, 0.0, 4.0])
    arguments = (np.array([29, 79] * 3), (16, 18), (0.6, 0.6), edges)
    slices = potential.slice_potentials(place(positions), *arguments)
    np.testing.assert_allclose(slices.get(), potential.slice_potentials(positions, *arguments), atol=1e-3)


def test_sums_and_windows_of_parts_stay_on_the_device(place):
    array = np.arange(20.0).reshape(4, 5)
    total = sum_trees([{"a": place(array)}, {"a": place(array)}, {"a": place(array)}])
    np.testing.assert_array_equal(total["a"].get(), 3 * array)
    np.testing.assert_array_equal(cut(place(array), ((1, 3), (0, 2))).get(), array[1:3, :2])


def test_a_strided_array_is_refused_before_a_kernel_reads_it(place):
    with pytest.raises(ValueError, match=r"render_atoms.*contiguous"):
        atoms.render(place(np.zeros((8, 16)))[:, ::2], *(place(np.ones(1)) for _ in range(4)), 3)
    cuda.require_contiguous("anything", (np.zeros(3), 4, 5.0))
