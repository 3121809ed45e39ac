"""The report on alignment: what was found and what is wrong stands on the page."""

import numpy as np

from stemtomo.geometry import TiltSeries
from stemtomo.pipeline.alignment import align
from stemtomo.pipeline.config import AlignmentSettings, TomographySettings
from stemtomo.pipeline.tomography import tomography
from stemtomo.reporting import report
from tests.algorithms.tomography import phantom
from tests.pipeline.projected import phase_store

SERIES = TiltSeries.from_degrees(np.linspace(-60, 60, 9))
ATOMS = phantom.ball(40, 5.0, 2.5)


def test_a_store_of_projections_alone_is_reported_with_angles_misfits_and_diagnoses(tmp_path):
    shifts = np.random.default_rng(0).uniform(-2, 2, (9, 2))
    flat = (ATOMS[0] * [1, 0.8, 0.6], ATOMS[1])
    images = phantom.images(*flat, SERIES.rotations, shifts, (36, 36)).astype(np.float32)
    store = phase_store(tmp_path / "s.zarr", SERIES, np.ascontiguousarray(images.transpose(0, 2, 1)))
    align(store, AlignmentSettings(refine_angles=True, joint_iterations=30))
    tomography(store, TomographySettings(iterations=10, free_fraction=0.05))
    page = report(store.path).read_text(encoding="utf-8")
    for words in (
        "The tilt axis seems to lie",
        "Sinogram",
        "Angles refined, less those given",
        "Misfit of the volume",
        "R-free of what was held out",
        "+joint",
    ):
        assert words in page
