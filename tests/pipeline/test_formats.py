"""Detectors' own files from the TOML file to the store, one per tilt, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stemtomo import cli
from stemtomo.errors import AcquisitionError, ConfigurationError
from stemtomo.io.store import Store
from stemtomo.pipeline.ingest import open_input
from stemtomo.pipeline.references import load_configuration
from tests.io.formats import files

TOML = """
[series]
store = "{folder}/series.zarr"
[input]
{input}
[optics]
energy_kev = 300
semiangle_mrad = 21
[scan]
shape = [8, 9]
step_angstrom = 1.25
[detector]
pixel_inv_angstrom = 0.1
[tilts]
{tilts}
"""
NAMED = 'path = "."\nfiles = "tilt_{theta_deg}.mib"\nskip = 1\nflyback = 2'
ANGLES = (-10.0, 2.5, 30.0)


@pytest.fixture
def frames(tmp_path: Path) -> np.ndarray:
    """Frames (tilt, line, column, ky, kx) with a flyback of 2, written after one frame to skip."""
    frames = np.random.default_rng(0).poisson(0.5, (3, 8, 11, 4, 256)).astype("u1").clip(max=63)
    for angle, tilt in zip(ANGLES, frames, strict=True):
        recorded = np.concatenate([tilt[:1, 0], tilt.reshape(-1, 4, 256)])
        files.write_mib(tmp_path / f"tilt_{angle:g}.mib", recorded, "U08", 6)
    return frames


def write(folder: Path, input: str, tilts: str = "") -> Path:
    path = folder / "series.toml"
    path.write_text(TOML.format(folder=folder, input=input, tilts=tilts))
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_run_takes_one_mib_per_tilt_with_the_angles_of_their_names(frames: np.ndarray, tmp_path: Path) -> None:
    toml = write(tmp_path, NAMED)
    assert "ingest" in call("run", toml, "--plan")
    numbers = tmp_path / "numbers.json"
    call("run", toml, "--until", "quicklook", "--json", numbers)
    store = Store.open(tmp_path / "series.zarr")
    for tilt, expected in enumerate(frames):
        np.testing.assert_array_equal(store.frames(tilt)[:], expected[:, :9])
        assert np.rad2deg(store.pose(tilt).theta_rad) == pytest.approx(ANGLES[tilt])
    call("run", toml, "--until", "quicklook", "--json", numbers)
    assert json.loads(numbers.read_text())["stages"]["ingest"]["shards_written"] == 0


def test_a_list_is_in_the_order_of_the_angles(frames: np.ndarray, tmp_path: Path) -> None:
    names = ", ".join(f'"tilt_{angle:g}.mib"' for angle in reversed(ANGLES))
    toml = write(tmp_path, f'path = "."\nfiles = [{names}]\nskip = 1\nflyback = 2', "theta_deg = [30, 2.5, -10]")
    configuration = load_configuration(toml)
    source = open_input(configuration.input, configuration.scan.shape, configuration.theta_deg())
    np.testing.assert_array_equal(source.read(0, 0, 8), frames[2, :, :9])


@pytest.mark.parametrize("path", ['"tilt_*.mib"', '"tilt_{theta}.mib"', '["tilt_-10.mib", "tilt_2.5.mib"]'])
def test_one_file_per_tilt_is_said_in_one_way(path: str, frames: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"the folder as input\.path and the names as input\.files"):
        load_configuration(write(tmp_path, f"path = {path}", "theta_deg = [1, 2, 3]"))


def test_angles_that_are_given_choose_among_the_files(frames: np.ndarray, tmp_path: Path) -> None:
    configuration = load_configuration(write(tmp_path, NAMED, "theta_deg = [30, 2.5]"))
    with pytest.raises(AcquisitionError, match=r"-10 deg is none of the 2 angles of tilts\.theta_deg"):
        open_input(configuration.input, configuration.scan.shape, configuration.theta_deg())
    (tmp_path / "tilt_-10.mib").unlink()
    source = open_input(configuration.input, configuration.scan.shape, configuration.theta_deg())
    np.testing.assert_array_equal(source.read(1, 0, 8), frames[1, :, :9])


def test_a_tilt_that_is_short_is_named_before_anything_is_copied(frames: np.ndarray, tmp_path: Path) -> None:
    short = tmp_path / "tilt_2.5.mib"
    short.write_bytes(short.read_bytes()[:-3000])
    result = CliRunner().invoke(cli.app, ["run", str(write(tmp_path, NAMED))])
    assert result.exit_code == 2
    assert "tilt_2.5.mib: ends inside frame 86 (of 87)" in result.stderr
    assert not list((tmp_path / "series.zarr").glob("tilt/*/frames"))


def test_two_files_of_one_angle(frames: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "tilt_2.50.mib").write_bytes((tmp_path / "tilt_2.5.mib").read_bytes())
    with pytest.raises(AcquisitionError, match=r"both have the angle 2\.5 deg"):
        load_configuration(write(tmp_path, NAMED))


def test_info_lists_what_a_file_holds(frames: np.ndarray, tmp_path: Path) -> None:
    import h5py

    shown = call("info", tmp_path / "tilt_30.mib")
    assert "merlin" in shown
    assert "frames  89 x 4 x 256  uint8, scan not said" in shown
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a/frames"], file["b"] = np.zeros((2, 3, 4, 5), "u2"), np.zeros(3)
    found = json.loads(call("info", tmp_path / "a.h5", "--json"))
    assert found["format"] == "hdf5"
    assert found["arrays"] == [{"array": "a/frames", "shape": [2, 3, 4, 5], "dtype": "uint16"}]
    (tmp_path / "a.xyz").touch()
    result = CliRunner().invoke(cli.app, ["info", str(tmp_path / "a.xyz")])
    assert result.exit_code == 2
    assert "is not known; input.format can be" in result.stderr


def test_a_dataset_of_an_hdf5_file(tmp_path: Path) -> None:
    import h5py

    data = files.counts((8, 9, 16, 16), 9).astype("u2")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scan/frames"] = data
    configuration = load_configuration(write(tmp_path, 'path = "a.h5"\narray = "scan/frames"', "theta_deg = [0]"))
    source = open_input(configuration.input, configuration.scan.shape)
    np.testing.assert_array_equal(source.read(0, 0, 8), data)
