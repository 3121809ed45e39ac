import pytest

from stemtomo.algorithms.ptychography.advice import advise


def test_a_good_reconstruction_needs_no_advice():
    assert advise([0.3, 0.12, 0.101], 0.1, 19.5, 43.0) == []


@pytest.mark.parametrize(
    ("losses", "thickness", "word"),
    [
        ([0.3, float("nan")], 0.0, "not finite"),
        ([0.3, 0.2, 0.4], 0.0, "rose"),
        ([0.3, 0.2, 0.19], 0.0, "defocus_c1_angstrom"),
        ([0.3, 0.1, 0.08], 0.0, "follows the noise"),
        ([0.3, 0.101], 60.0, "depth of focus"),
    ],
)
def test_each_way_to_fail_is_named(losses, thickness, word):
    (sentence,) = advise(losses, 0.1, thickness, 43.0)
    assert word in sentence
