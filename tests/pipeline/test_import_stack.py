"""Tilt stacks of other programs in, volumes out: what the programs' own libraries wrote and read."""

import numpy as np
import pytest
from typer.testing import CliRunner

import stemtomo
from stemtomo.cli import app
from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.geometry import TiltSeries
from stemtomo.io.stacks import read_stack
from stemtomo.io.store import Store
from stemtomo.io.volume_files import read_volume, write_volume
from stemtomo.pipeline.config import StackSettings, TomographySettings
from stemtomo.pipeline.import_stack import import_stack
from tests.algorithms.tomography import phantom

mrcfile = pytest.importorskip("mrcfile")
tifffile = pytest.importorskip("tifffile")

THETA = np.linspace(-60, 60, 13)
SERIES = TiltSeries.from_degrees(THETA)
ATOMS = phantom.ball(30, 4.0, 2.5)
IMAGES = phantom.images(*ATOMS, SERIES.rotations, np.zeros((13, 2)), (30, 32)).astype(np.float32)
PIXEL = phantom.PIXEL_ANGSTROM


def _mrc(path, images=IMAGES, pixel=PIXEL):
    with mrcfile.new(path) as file:
        file.set_data(images)
        file.set_image_stack()
        file.voxel_size = (pixel, pixel, 1.0)
    path.with_suffix(".rawtlt").write_text("\n".join(f"{angle:.2f}" for angle in THETA) + "\n")
    return path


