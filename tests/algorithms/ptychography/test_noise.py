import numpy as np
import pytest

from stemtomo.algorithms.ptychography.noise import expected_loss
from stemtomo.kernels import patches


@pytest.mark.parametrize("mean", [0.01, 0.3, 2.0, 40.0, 3000.0])
@pytest.mark.parametrize("loss", ["amplitude", "anscombe", "poisson"])
def test_the_floor_is_what_drawn_counts_show(mean, loss):
    counts = np.random.default_rng(0).poisson(mean, size=(1, 400_000, 1)).astype(np.float64)
    model = np.full(counts.shape, np.sqrt(mean), dtype=np.complex128)
    drawn = patches.residual(model, counts, loss)[0] / counts.size
    assert expected_loss(np.full(5, mean), loss) == pytest.approx(drawn, rel=0.02)


def test_bright_pixels_tend_to_the_limits_of_their_losses():
    assert expected_loss(np.full(3, 9000.0), "anscombe") == pytest.approx(0.25, rel=1e-3)
    assert expected_loss(np.full(3, 9000.0), "poisson") == pytest.approx(0.5, rel=1e-3)
