"""What a curve of losses and the geometry say to a person: which way a reconstruction went wrong, if it did."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: A loss this many times the noise floor is more than noise and a good model leave.
_FAR_ABOVE = 1.5
#: A loss this far below the floor follows the noise.
_BELOW = 0.9


def advise(
    losses: Sequence[float], noise_floor: float, slice_thickness_angstrom: float, depth_of_focus_angstrom: float
) -> list[str]:
    """Return sentences of advice; none where nothing is to be said.

    Parameters
    ----------
    losses
        Loss per pixel after every epoch.
    noise_floor
        What counting noise alone leaves.
    slice_thickness_angstrom
        Zero for a single slice.
    depth_of_focus_angstrom
        lambda / alpha².
    """
    found = []
    if not all(math.isfinite(loss) for loss in losses):
        return ["the loss is not finite: the steps diverge; lower step and probe_step, or check the dose of the frames"]
    if losses[-1] > 1.05 * min(losses):
        found.append(
            f"the loss rose from {min(losses):.4g} to {losses[-1]:.4g}: the steps diverge; lower step, probe_step or"
            " momentum, or use fewer batches"
        )
    elif losses[-1] > _FAR_ABOVE * noise_floor:
        found.append(
            f"the loss ended at {losses[-1] / noise_floor:.1f} times what counting noise leaves ({noise_floor:.4g}):"
            " the model does not describe the patterns; check the sign of defocus_c1_angstrom (positive is overfocus),"
            " scan.rotation_deg, the order of the axes and scan.step_angstrom ('stemtomo calibrate' measures them), or"
            " use more slices, probe_modes or epochs"
        )
    if losses[-1] < _BELOW * noise_floor:
        found.append(
            f"the loss ended at {losses[-1] / noise_floor:.2f} of what counting noise leaves: the object follows the"
            " noise; use fewer epochs or slices, or a larger depth_blur_angstrom"
        )
    if slice_thickness_angstrom > depth_of_focus_angstrom:
        found.append(
            f"slices of {slice_thickness_angstrom:.3g} Å are thicker than the depth of focus"
            f" ({depth_of_focus_angstrom:.3g} Å): amplitude and phase mix; use more, thinner slices"
        )
    return found