def call(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_a_stack_with_its_rawtlt_becomes_atoms_and_a_volume_file(tmp_path):
    """The whole way by command line; the atoms are where they were put, the file is read by mrcfile itself."""
    stack, store, out = _mrc(tmp_path / "tilts.st"), tmp_path / "s.zarr", tmp_path / "volume.mrc"
    for arguments in (
        ("import-stack", stack, store),
        ("align", store, "--set", "enabled=false"),
        ("tomography", store, "--set", "iterations=60", "--set", "refine_shifts=false"),
        ("export-volume", store, out),
    ):
        said = call(*arguments)
        assert said.exit_code == 0, said.output
    with mrcfile.open(out) as file:
        volume, voxel = np.array(file.data), float(file.voxel_size.x)
        assert file.is_volume()
    assert voxel == pytest.approx(PIXEL)
    found = phantom.compare(volume, ATOMS[0])
    assert found.recall == found.precision == 1
    # Without an energy the volume is intensity per Å: its line integral is the image.
    np.testing.assert_allclose(volume.sum() * voxel, IMAGES[6].sum(), rtol=0.03)


@pytest.mark.parametrize("suffix", [".mrc", ".tif", ".npy", ".npz"])
def test_every_format_gives_the_images(tmp_path, suffix):
    path, tilts = tmp_path / f"stack{suffix}", tmp_path / "angles.csv"
    tilts.write_text("".join(f"{theta}, 1.5, -0.5  # theta, phi, psi\n" for theta in THETA))
    if suffix == ".mrc":
        _mrc(path)
    elif suffix == ".tif":
        tifffile.imwrite(path, IMAGES)
    elif suffix == ".npy":
        np.save(path, IMAGES)
    else:
        np.savez(path, series=IMAGES, other=THETA)
    settings = StackSettings(pixel_angstrom=0.5, energy_kev=300)
    numbers = import_stack(path, tmp_path / "s.zarr", settings, angles=tilts)
    result = Store.open(tmp_path / "s.zarr").read("projections")
    np.testing.assert_array_equal(result["phase"].values, IMAGES)
    np.testing.assert_allclose(result["theta_deg"].values, THETA)
    assert result["phi_deg"].values.tolist() == [1.5] * 13
    assert result["psi_deg"].values.tolist() == [-0.5] * 13
    assert result.attrs["pixel_angstrom"] == 0.5
    assert result.attrs["sigma_rad_per_volt_angstrom"] == pytest.approx(6.526e-4, rel=1e-3)
    assert (numbers["tilts"], numbers["shape_yx"]) == (13, [30, 32])


def test_contrast_axis_background_and_missing_pixels(tmp_path):
    noise = 0.02 * IMAGES.max() * np.random.default_rng(0).normal(size=IMAGES.shape)
    images = 5.0 - (IMAGES + noise).transpose(0, 2, 1)
    images[2, :4] = np.nan
    np.save(tmp_path / "stack.npy", images)
    (tmp_path / "stack.tlt").write_text("\n".join(map(str, THETA)))
    settings = StackSettings(pixel_angstrom=PIXEL, axis="x", scale=-1, background="level", nan_as_missing=True)
    import_stack(tmp_path / "stack.npy", tmp_path / "s.zarr", settings)
    result = Store.open(tmp_path / "s.zarr").read("projections")
    level = np.mean(result["phase"].values[5] - IMAGES[5] - noise[5])
    np.testing.assert_allclose(result["phase"].values[5] - level, IMAGES[5] + noise[5], atol=1e-5)
    assert abs(level) < 0.03 * IMAGES.max()
    assert not result["valid"].values[2, :, :4].any()
    assert not result["phase"].values[2, :, :4].any()
    assert result["valid"].values.mean() == pytest.approx(1 - 4 / 32 / 13)


def test_what_cannot_be_used_is_refused_with_exit_code_2(tmp_path):
    stack = _mrc(tmp_path / "a.st")

    def refused(path, *words, arguments=()):
        said = call("import-stack", path, tmp_path / "x.zarr", *arguments)
        assert said.exit_code == 2
        for word in words:
            assert word in said.stderr
        assert not (tmp_path / "x.zarr").exists()

    angles = tmp_path / "a.rawtlt"
    whole = angles.read_text()
    angles.write_text(whole.partition("\n")[2])
    refused(stack, "13 projections, but 12 tilt angles")
    angles.write_text(whole.replace("10.00", "ten", 1))
    refused(stack, "a.rawtlt, line", "is no angle")
    angles.unlink()
    refused(stack, "no angles beside it", "--angles")
    angles.write_text(whole)
    spoiled = IMAGES.copy()
    spoiled[3, 5, 6] = np.nan
    refused(_mrc(tmp_path / "b.mrc", spoiled), "projection 3", "not numbers")
    spoiled[3] = 1
    refused(_mrc(tmp_path / "c.mrc", spoiled), "projection 3 is constant")
    refused(_mrc(tmp_path / "d.mrc", pixel=0.0), "pixel_angstrom")
    refused(tmp_path / "none.mrc", "no such file")
    (tmp_path / "e.mrc").write_bytes(b"no header")
    refused(tmp_path / "e.mrc", "cannot be read as MRC", arguments=("--angles", angles))
    refused(stack, "pixel_angstrom", "greater than 0", arguments=("--pixel-angstrom", "-1"))
    np.savez(tmp_path / "f.npz", a=IMAGES, b=IMAGES)
    refused(tmp_path / "f.npz", "holds a, b", "--array")
    np.savez(tmp_path / "g.npz", a=IMAGES, notes=np.array([{"operator": "x"}], dtype=object))
    assert read_stack(tmp_path / "g.npz")[0].shape == IMAGES.shape  # what is beside the stack is not read


def test_a_store_with_frames_is_not_overwritten(tmp_path):
    store = Store.create(tmp_path / "s.zarr", "frames")
    store.declare_tilts(3)
    for where in (tmp_path / "s.zarr", store):
        with pytest.raises(FormatError, match="store with frames"):
            import_stack(_mrc(tmp_path / f"{type(where).__name__}.st"), where)
    with pytest.raises(ConfigurationError, match="pixel"):
        stemtomo.import_stack(_mrc(tmp_path / "b.st", pixel=0.0), tmp_path / "t.zarr")


@pytest.mark.parametrize("suffix", [".mrc", ".h5", ".tif", ".npy"])
def test_volumes_come_back_from_the_files_as_they_were(tmp_path, suffix):
    volume, path = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32), tmp_path / f"v{suffix}"
    write_volume(path, volume, 0.35)
    if suffix == ".h5":
        import h5py

        with h5py.File(path) as file:
            found, voxel = file["potential"][()], file["potential"].attrs["voxel_angstrom"]
    elif suffix == ".tif":
        with tifffile.TiffFile(path) as file:
            found, voxel = file.asarray(), file.imagej_metadata["spacing"]
            numerator, denominator = file.pages[0].tags["XResolution"].value
        assert 1e8 * denominator / numerator == pytest.approx(0.35, rel=1e-5)
    else:
        found, voxel = read_volume(path, 0.35 if suffix == ".npy" else None)
    np.testing.assert_array_equal(found, volume)
    assert voxel == pytest.approx(0.35)
    with pytest.raises(FormatError, match=r"write \.mrc"):
        write_volume(tmp_path / "v.xyz", volume, 0.35)
    assert not list(tmp_path.glob(".*"))


