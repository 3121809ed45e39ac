"""What a curve of losses and the geometry say to a person: which way a reconstruction went wrong, if it did."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: A loss this many times the noise floor is more than noise and a good model leave.
_FAR_ABOVE = 1.5
#: A loss this far below the floor follows the noise.
_BELOW = 0.9
#: Least linear overlap of neighbouring probes with which patterns still tie object and probe together.
_LEAST_OVERLAP = 0.6
#: Share of a window that a probe may fill.
_MOST_FILLED = 0.9


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


def advise_geometry(
    probe_angstrom: float,
    step_angstrom: float,
    window_angstrom: float,
    slice_thickness_angstrom: float = 0.0,
    depth_of_focus_angstrom: float = math.inf,
    depth_blur_angstrom: float | None = None,
) -> list[str]:
    """Return sentences on a scan and a stack of slices that cannot go well, before anything is computed.

    Parameters
    ----------
    probe_angstrom
        Diameter of the probe on the specimen, see :func:`probe_diameter_angstrom`.
    step_angstrom
        Largest step of the scan.
    window_angstrom
        Extent of a window: one over the detector's pixel.
    slice_thickness_angstrom
        Zero for a single slice.
    """
    found = []
    overlap = 1 - step_angstrom / probe_angstrom
    if overlap < _LEAST_OVERLAP:
        found.append(
            f"neighbouring probes of {probe_angstrom:.3g} Å overlap by {max(0.0, overlap):.0%}: patterns hardly tie"
            " object and probe together; scan with smaller steps or more defocus"
        )
    if probe_angstrom > _MOST_FILLED * window_angstrom:
        found.append(
            f"a probe of {probe_angstrom:.3g} Å does not fit a window of {window_angstrom:.3g} Å, one over the"
            " detector's pixel: it wraps around; use less defocus or a longer camera length, and check"
            " detector.pixel_inv_angstrom"
        )
    if 0 < slice_thickness_angstrom < depth_of_focus_angstrom and depth_blur_angstrom == 0:
        found.append(
            f"slices of {slice_thickness_angstrom:.3g} Å are thinner than the depth of focus"
            f" ({depth_of_focus_angstrom:.3g} Å) and nothing ties them: they become twins that share noise between"
            " them; leave depth_blur_angstrom at its default, or use fewer slices"
        )
    return found


def probe_diameter_angstrom(
    wavelength: float, semiangle_rad: float, c1_angstrom: float, depth_angstrom: float
) -> float:
    """Return the diameter of a probe in Å: its disc half the specimen's ``depth`` away from C1, and the Airy disc."""
    return 2 * semiangle_rad * (abs(c1_angstrom) + depth_angstrom / 2) + 1.22 * wavelength / semiangle_rad
