"""Commands for what comes from and goes to other programs of tomography: import-stack, export-volume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stemtomo.cli.application import app
from stemtomo.cli.options import DebugOption, JsonOption, StoreArgument
from stemtomo.cli.shell import clear_errors, require_folder, write_json


@app.command("import-stack")
def import_stack(
    stack: Annotated[Path, typer.Argument(metavar="STACK", help="Projections: .mrc, .st, .tif, .npy or .npz.")],
    store: StoreArgument,
    angles: Annotated[
        Path | None,
        typer.Option("--angles", metavar="FILE", help="Theta (or theta, phi, psi) per line; .rawtlt, .tlt beside it."),
    ] = None,
    pixel: Annotated[float | None, typer.Option("--pixel-angstrom", help="Pixel in Å; that of an MRC header.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy-kev", help="The images are phases in rad at this energy.")
    ] = None,
    array: Annotated[str | None, typer.Option("--array", metavar="NAME", help="Member of an .npz.")] = None,
    background: Annotated[
        str | None, typer.Option("--background", metavar="none|level|plane", help="Vacuum that is taken off.")
    ] = None,
    axis: Annotated[
        str | None, typer.Option("--axis", metavar="y|x", help="Axis of the images along the tilt's.")
    ] = None,
    axis_deg: Annotated[
        float | None, typer.Option("--axis-deg", help="Turn of the tilt axis in the plane, added to phi.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Factor; -1 for dark objects on bright ground.")
    ] = None,
    scan_matrix: Annotated[
        str | None, typer.Option("--scan-matrix", metavar="XX,XY,YX,YY", help="Linear distortion that is taken out.")
    ] = None,
    nan_as_missing: Annotated[
        bool, typer.Option("--nan-as-missing", help="Pixels that are no numbers were not measured.")
    ] = False,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Make a store from a tilt stack of another program; align and tomography go on from there."""
    with clear_errors(debug):
        require_folder(json_file)
        from stemtomo.pipeline.import_stack import import_stack as read_in
        from stemtomo.pipeline.references import settings_told
        from stemtomo.pipeline.settings import StackSettings

        told = {
            "pixel_angstrom": pixel,
            "energy_kev": energy,
            "array": array,
            "background": background,
            "axis": axis,
            "axis_deg": axis_deg,
            "scale": scale,
            "scan_matrix": None if scan_matrix is None else scan_matrix.split(","),
            "nan_as_missing": nan_as_missing,
        }
        numbers = read_in(stack, store, settings_told(StackSettings, "import-stack", told), angles=angles)
        write_json(numbers, json_file)
        low, high = numbers["theta_deg"]
        height, width = numbers["shape_yx"]
        typer.echo(f"{numbers['store']}: {numbers['tilts']} projections of {height} x {width}, {low:g} to {high:g} deg")


@app.command("scan-distortion")
def scan_distortion(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image or repeated frames: .mrc, .tif, .npy or .npz.")],
    spot: Annotated[
        list[str] | None,
        typer.Option("--spot", metavar="KX,KY", help="Frequency in 1/px that a lattice should have; two or more."),
    ] = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Say how a scan is distorted: by drift between repeated frames, or (--spot) from a known lattice."""
    with clear_errors(debug):
        require_folder(json_file)
        from stemtomo.pipeline.import_stack import scan_distortion as measure

        numbers = measure(image, spot)
        write_json(numbers, json_file)
        typer.echo(f"--scan-matrix={','.join(f'{value:.6f}' for value in numbers['scan_matrix'])}")


@app.command("export-volume")
def export_volume(
    store: StoreArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write: .mrc, .h5, .tif or .npy.")],
    joint: Annotated[bool, typer.Option("--joint", help="The volume of the stage joint.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write the volume of a store for other programs."""
    with clear_errors(debug):
        from stemtomo.io.store import Store
        from stemtomo.io.volume_files import write_volume

        result = Store.open(store).read("joint" if joint else "volume")
        write_volume(file, result["potential"].values, float(result.attrs["voxel_angstrom"]))
        typer.echo(str(file))
