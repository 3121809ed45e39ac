"""The demo: electrons in, scored atoms out; stopped anywhere, it continues."""

import numpy as np
import pytest

from stemtomo.errors import ConfigurationError
from stemtomo.io.store import Store
from stemtomo.pipeline import demo as module
from stemtomo.pipeline.config import AtomSettings, PtychographySettings, StageSettings, TomographySettings
from stemtomo.pipeline.demo import demo
from stemtomo.pipeline.simulate import SimulationSettings
from stemtomo.pipeline.specimen import core_shell_nanoparticle, read_specimen

#: About 40 atoms, in seconds.
PARTICLE = core_shell_nanoparticle(3, 10.0, shell_angstrom=2.0)
SIMULATION = SimulationSettings(
    tilt_deg=tuple(float(angle) for angle in range(-64, 65, 16)),
    scan_shape=(13, 13),
    detector_px=40,
    oversampling=2.0,
    slice_thickness_angstrom=2.0,
    phonon_configurations=1,
    phonon_rms_angstrom=0.05,
    defocus_c1_angstrom=120.0,
    dose_per_square_angstrom=4e5,
)
SETTINGS = StageSettings(
    ptychography=PtychographySettings(epochs=12, settling_epochs=6), tomography=TomographySettings(iterations=80)
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, demo(out, specimen=PARTICLE, simulation=SIMULATION, settings=SETTINGS)


def test_every_atom_is_found_and_named(finished):
    _, result = finished
    assert (result["recall"], result["precision"]) == (1, 1)
    assert result["rmsd_pm"] < 10
    assert result["species_accuracy"] == 1
    assert list(result["stages"]) == [
        "simulate", "quicklook", "ptychography", "projections", "align", "tomography", "find_atoms", "score",
    ]  # fmt: skip


def test_the_truth_lies_beside_the_store_and_not_in_it(finished):
    out, result = finished
    truth = read_specimen(out / "truth.xyz")
    assert result["truth"] == str(out / "truth.xyz")
    np.testing.assert_allclose(truth.positions, PARTICLE.positions, atol=1e-6)
    assert not list((out / "demo.zarr").rglob("*.xyz"))


def test_run_again_it_computes_nothing(finished):
    out, result = finished
    again = demo(out, specimen=PARTICLE, simulation=SIMULATION, settings=SETTINGS)
    assert again["stages"]["simulate"]["simulated_tilts"] == 0
    assert again["stages"]["ptychography"]["computed"] == 0
    assert again["rmsd_pm"] == result["rmsd_pm"]


def test_it_continues_where_it_was_stopped(finished, tmp_path, monkeypatch):
    _, result = finished

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    stages = module.run_stages
    monkeypatch.setattr(module, "run_stages", killed)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, specimen=PARTICLE, simulation=SIMULATION, settings=SETTINGS)
    monkeypatch.setattr(module, "run_stages", stages)
    resumed = demo(tmp_path, specimen=PARTICLE, simulation=SIMULATION, settings=SETTINGS)
    assert resumed["stages"]["simulate"]["simulated_tilts"] == 0
    assert resumed["rmsd_pm"] == pytest.approx(result["rmsd_pm"], rel=1e-3)


def test_species_come_from_the_specimen_whatever_the_settings_say(finished):
    out, _ = finished
    settings = SETTINGS.model_copy(update={"atoms": AtomSettings(species=("Al", "Si"))})
    demo(out, specimen=PARTICLE, simulation=SIMULATION, settings=settings)
    assert set(Store.open(out / "demo.zarr").read("atoms").attrs["classes"]) == {"Cu", "Au"}


def test_a_folder_of_another_specimen_is_left_alone(finished):
    out, _ = finished
    with pytest.raises(ConfigurationError, match="37 atoms of another specimen"):
        demo(out, specimen=core_shell_nanoparticle(9, 10.0), simulation=SIMULATION)
