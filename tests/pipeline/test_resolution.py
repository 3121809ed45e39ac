"""The verb resolution: volumes from files and stores, halves of tilts and of scan positions, on disk and as numbers."""

import json

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from stemtomo import cli
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError, FormatError, StoreError
from stemtomo.geometry import TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.alignment import align
from stemtomo.pipeline.config import ProjectionSettings, PtychographySettings, ResolutionSettings, TomographySettings
from stemtomo.pipeline.projections import projections
from stemtomo.pipeline.ptychography import ptychography
from stemtomo.pipeline.resolution import resolution
from stemtomo.pipeline.tomography import tomography
from stemtomo.reporting import experiment
from stemtomo.reporting.resolution import resolution as section
from stemtomo.reporting.results import Results
from tests.algorithms.tomography import phantom
from tests.pipeline.projected import projected_store
from tests.pipeline.series import make_series

THETA = np.linspace(-60, 60, 13)


def cosines(shape, voxel, periods):
    """Return a volume of plane waves of the given periods (z, y, x) in Å."""
    grids = np.indices(shape) * voxel
    return sum(np.cos(2 * np.pi * grid / period) for grid, period in zip(grids, periods, strict=True))


@pytest.fixture(scope="module")
def reconstructed(tmp_path_factory):
    """A ball of atoms, tilted to 60 degrees in 13 steps, with noise, as volume."""
    atoms = phantom.ball(50, 6.0, 2.5)
    path = tmp_path_factory.mktemp("resolution") / "s.zarr"
    store = projected_store(path, TiltSeries.from_degrees(THETA), atoms, np.zeros((13, 2)), (40, 44), noise=0.05)
    align(store)
    tomography(store, TomographySettings(iterations=40))
    return store


def test_two_files_are_compared(tmp_path):
    shape, voxel = (48, 40, 56), 0.5
    rng = np.random.default_rng(0)
    truth = cosines(shape, voxel, (2.0, 4.0, 1.75))
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", truth + 3 * rng.normal(size=shape))
    numbers = resolution(tmp_path / "a.npy", tmp_path / "b.npy", ResolutionSettings(voxel_angstrom=voxel))
    json.dumps(numbers, allow_nan=False)
    assert [numbers["axes"][axis]["resolution_angstrom"] for axis in "zyx"] == pytest.approx([2.0, 4.0, 1.75], rel=0.05)
    assert numbers["peaks_in_both_halves"]
    assert numbers["fsc"]["nyquist_inv_angstrom"] == 1.0
    assert set(numbers["fsc"]["directional"]) == {"z", "y", "x"}


def test_an_mrc_file_says_its_voxel(tmp_path):
    mrcfile = pytest.importorskip("mrcfile")
    volume = cosines((32, 32, 32), 0.4, (1.6, 3.2, 1.6)).astype(np.float32)
    with mrcfile.new(tmp_path / "v.mrc") as file:
        file.set_data(volume)
        file.voxel_size = 0.4
    numbers = resolution(tmp_path / "v.mrc")
    assert numbers["voxel_angstrom"] == pytest.approx(0.4)
    assert numbers["axes"]["z"]["resolution_angstrom"] == pytest.approx(1.6, rel=0.05)
    assert "fsc" not in numbers


def test_files_that_do_not_fit(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 8)))
    np.save(tmp_path / "b.npy", np.zeros((8, 8, 9)))
    np.save(tmp_path / "flat.npy", np.zeros((8, 8)))
    told = ResolutionSettings(voxel_angstrom=0.5)
    with pytest.raises(ConfigurationError, match="not on one grid"):
        resolution(tmp_path / "a.npy", tmp_path / "b.npy", told)
    with pytest.raises(FormatError, match="does not say its voxel"):
        resolution(tmp_path / "a.npy")
    with pytest.raises(FormatError, match=r"expected real numbers \(z, y, x\)"):
        resolution(tmp_path / "flat.npy", settings=told)
    with pytest.raises(FormatError, match="no such file"):
        resolution(tmp_path / "absent.mrc")
    with pytest.raises(ConfigurationError, match="give both"):
        resolution(tmp_path / "a.npy", settings=told.model_copy(update={"halves": "tilts"}))
    with pytest.raises(StoreError, match="volume has not been made"):
        resolution(Store.create(tmp_path / "empty.zarr", "empty"))


def test_halves_of_the_tilts(reconstructed):
    numbers = resolution(reconstructed, settings=ResolutionSettings(halves="tilts"), executor=ThreadExecutor(2))
    assert numbers["halves"] == "tilts"
    # Across the wedge the halves agree up to Nyquist (None) or nearly; along the beam they cannot.
    directional = {axis: limits["frequency_inv_angstrom"] for axis, limits in numbers["fsc"]["directional"].items()}
    assert 0.6 < directional["z"]["0.143"] < 1.0
    assert directional["z"]["0.5"] <= directional["z"]["0.143"]
    for axis in "xy":
        assert directional[axis]["0.143"] is None or directional[axis]["0.143"] > 1.2 * directional["z"]["0.143"]
    assert numbers["wedge"]["missing_half_angle_deg"] == pytest.approx(30, abs=0.1)
    assert numbers["wedge"]["spacing_deg"] == pytest.approx(10)
    result = reconstructed.read("resolution")
    assert result["fsc"].dims == ("shell",)
    assert result["fsc"].values[0] == 1
    again = resolution(reconstructed, settings=ResolutionSettings(halves="tilts"))
    assert again == numbers
    halves = sorted(path.name for path in (reconstructed.path / ".halves").iterdir())
    assert halves == ["tilts-0.zarr", "tilts-1.zarr"]


