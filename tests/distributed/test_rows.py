"""The one idea, proved on tiny real physics: five algorithms as local work on parts and a sum, on 1 or N parts.

Every test runs the same engine calls on threads and on two worker processes, with the work cut in different ways.
"""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.windows import object_grid, tile
from stemtomo.distributed import Parts
from stemtomo.geometry import Detector, Optics, Pose, Scan, TiltSeries
from stemtomo.kernels import atoms, masks, patches
from stemtomo.physics import multislice, projection, rotation
from stemtomo.physics.electron import wavelength_angstrom
from stemtomo.physics.probe import probe_wave
from stemtomo.physics.propagation import fresnel_propagator

DETECTOR = Detector((16, 16), 1 / 6.4)
PIXEL = DETECTOR.object_pixel_angstrom_yx
OPTICS = Optics(energy_ev=300e3, semiangle_rad=25e-3, aberrations={"C10": 60.0})
PROPAGATOR = fresnel_propagator((16, 16), PIXEL, wavelength_angstrom(300e3), 20.0, dtype=np.complex128)
PROBE = probe_wave(OPTICS, (16, 16), PIXEL, intensity=1000.0, dtype=np.complex128)


# -- quicklook: a part owns a block of frames; virtual images are disjoint, patterns are summed ------------------------


@functools.cache
def frames():
    return np.random.default_rng(0).poisson(0.7, size=(9, 7, 12, 10)).astype(np.uint16)


def look(rows):
    weights = np.stack([np.ones((12, 10)), np.indices((12, 10))[1]])
    sums = masks.frame_sums(frames()[rows[0] : rows[1]], weights)
    return {"images": np.moveaxis(sums.weighted, -1, 0), "pattern": sums.pattern_sum}


@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 1, 2, 5, 9)])
def test_quicklook_over_blocks_of_frames(workers, cuts):
    blocks = list(itertools.pairwise(cuts))
    parts = Parts.create(workers, look, blocks)
    pattern = workers.gather(parts.pick("pattern").sum())
    images = workers.gather(parts.pick("images").sum_into((9, 7), [(rows, (0, 7)) for rows in blocks]))
    np.testing.assert_array_equal(pattern, frames().sum(axis=(0, 1), dtype=np.float64))
    np.testing.assert_array_equal(images[0], frames().sum(axis=(2, 3), dtype=np.float64))
    np.testing.assert_allclose(images[1], np.einsum("yxqk,k->yx", frames(), np.arange(10.0)), rtol=1e-12)


# -- ptychography: a part owns a tile of positions and its object window; halos are summed, the probe is global --------


@functools.cache
def scan_model():
    grid = object_grid(Scan((6, 8), (1.7, 1.3)).positions(), (16, 16), PIXEL)
    return solver.Model(grid, (PROPAGATOR,), "anscombe", "phase")


@functools.cache
def counts():
    model = scan_model()
    y, x = np.indices(model.grid.shape_yx)
    truth = np.stack([0.4 * (1 + np.sin(0.5 * y) * np.cos(0.4 * x)), 0.3 * (1 + np.cos(0.3 * y + 0.6 * x))])
    state = replace(solver.State.start(model, PROBE), phase=truth)
    return np.random.default_rng(1).poisson(solver.patterns(state, model, np.arange(48)))


def build_tile(where):
    local, _ = tile(scan_model().grid, where)
    model = replace(scan_model(), grid=local)
    return {"model": model, "counts": counts()[where], "state": solver.State.start(model, 1.1 * PROBE)}


def tile_gradients(part):
    sums = solver.gradients(part["state"], part["model"], part["counts"], np.arange(len(part["counts"])))
    halo = {"phase": sums.phase, "illumination": sums.illumination}
    return {"halo": halo, "total": {"probe": sums.probe, "loss": sums.loss, "positions": sums.positions}}


def peak(halo):
    return float(halo["illumination"].max())


def tile_update(part, total, peaks, halo):
    sums = solver.Gradients(halo["phase"], total["probe"], halo["illumination"], total["loss"], total["positions"])
    rule = solver.Nesterov(step=0.7, momentum=0.6)
    return {**part, "state": solver.update(part["state"], sums, rule, True, max(peaks))}


