import itertools

import numpy as np
import pytest

from stemtomo.algorithms.quasi_newton import minimise


def quadratic(point):
    """A complex and a real variable of very different curvature, coupled; the minimum is (1 + 2i, 3)."""
    z, x = point[0] - (1 + 2j), point[1] - 3.0
    loss = float(np.sum(np.abs(z) ** 2) + 1e6 * np.sum(x**2) + 100 * np.sum(z.real * x[0]))
    return loss, (2 * z + 100 * x[0], 2e6 * x + 100 * z.real.sum())


def start():
    return np.zeros(5, complex), np.zeros(1)


def test_the_gradient_of_the_example_is_right():
    rng = np.random.default_rng(0)
    point, turn = (rng.normal(size=5) + 0j, rng.normal(size=1)), (rng.normal(size=5) + 1j, rng.normal(size=1))
    values = [quadratic(tuple(p + s * 1e-6 * t for p, t in zip(point, turn, strict=True)))[0] for s in (1, -1)]
    slope = sum(np.vdot(g, t).real for g, t in zip(quadratic(point)[1], turn, strict=True))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_a_badly_scaled_quadratic_is_solved():
    found = minimise(quadratic, start(), (np.ones(5), np.array(1e-6)), 40)
    np.testing.assert_allclose(found.point[0], 1 + 2j, rtol=1e-5)
    np.testing.assert_allclose(found.point[1], 3.0, rtol=1e-8)


def test_steps_keep_to_their_limit_and_the_loss_never_rises():
    seen = [start()]
    losses = [quadratic(start())[0]]

    def follow(iterate):
        seen.append(iterate.point)
        losses.append(iterate.loss)
        return len(seen) == 6

    found = minimise(
        quadratic, start(), (np.ones(5), np.array(1e-6)), 40, largest_step=(None, 0.1), on_iteration=follow
    )
    assert len(seen) == 6
    assert found.evaluations >= 6
    assert all(abs(b[1][0] - a[1][0]) <= 0.1 + 1e-12 for a, b in itertools.pairwise(seen))
    assert all(b < a for a, b in itertools.pairwise(losses))
    assert found.point[0].dtype == complex


def test_one_element_that_is_astray_holds_nobody_up_where_elements_are_cut_singly():
    target = np.concatenate([[1000.0], np.linspace(-0.5, 0.5, 50)])

    def far(point):
        return 0.5 * float(((point[0] - target) ** 2).sum()), (point[0] - target,)

    start, limit = (np.zeros(51),), [1.0]
    whole, singly = (minimise(far, start, (np.ones(51),), 3, largest_step=limit, singly=s) for s in (False, True))
    np.testing.assert_allclose(singly.point[0][1:], target[1:], atol=1e-12)
    assert singly.point[0][0] == pytest.approx(3)
    assert np.abs(whole.point[0][1:] - target[1:]).max() > 0.4


def test_a_first_step_that_its_limit_cuts_a_thousandfold_is_still_shortened():
    def quartic(point):
        return float((point[0] ** 4).sum()), (4 * point[0] ** 3,)

    found = minimise(quartic, (np.ones(1),), (np.array(1e6),), 20, largest_step=[100.0])
    assert abs(found.point[0][0]) < 0.1


def test_a_loss_that_is_no_number_is_never_an_iterate():
    def walled(point):
        value = float((point[0][0] - 1) ** 2) if abs(point[0][0]) < 0.5 else np.nan
        return value, (2 * (point[0] - 1),)

    found = minimise(walled, (np.zeros(1),), (np.array(1e9),), 5)
    assert np.isfinite(found.loss)
    assert found.loss <= 1
