"""The adaptive propagator against an upright one on reference data: equal passes, slices and regularisation."""

import numpy as np
import pytest

from stemtomo.algorithms.ptychography.adaptive import Geometry
from tests import mistilted
from tests.benchmarks import mistilted_columns
from tests.data import needs


@needs(mistilted.NAME)
@pytest.mark.heavy
def test_the_tilt_in_the_propagator_beats_straightening_afterwards():
    specimen = mistilted.load()
    # As the search finds it (tested in test_mistilt): within 0.2 mrad and 1 Å.
    geometry = Geometry(np.array([5.91e-3, -2.89e-3]), 101.7 / mistilted_columns.SLICES)
    found = mistilted_columns.compare(specimen, geometry)
    for name in ("APP, tied slices", "APP, free slices"):
        score, shape = found[name]
        assert score["r"] > 0.97
        assert score["r_blur"] > 0.99
        assert np.hypot(*shape.shifts_pm["TiO against Sr"]) < 1
        assert np.hypot(*shape.shifts_pm["O against TiO"]) < 2
        assert shape.elongation < 1.03
        assert shape.scatter_pm < 3
    for name in ("FPP", "FPP, straightened"):
        score, shape = found[name]
        assert score["r"] < 0.95
        assert shape.elongation > 1.08
