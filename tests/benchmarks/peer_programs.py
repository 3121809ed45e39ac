"""Other programs on the same patterns: ``python peer_programs.py PROGRAM CONDITIONS.npz PHASE.npy EPOCHS``.

Runs in the environment of these programs and imports nothing of this package. The conditions are patterns (position,
ky, kx; the beam in the middle), the probe to begin with, positions in object pixels from the middle, slices, their
thickness, pixel and wavelength in Å, and positions per batch. Prints one line of JSON: the version, processor seconds
(all threads) per epoch and the peak of memory; the phase summed over the slices goes to a file.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

#: What a program does with the conditions: its version, a function that runs so many epochs, and one that returns the
#: object (slice, y, x), complex.
Prepared = tuple[str, Callable[[int], Any], Callable[[], np.ndarray]]


def pty_chi(told: dict[str, np.ndarray]) -> Prepared:
    """Set up LSQML of pty-chi with its defaults, which are what its authors advise for multislice."""
    import torch
    from ptychi import api
    from ptychi.api.task import PtychographyTask

    options = api.LSQMLOptions()
    options.data_options.data = told["patterns"].astype(np.float32)
    options.data_options.wavelength_m = float(told["wavelength"]) * 1e-10
    shape = (int(told["slices"]), *(int(n) for n in told["object_shape"]))
    obj, probe = options.object_options, options.probe_options
    obj.initial_guess = torch.ones(shape, dtype=torch.complex64)
    obj.pixel_size_m = float(told["pixel"]) * 1e-10
    obj.slice_spacings_m = np.full(shape[0] - 1, float(told["thickness"]) * 1e-10)
    probe.initial_guess = torch.as_tensor(told["probe"])[None, None]
    where = options.probe_position_options
    where.position_y_px, where.position_x_px = told["positions_px_yx"].T
    reconstructor = options.reconstructor_options
    reconstructor.batch_size = int(told["batch"])
    reconstructor.default_device = api.Devices.CPU
    reconstructor.random_seed = 0
    task = PtychographyTask(options)
    return version("ptychi"), task.run, lambda: task.get_data_to_cpu("object", as_numpy=True)


PROGRAMS = {"pty-chi LSQML": pty_chi}


def main(program: str, conditions: str, phase: str, epochs: str) -> dict[str, object]:
    """Run ``program`` and return its version and what it cost."""
    with np.load(conditions) as file:
        told = dict(file)
    name, run, found = PROGRAMS[program](told)
    began = time.process_time()
    run(int(epochs))
    cost = (time.process_time() - began) / int(epochs)
    np.save(phase, np.angle(found()).sum(axis=0))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"version": name, "cpu_s": cost, "peak_mb": int(peak.split()[1]) / 1024}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