def reconstruct_tiles(workers, tiles, epochs=6):
    windows = [tile(scan_model().grid, where)[1] for where in tiles]
    parts, losses = Parts.create(workers, build_tile, tiles), []
    for _ in range(epochs):
        local = parts.map(tile_gradients)
        halos, total = local.pick("halo").halo_sum(windows), local.pick("total").sum()
        parts = parts.map(tile_update, total, list(halos.map(peak).handles), each=[halos])
        losses.append(workers.submit(dict.get, total, "loss"))
    return windows, [part["state"] for part in parts.gather()], workers.gather(losses)


def test_ptychography_of_two_tiles_with_halo_sums(workers):
    order = np.arange(48).reshape(6, 8)
    _, (whole,), losses = reconstruct_tiles(workers, [order.ravel()])
    y0, x0 = scan_model().grid.corners.min(axis=0)
    assert losses == sorted(losses, reverse=True)
    tilings = {
        "two": [order[:, :5].ravel(), order[:, 5:].ravel()],
        "uneven four": [order[:1, :3].ravel(), order[:1, 3:].ravel(), order[1:, :6].ravel(), order[1:, 6:].ravel()],
    }
    for tiles in tilings.values():
        windows, states, tiled_losses = reconstruct_tiles(workers, tiles)
        np.testing.assert_allclose(tiled_losses, losses, rtol=1e-12)
        for ((top, bottom), (left, right)), state in zip(windows, states, strict=True):
            expected = whole.phase[:, top - y0 : bottom - y0, left - x0 : right - x0]
            np.testing.assert_allclose(state.phase, expected, atol=1e-12)
            np.testing.assert_allclose(state.probe, whole.probe, atol=1e-11)


# -- tomography: a part owns a block of the volume; projections are summed, residuals go back --------------------------

GEOMETRY = projection.TiltGeometry(
    rotations=TiltSeries.from_degrees([-60, -20, 15, 55], [0, 3, -2, 1], [1, 0, 2, -1]).rotations,
    shifts_px=np.array([[0.3, -0.2], [0, 0], [-0.4, 0.1], [0.2, 0.5]]),
    volume_shape=(12, 12, 12),
    image_shape=(14, 14),
)


@functools.cache
def projections():
    volume = np.random.default_rng(2).random((12, 12, 12))
    return projection.project(GEOMETRY, volume, GEOMETRY.whole_volume, GEOMETRY.whole_image)


def build_block(block):
    window = projection.footprint(GEOMETRY, block)
    return {"block": block, "window": window, "values": np.zeros([stop - start for start, stop in block])}


def block_projection(part):
    return projection.project(GEOMETRY, part["values"], part["block"], part["window"])


def residual_images(images):
    return images - projections()


def block_step(part, images):
    gradient = projection.backproject(GEOMETRY, images, part["window"], part["block"])
    return {**part, "values": np.maximum(part["values"] - gradient / 48, 0)}


def reconstruct_blocks(workers, blocks, iterations=8):
    windows = [projection.footprint(GEOMETRY, block) for block in blocks]
    parts = Parts.create(workers, build_block, blocks)
    for _ in range(iterations):
        images = workers.submit(residual_images, parts.map(block_projection).sum_into((14, 14), windows))
        parts = parts.map(block_step, each=[parts.cut(images, windows)])
    return parts.pick("values").gather(), float(np.abs(workers.gather(images)).mean())


def test_tomography_over_blocks_of_the_volume(workers):
    (whole,), misfit = reconstruct_blocks(workers, [GEOMETRY.whole_volume])
    assert misfit < 0.2 * np.abs(projections()).mean()
    full = (0, 12)
    for blocks in (
        [(full, (0, 5), full), (full, (5, 12), full)],
        [((0, 7), full, (0, 3)), ((7, 12), full, (0, 3)), (full, full, (3, 12))],
    ):
        for block, values in zip(blocks, reconstruct_blocks(workers, blocks)[0], strict=True):
            np.testing.assert_allclose(values, whole[tuple(slice(*pair) for pair in block)], atol=1e-12)


# -- joint multislice tomography: a part owns a tilt (and a tile of it); volume gradients are summed -------------------

POSES = {"a": Pose(0.3), "b": Pose(-0.8, phi_rad=0.1)}


def tilt_model(where):
    grid = object_grid(Scan((4, 4), (1.6, 1.6), periodic=True).positions(), (16, 16), PIXEL, (6.4, 6.4))
    return replace(grid, corners=grid.corners[where], shifts_px=grid.shifts_px[where])


