"""One tilt of ptychography and one of tomography on CuPy arrays: the numbers of the host, to single precision."""

import numpy as np
import pytest

from stemtomo import backend
from stemtomo.algorithms.ptychography import solver
from stemtomo.physics.projection import backproject, project
from tests.benchmarks import gpu, ptychography, tomography

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("conditions", [ptychography.SINGLE_SLICE, ptychography.SIX_SLICES._replace(batches=4)])
def test_the_multislice_gradient_is_that_of_the_host(conditions):
    state, model = ptychography.prepare(conditions)
    counts = ptychography.simulated_counts(state, model)
    begin, there = gpu.on_device(state, model)
    everything = np.arange(len(counts))
    here, device = (
        solver.gradients(state, model, counts, everything),
        solver.gradients(begin, there, backend.to_device(counts), everything),
    )
    for ours, theirs in ((here.phase, device.phase), (here.probe, device.probe)):
        np.testing.assert_allclose(backend.to_host(theirs), ours, atol=2e-4 * np.abs(ours).max())
    assert device.loss == pytest.approx(here.loss, rel=1e-5)


def test_a_tilt_of_ptychography_ends_where_the_host_ends():
    conditions = ptychography.SINGLE_SLICE
    state, model = ptychography.prepare(conditions)
    counts = ptychography.simulated_counts(state, model)
    begin, there = gpu.on_device(state, model)
    ours, losses = ptychography.solve(state, model, counts, conditions.batches, 20)
    found, device_losses = ptychography.solve(begin, there, backend.to_device(counts), conditions.batches, 20)
    assert device_losses == pytest.approx(losses, rel=1e-3)
    bright = solver.illumination(state.probe, model.grid) > 0.3 * solver.illumination(state.probe, model.grid).max()
    np.testing.assert_allclose(backend.to_host(found.phase)[0][bright], ours.phase[0][bright], atol=5e-3)


def test_projector_and_adjoint_are_those_of_the_host():
    where = tomography.geometry(48, 1.0)
    volume = np.random.default_rng(0).random((48, 48, 48), dtype=np.float32)
    images = project(where, volume, where.whole_volume, where.whole_image)
    there = project(where, backend.to_device(volume), where.whole_volume, where.whole_image)
    np.testing.assert_allclose(backend.to_host(there), images, rtol=1e-4, atol=1e-4 * images.max())
    back = backproject(where, images, where.whole_image, where.whole_volume)
    device = backproject(where, there, where.whole_image, where.whole_volume)
    np.testing.assert_allclose(backend.to_host(device), back, rtol=1e-4, atol=1e-4 * back.max())
