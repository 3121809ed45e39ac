import pytest

from stemtomo.algorithms.ptychography.advice import advise, advise_geometry, probe_diameter_angstrom


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


def test_a_probe_is_as_wide_as_its_defocus_and_its_aperture_make_it():
    # 2 x 21 mrad x 200 Å is 8.4 Å, the Airy disc to its first zero 1.14 Å; 100 Å of specimen add 2.1 Å.
    assert probe_diameter_angstrom(0.0197, 0.021, -200.0, 0.0) == pytest.approx(9.54, abs=0.01)
    assert probe_diameter_angstrom(0.0197, 0.021, 200.0, 100.0) == pytest.approx(11.64, abs=0.01)


@pytest.mark.parametrize(
    ("probe", "step", "window", "thickness", "blur", "word"),
    [
        (8.0, 4.0, 25.0, 0.0, None, "overlap by 50%"),
        (8.0, 9.0, 25.0, 0.0, None, "overlap by 0%"),
        (24.0, 1.0, 25.0, 0.0, None, "wraps around"),
        (8.0, 1.0, 25.0, 10.0, 0.0, "twins"),
    ],
)
def test_a_scan_or_stack_that_cannot_go_well_is_named(probe, step, window, thickness, blur, word):
    (sentence,) = advise_geometry(probe, step, window, thickness, 43.0, blur)
    assert word in sentence


def test_usual_conditions_need_no_advice():
    assert advise_geometry(8.4, 1.6, 25.6) == []
    assert advise_geometry(8.4, 0.4, 25.6, 19.5, 43.0, None) == []
