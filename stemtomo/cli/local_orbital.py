"""Commands on focal tilt series of incoherent images: atoms by local orbitals, and test series."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, SchedulerOption, StageSetOption, WorkersOption
from stemtomo.cli.shell import bars, clear_errors, cluster, require_folder, stdout, write_json


@app.command("local-orbital")
def local_orbital(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Store (.zarr) with a focal series, or for one.")],
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="FILE", help="Focal series (.npz or HDF5) to put into the store first."),
    ] = None,
    overrides: StageSetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the atoms: .xyz, .parquet, .cif, .pdb.")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option("--truth", metavar="FILE", help="Known atoms, .xyz or .npz: deviation over depth for the report."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it needs, and stop.")] = False,
    json_file: JsonOption = None,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
    debug: DebugOption = False,
) -> None:
    """Find atoms in a tilt series of HAADF images at one focus or several, with the probe at every depth."""
    with clear_errors(debug), cluster(scheduler, workers):
        require_folder(json_file)
        require_folder(out, "--out")
        from stemtomo.distributed import MemoryPlan
        from stemtomo.io.store import Store
        from stemtomo.pipeline.local_orbital import local_orbital as verb
        from stemtomo.pipeline.local_orbital import plan_local_orbital
        from stemtomo.pipeline.references import override_section
        from stemtomo.pipeline.settings.local_orbital import FocalSettings, LocalOrbitalSettings
        from stemtomo.terminal import numbers_table

        settings = override_section("local_orbital", {}, overrides or [], FocalSettings)
        assert isinstance(settings, LocalOrbitalSettings)
        if plan:
            planned = MemoryPlan([plan_local_orbital(Store.of(store), settings)])
            write_json(planned.to_dict(), json_file)
            typer.echo(str(planned))
            return
        with bars() as progress:
            numbers = verb(store, settings, images=images, out=out, truth=truth, progress=progress)
        write_json(numbers, json_file)
        stdout().print(numbers_table({key: value for key, value in numbers.items() if key != "loss"}))


@app.command("simulate-particle")
def simulate_particle(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Focal series to write (.npz), with its known atoms.")],
    atoms: Annotated[int, typer.Option("--atoms", help="Silicon atoms of the amorphous particle.")] = 2000,
    sections: Annotated[int, typer.Option("--sections", min=1, help="Foci per tilt; the dose stays the same.")] = 3,
    semiangle_mrad: Annotated[float, typer.Option("--semiangle-mrad", help="Convergence semiangle.")] = 25.0,
    electrons_per_atom: Annotated[
        float | None,
        typer.Option("--electrons-per-atom", help="Electrons that an atom scatters in one image; no noise."),
    ] = None,
    multislice: Annotated[
        bool, typer.Option("--multislice", help="Images by frozen-phonon multislice; 20 CPU s each for 2,000 atoms.")
    ] = False,
    tilt_step_deg: Annotated[
        float | None,
        typer.Option("--tilt-step-deg", min=0.1, help="Step from -70 to 70; 2 times the foci if not given."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of particle and noise.")] = 0,
    debug: DebugOption = False,
) -> None:
    """Write a focal tilt series of an amorphous particle, to try local-orbital tomography on."""
    with clear_errors(debug):
        require_folder(path, "FILE")
        import numpy as np

        from stemtomo.pipeline.focal_series import simulate_particle as verb
        from stemtomo.terminal import numbers_table

        step = 2.0 * sections if tilt_step_deg is None else tilt_step_deg
        numbers = verb(
            path,
            theta_deg=np.arange(-70.0, 70.0 + 1e-6, step).tolist(),
            multislice=multislice,
            atoms=atoms,
            sections=sections,
            semiangle_mrad=semiangle_mrad,
            electrons_per_atom=electrons_per_atom,
            seed=seed,
        )
        stdout().print(numbers_table(numbers))
