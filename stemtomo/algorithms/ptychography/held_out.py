"""Patterns that take no part in a reconstruction and tell when it begins to follow the noise.

The loss of patterns that are fitted falls for ever; that of patterns held out falls as long as the object gets better
and rises once it follows the noise of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

#: Share by which a loss must fall to count as lower.
_LOWER = 1e-4


def split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted indices of patterns that are used, and of those held out, a random ``share`` of ``count``."""
    if share <= 0:
        return np.arange(count), np.zeros(0, dtype=np.int64)
    order = np.random.default_rng([seed, 1]).permutation(count)
    held = max(1, round(share * count))
    return np.sort(order[held:]), np.sort(order[:held])


@dataclass
class Stopping:
    """Remembers when the loss of held-out patterns was lowest, and says when it has not fallen for long enough."""

    patience: int
    losses: list[float] = field(default_factory=list)
    best: int = -1
    """Epoch of the lowest loss, counted from the first told; -1 before any."""

    def tell(self, loss: float) -> bool:
        """Note the next loss; return whether it is the lowest so far."""
        self.losses.append(loss)
        if self.best < 0 or loss < (1 - _LOWER) * self.losses[self.best]:
            self.best = len(self.losses) - 1
            return True
        return False

    @property
    def over(self) -> bool:
        """Whether the loss has not fallen for ``patience`` epochs."""
        return len(self.losses) - 1 - self.best >= self.patience
