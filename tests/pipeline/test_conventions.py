"""Every convention of the geometry, pinned by patterns of an independent simulator (abTEM)."""

import json
from dataclasses import replace

import numpy as np
import pytest

from stemtomo.geometry import Pose
from stemtomo.pipeline.simulate import SimulationSettings, diffraction_patterns
from stemtomo.pipeline.specimen import Specimen
from tests.data import FOLDER, needs

SET = "cuau_tilt"
pytestmark = needs(SET)


@pytest.fixture(scope="module")
def series():
    metadata = json.loads((FOLDER / SET / "metadata.json").read_text())
    truth = np.load(FOLDER / SET / "truth.npz")
    which = int(truth["noise_free_tilt_index"][0])
    frames = truth["noise_free_scaled"][0].astype(np.float64) / float(truth["noise_free_scale"])
    specimen = Specimen(truth["atoms_xyz_A"].astype(np.float64), truth["atomic_numbers"].astype(int))
    settings = SimulationSettings(
        defocus_c1_angstrom=metadata["defocus_C1_A"],
        defocus_plane_z_angstrom=metadata["defocus_reference_plane_z_A"],
        oversampling=3.0,
        slice_thickness_angstrom=1.0,
        phonon_configurations=2,
    )
    return specimen, Pose(np.radians(metadata["tilt_theta_deg"][which])), frames, settings


def misfit(specimen, pose, frames, settings):
    """R-factor of amplitudes over a few positions on and beside the particle."""
    chosen = [(12, 12), (8, 14), (15, 9), (3, 20)]
    positions = settings.scan.positions().reshape(*settings.scan_shape, 2)
    ours = diffraction_patterns(specimen, pose, np.array([positions[p] for p in chosen]), settings)
    theirs = np.array([frames[p] for p in chosen])
    return np.abs(np.sqrt(ours) - np.sqrt(theirs)).sum() / np.sqrt(theirs).sum()


def test_every_convention_matters(series):
    specimen, pose, frames, settings = series
    right = misfit(*series)
    assert right < 0.04  # few phonon configurations on both sides
    opposite = settings.model_copy(update={"defocus_c1_angstrom": -settings.defocus_c1_angstrom})
    assert misfit(specimen, pose, frames, opposite) > 3 * right
    assert misfit(specimen, pose, frames.swapaxes(0, 1), settings) > 2 * right
    assert misfit(specimen, pose, frames.swapaxes(2, 3), settings) > 2 * right
    assert misfit(specimen, pose, frames[..., ::-1], settings) > 2 * right
    assert misfit(specimen, replace(pose, theta_rad=-pose.theta_rad), frames, settings) > 2 * right
