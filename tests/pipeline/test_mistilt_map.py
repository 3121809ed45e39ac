"""A mistilt per position from outside: a store in, the map out."""

import numpy as np
import pytest
from pydantic import ValidationError

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Detector, Optics
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ptychography import ptychography
from tests.algorithms.ptychography.test_mistilt_map import SCAN, bent_crystal
from tests.pipeline.test_mistilt import write


def test_the_stage_writes_the_map_of_a_bent_crystal(tmp_path):
    told, _, data, tilt, phase = bent_crystal()
    optics = Optics(300e3, 22e-3, {"C10": 60.0})
    store = write(tmp_path / "bent.zarr", data.counts, optics, SCAN, Detector((40, 40), 1 / (40 * 0.36)))
    settings = PtychographySettings(
        slices=4,
        slice_thickness_angstrom=25.0,
        object="complex",
        detector_padding=0.0,
        c1_at="entrance",
        epochs=20,
        refine_mistilt=True,
        mistilt_iterations=10,
        mistilt_map_smoothing_angstrom=1.2,
        electrons_per_pattern=1e5,
    )
    numbers = ptychography(store, settings, executor=ThreadExecutor(1))
    result = store.read("ptychography/000").compute()
    found = np.column_stack([result["mistilt_map_x_mrad"].values, result["mistilt_map_y_mrad"].values]) / 1e3
    inner = (np.abs(told) < 0.8 * np.abs(told).max(axis=0)).all(axis=1)
    assert np.sqrt(((found - tilt)[inner] ** 2).mean(axis=0)).max() < 0.5e-3
    assert len(numbers["loss"][0]) == 20
    assert numbers["loss"][0][-1] == pytest.approx(numbers["noise_floor"][0], rel=0.15)
    np.testing.assert_allclose(numbers["mistilt_mrad"][0], found.mean(axis=0) * 1e3)
    middle = tuple(slice(n // 2 - 8, n // 2 + 8) for n in phase.shape[1:])
    seen = result["phase_sum"].values[tuple(slice(n // 2 - 8, n // 2 + 8) for n in result["phase_sum"].shape)]
    assert np.corrcoef(seen.ravel(), phase[0].real[middle].ravel())[0, 1] > 0.95


def test_one_slice_has_no_map():
    with pytest.raises(ValidationError, match="at least 3 slices"):
        PtychographySettings(mistilt_map_smoothing_angstrom=1.0)
