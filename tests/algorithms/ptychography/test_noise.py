import numpy as np
import pytest

from stemtomo.algorithms.ptychography.noise import expected_loss


@pytest.mark.parametrize("mean", [0.01, 0.3, 2.0, 40.0, 3000.0])
@pytest.mark.parametrize(("loss", "offset"), [("amplitude", 0.0), ("anscombe", 0.375)])
def test_the_floor_is_what_drawn_counts_show(mean, loss, offset):
    counts = np.random.default_rng(0).poisson(mean, size=400_000)
    drawn = np.mean((np.sqrt(counts + offset) - np.sqrt(mean + offset)) ** 2)
    assert expected_loss(np.full(5, mean), loss) == pytest.approx(drawn, rel=0.02)


def test_bright_pixels_tend_to_a_quarter():
    assert expected_loss(np.full(3, 9000.0), "anscombe") == pytest.approx(0.25, rel=1e-3)
