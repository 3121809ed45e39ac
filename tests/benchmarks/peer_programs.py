"""Other programs on the same patterns: ``python peer_programs.py PROGRAM CONDITIONS.npz PHASE.npy EPOCHS``.

Runs in the environment of these programs and imports nothing of this package. The conditions are patterns (position,
ky, kx; the beam in the middle), the probe to begin with, positions in object pixels from the middle, the scan's shape
and step, slices, their thickness, pixel and wavelength in Å, energy and semi-angle, and positions per batch. Prints one
line of JSON: the version, processor seconds (all threads) per epoch and the peak of memory; the phase summed over the
slices goes to a file.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

#: What a program does with the conditions: its version, a function that runs so many epochs, and one that returns the
#: object (slice, y, x), complex.
Prepared = tuple[str, Callable[[int], Any], Callable[[], np.ndarray]]

#: Steps at which five epochs scored best of the few tried (docs/performance.md); PtyRAD's own are ten and more times
#: smaller, for hundreds of epochs. None for the positions, which are known.
PTYRAD_RATES = {
    "obja": {"start_iter": 1, "lr": 1e-2},
    "objp": {"start_iter": 1, "lr": 3e-2},
    "probe": {"start_iter": 1, "lr": 1e-3},
    "probe_pos_shifts": {"start_iter": None, "lr": 0.0},
}
QUANTEM_RATES = {"object": {"name": "adamw", "lr": 2e-2}, "probe": {"name": "adamw", "lr": 1e-3}}
QUANTEM_ANALYTIC_RATES = {"object": {"name": "sgd", "lr": 0.5}, "probe": {"name": "sgd", "lr": 0.5}}


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


def ptyrad(told: dict[str, np.ndarray]) -> Prepared:
    """Set up Adam of PtyRAD at the rates of `PTYRAD_RATES`, positions fixed, and all else as it is by default.

    Its module with the loop (``ptyrad.solver``) needs Python 3.12 to import in 1.0.0, so the loop is written out here,
    without what it logs: batches drawn once, loss, gradients, step; after every epoch its constraints.
    """
    import torch
    from ptyrad.core import CombinedConstraint, CombinedLoss, PtychoModel
    from ptyrad.init import Initializer
    from ptyrad.params import PtyRADParams

    settings = PtyRADParams(**_ptyrad_settings(told)).model_dump()
    begin = Initializer(settings["init_params"], seed=0).init_all()
    model = PtychoModel(begin.init_variables, settings["model_params"], device="cpu")
    optimizer = torch.optim.Adam(model.optimizable_params)
    loss = CombinedLoss(settings["loss_params"], device="cpu")
    constrain = CombinedConstraint(settings["constraint_params"], device="cpu")
    order = torch.as_tensor(np.random.default_rng(0).permutation(len(told["patterns"])))

    def run(epochs: int) -> None:
        for epoch in range(1, epochs + 1):
            for batch in order.split(int(told["batch"])):
                modelled = model(batch)
                total, _ = loss(
                    modelled, model.get_measurements(batch), *model._current_object_patches, model.omode_occu
                )
                total.backward()
                optimizer.step()
                optimizer.zero_grad()
                model.clear_cache()
            constrain(model, epoch)

    def found() -> np.ndarray:
        return torch.polar(model.opt_obja, model.opt_objp).detach().numpy()[0]

    return version("ptyrad"), run, found


def _ptyrad_settings(told: dict[str, np.ndarray]) -> dict[str, Any]:
    rows, columns = (int(n) for n in told["scan_shape_yx"])
    init = {
        "probe_kv": float(told["energy_kev"]),
        "probe_conv_angle": float(told["semiangle_mrad"]),
        "probe_pmode_max": 1,
        "meas_Npix": told["patterns"].shape[-1],
        "meas_calibration": {"mode": "dx", "value": float(told["pixel"])},
        "meas_source": "custom",
        "meas_params": told["patterns"].astype(np.float32),
        "probe_source": "custom",
        "probe_params": told["probe"][None],
        "pos_N_scans": rows * columns,
        "pos_N_scan_slow": rows,
        "pos_N_scan_fast": columns,
        "pos_scan_step_size": float(told["step_yx"][0]),
        "pos_scan_rand_std": None,
        "obj_Nlayer": int(told["slices"]),
        "obj_slice_thickness": float(told["thickness"]),
    }
    return {"init_params": init, "model_params": {"update_params": PTYRAD_RATES}}


def quantem(told: dict[str, np.ndarray], analytic: bool = False) -> Prepared:
    """Set up AdamW of quantem by automatic differentiation, or its analytic ePIE step; its complex object, no descan.

    The object reaches half a window past the outermost positions, so that no window wraps round it.
    """
    from quantem.diffractive_imaging.dataset_models import PtychographyDatasetRaster
    from quantem.diffractive_imaging.detector_models import DetectorPixelated
    from quantem.diffractive_imaging.object_models import ObjectPixelated
    from quantem.diffractive_imaging.probe_models import ProbePixelated
    from quantem.diffractive_imaging.ptychography import Ptychography

    patterns = told["patterns"]
    edge = patterns.shape[-1]
    frequency = 1 / (edge * float(told["pixel"]))
    data = PtychographyDatasetRaster.from_array(
        patterns.reshape(*told["scan_shape_yx"], *patterns.shape[1:]).astype(np.float32),
        sampling=(*told["step_yx"], frequency, frequency),
        units=("A", "A", "A^-1", "A^-1"),
        verbose=0,
        learn_descan=False,
        learn_scan_positions=False,
    )
    data.preprocess(
        com_fit_function="no_shift",
        force_com_rotation=0,
        force_com_transpose=False,
        plot_rotation=False,
        plot_com=False,
        probe_energy=float(told["energy_kev"]) * 1e3,
    )
    probe = ProbePixelated.from_array(
        np.fft.ifftshift(told["probe"]), probe_params={"energy": float(told["energy_kev"]) * 1e3}
    )
    solver = Ptychography.from_models(
        data,
        ObjectPixelated.from_uniform(int(told["slices"]), float(told["thickness"]), obj_type="complex"),
        probe,
        DetectorPixelated(),
        verbose=0,
        rng=0,
    )
    solver.preprocess(obj_padding_px=(edge // 2, edge // 2))

    def run(epochs: int) -> None:
        rates = QUANTEM_ANALYTIC_RATES if analytic else QUANTEM_RATES
        solver.reconstruct(epochs, optimizer_params=rates, batch_size=int(told["batch"]), autograd=not analytic)

    def found() -> np.ndarray:
        obj = solver.obj
        middle = data.scan_positions_px.detach().numpy().mean(axis=0)
        shift = np.round(np.asarray(obj.shape[1:]) // 2 - middle).astype(int)
        return np.roll(obj, shift, axis=(1, 2))

    return version("quantem"), run, found


PROGRAMS = {
    "pty-chi LSQML": pty_chi,
    "PtyRAD Adam": ptyrad,
    "quantem AdamW": quantem,
    "quantem analytic": partial(quantem, analytic=True),
}


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
