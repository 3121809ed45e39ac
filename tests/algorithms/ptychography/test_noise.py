import numpy as np
import pytest

from stemtomo.algorithms.ptychography.noise import expected_loss, mean_curvature
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


@pytest.mark.parametrize(
    ("loss", "mean"), [("poisson", 0.05), ("poisson", 1.0), ("poisson", 30.0), ("anscombe", 30.0), ("amplitude", 300.0)]
)
def test_the_curvature_is_what_the_mean_gradient_rises_by(mean, loss):
    counts = np.random.default_rng(0).poisson(mean, size=(1, 400_000, 1)).astype(np.float64)
    step, slopes = 1e-3, []
    for change in (-step, step):
        model = np.full(counts.shape, np.sqrt(mean) + change, dtype=np.complex128)
        patches.residual(model, counts, loss)
        slopes.append(model.real.mean())
    rise = (slopes[1] - slopes[0]) / (2 * step)
    # Curvature 1 is a slope of 2 per unit of the modulus.
    assert 2 * mean_curvature(np.full(3, mean), loss) == pytest.approx(rise, rel=0.03)
