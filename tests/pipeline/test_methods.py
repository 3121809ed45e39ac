"""Every method of reconstruction: the volume, its R factors, and that blocks and threads do not change it."""

import os
from pathlib import Path

import numpy as np
import pytest

from stemtomo.algorithms import total_variation
from stemtomo.algorithms.tomography import genfire
from stemtomo.algorithms.tomography.solver import Measurement
from stemtomo.distributed import Checkpoint
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import TiltSeries
from stemtomo.physics.projection import TiltGeometry, render, seen_extent
from stemtomo.pipeline.config import TomographySettings
from stemtomo.pipeline.descent import Problem
from stemtomo.pipeline.reconstruction import reconstruct
from tests.algorithms.tomography import phantom

SERIES = TiltSeries.from_degrees(np.linspace(-66, 66, 13), np.linspace(-3, 2, 13))
ATOMS = phantom.ball(40, 5.0, 2.5)
SHAPE = (32, 28, 32)
TRUTH = phantom.volume(*ATOMS, SHAPE)
PLAIN = ("wbp", "genfire")
ITERATIONS = {"fista": 60, "fista_tv": 40, "resire": 150, "sirt": 150, "cgls": 12, "wbp": 1, "genfire": 40}
CORRELATION = {"fista": 0.98, "fista_tv": 0.97, "resire": 0.95, "sirt": 0.93, "cgls": 0.85, "wbp": 0.75, "genfire": 0.9}
DATA = Path(os.environ.get("STEMTOMO_DATA", Path(__file__).parents[3] / "shared" / "data"))


def _problem(method, shifts=None, noise=0.0):
    shifts = np.random.default_rng(2).normal(size=(13, 2)) if shifts is None else shifts
    images = phantom.images(*ATOMS, SERIES.rotations, shifts, SHAPE[1:]).astype(np.float32)
    images += noise * images.max() * np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    geometry = TiltGeometry(SERIES.rotations, shifts, SHAPE, SHAPE[1:], 1 if method in PLAIN else 2)
    width = 0.0 if method in PLAIN else 0.5
    return Problem(Measurement(images, np.ones(images.shape, bool), np.ones(13, np.float32), width), geometry, 1.0, 1.0)


def _run(method, blocks=1, threads=1, **settings):
    problem = _problem(method)
    values = {"iterations": ITERATIONS[method], "refine_shifts": False, "tv_weight_rad": 0.002, **settings}
    found = reconstruct(problem, TomographySettings(method=method, blocks=blocks, **values), ThreadExecutor(threads))
    return render(found.coefficients, problem.geometry.degree, problem.measured.element_width_px), found


@pytest.mark.parametrize("method", list(ITERATIONS))
def test_every_method_finds_the_atoms_of_the_phantom(method):
    volume, found = _run(method)
    assert np.corrcoef(volume.ravel(), TRUTH.ravel())[0, 1] > CORRELATION[method]
    # Without positivity the missing wedge holds what it likes, and a crude grid is a few percent off.
    assert volume.sum() == pytest.approx(TRUTH.sum(), rel=0.25 if method in PLAIN else 0.1)
    assert found.factors.r1.shape == found.factors.r2.shape == (13,)
    assert found.losses[-1] == min(found.losses)


@pytest.mark.parametrize("method", ["fista_tv", "resire", "sirt", "cgls", "wbp"])
def test_blocks_do_not_change_a_method(method):
    iterations = {"iterations": min(ITERATIONS[method], 12)}
    one, many = (_run(method, blocks, threads, **iterations)[0] for blocks, threads in ((1, 1), (5, 2)))
    np.testing.assert_allclose(many, one, atol=2e-4 * np.abs(one).max())


@pytest.mark.parametrize("method", ["cgls", "fista_tv"])
def test_an_interrupted_method_goes_on_to_the_same_bits(method, tmp_path):
    class Stop(Exception):
        pass

    class Progress:
        def start(self, stage, total, unit=""):
            pass

        def finish(self, stage):
            pass

        def advance(self, n=1, **numbers):
            self.left -= n
            if self.left <= 0:
                raise Stop

    settings = TomographySettings(method=method, iterations=9, checkpoint_every=4, blocks=2, refine_shifts=False)
    problem, executor, progress = _problem(method), ThreadExecutor(1), Progress()
    whole = reconstruct(problem, settings, executor)
    checkpoint, progress.left = Checkpoint(tmp_path / "c", "mark"), 6
    with pytest.raises(Stop):
        reconstruct(problem, settings, executor, progress, checkpoint)
    again = reconstruct(problem, settings, executor, checkpoint=checkpoint)
    np.testing.assert_array_equal(again.coefficients, whole.coefficients)
    assert again.losses == whole.losses


