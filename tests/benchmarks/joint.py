"""Joint tomography: a visit of one tilt (an epoch is one of each tilt) against the bare FFTs of its waves, one core."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stemtomo.algorithms.joint import solver
from stemtomo.algorithms.joint.transfer import frequency_gain
from stemtomo.algorithms.joint.view import Box, View, slices_adjoint, slices_of
from stemtomo.algorithms.ptychography.model import Model, State, patterns
from stemtomo.algorithms.ptychography.windows import object_grid, spread_batches
from stemtomo.geometry import Pose
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from tests.benchmarks.measure import Row, cost_row, cpu_seconds
from tests.benchmarks.ptychography import SINGLE_SLICE, fft_floor

_BOX = Box((96, 96, 96), 0.4)


def benchmark() -> list[Row]:
    """Measure a visit with one slice and with nine, and the turns of the volume alone."""
    rows = []
    for name, per_slice in (("1 slice", 96), ("9 slices of 4.4 Å", 11)):
        visit, model, view = prepare(per_slice)
        cost = cpu_seconds(visit, repeats=2)
        floor, library = fft_floor(model)
        rows.append(cost_row("joint", f"24x24 of 64x64, {name} (FFTs: {library})", cost, "CPU s/tilt", floor))
    volume = np.random.default_rng(0).random(_BOX.shape_zyx).astype(np.float32)
    turns = cpu_seconds(lambda: slices_adjoint(slices_of(volume, view), view))
    return [*rows, cost_row("joint", "96^3 turned there and back, of which", turns, "CPU s/tilt")]


def prepare(voxels_per_slice: int) -> tuple[Callable[[], np.ndarray], Model, View]:
    """Return a visit in four batches as a call, its model and its view."""
    given = SINGLE_SLICE
    window = given.detector.shape_yx
    grid = object_grid(given.scan.positions(), window, (0.4, 0.4))
    view = View.whole(Pose(0.6), _BOX, grid.shape_yx, voxels_per_slice)
    wavelength = wavelength_angstrom(given.optics.energy_ev)
    model = Model(grid, view.propagators(window, wavelength, np.dtype(np.complex64)), "anscombe", "phase")
    probe = probe_wave(given.optics, window, (0.4, 0.4), intensity=given.electrons)[None]
    z, y, x = np.indices(_BOX.shape_zyx) - 48
    volume = (0.02 * (z**2 + y**2 + x**2 < 28**2)).astype(np.float32)
    free, count = solver.Constraint(), len(grid.corners)
    means = patterns(State(slices_of(volume, view), probe), model, np.arange(count))
    seen = solver.Patterns(model, np.random.default_rng(0).poisson(means).astype(np.uint16), np.arange(count))

    def visit() -> np.ndarray:
        gain = frequency_gain(probe, grid.shape_yx, 10.0)
        start = slices = solver.start_slices(volume, view, free)
        for batch in spread_batches(count, 4, 0):
            sums = solver.gradients(seen, slices, probe, batch)
            assert sums is not None
            slices = solver.descended(slices, sums, solver.SweepRule(), 1.0, None, gain)
        return solver.turned_back(volume, slices - start, view, free, None, 1.0)

    return visit, model, view
