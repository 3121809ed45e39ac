"""``python -m tests.benchmarks.joint_thick [WAY ...]``: a specimen of three depths of field, three ways.

A disc of strontium titanate that is 105 Å thick along the beam at every tilt, of which 31 Å are in focus at once. The
volumes are compared with the known atoms; atoms are not traced. A nightly measurement: minutes of processor time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy import ndimage

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.io.store import Store
from stemtomo.pipeline.references import load_configuration
from stemtomo.pipeline.run import run
from tests.data import FOLDER

EXAMPLE = Path(__file__).parents[2] / "examples" / "cuau_tilt.toml"  # of the same layout
_SHORT = [
    "joint.enabled=true",
    "joint.single_slice_epochs=3",
    "joint.sweeps=2",
    "joint.settling_sweeps=2",
]
WAYS: dict[str, tuple[list[str], str]] = {
    "joint": ([*_SHORT, "joint.slice_thickness_angstrom=5.2"], "joint"),
    "single slice": ([*_SHORT, "joint.single_slice=true"], "joint"),
    "sequential": (["ptychography.epochs=15", "tomography.iterations=40"], "tomography"),
}
#: Full width at half maximum to which volume and atoms are blurred.
_BLUR_ANGSTROM = 2.0
_FWHM = 2 * np.sqrt(2 * np.log(2))


def blurred_atoms(atoms: np.ndarray, numbers: np.ndarray, shape: Sequence[int], voxel: float) -> np.ndarray:
    """Return known ``atoms`` (atom, 3; x, y, z) as points of their atomic number, blurred, (z, y, x)."""
    volume = np.zeros(shape)
    places = atoms[:, ::-1] / voxel + np.array(shape) // 2
    lower = np.floor(places).astype(int)
    for corner in np.ndindex(2, 2, 2):
        where = lower + corner
        weight = np.prod(1 - np.abs(places - where), axis=1) * numbers
        inside = ((where >= 0) & (where < shape)).all(axis=1)
        np.add.at(volume, tuple(where[inside].T), weight[inside])
    return ndimage.gaussian_filter(volume, _BLUR_ANGSTROM / _FWHM / voxel)


def depth_of_atoms(volume: np.ndarray, atoms: np.ndarray, voxel: float) -> dict[str, float]:
    """Return the full width in Å at half maximum, along x, y and z, of the mean ``volume`` around ``atoms``."""
    offsets = np.arange(-40, 41) * 0.1
    widths = {}
    for column, axis in enumerate("xyz"):
        step = np.zeros(3)
        step[column] = 1
        where = (atoms[:, None] + offsets[:, None] * step)[..., ::-1] / voxel + np.array(volume.shape) // 2
        profile = ndimage.map_coordinates(volume, where.reshape(-1, 3).T, order=1).reshape(len(atoms), -1).mean(axis=0)
        middle = len(offsets) // 2
        left, right = profile[: middle + 1][::-1], profile[middle:]
        half = (profile[middle] + min(left.min(), right.min())) / 2
        widths[axis] = 0.1 * (_reach(left, half) + _reach(right, half))
    return widths


def _reach(profile: np.ndarray, half: float) -> float:
    """Return where ``profile`` falls below ``half`` first, in steps; its end if it never does."""
    below = np.flatnonzero(profile < half)
    if not below.size:
        return len(profile) - 1.0
    last = below[0] - 1
    return float(last + (profile[last] - half) / (profile[last] - profile[last + 1]))


def compared(result: xr.Dataset) -> dict[str, float]:
    """Return the correlation of a volume with the blurred atoms inside the disc, and the widths of its atoms."""
    potential, voxel = result["potential"].values, float(np.ravel(result.attrs["voxel_angstrom"])[0])
    with np.load(FOLDER / "thick_tilt" / "truth.npz") as data:
        atoms, numbers = data["atoms_xyz_A"], data["atomic_numbers"]
    truth = blurred_atoms(atoms, numbers, potential.shape, voxel)
    found = ndimage.gaussian_filter(potential, _BLUR_ANGSTROM / _FWHM / voxel)
    z, y, x = (voxel * (grid - count // 2) for grid, count in zip(np.indices(truth.shape), truth.shape, strict=True))
    inside = (np.hypot(x, z) < 52) & (np.abs(y) < 7)
    # One rigid translation: the plane of the defocus and the tilt axis are known to a voxel or so.
    correlations = []
    for shift in np.ndindex(5, 3, 5):
        moved = np.roll(found, [s - n // 2 for s, n in zip(shift, (5, 3, 5), strict=True)], axis=(0, 1, 2))
        correlations.append(np.corrcoef(moved[inside], truth[inside])[0, 1])
    heavy = atoms[(numbers == 38) & (np.hypot(atoms[:, 0], atoms[:, 2]) < 45) & (np.abs(atoms[:, 1]) < 6)]
    widths = depth_of_atoms(potential, heavy, voxel)
    return {"correlation": max(correlations), **{f"fwhm_{axis}": width for axis, width in widths.items()}}


def reconstructed(way: str, store: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the comparison and the numbers of one way."""
    overrides, until = WAYS[way]
    told = [f"input.path={FOLDER / 'thick_tilt' / 'data.npz'}", f"series.store={store}", *overrides]
    numbers = run(load_configuration(EXAMPLE, told), until=until, executor=ThreadExecutor(1))
    return compared(Store.open(store).read("joint" if until == "joint" else "volume")), numbers


def main() -> None:
    """Print a table of the ways that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.joint_thick", description=__doc__)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}; all if none")
    given = parser.parse_args()
    print("| way | correlation | width along x, y, z (Å) | CPU s |\n|---|---|---|---|")
    for way in given.ways or WAYS:
        with tempfile.TemporaryDirectory() as folder:
            found, numbers = reconstructed(way, Path(folder) / "disc.zarr")
        widths = ", ".join(f"{found[f'fwhm_{axis}']:.2f}" for axis in "xyz")
        print(f"| {way} | {found['correlation']:.3f} | {widths} | {numbers['cpu_s']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
