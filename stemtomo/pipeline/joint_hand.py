"""Whether the tilts turn the way the poses say: both hands are reconstructed and compared.

Projections cannot tell: a volume mirrored in z, seen at tilts of the other sign, has the same ones. Only propagation
through the specimen breaks the tie, by little, so both hands get the same short run from zero and their losses are
compared tilt by tilt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from stemtomo.io.store import Store
from stemtomo.pipeline.joint_epochs import epochs_of, reconstruct
from stemtomo.pipeline.joint_parts import Tilt
from stemtomo.pipeline.joint_steps import JointRun
from stemtomo.pipeline.progress import Progress
from stemtomo.pipeline.settings.joint import JointSettings

#: Differences of fewer standard errors over the tilts decide nothing.
_SIGNIFICANT = 3.0


@dataclass(frozen=True)
class Hand:
    """Mean misfit per detector pixel of every tilt, (tilt,): as the poses say, and with the signs turned round."""

    losses: np.ndarray
    mirrored_losses: np.ndarray

    @property
    def significance(self) -> float:
        """Mean rise of the loss of the mirrored hand in standard errors over the tilts; positive for right signs."""
        rise = self.mirrored_losses - self.losses
        error = float(rise.std(ddof=1)) / math.sqrt(len(rise)) if len(rise) > 1 else math.inf
        return float(rise.mean()) / error if error else math.copysign(math.inf, rise.mean()) if rise.any() else 0.0

    @property
    def verdict(self) -> Literal["right", "wrong", "undecided"]:
        """What the patterns say of the signs of the poses."""
        if abs(self.significance) < _SIGNIFICANT:
            return "undecided"
        return "right" if self.significance > 0 else "wrong"

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        right, mirrored = float(self.losses.mean()), float(self.mirrored_losses.mean())
        lower = int((self.losses < self.mirrored_losses).sum())
        numbers = (
            f"loss {right:.4g} per pixel as the poses say, {mirrored:.4g} with the signs of theta and psi turned round;"
            f" lower as they say at {lower} of {len(self.losses)} tilts"
        )
        said = {
            "right": "the sign of the tilt fits",
            "wrong": "the sign of the tilt is wrong and the volume mirrored in z: turn theta and psi round",
            "undecided": "the sign of the tilt cannot be told: the specimen may be too thin, or the dose too low",
        }
        return f"{said[self.verdict]} ({numbers})"

    def to_attrs(self) -> dict[str, Any]:
        """Return JSON attributes."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "loss": float(self.losses.mean()),
            "mirrored_loss": float(self.mirrored_losses.mean()),
            "standard_errors": min(max(self.significance, -1e6), 1e6),
        }


def short_run(settings: JointSettings) -> JointSettings:
    """Return the settings of the run that each hand gets."""
    return settings.model_copy(
        update={
            "start": "zero",
            "single_slice_epochs": min(settings.single_slice_epochs, 3),
            "sweeps": min(settings.sweeps, 2),
            "settling_sweeps": min(settings.settling_sweeps, 3),
            "accelerated_epochs": 0 if settings.sweeps else min(settings.accelerated_epochs, 8),
        }
    )


def compare_hands(store: Store, run: JointRun, progress: Progress) -> Hand:
    """Reconstruct both hands shortly from zero, from the patterns of ``run``, and return their losses."""
    told = short_run(run.settings)
    schedule = epochs_of(told)
    progress.start("joint: sign of the tilt", 2 * len(schedule), "epoch")
    found = []
    for tilts in (run.tilts, [_mirrored(tilt) for tilt in run.tilts]):
        hand = JointRun(run.executor, tilts, told, run.patterns)
        found.append(hand.losses(reconstruct(store, hand, schedule, None, progress)))
    progress.finish("joint: sign of the tilt")
    return Hand(*found)


def _mirrored(tilt: Tilt) -> Tilt:
    pose = tilt.view.pose.mirrored
    return replace(tilt, single=replace(tilt.single, pose=pose), view=replace(tilt.view, pose=pose))