def test_the_defaults_of_tomography_take_a_stack(tmp_path):
    import_stack(_mrc(tmp_path / "a.st"), tmp_path / "s.zarr")
    stemtomo.align(tmp_path / "s.zarr")
    assert stemtomo.tomography(tmp_path / "s.zarr", TomographySettings(iterations=5))["computed"]


def test_repeated_frames_are_freed_of_drift_and_the_scan_is_put_straight(tmp_path):
    """Frames recorded while the specimen moves, written down row by row; the mean is the specimen at rest."""
    rng = np.random.default_rng(3)
    drifts = rng.uniform(-1.5, 1.5, (13, 2))
    rows = np.arange(30) - 15
    frames = np.zeros((13, 3, 30, 32), np.float32)
    for tilt, drift in enumerate(drifts):
        for number in range(3):
            for row in range(30):
                moved = [drift * (number + rows[row] / 30)]
                one = SERIES.rotations[tilt : tilt + 1]
                frames[tilt, number, row] = phantom.images(*ATOMS, one, moved, (30, 32))[0, row]
    np.save(tmp_path / "frames.npy", frames)
    (tmp_path / "frames.tlt").write_text("\n".join(map(str, THETA)))
    numbers = import_stack(tmp_path / "frames.npy", tmp_path / "s.zarr", StackSettings(pixel_angstrom=PIXEL))
    np.testing.assert_allclose(numbers["drift_px_per_frame"], drifts, atol=0.15)
    mean = Store.open(tmp_path / "s.zarr").read("projections")["phase"].values
    assert np.corrcoef(mean.ravel(), IMAGES.ravel())[0, 1] > 0.995
    assert np.corrcoef(frames.mean(axis=1).ravel(), IMAGES.ravel())[0, 1] < 0.95
    # One tilt's frames alone, by command line: the matrix that straightens them.
    np.save(tmp_path / "one.npy", frames[0])
    said = call("scan-distortion", tmp_path / "one.npy")
    assert said.exit_code == 0
    matrix = [float(word) for word in said.output.strip().partition("=")[2].split(",")]
    np.testing.assert_allclose(matrix, [1, -drifts[0, 0] / 30, 0, 1 - drifts[0, 1] / 30], atol=0.006)
    straight = StackSettings(pixel_angstrom=PIXEL, scan_matrix=tuple(matrix))
    np.save(tmp_path / "first.npy", frames[:1, 0])
    (tmp_path / "first.tlt").write_text(str(THETA[0]))
    import_stack(tmp_path / "first.npy", tmp_path / "t.zarr", straight)
    first = Store.open(tmp_path / "t.zarr").read("projections")["phase"].values[0]
    assert np.corrcoef(first.ravel(), IMAGES[0].ravel())[0, 1] > 0.995
    assert call("scan-distortion", tmp_path / "one.npy", "--spot", "0.1,0.2").exit_code == 2


def test_a_stack_that_was_exported_anew_is_another_one(tmp_path):
    """The same name, angles and settings: what is made from the projections is out of date."""
    prints = []
    for images in (IMAGES, IMAGES[:, ::-1]):
        folder = tmp_path / str(len(prints))
        folder.mkdir()
        import_stack(_mrc(folder / "tilts.st", np.ascontiguousarray(images)), tmp_path / "s.zarr")
        prints.append(Store.open(tmp_path / "s.zarr").fingerprint("projections"))
    assert prints[0] != prints[1]
