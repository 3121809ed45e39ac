"""A study: every combination simulated, reconstructed and scored, and its table, picture and command."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from stemtomo.cli import app
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError
from stemtomo.io.store import Store
from stemtomo.pipeline.config import JointSettings, StageSettings
from stemtomo.pipeline.simulate import SimulationSettings
from stemtomo.pipeline.specimen import Specimen, specimen_of, write_specimen
from stemtomo.pipeline.study import StudySettings, markdown, study, study_settings
from stemtomo.reporting.study import study_picture

ATOMS = Specimen(np.array([[0.0, 0.4, 0.2], [2.0, -1.0, 1.1], [-1.8, 1.7, -1.0]]), np.array([79, 79, 79]), "three")
SIMULATION = SimulationSettings(
    tilt_deg=(-50.0, -25.0, 0.0, 25.0, 50.0),
    scan_shape=(8, 8),
    scan_step_angstrom=1.2,
    detector_px=24,
    defocus_c1_angstrom=100.0,
    phonon_configurations=1,
    dose_per_square_angstrom=1e6,
)
QUICK = StageSettings(
    joint=JointSettings(single_slice_epochs=3, sweeps=1, settling_sweeps=2, slice_thickness_angstrom=2.0)
)


def test_every_combination_is_a_simulation_with_the_same_field_and_as_many_tilts():
    asked = StudySettings(scan_step_angstrom=(0.6, 2.4), tilt_range_deg=(60.0,), dose_per_square_angstrom=(1e3, 1e4))
    conditions = asked.conditions(SIMULATION)
    assert len(conditions) == 4
    for chosen, simulation in conditions:
        assert simulation.dose_per_square_angstrom == chosen["dose_per_square_angstrom"]
        assert simulation.scan.extent_angstrom_yx == pytest.approx((9.6, 9.6))
        np.testing.assert_allclose(simulation.tilt_deg, [-60, -30, 0, 30, 60])
        assert simulation.defocus_c1_angstrom == 100
    assert StudySettings().conditions(SIMULATION) == [({}, SIMULATION)]


@pytest.mark.heavy
def test_more_electrons_place_the_atoms_better(tmp_path):
    asked = StudySettings(dose_per_square_angstrom=(3e3, 1e6), ways=("joint",))
    found = study(tmp_path, ATOMS, asked, simulation=SIMULATION, stages=QUICK, executor=ThreadExecutor(2))
    few, many = found["rows"]
    assert many["recall"] == many["precision"] == 1
    assert few["rmsd_pm"] is None or many["rmsd_pm"] < few["rmsd_pm"]
    assert many["rmsd_pm"] < 12
    assert json.loads((tmp_path / "study.json").read_text())["rows"] == found["rows"]
    assert Store.open(tmp_path / "dose1e+06.zarr").tilt_count == 5
    table = markdown(found["rows"]).splitlines()
    assert table[0].startswith("| dose (e/Å²) | way | recall")
    assert len(table) == 4
    assert study_picture(found["rows"]).startswith(b"\x89PNG")
    again = study(tmp_path, ATOMS, asked, simulation=SIMULATION, stages=QUICK, executor=ThreadExecutor(2))
    assert [row["rmsd_pm"] for row in again["rows"]] == [row["rmsd_pm"] for row in found["rows"]]


def test_the_command_reads_a_structure_and_simulates(tmp_path):
    moved = Specimen(ATOMS.positions + 5, ATOMS.atomic_numbers, "moved")
    write_specimen(tmp_path / "atoms.xyz", moved)
    centred = specimen_of(tmp_path / "atoms.xyz").positions
    np.testing.assert_allclose(centred.min(axis=0), -centred.max(axis=0), atol=1e-5)
    told = [
        f"{name}={value}" for name, value in (("scan_shape", "[2, 2]"), ("tilt_deg", "[0, 10]"), ("detector_px", 24))
    ]
    arguments = ["simulate", str(tmp_path / "atoms.xyz"), "--out", str(tmp_path / "out"), "--way", "none"]
    for text in told:
        arguments += ["--set", f"simulation.{text}"]
    result = CliRunner().invoke(app, [*arguments, "--defocus", "-50,100"])
    assert result.exit_code == 0, result.output
    for c1 in (-50, 100):
        store = Store.open(tmp_path / "out" / f"defocus{c1}.zarr")
        assert store.frames(1).shape == (2, 2, 24, 24)
        assert store.optics(0).c1_angstrom == c1


def test_the_truth_of_another_study_is_not_replaced(tmp_path):
    write_specimen(tmp_path / "truth.xyz", ATOMS)
    before = (tmp_path / "truth.xyz").read_bytes()
    other = Specimen(ATOMS.positions + 1, ATOMS.atomic_numbers, "other")
    with pytest.raises(ConfigurationError, match="another specimen"):
        study(tmp_path, other, simulation=SIMULATION, executor=ThreadExecutor(1))
    assert (tmp_path / "truth.xyz").read_bytes() == before


def test_what_is_asked_wrongly_is_said():
    with pytest.raises(ConfigurationError, match="jointly"):
        study_settings({}, "jointly")
    with pytest.raises(ConfigurationError, match="not a section"):
        study_settings({}, "joint", ["jiont.sweeps=1"])
    settings, simulation, stages = study_settings(
        {"dose_per_square_angstrom": "1e3,1e5"}, "joint,sequential", ["simulation.energy_kev=200", "joint.sweeps=2"]
    )
    assert settings.dose_per_square_angstrom == (1e3, 1e5)
    assert settings.ways == ("joint", "sequential")
    assert simulation.energy_kev == 200
    assert stages.joint.sweeps == 2