def tilt_patterns(volume, pose, where, measured=None):
    """Return patterns of a tilted volume of phase per slice, or the loss and its gradient in the volume."""
    slices = rotation.to_laboratory(volume, pose)
    transmission = np.exp(1j * slices)
    grid = tilt_model(where)
    model = solver.Model(grid, (PROPAGATOR,) * 15, "amplitude", "phase")
    state = solver.State(slices, PROBE[None])
    if measured is None:
        return solver.patterns(state, model, np.arange(len(where)))
    probes = solver.probes_at(PROBE, grid, np.arange(len(where)))
    spectra, incident = multislice.forward(probes, transmission, grid.corners, model.propagators)
    loss = patches.residual(spectra, measured, "amplitude").sum()
    gradient = np.zeros_like(transmission)
    multislice.adjoint(spectra, incident, transmission, grid.corners, model.propagators, gradient)
    return {"loss": float(loss), "volume": rotation.to_sample((transmission.conj() * gradient).imag, pose)}


def build_view(spec):
    name, where = spec
    truth = 0.05 * np.random.default_rng(4).random((16, 16, 16))
    return {"pose": POSES[name], "where": where, "counts": tilt_patterns(truth, POSES[name], where)}


def view_gradient(view, volume):
    return tilt_patterns(volume, view["pose"], view["where"], view["counts"])


def volume_step(volume, sums):
    return np.maximum(volume - 2e-5 * sums["volume"], 0)


def solve_views(workers, views, iterations=4):
    parts, volume, losses = Parts.create(workers, build_view, views), np.full((16, 16, 16), 0.01), []
    for _ in range(iterations):
        sums = parts.map(view_gradient, volume).sum()
        volume = workers.submit(volume_step, volume, sums)
        losses.append(workers.submit(dict.get, sums, "loss"))
    return workers.gather(volume), workers.gather(losses)


def test_joint_tomography_over_tilts_and_tiles(workers):
    every = np.arange(16)
    serial, losses = solve_views(workers, [("a", every), ("b", every)])
    assert losses == sorted(losses, reverse=True)
    parts = [("a", every[:5]), ("b", every[:9]), ("a", every[5:]), ("b", every[9:])]
    split, split_losses = solve_views(workers, parts)
    np.testing.assert_allclose(split, serial, atol=1e-13)
    np.testing.assert_allclose(split_losses, losses, rtol=1e-12)


# -- local orbitals: a part owns images; gradients of atoms (by block) and of the probe are summed ---------------------

RNG = np.random.default_rng(5)
ATOMS = {"x": RNG.uniform(-7, 7, 6), "y": RNG.uniform(-7, 7, 6), "z": RNG.uniform(-7, 7, 6)}


def draw(positions, angle):
    image = np.zeros((24, 24))
    u = positions["x"] * np.cos(angle) - positions["z"] * np.sin(angle) + 12
    atoms.render(image, u, positions["y"] + 12, np.ones(6), np.full(6, 1.3), 7)
    return image, u


def build_images(angles):
    return [(angle, draw(ATOMS, angle)[0]) for angle in angles]


def atom_gradients(images, guess):
    total = {"x": np.zeros(6), "y": np.zeros(6), "z": np.zeros(6), "loss": 0.0}
    for angle, measured in images:
        image, u = draw(guess, angle)
        _, du, dv, _ = atoms.gather(image - measured, u, guess["y"] + 12, np.ones(6), np.full(6, 1.3), 7)
        total["x"] += np.cos(angle) * du
        total["z"] -= np.sin(angle) * du
        total["y"] += dv
        total["loss"] += 0.5 * float(np.sum((image - measured) ** 2))
    return total


def atom_step(guess, sums):
    return {axis: guess[axis] - 12.0 * sums[axis] for axis in "xyz"}


def fit_atoms(workers, groups, steps=40):
    parts, guess = Parts.create(workers, build_images, groups), {k: v + 0.3 for k, v in ATOMS.items()}
    for _ in range(steps):
        sums = parts.map(atom_gradients, guess).sum()
        guess = workers.submit(atom_step, guess, sums)
    return workers.gather(guess)


def test_atom_gradients_over_images(workers):
    one = fit_atoms(workers, [(-0.6, 0.5)])
    for axis in "xyz":
        assert np.abs(one[axis] - ATOMS[axis]).max() < 0.05
        np.testing.assert_allclose(fit_atoms(workers, [(-0.6,), (0.5,)])[axis], one[axis], atol=1e-12)
