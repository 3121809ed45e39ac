"""Blocks give the atoms of the whole; finer samples and sharper atoms are what they say; answers are analytic."""

from functools import partial

import numpy as np
import pytest

from stemtomo.algorithms.atoms import fitting, sharpening, tracing
from stemtomo.algorithms.atoms.scoring import match_atoms
from tests.algorithms.atoms.test_tracing import VOXEL, gaussians, particle


def traced(volume, edge=None, **rules):
    read = partial(tracing.region_of, volume)
    return tracing.trace_blocks(volume.shape, read, VOXEL, tracing.TracingRules(**rules), block_voxels=edge)


@pytest.fixture(scope="module")
def noisy():
    positions, intensity = particle(spacing=2.4, radius=9.5)
    return positions, gaussians(positions, intensity, 0.45, wedge_deg=70, noise=0.03).astype(np.float32)


@pytest.mark.parametrize("edge", [17, 27])
@pytest.mark.parametrize("fit", ["gaussian", "polynomial"])
def test_an_atom_near_a_face_is_found_once(noisy, edge, fit):
    _, volume = noisy
    whole, blocks = traced(volume, fit=fit), traced(volume, edge, fit=fit)
    np.testing.assert_array_equal(blocks.integrated, whole.integrated)
    np.testing.assert_allclose(blocks.positions, whole.positions, atol=1e-9)
    np.testing.assert_allclose(blocks.width_angstrom, whole.width_angstrom, rtol=1e-7)


def test_blocks_of_sharper_and_finer_volumes_are_those_of_the_whole(noisy):
    volume = noisy[1][10:44, 10:44, 10:44]
    rules = {"deconvolution_angstrom": 0.35, "upsampling": 2, "margin_angstrom": 0.5}
    whole, blocks = traced(volume, **rules), traced(volume, 18, **rules)
    assert len(blocks) == len(whole)
    order = [np.lexsort(found.positions.round(2).T) for found in (whole, blocks)]
    np.testing.assert_allclose(blocks.positions[order[1]], whole.positions[order[0]], atol=1e-3)


def test_blocks_cover_every_voxel_once():
    count = np.zeros((31, 8, 50), int)
    for block in tracing.volume_blocks(count.shape, 16):
        count[block] += 1
    assert (count == 1).all()


def test_known_places_are_measured_as_tracing_measures_them(noisy):
    _, volume = noisy
    found = traced(volume)
    read, rules = partial(tracing.region_of, volume), tracing.TracingRules()
    for edge in (None, 20):
        measured = tracing.measure_atoms(volume.shape, read, VOXEL, found.positions, rules, block_voxels=edge)
        np.testing.assert_array_equal(measured.positions, found.positions)
        # Tracing integrates about the maximum, and not about the fitted centre.
        np.testing.assert_allclose(measured.integrated, found.integrated, rtol=0.05)


def test_samples_between_voxels_are_those_of_the_wave():
    count, factor = 48, 3
    wave = [np.cos(2 * np.pi * f * np.arange(count) + p) for f, p in ((0.31, 0.2), (0.17, 1.0), (0.38, 0.5))]
    fine = [
        np.cos(2 * np.pi * f * np.arange(count * factor) / factor + p)
        for f, p in ((0.31, 0.2), (0.17, 1.0), (0.38, 0.5))
    ]
    volume = np.einsum("i,j,k->ijk", *wave).astype(np.float32)
    inside = (slice(30, -30),) * 3
    np.testing.assert_allclose(
        sharpening.upsampled(volume, factor)[inside], np.einsum("i,j,k->ijk", *fine)[inside], atol=0.01
    )


def test_deconvolution_parts_what_had_run_together_and_keeps_its_sum():
    width = 0.75
    positions = np.array([[-0.75, 0.2, 0.1], [0.75, 0.2, 0.1]])
    volume = gaussians(positions, np.ones(2), width, count=40).astype(np.float32)
    assert len(traced(volume, smoothing_angstrom=0.0, minimum_distance_angstrom=1.0)) == 1
    found = traced(
        volume,
        smoothing_angstrom=0.0,
        minimum_distance_angstrom=1.0,
        deconvolution_angstrom=width,
        deconvolution_noise=1e-3,
        threshold=0.4,
    )
    match = match_atoms(found.positions, positions, 0.3)
    assert (match.recall, match.precision) == (1, 1)
    sharp = sharpening.deconvolved(volume, width / VOXEL, 1e-3)
    assert sharp.sum() == pytest.approx(volume.sum(), rel=1e-3)


def test_the_polynomial_has_its_maximum_and_curvature_where_the_gaussian_has():
    sigma = 1.6
    centres = np.array([[15.3, 16.1, 14.8], [16.0, 15.4, 15.0]])
    grid = np.indices((32, 32, 32), dtype=float)
    for centre in centres:
        squared = ((grid - centre[:, None, None, None]) ** 2).sum(axis=0)
        volume = 5 * np.exp(-0.5 * squared / sigma**2)
        fit = fitting.fit_polynomials(volume, np.rint(centre)[None] + 0.2, 2.0)
        np.testing.assert_allclose(fit.centres[0], centre, atol=0.02)
        assert fit.width[0] == pytest.approx(sigma, rel=0.12)
        assert fit.amplitude[0] == pytest.approx(5, rel=0.05)


def test_a_maximum_at_a_face_is_left_out_where_asked():
    positions = np.array([[0.0, 0.0, -10.4], [0.0, 0.0, -6.5], [3.0, 3.0, 0.0]])
    volume = gaussians(positions, np.full(3, 100.0), 0.45, count=64)[5:-5, 5:-5, 5:-5].astype(np.float32)
    assert len(traced(volume)) == 3
    assert len(traced(volume, margin_angstrom=0.6)) == 2
