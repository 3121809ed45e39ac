"""What the store keeps of a tilt that ptychography has reconstructed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from stemtomo import backend
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.noise import expected_loss
from stemtomo.algorithms.ptychography.padding import to_detector_pixels
from stemtomo.geometry import Detector, Optics, Scan
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.solving import Solved, extra_variables

_NOISE_POSITIONS = 64


def result_of_solved(
    solved: Solved,
    settings: PtychographySettings,
    optics: Optics,
    detector: Detector,
    lit: backend.Array | None = None,
) -> xr.Dataset:
    """Return what the store keeps of a tilt that was solved; ``lit`` is its illumination (Y, X), where it is known."""
    per_pixel = 1 / float(np.prod(detector.shape_yx))
    model = solved.model
    state = solver.untied(solved.state, model.slices, model.weights)
    losses = [loss * per_pixel for loss in solved.losses]
    dataset = result_of(state, model, losses, settings, optics, lit, solved.patterns)
    return dataset.assign(extra_variables(solved, detector, per_pixel)).assign_attrs(
        best_epoch=solved.best_epoch, masked_pixels=0 if model.mask is None else int((~model.mask).sum())
    )


def result_of(
    state: solver.State,
    model: solver.Model,
    losses: list[float],
    settings: PtychographySettings,
    optics: Optics,
    lit: backend.Array | None = None,
    seen: Callable[[np.ndarray], backend.Array] | None = None,
) -> xr.Dataset:
    """Return object, probe, losses and noise floor of a reconstruction.

    Parameters
    ----------
    lit
        Its illumination (Y, X), where it is known.
    seen
        Its patterns at positions, where there is more to them than object and probe.
    """
    window, detector = model.grid.window_yx, model.detector_yx or model.grid.window_yx
    phase = to_detector_pixels(backend.to_host(state.phase), window, detector)
    transmission = np.exp(1j * phase).astype(np.complex64)
    pixels = window[0] * window[1] / (detector[0] * detector[1])
    lit = solver.illumination(state.probe, model.grid) if lit is None else lit
    illumination = np.maximum(to_detector_pixels(backend.to_host(lit), window, detector), 0) * np.float32(pixels)
    modes = to_detector_pixels(backend.to_host(state.probe), window, detector) * np.float32(np.sqrt(pixels))
    powers = np.sum(np.abs(modes) ** 2, axis=(1, 2))
    thickness, weights = settings.mean_slice_angstrom, settings.slice_weights or (1.0,) * settings.slices
    return xr.Dataset(
        {
            "object": (("slice", "y", "x"), transmission),
            "phase_sum": (("y", "x"), phase.real.sum(axis=0).astype(np.float32)),
            "illumination": (("y", "x"), illumination),
            "probe": (("probe_y", "probe_x"), modes[0]),
            "loss": (("epoch",), np.array(losses)),
        },
        attrs={
            "pixel_angstrom": [
                p * w / d for p, w, d in zip(model.grid.pixel_angstrom_yx, window, detector, strict=True)
            ],
            "window_px": list(window),
            "mode_power": (powers / powers.sum()).tolist(),
            "slice_thickness_angstrom": thickness,
            "slice_thicknesses_angstrom": [weight * thickness for weight in weights],
            # The stack is centred on the rotation centre, and a slice acts in its middle.
            "first_slice_z_angstrom": (weights[0] - settings.slices) / 2 * thickness,
            "energy_kev": optics.energy_ev / 1e3,
            "noise_floor": noise_floor(model, seen or (lambda where: solver.patterns(state, model, where))),
            "loss_unit": "per detector pixel and pattern",
        },
    )


def noise_floor(model: solver.Model, seen: Callable[[np.ndarray], backend.Array]) -> float:
    """Return the loss per pixel that counting noise alone leaves, at the reconstructed model, over some positions."""
    where = np.unique(np.linspace(0, len(model.grid.corners) - 1, _NOISE_POSITIONS).astype(int))
    patterns = backend.to_host(seen(where))
    if model.mask is None:
        return expected_loss(patterns, model.loss)
    good = backend.to_host(model.mask)
    return expected_loss(patterns[:, good], model.loss) * float(good.mean())


def loss_map(losses: np.ndarray, recorded: np.ndarray, scan: Scan) -> tuple[tuple[str, str], np.ndarray]:
    """Return the loss of the ``recorded`` positions (flat indices) as a variable over the scan; zero elsewhere."""
    found = np.zeros(scan.count, np.float32)
    found[recorded] = losses
    return ("scan_y", "scan_x"), found.reshape(scan.shape_yx)
