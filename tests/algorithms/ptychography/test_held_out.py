import numpy as np

from stemtomo.algorithms.ptychography.held_out import Stopping, split


def test_patterns_are_either_used_or_held_out():
    used, held = split(200, 0.05, 3)
    assert len(held) == 10
    np.testing.assert_array_equal(np.sort(np.concatenate([used, held])), np.arange(200))
    assert (np.diff(used) > 0).all()
    assert len(split(200, 0.0, 3)[1]) == 0


def test_the_lowest_loss_is_remembered_and_patience_ends():
    stopping = Stopping(patience=2)
    lowest = [stopping.tell(loss) for loss in (5.0, 4.0, 4.1, 3.9)]
    assert lowest == [True, True, False, True]
    assert not stopping.over
    stopping.tell(3.95)
    stopping.tell(3.9)  # no lower by more than rounding
    assert stopping.over
    assert stopping.best == 3