def test_conjugate_gradients_end_at_the_least_squares_solution():
    """A tiny problem whose normal equations numpy solves."""
    rng = np.random.default_rng(1)
    shape, rotations = (3, 4, 3), SERIES.rotations[::2]
    geometry = TiltGeometry(rotations, np.zeros((7, 2)), shape, (6, 6))
    images = rng.random((7, 6, 6)).astype(np.float32)
    from stemtomo.physics.projection import project

    columns = [
        project(geometry, unit.reshape(shape), geometry.whole_volume, geometry.whole_image).ravel()
        for unit in np.eye(36)
    ]
    expected = np.linalg.lstsq(np.stack(columns, axis=1), images.ravel(), rcond=None)[0]
    measured = Measurement(images, np.ones(images.shape, bool), np.ones(7, np.float32))
    settings = TomographySettings(method="cgls", iterations=80, refine_shifts=False)
    found = reconstruct(Problem(measured, geometry, 1.0, 1.0), settings, ThreadExecutor(1)).coefficients
    np.testing.assert_allclose(found.ravel(), expected, atol=5e-3 * np.abs(expected).max())


def test_pixels_held_out_are_predicted_worse_than_those_that_were_used():
    problem = _problem("fista", noise=0.1)
    settings = TomographySettings(iterations=100, free_fraction=0.1, refine_shifts=False)
    found = reconstruct(problem, settings, ThreadExecutor(1))
    assert found.r_free > 1.1 * found.factors.r1.mean()
    assert _run("fista", iterations=2)[1].r_free is None
    assert _run("genfire", iterations=5)[1].r_free > 0


def test_smoothing_lowers_the_total_variation_and_is_optimal():
    """Any change of the smoothed volume makes the objective of the proximal step larger."""
    rng = np.random.default_rng(3)
    values, weight = rng.random((6, 7, 5)), 0.05
    smooth = total_variation.smoothed(values, weight)

    def objective(volume):
        return 0.5 * np.sum((volume - values) ** 2) + weight * total_variation.total_variation(volume)

    assert total_variation.total_variation(smooth) < 0.7 * total_variation.total_variation(values)
    least = objective(smooth)
    for _ in range(20):
        assert objective(np.maximum(smooth + 0.02 * rng.normal(size=values.shape), 0)) > least


def test_smoothing_in_pieces_is_the_smoothing_of_the_whole_to_the_bit():
    values = np.random.default_rng(4).random((70, 5, 6), dtype=np.float32)
    for voxels in (1, 45 * 30, 10**6):
        pieces = total_variation.smoothed_in_pieces(values, 0.1, piece_voxels=voxels)
        np.testing.assert_array_equal(pieces, total_variation.smoothed(values, 0.1))