def test_without_halves_there_are_spectra_and_a_wedge(reconstructed):
    numbers = resolution(str(reconstructed.path))
    assert "fsc" not in numbers
    assert not numbers["peaks_in_both_halves"]
    assert numbers["wedge"]["elongation"] > 1


def test_halves_of_the_positions(tmp_path):
    store = make_series(tmp_path / "s.zarr")
    bad = np.zeros((32, 32), np.uint8)
    bad[20, 4] = 1
    attrs = {"found": {}, "metadata": {}, "difference": {}, "undetermined": {}}
    dataset = xr.Dataset({"bad_pixels": (("ky", "kx"), bad)}, attrs=attrs)
    store.write("calibration/001", dataset, Provenance.start("calibrate", {}))
    ptychography(store, PtychographySettings(epochs=6, settling_epochs=2))
    numbers = resolution(store, settings=ResolutionSettings(halves="positions", tilts=(1,)))
    limits = numbers["frc"]["1"]["resolution_angstrom"]
    assert 0.8 < limits["0.143"] < 4
    assert "fsc" not in numbers
    assert "axes" not in numbers
    half = Store.open(tmp_path / "s.zarr" / ".halves" / "positions-0.zarr")
    other = Store.open(tmp_path / "s.zarr" / ".halves" / "positions-1.zarr")
    assert not (half.valid(1) & other.valid(1)).any()
    assert (half.valid(1) | other.valid(1)).all()
    np.testing.assert_array_equal(half.frames(1)[:], store.frames(1)[:])
    for one in (store, half, other):  # pixels that the whole leaves out are left out of its halves
        assert one.read("ptychography/001").attrs["masked_pixels"] == 1
    with pytest.raises(ConfigurationError, match="tilts 0 to 2"):
        resolution(store, settings=ResolutionSettings(halves="positions", tilts=(7,)))


def test_halves_of_all_positions_up_to_the_volume_and_their_noise(tmp_path):
    store = make_series(tmp_path / "s.zarr")
    ptychography(store, PtychographySettings(epochs=4, settling_epochs=1))
    projections(store)
    align(store)
    tomography(store, TomographySettings(iterations=10))
    numbers = resolution(store, settings=ResolutionSettings(halves="positions"))
    assert len(numbers["frc"]) == 3
    assert (
        numbers["fsc"]["frequency_inv_angstrom"]["0.5"] is None or numbers["fsc"]["frequency_inv_angstrom"]["0.5"] > 0.1
    )
    filtered = projections(store, ProjectionSettings(denoise="lowrank", noise="halves"))
    assert filtered["noise_source"] == ["half sets"] * 3


def call(*arguments):
    return CliRunner().invoke(cli.app, ["resolution", *(str(argument) for argument in arguments)])


def test_the_command_prints_a_table_and_writes_numbers(reconstructed, tmp_path):
    done = call(reconstructed.path, "--halves", "tilts", "--mask", "specimen", "--json", tmp_path / "n.json")
    assert done.exit_code == 0, done.output
    for word in ("FSC = 0.143", "half bit", "last spectral peak", "Missing wedge", "30.0°"):
        assert word in done.output
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["fsc"]["mask"] == "specimen"


def test_the_command_compares_two_files(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", cosines((32, 32, 32), 0.5, (2, 4, 2)) + rng.normal(size=(32, 32, 32)))
    done = call(tmp_path / "a.npy", tmp_path / "b.npy", "--voxel", 0.5)
    assert done.exit_code == 0, done.output
    assert "FSC, one bit" in done.output
    refused = call(tmp_path / "a.npy", "--tilt", 1)
    assert refused.exit_code == 2
    assert "halves = 'positions'" in refused.stderr.replace("\n", " ")
    refused = call(tmp_path / "a.npy", "--halves", "odd")
    assert refused.exit_code == 2
    assert "halves" in refused.stderr


def test_the_report_shows_curves_and_both_stacks(tmp_path):
    store = make_series(tmp_path / "s.zarr")
    ptychography(store, PtychographySettings(epochs=4, settling_epochs=1, slices=2, slice_thickness_angstrom=5.0))
    projections(store, ProjectionSettings(denoise="lowrank"))
    align(store)
    tomography(store, TomographySettings(iterations=5))
    resolution(store, settings=ResolutionSettings(halves="tilts"))
    page = section(Results(store)) + experiment.projections(Results(store))
    assert 'id="resolution"' in page
    for text in ("Correlation of two volumes", "Spectral amplitude", "before and after the filters", "in every slice"):
        assert text in page
    resolution(store, settings=ResolutionSettings(halves="positions", tilts=(0,)))
    assert "information limit of each tilt" in section(Results(store))
