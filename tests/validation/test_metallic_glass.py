"""A cube from a published metallic glass in 55 noisy projections: atoms are added and dropped until all are there."""

import pytest

from tests.benchmarks.glass import found, simulated
from tests.data import needs


@pytest.mark.heavy
@pytest.mark.timeout(1500)
@needs("metallic_glass_models")
@pytest.mark.parametrize(
    ("r1", "share", "rmsd_pm"), [(0.14, 0.998, 9), (0.25, 0.995, 14), (0.355, 0.99, 20), (0.634, 0.88, 36)]
)
def test_the_atoms_of_a_glass_are_all_found(r1, share, rmsd_pm):
    # R1 of .355 and .634 in the cube are the noise per pixel that .14 and .25 are in the whole particle.
    result = found(simulated(28.0, 120, r1, 0.82), 0.82)
    print(r1, result)
    assert result["recall"] >= share
    assert result["precision"] >= share
    assert result["rmsd pm"] <= rmsd_pm