@pytest.mark.parametrize("gridding", ["fft", "dft"])
def test_grid_points_hold_the_transform_of_the_volume(gridding):
    """Against the Fourier transform of Gaussian atoms, written down."""
    width, edge = 1.1, 48
    positions = np.array([[3.0, -4.0, 2.0], [-2.0, 1.0, 5.0]])
    shifts = np.random.default_rng(0).normal(size=(13, 2))
    scale = phantom.PIXEL_ANGSTROM
    images = phantom.images(positions * scale, np.ones(2), SERIES.rotations, shifts, (24, 24), width * scale)
    found = genfire.gridded(images * scale**2, SERIES.rotations, shifts, edge, 0.3, gridding)
    kz, ky, kx = np.unravel_index(found.indices, (edge, edge, edge // 2 + 1))
    k = np.stack([kx, (ky + edge // 2) % edge - edge // 2, (kz + edge // 2) % edge - edge // 2], axis=1) / edge
    envelope = np.exp(-2 * np.pi**2 * width**2 * (k**2).sum(axis=1))
    expected = (envelope[:, None] * np.exp(-2j * np.pi * k @ positions.T)).sum(axis=1)
    error = np.linalg.norm(found.values - expected) / np.linalg.norm(expected)
    assert error < (0.2 if gridding == "fft" else 0.1)
    assert len(found.indices) > 2000


def test_a_film_that_goes_on_is_reconstructed_in_a_wider_volume():
    """Material beside the images is seen by the tilts; without room for it, it is put into the wrong voxels."""
    rng = np.random.default_rng(4)
    rotations = TiltSeries.from_degrees(np.linspace(-60, 60, 17)).rotations
    positions = (rng.random((400, 3)) - 0.5) * [40.0, 12.0, 6.0]  # Å: wider than the 12.8 Å of the images
    weights, depth, view = np.ones(400), 18, (32, 32)
    images = phantom.images(positions, weights, rotations, np.zeros((17, 2)), view).astype(np.float32)
    wide = seen_extent(rotations, view, depth)
    assert wide[0] == 32
    assert wide[1] > 80
    truth = phantom.volume(positions, weights, (depth, 32, 32))
    correlations = []
    for shape in ((depth, 32, 32), (depth, *wide)):
        geometry = TiltGeometry(rotations, np.zeros((17, 2)), shape, view)
        measured = Measurement(images, np.ones(images.shape, bool), np.ones(17, np.float32), 0.5)
        settings = TomographySettings(iterations=40, refine_shifts=False)
        found = reconstruct(Problem(measured, geometry, 1.0, 1.0, False), settings, ThreadExecutor(1))
        start = shape[2] // 2 - 16
        volume = render(found.coefficients, 2, 0.5)[:, :, start : start + 32]
        correlations.append(np.corrcoef(volume[:, 4:-4, 8:-8].ravel(), truth[:, 4:-4, 8:-8].ravel())[0, 1])
    assert correlations[1] > correlations[0] + 0.05
    assert correlations[1] > 0.85


@pytest.mark.heavy
@pytest.mark.skipif(not (DATA / "genfire_vesicle").is_dir(), reason="needs the vesicle of GENFIRE (set STEMTOMO_DATA)")
def test_the_vesicle_of_genfire_is_found_better_than_by_genfire():
    with np.load(DATA / "genfire_vesicle" / "data.npz") as data:
        images, truth = data["proj"].transpose(2, 1, 0), data["gt_volume"].transpose(2, 1, 0)
        theirs, error = data["genfire_rec"][:, :, 60:120].transpose(2, 1, 0), float(data["errK"][0, -1])
        phi, theta, psi = data["tilt_euler_zyz_deg"].T
    rotations = TiltSeries.from_degrees(theta, phi, psi).rotations
    fourier = genfire.gridded(images, rotations, np.zeros((61, 2)), 180, 0.3, "dft")
    found = genfire.reconstruct(fourier, (60, 60, 60), 50)
    assert found.errors[-1] < error
    ours, reference = (np.corrcoef(v.ravel(), truth.ravel())[0, 1] for v in (found.volume, theirs))
    assert ours > reference


def test_the_cubic_footprint_comes_nearer_to_the_phantom():
    """Without noise, the same series and iterations: linear, quadratic, cubic."""
    rotations = TiltSeries.from_degrees(np.linspace(-70, 70, 31)).rotations
    atoms, edge = phantom.ball(120, 7.0, 2.4), 48
    images = phantom.images(*atoms, rotations, np.zeros((31, 2)), (edge, edge)).astype(np.float32)
    truth, missed = phantom.volume(*atoms, (edge,) * 3), {}
    for degree in (1, 2, 3):
        geometry = TiltGeometry(rotations, np.zeros((31, 2)), (edge,) * 3, (edge, edge), degree)
        measured = Measurement(images, np.ones(images.shape, bool), np.ones(31, np.float32))
        settings = TomographySettings(iterations=100, refine_shifts=False)
        found = reconstruct(Problem(measured, geometry, 1.0, 1.0), settings, ThreadExecutor(1))
        volume = render(found.coefficients, degree)
        missed[degree] = 1 - np.corrcoef(volume.ravel(), truth.ravel())[0, 1]
    assert missed[3] < 0.9 * missed[2]
    assert missed[2] < 0.7 * missed[1]
