"""The loss of every position: where in a scan the model and the patterns disagree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stemtomo.algorithms.ptychography import detection
from stemtomo.algorithms.ptychography.model import Model, State, probes_at, transmission_of
from stemtomo.algorithms.ptychography.parameters import Parameter
from stemtomo.backend import Array, to_device_of, to_host, together_bytes
from stemtomo.physics import multislice


def misfit(state: State, model: Model, counts: Array, parameters: Sequence[Parameter] = ()) -> np.ndarray:
    """Return the loss of every position of ``model``, (position,) float64, in host memory.

    Parameters
    ----------
    counts
        Their patterns, (position, qy, qx), zero frequency first, electrons.
    parameters
        Parameters beside object and probe, whose values are in ``state.extra``.
    """
    for parameter in parameters:
        model = parameter.model_at(state.extra[parameter.name], model)
    lights = [parameter.background(state.extra[parameter.name]) for parameter in parameters]
    background = next((light for light in lights if light is not None), None)
    transmission = transmission_of(state, model.slices, model.weights)
    modes, found = len(state.probe), np.zeros(len(model.grid.corners))
    chunk = max(1, together_bytes(state.probe) // state.probe.nbytes)
    for start in range(0, len(found), chunk):
        where = np.arange(start, min(start + chunk, len(found)))
        probes = probes_at(state.probe, model.grid, where)
        for parameter in parameters:
            probes = parameter.probes(state.extra[parameter.name], probes, model, where)
        waves = probes.reshape(-1, *state.probe.shape[1:])
        corners = to_device_of(np.repeat(model.grid.corners[where], modes, axis=0), state.probe)
        spectra, _ = multislice.forward(waves, transmission, corners, model.propagators)
        numbers = to_device_of(where.astype(np.int64), spectra)
        seen = {"where": numbers, "modes": modes, "mask": model.mask, "background": background}
        losses = detection.residual(spectra, counts, model.loss, model.blur_px, floor_factor=model.floor_factor, **seen)
        found[where] = to_host(losses)
    return found
