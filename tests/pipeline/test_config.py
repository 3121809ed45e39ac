"""A configuration says what it means, or says which key is wrong, what it holds and what is allowed."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ingest_series import ingest
from stemtomo.pipeline.references import load_configuration
from stemtomo.pipeline.solving import epochs_of

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = Path(os.environ.get("STEMTOMO_DATA", Path(__file__).parents[2].parent / "shared" / "data"))

TOML = """
[series]
name = "@metadata:specimen.name"
[input]
path = "frames.npz"
array = "frames"
[optics]
energy_kev = 300
semiangle_mrad = "@metadata:semiangle_mrad"
defocus_c1_angstrom = "10 * @metadata:defocus_nm"
[scan]
shape = "@metadata:scan_shape"
step_angstrom = [1.5, "@metadata:steps.0"]
[detector]
pixel_inv_angstrom = 0.05
[tilts]
theta_deg = "@data:theta"
"""


@pytest.fixture
def toml(tmp_path):
    np.savez(tmp_path / "frames.npz", frames=np.zeros((3, 4, 5, 64, 64), np.uint16), theta=np.array([-30.0, 0.0, 30.0]))
    metadata = {
        "specimen": {"name": "particle"},
        "semiangle_mrad": 21.0,
        "defocus_nm": 20.0,
        "scan_shape": [4, 5],
        "steps": [1.25],
    }
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    path = tmp_path / "series.toml"
    path.write_text(TOML)
    return path


def test_references_reach_metadata_and_members_of_the_input(toml):
    configuration = load_configuration(toml)
    assert configuration.series.name == "particle"
    assert configuration.store_path == Path("particle.zarr")
    assert configuration.optics.semiangle_mrad == 21
    assert configuration.scan.step_angstrom == (1.5, 1.25)
    assert configuration.tilts.theta_deg == (-30, 0, 30)


def test_a_product_converts_the_unit_of_a_reference(toml):
    assert load_configuration(toml).optics.defocus_c1_angstrom == pytest.approx(200)


def test_input_path_is_relative_to_the_file_but_an_override_to_the_current_folder(toml, monkeypatch):
    assert load_configuration(toml).input.path == toml.parent / "frames.npz"
    monkeypatch.chdir(toml.parent)
    assert load_configuration(toml, ["input.path=./frames.npz"]).input.path == Path("frames.npz")


def test_an_override_is_applied_before_references_are_resolved(toml, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    np.savez(elsewhere / "other.npz", frames=np.zeros((2, 4, 5, 8, 8)), theta=np.array([1.0, 2.0]))
    (elsewhere / "metadata.json").write_text((tmp_path / "metadata.json").read_text().replace("21.0", "30.0"))
    configuration = load_configuration(toml, [f"input.path={elsewhere / 'other.npz'}"])
    assert configuration.tilts.theta_deg == (1, 2)
    assert configuration.optics.semiangle_mrad == 30


def test_overrides_are_toml_values_or_plain_text(toml):
    configuration = load_configuration(
        toml,
        [
            "ptychography.epochs=7",
            "tilts.theta_deg=[1, 2.5]",
            "series.name=dry run",
            "alignment.enabled=false",
            'atoms.species=["Cu", "Au"]',
        ],
    )
    assert configuration.ptychography.epochs == 7
    assert configuration.tilts.theta_deg == (1, 2.5)
    assert configuration.series.name == "dry run"
    assert configuration.alignment.enabled is False
    assert configuration.atoms.species == ("Cu", "Au")


def test_the_configuration_is_frozen(toml):
    with pytest.raises(ValueError, match="frozen"):
        load_configuration(toml).optics.energy_kev = 200


def test_builders_hand_out_ev_rad_and_angstrom(toml):
    configuration = load_configuration(
        toml, ["optics.aberrations={C30 = 1e4, C12 = 20, phi12 = 0.5}", "scan.rotation_deg=90"]
    )
    optics = configuration.to_optics()
    assert optics.energy_ev == 300e3
    assert optics.semiangle_rad == pytest.approx(0.021)
    assert optics.c1_angstrom == pytest.approx(200)
    assert optics.aberrations["C30"] == 1e4
    scan = configuration.to_scan((4, 5))
    assert scan.rotation_rad == pytest.approx(math.pi / 2)
    assert scan.step_angstrom_yx == (1.5, 1.25)
    assert configuration.to_detector((8, 8)).centre_yx == (4, 4)
    assert [round(math.degrees(pose.theta_rad)) for pose in configuration.to_tilts(3)] == [-30, 0, 30]


def test_euler_rows_are_phi_theta_psi(toml):
    raw = toml.read_text().replace('theta_deg = "@data:theta"', "euler_zyx_deg = [[10, 20, 30], [1, 2, 3]]")
    toml.write_text(raw)
    pose = load_configuration(toml).to_tilts(2)[0]
    assert (pose.phi_rad, pose.theta_rad, pose.psi_rad) == pytest.approx(tuple(np.radians([10, 20, 30])))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optics.energy_kev=-300", r"optics.energy_kev = -300: .*greater than 0"),
        ("optics.energy_kev=nan", r"optics.energy_kev"),
        ("optics.energykev=300", r"unknown key optics.energykev \(did you mean energy_kev"),
        ("optic.energy_kev=300", r"unknown section optic \(did you mean optics"),
        ("optics.semiangle_mrad=@metadata:semi_angle", r"no 'semi_angle' \(did you mean semiangle_mrad"),
        ("optics.semiangle_mrad=@data:angle", r"@data:angle.*has frames, theta"),
        ("tilts.theta_deg=@data:frames", "too many for a configuration"),
        ("tilts.theta_deg=[1, 'a']", r"tilts.theta_deg.1 = 'a'"),
        ("optics.defocus_c1_angstrom=10 * ten * @metadata:defocus_nm", "'ten' is neither a number nor a reference"),
        ("scan.shape=[0, 4]", r"scan.shape.0 = 0"),
        ("scan.step_angstrom=0", r"scan.step_angstrom = 0.*Å"),
        ("scan.origin=middle", "'centre' or 'pixel'"),
        ("input.axes=tilt,y,x,ky", "input.axes.*each once"),
        ("ptychography.slices=4", "slice_thickness_angstrom is needed"),
        ("tilts.euler_zyx_deg=[[0, 1, 0]]", "not both"),
        ("epochs=3", "expected section.key=value"),
        ("optics.aberrations={C10 = 5}", "defocus_c1_angstrom"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(toml, override, expected):
    with pytest.raises(ConfigurationError, match=expected) as caught:
        load_configuration(toml, [override])
    assert "\n" not in str(caught.value)


def test_a_missing_section_and_a_missing_key_are_named(toml):
    text = toml.read_text()
    toml.write_text(text.replace("[detector]\npixel_inv_angstrom = 0.05", ""))
    with pytest.raises(ConfigurationError, match=r"section \[detector\] is missing"):
        load_configuration(toml)
    toml.write_text(text.replace("energy_kev = 300", ""))
    with pytest.raises(ConfigurationError, match=r"optics.energy_kev is missing: Beam energy in keV"):
        load_configuration(toml)


def test_a_missing_file_and_broken_toml_are_said_as_such(toml, tmp_path):
    with pytest.raises(ConfigurationError, match="no such configuration file"):
        load_configuration(tmp_path / "absent.toml")
    toml.write_text("[optics\n")
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        load_configuration(toml)


def test_missing_metadata_says_where_it_was_looked_for(toml, tmp_path):
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(ConfigurationError, match=r"metadata.json does not exist"):
        load_configuration(toml)


@pytest.mark.parametrize(
    ("override", "count", "expected"),
    [
        ("tilts.theta_deg=[0, 10]", 3, "2 angles for 3 tilts: an angle is missing"),
        ("tilts.theta_deg=[0, 10, 20, 30]", 3, "too many angles"),
        ("tilts.theta_deg=[0, 10, 10]", 3, "tilts 1 and 2 have the same angles"),
        ("tilts.phi_deg=[0, 10]", 3, "tilts.phi_deg has 2 angles for 3 tilts"),
    ],
)
def test_angle_lists_match_the_frames(toml, override, count, expected):
    with pytest.raises(ConfigurationError, match=expected):
        load_configuration(toml, [override]).to_tilts(count)


def test_a_scan_shape_that_is_not_that_of_the_frames_is_refused(toml):
    configuration = load_configuration(toml)
    with pytest.raises(FormatError, match=r"\[4, 5\].*20 positions.*\[5, 5\].*25 frames"):
        configuration.to_scan((5, 5))


@pytest.mark.parametrize("name", ["cuau_tilt", "mset_cuau"])
@pytest.mark.skipif(not DATA.is_dir(), reason="the reference data are not here (STEMTOMO_DATA)")
def test_the_examples_hold_no_number_that_the_data_set_states(name):
    example = EXAMPLES / f"{name}.toml"
    input_path = DATA / name / {"cuau_tilt": "data.npz", "mset_cuau": "data4d.npz"}[name]
    configuration = load_configuration(example, [f"input.path={input_path}"])
    assert configuration.series.name == name
    assert configuration.to_optics().energy_ev == 300e3
    assert configuration.to_optics().c1_angstrom == 200  # overfocus in both
    assert configuration.to_optics().defocus_plane_z_angstrom == pytest.approx(
        {"cuau_tilt": -16, "mset_cuau": -4.8}[name]
    )
    assert configuration.to_scan((24, 24)).step_angstrom_yx == {"cuau_tilt": (1.6, 1.6), "mset_cuau": (0.4, 0.4)}[name]
    assert len(configuration.to_tilts()) == {"cuau_tilt": 15, "mset_cuau": 8}[name]


@pytest.mark.parametrize(
    ("section", "key", "others", "message"),
    [
        ("ptychography", "positive_phase=true", 'rule = "lbfgs"', "rule = .lbfgs. does not keep positive_phase"),
        ("ptychography", "held_out=0.1", "mistilt_map_smoothing_angstrom = 5", "found without held_out"),
        ("tomography", "refine_shifts=true", 'method = "sirt"', "refine_shifts = true is for method fista, fista_tv"),
        ("tomography", "free_fraction=0.1", 'method = "wbp"', "free_fraction is for method"),
        ("alignment", "joint_bins=[4, 4, 2]", "", "joint_bins go from coarse to fine"),
    ],
)
def test_what_would_be_ignored_is_refused(toml, section, key, others, message):
    stack = "slices = 3\nslice_thickness_angstrom = 5\n" if section == "ptychography" else ""
    toml.write_text(f"{TOML}\n[{section}]\n{stack}{others}\n")
    load_configuration(toml)
    with pytest.raises(ConfigurationError, match=message):
        load_configuration(toml, [f"{section}.{key}"])


def test_settling_epochs_are_at_most_all():
    settings = PtychographySettings(epochs=4, settling_epochs=9, rule="lbfgs")
    assert settings.settling_of(settings.epochs) == 4
    assert epochs_of(settings) == ((), ())


def test_overrides_of_a_configuration_are_not_ignored(toml):
    with pytest.raises(ConfigurationError, match="are for a TOML file"):
        ingest(load_configuration(toml), overrides=["ingest.bin=2"])


def test_a_damaged_member_behind_a_reference_is_named(toml, tmp_path):
    np.savez_compressed(tmp_path / "frames.npz", frames=np.zeros((3, 4, 5, 64, 64), np.uint16), theta=np.arange(3.0))
    damaged = bytearray((tmp_path / "frames.npz").read_bytes())
    place = damaged.index(b"theta.npy") + 40
    damaged[place : place + 60] = bytes(60)
    (tmp_path / "frames.npz").write_bytes(bytes(damaged))
    with pytest.raises(ConfigurationError, match=r"tilts.theta_deg = '@data:theta': .* cannot be read as .npz"):
        load_configuration(toml)
