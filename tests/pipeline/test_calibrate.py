"""The calibration of a series in a store: what was simulated comes back beside the metadata, which stay as they are."""

import json

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import stemtomo
from stemtomo.cli import app
from stemtomo.errors import CalibrationError, ConfigurationError, StoreError
from stemtomo.geometry import Detector, Optics, Pose, Scan
from stemtomo.io.frames import shard_regions
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.calibrate import calibrate
from stemtomo.pipeline.compare import refined_notes, series_trends
from stemtomo.pipeline.config import CalibrationSettings
from stemtomo.pipeline.quicklook import quicklook
from stemtomo.pipeline.references import settings_told
from tests.algorithms.imaging import microscope
from tests.data import FOLDER, needs


def make_store(path, tilts, optics, scan, pixel, theta_deg):
    store = Store.create(path, "test")
    store.declare_tilts(len(tilts))
    for index, frames in enumerate(tilts):
        detector, pose = Detector(frames.shape[2:], pixel), Pose(np.deg2rad(theta_deg[index]))
        array = store.create_tilt(index, frames.shape, frames.dtype, optics, scan, detector, pose)
        regions = dict(shard_regions(array))
        for y0, y1, x0, x1 in regions.values():
            store.write_frames(index, y0, x0, frames[y0:y1, x0:x1])
        store.record_frames(index, regions)
        store.complete_tilt(index, Provenance.start("ingest", {}, {}).finish())
    store.complete_tilts(Provenance.start("ingest", {}, {}))
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One tilt of the simulated microscope; the metadata say 20.5 mrad, 20 deg and C1 = +130 Å, all a little wrong."""
    frames = microscope.frames(scan=48, electrons=1e4)
    optics, scan = Optics(300e3, 20.5e-3, {"C10": 130.0}), Scan((48, 48), (0.6, 0.6), np.deg2rad(20))
    path = tmp_path_factory.mktemp("calibrate") / "test.zarr"
    made = make_store(path, [frames], optics, scan, microscope.PIXEL, [0.0])
    quicklook(made)
    return made


def test_what_is_found_stands_beside_the_metadata(store):
    result = calibrate(store)
    tilt = result["tilts"][0]
    assert tilt["found"]["semiangle_mrad"] == pytest.approx(20, abs=0.3)
    assert tilt["found"]["rotation_mod_180_deg"] == pytest.approx(23, abs=0.5)
    assert tilt["found"]["c1_magnitude_angstrom"] == pytest.approx(150, rel=0.015)
    assert tilt["metadata"]["semiangle_mrad"] == pytest.approx(20.5)
    assert tilt["difference"]["rotation_deg"] == pytest.approx(3, abs=0.5)
    assert tilt["difference"]["c1_angstrom"] == pytest.approx(20, abs=2.5)
    assert (tilt["found"]["dead_pixels"], tilt["found"]["hot_pixels"]) == (0, 0)
    json.dumps(result, allow_nan=False)
    assert store.optics(0).c1_angstrom == 130  # nothing is overwritten
    kept = store.read("calibration/000")
    assert kept["parallax"].dims == ("y", "x")
    assert np.isfinite(kept["parallax"]).all()
    assert np.isfinite(kept["icom_phase"]).all()
    assert calibrate(store)["computed"] == 0


def test_the_sign_is_open_until_somebody_knows_it(store):
    tilt = calibrate(store)["tilts"][0]
    assert tilt["found"]["rotation_deg"] is None
    assert tilt["found"]["c1_angstrom"] is None
    assert "fit alike" in tilt["undetermined"]["sign"]
    over, under = tilt["found"]["candidates"]
    assert over["c1_angstrom"] == -under["c1_angstrom"]
    assert abs(over["rotation_deg"] - under["rotation_deg"]) == pytest.approx(180)
    known = calibrate(store, CalibrationSettings(c1_sign="positive"))["tilts"][0]
    assert known["found"]["rotation_deg"] == pytest.approx(23, abs=0.5)
    assert known["found"]["c1_angstrom"] > 0
    assert "sign" not in known["undetermined"]
    other = calibrate(store, CalibrationSettings(rotation_near_deg=-150.0))["tilts"][0]
    assert other["found"]["rotation_deg"] == pytest.approx(-157, abs=0.5)
    assert other["found"]["c1_angstrom"] < 0


def test_what_is_required_and_not_there_is_an_error(tmp_path):
    noise = np.random.default_rng(0).poisson(0.1, size=(16, 16, 64, 64)).astype(np.uint16)
    noise[:, :, 32 - 15 : 32 + 15, 32 - 15 : 32 + 15] += (
        np.random.default_rng(1).poisson(3.0, (16, 16, 30, 30)).astype("u2")
    )
    optics, scan = Optics(300e3, 20e-3), Scan((16, 16), (0.6, 0.6))
    store = make_store(tmp_path / "noise.zarr", [noise], optics, scan, microscope.PIXEL, [0.0])
    with pytest.raises(StoreError, match="quicklook"):
        calibrate(store)
    quicklook(store)
    found = calibrate(store)["tilts"][0]
    assert found["found"]["c1_magnitude_angstrom"] is None
    assert found["found"]["rotation_mod_180_deg"] is None
    for what in ("rotation", "c1"):
        with pytest.raises(CalibrationError, match=f"do not determine the {what}"):
            calibrate(store, CalibrationSettings(require=(what,)))


def test_trends_stay_on_one_branch_and_name_the_odd_tilt():
    theta = np.deg2rad(np.linspace(-60, 60, 9))
    records = []
    for i, angle in enumerate(theta):
        c1, turn = 200 + 20 * np.sin(angle) + (80 if i == 2 else 0), 89.5 if i % 2 else 90.5
        pair = [{"rotation_deg": turn, "c1_angstrom": c1}, {"rotation_deg": turn - 180, "c1_angstrom": -c1}]
        found = {"candidates": pair[:: 1 if i % 2 else -1], "c1_angstrom": None, "rotation_deg": None}
        found |= {"semiangle_mrad": 20.0, "com_rotation_deg": None}
        records.append({"theta_rad": angle, "found": found, "undetermined": {"sign": "open"}})
    series = series_trends(records)
    assert series["c1_angstrom"]["outliers"] == [2]
    assert "undetermined" in series["c1_angstrom"]["sign"]
    assert len({np.sign(value) for value in series["c1_angstrom"]["values"]}) == 1
    assert np.ptp(series["parallax_rotation_deg"]["values"]) == pytest.approx(1.0)
    assert series["semiangle_mrad"]["outliers"] == []


@needs("cuau_tilt")
def test_the_known_optics_of_a_simulated_particle(tmp_path):
    data = np.load(FOLDER / "cuau_tilt" / "data.npz")
    told = json.loads((FOLDER / "cuau_tilt" / "metadata.json").read_text())
    chosen = [4, 6, 7, 14]
    optics = Optics(300e3, 21e-3, {"C10": told["defocus_C1_A"]}, told["defocus_reference_plane_z_A"])
    scan = Scan((24, 24), (told["scan_step_A"],) * 2)
    theta = [told["tilt_theta_deg"][i] for i in chosen]
    frames = data["patterns_counts"][chosen]
    store = make_store(tmp_path / "cuau.zarr", frames, optics, scan, told["detector_pixel_invA"], theta)
    quicklook(store)
    for tilt in calibrate(store, CalibrationSettings(c1_sign="positive"))["tilts"]:
        assert tilt["found"]["semiangle_mrad"] == pytest.approx(21, abs=0.4)  # half a pixel
        assert tilt["found"]["beam_centre_ky_px"] == pytest.approx(32, abs=0.1)
        assert tilt["found"]["rotation_deg"] == pytest.approx(0, abs=0.5)
        assert tilt["found"]["c1_angstrom"] == pytest.approx(told["effective_C1_at_rotation_centre_A"], rel=0.025)


def thick_store(name, path, c1_off_by=0.0):
    """A store of one of the crystals; C1 is told on the entrance surface, and the metadata may be wrong."""
    with np.load(FOLDER / name / "data.npz") as data:
        patterns = data["patterns_counts"]
    told = json.loads((FOLDER / name / "metadata.json").read_text())
    lens = {"C10": told["defocus_C1_A"] + c1_off_by}
    optics = Optics(300e3, told["convergence_semiangle_mrad"] / 1e3, lens, -told["thickness_A"] / 2)
    scan = Scan(patterns.shape[:2], (told["scan_step_A"],) * 2)
    store = make_store(path / f"{name}.zarr", [patterns], optics, scan, told["detector_pixel_invA"], [0.0])
    quicklook(store)
    return store, told


@needs("sto_zone")
def test_the_optics_of_a_thick_crystal_are_known_but_parallax_sees_a_plane_within_it(tmp_path):
    """117 Å of SrTiO3 on zone is no thin object: channelling moves its focus by 16 Å, an eighth of the slab."""
    store, told = thick_store("sto_zone", tmp_path)
    found = calibrate(store, CalibrationSettings(rotation_near_deg=0.0))["tilts"][0]["found"]
    assert found["semiangle_mrad"] == pytest.approx(21.4, abs=0.36)
    assert found["beam_centre_kx_px"] == pytest.approx(48, abs=0.1)
    assert found["rotation_deg"] == pytest.approx(0, abs=0.5)
    assert found["com_rotation_deg"] == pytest.approx(0, abs=0.5)
    assert -150 < found["c1_angstrom"] < -150 + told["thickness_A"]


def test_a_refinement_that_is_too_short_says_so(store):
    told = CalibrationSettings(
        c1_sign="positive", refine=True, refine_patterns=64, refine_iterations=1, refine_slices=3
    )
    tilt = calibrate(store, told)["tilts"][0]
    assert tilt["found"]["refined_c1_angstrom"] is None
    assert tilt["found"]["c1_angstrom"] == pytest.approx(150, rel=0.015)
    assert "the search was too short" in tilt["undetermined"]["refined_c1_angstrom"]
    with pytest.raises(ConfigurationError, match="thickness_angstrom"):
        settings_told(CalibrationSettings, "calibrate", {"refine": True, "thickness_angstrom": -3.0})


def test_a_refinement_is_said_with_the_planes_it_belongs_to():
    found = {"refined_c1_angstrom": -92.6, "refined_c1_sigma_angstrom": 1.8, "refined_thickness_angstrom": None}
    [thin] = refined_notes([{"tilt": 3, "found": found}, {"tilt": 4, "found": {"refined_c1_angstrom": None}}])
    assert thin == "Tilt 3: C1 -92.6 Å in the middle of the specimen (σ 1.8)"
    found |= {"refined_thickness_angstrom": 117.1, "refined_thickness_sigma_angstrom": 3.8}
    found |= {
        "refined_c1_entrance_angstrom": -151.2,
        "refined_mistilt_mrad": [0.0, 0.1],
        "refined_mistilt_sigma_mrad": 0.1,
    }
    [thick] = refined_notes([{"tilt": 3, "found": found | {"depth_of_focus_angstrom": 43.0}}])
    assert "-151.2 Å on its entrance surface; thickness 117 Å (σ 4)" in thick
    assert thick.endswith("slices = 6, slice_thickness_angstrom = 19.5")


@pytest.mark.heavy
@pytest.mark.timeout(900)  # a minute of one core
@needs("sto_zone")
def test_a_refinement_finds_c1_of_a_thick_crystal_and_its_sign(tmp_path):
    # Nothing is told: neither sign nor thickness, and the metadata's C1 is wrong.
    store, told = thick_store("sto_zone", tmp_path, c1_off_by=40.0)
    tilt = calibrate(store, CalibrationSettings(refine=True))["tilts"][0]
    found, middle = tilt["found"], told["defocus_C1_A"] + told["thickness_A"] / 2
    assert "sign" not in tilt["undetermined"]
    assert found["rotation_deg"] == pytest.approx(0, abs=0.5)
    assert found["refined_c1_angstrom"] == pytest.approx(middle, abs=found["refined_c1_sigma_angstrom"])
    assert found["refined_c1_sigma_angstrom"] < 2.5
    assert found["refined_c1_entrance_angstrom"] == pytest.approx(told["defocus_C1_A"], abs=3)
    assert found["refined_thickness_angstrom"] == pytest.approx(told["thickness_A"], abs=4)
    assert np.abs(found["refined_mistilt_mrad"]).max() < 0.2


@pytest.mark.heavy
@pytest.mark.timeout(900)
@needs("sto_mistilt")
def test_a_refinement_begins_at_the_metadata_where_parallax_finds_nothing(tmp_path):
    store, told = thick_store("sto_mistilt", tmp_path, c1_off_by=40.0)
    tilt = calibrate(store, CalibrationSettings(refine=True))["tilts"][0]
    found, middle = tilt["found"], told["defocus_C1_A"] + told["thickness_A"] / 2
    assert "c1_angstrom" in tilt["undetermined"]
    assert found["refined_c1_angstrom"] == pytest.approx(middle, abs=2 * found["refined_c1_sigma_angstrom"])
    np.testing.assert_allclose(found["refined_mistilt_mrad"], [6, -3], atol=0.5)


def test_the_command_line_prints_a_row_per_tilt_and_writes_the_numbers(store, tmp_path):
    numbers = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["calibrate", str(store.path), "--c1-sign", "positive", "--json", str(numbers)])
    assert result.exit_code == 0, result.output
    assert "[130.0]" in result.output
    assert json.loads(numbers.read_text())["tilts"][0]["found"]["c1_angstrom"] > 0
    refused = CliRunner().invoke(app, ["calibrate", str(store.path), "--c1-sign", "upwards"])
    assert refused.exit_code == 2
    assert "c1_sign" in refused.output


def test_the_report_shows_what_was_found(store, tmp_path):
    calibrate(store)
    page = stemtomo.report(store, tmp_path / "report.html").read_text()
    section = page[page.index('<section id="calibration"') :]
    assert "mod 180 [20.00]" in section
    assert "the sign is undetermined" in section.lower()
    assert "data:image/png" in section


def test_calibrate_is_public_and_its_result_opens_with_the_store(store):
    assert stemtomo.calibrate is calibrate
    calibrate(store)
    assert isinstance(stemtomo.open(store.path)["calibration/000"].to_dataset(), xr.Dataset)


def test_positions_without_a_frame_are_left_out(tmp_path):
    frames = microscope.frames(scan=48, electrons=1e4)
    lost = np.zeros((48, 48), bool)
    lost[np.random.default_rng(1).integers(0, 44, 60), np.random.default_rng(2).integers(0, 48, 60)] = True
    lost[20, 5:30] = True  # half a line
    lost[44:] = True  # the scan was stopped
    frames[lost] = 0
    optics, scan = Optics(300e3, 20e-3, {"C10": 150.0}), Scan((48, 48), (0.6, 0.6), np.deg2rad(23))
    made = make_store(tmp_path / "gaps.zarr", [frames], optics, scan, microscope.PIXEL, [0.0])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], lost.ravel().astype(int), [0]]))).reshape(-1, 2)
    made.close_source(0, {}, [(int(a), int(b)) for a, b in edges])
    quicklook(made)
    found = calibrate(made)["tilts"][0]["found"]
    assert found["c1_magnitude_angstrom"] == pytest.approx(150, rel=0.015)
    assert found["rotation_mod_180_deg"] == pytest.approx(23, abs=0.5)
    kept = made.read("calibration/000")
    np.testing.assert_array_equal(kept["valid"], ~lost)
    assert kept["parallax"].shape == kept["icom_phase"].shape == (48, 48)
    assert not kept["parallax"][44:].any()
    assert np.isfinite(kept["icom_phase"]).all()
