"""The verb local_orbital: blind from images to atoms, on threads and a cluster, interrupted, and from the shell."""

import json

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

import stemtomo
from stemtomo import cli
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.io.store import Store
from stemtomo.pipeline import local_orbital as module
from stemtomo.pipeline.focal_series import add_focal_series, read_focal_series, simulate_particle
from stemtomo.pipeline.local_orbital import local_orbital, plan_local_orbital
from stemtomo.pipeline.local_orbital_parts import Sums, read_images
from stemtomo.pipeline.settings.local_orbital import LocalOrbitalSettings

QUICK = LocalOrbitalSettings(
    atom_iterations=6,
    probe_searches=1,
    probe_iterations=6,
    last_iterations=6,
    rounds=2,
    slice_thickness_angstrom=5,
    window_angstrom=8,
    atoms_per_block=25,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("focal") / "particle.npz"
    theta = np.arange(-70.0, 71, 10)
    simulate_particle(path, atoms=60, sections=2, semiangle_mrad=50, pixel_angstrom=0.4, theta_deg=theta)
    return path


@pytest.fixture(scope="module")
def blind(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blind")
    numbers = local_orbital(folder / "s.zarr", QUICK, images=file, out=folder / "a.xyz", executor=ThreadExecutor(1))
    return folder, numbers


def test_every_atom_is_found_from_the_images_alone(blind, file):
    folder, numbers = blind
    assert numbers["atoms"] == 60
    score = stemtomo.score_atoms(folder / "a.xyz", file)
    assert (score["recall"], score["precision"]) == (1, 1)
    assert score["rmsd_pm"] < 2
    assert numbers["loss"][-1] < 0.02 * numbers["loss"][0]
    result = Store.open(folder / "s.zarr").read("local_orbital")
    assert result["probe"].dims == ("focus", "slice", "probe_y", "probe_x")
    assert result.sizes["focus"] == 2
    (silicon,) = numbers["species"]
    assert silicon["atoms"] == 60
    assert silicon["width_angstrom"] == pytest.approx(0.35, abs=0.05)


def test_a_second_call_finds_it_done(blind):
    folder, numbers = blind
    again = local_orbital(folder / "s.zarr", QUICK)
    assert not again["computed"]
    assert again["loss"] == numbers["loss"]


def test_parts_and_an_interruption_change_nothing(blind, file, tmp_path, monkeypatch):
    folder, numbers = blind
    store = add_focal_series(tmp_path / "s.zarr", file)
    committed = module.Checkpoint.commit
    calls = []

    def cut(self, *arguments):
        mark = committed(self, *arguments)
        calls.append(mark)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return mark

    monkeypatch.setattr(module.Checkpoint, "commit", cut)
    with pytest.raises(KeyboardInterrupt):
        local_orbital(store, QUICK, executor=ThreadExecutor(2))
    again = local_orbital(store, QUICK, executor=ThreadExecutor(2))
    assert again["loss"] == numbers["loss"]
    first, second = (Store.open(path).read("local_orbital") for path in (folder / "s.zarr", store.path))
    np.testing.assert_array_equal(first["x"].values, second["x"].values)


def test_a_cluster_gives_the_bits_of_threads(blind, file, tmp_path):
    from distributed import Client, LocalCluster

    _, numbers = blind
    settings = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with LocalCluster(**settings) as cluster, Client(cluster):
        found = local_orbital(tmp_path / "s.zarr", QUICK, images=file)
    assert found["loss"] == numbers["loss"]


def test_more_parts_sum_to_the_same(file, tmp_path, blind):
    _, numbers = blind
    finer = QUICK.model_copy(update={"images_per_part": 3, "held_out": 0.0, "precision": "double"})
    coarser = finer.model_copy(update={"images_per_part": 1000})
    losses = [local_orbital(tmp_path / f"{n}.zarr", s, images=file)["loss"] for n, s in enumerate((finer, coarser))]
    np.testing.assert_allclose(losses[0][:5], losses[1][:5], rtol=1e-9)
    np.testing.assert_allclose(losses[0][:3], numbers["loss"][:3], rtol=1e-3)


def test_where_derivatives_of_atoms_are_cut_into_blocks_changes_no_bit(file, tmp_path):
    store = add_focal_series(tmp_path / "s.zarr", file)
    series = read_images(store, "single")
    model = module._first(store, series, QUICK, ThreadExecutor(1))
    found = []
    for atoms, images in ((1, 12), (25, 12), (1000, 12), (25, 1000)):
        settings = QUICK.model_copy(update={"atoms_per_block": atoms, "images_per_part": images})
        found.append(Sums.over(ThreadExecutor(1), store.path, np.arange(len(series)), settings, len(series))(model))
    for name in found[0]._fields:
        first = getattr(found[0], name)
        for other in found[1:3]:
            np.testing.assert_array_equal(getattr(other, name), first)
        np.testing.assert_allclose(getattr(found[3], name), first, atol=1e-5 * np.abs(first).max())


def test_no_sum_holds_more_than_a_block_of_atoms(file, tmp_path, monkeypatch):
    from stemtomo.distributed import parts

    store = add_focal_series(tmp_path / "s.zarr", file)
    series = read_images(store, "single")
    model = module._first(store, series, QUICK, ThreadExecutor(1))
    largest, add = [], parts.sum_trees

    def watched(trees):
        largest.append(max(len(tree["positions"]) for tree in trees) if "positions" in trees[0] else 0)
        return add(trees)

    monkeypatch.setattr(parts, "sum_trees", watched)
    settings = QUICK.model_copy(update={"atoms_per_block": 16, "images_per_part": 5})
    Sums.over(ThreadExecutor(1), store.path, np.arange(len(series)), settings, len(series))(model)
    assert max(largest) == 16 < len(model)


def test_held_out_images_test_the_model(file, tmp_path):
    settings = QUICK.model_copy(update={"held_out": 0.1})
    numbers = local_orbital(tmp_path / "s.zarr", settings, images=file)
    assert numbers["held_out_loss"] < 20 * numbers["loss"][-1]
    assert numbers["atoms"] == 60


def test_the_plan_touches_metadata_alone(file, tmp_path):
    store = add_focal_series(tmp_path / "s.zarr", file)
    row = plan_local_orbital(store, QUICK)
    assert row.tasks == 3
    assert row.resident_bytes > read_focal_series(file)["images"].nbytes


def test_hdf5_is_read_like_npz(file, tmp_path):
    with np.load(file) as members, h5py.File(tmp_path / "s.h5", "w") as out:
        for name in members:
            out[name] = members[name]
    first, second = read_focal_series(file), read_focal_series(tmp_path / "s.h5")
    np.testing.assert_array_equal(first["images"], second["images"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta_deg": None}, "lacks theta_deg"),
        ({"theta_deg": np.zeros(3)}, "15 tilts need as many theta_deg"),
        ({"pixel_angstrom": -1}, "pixel_angstrom must be one positive number"),
        ({"images": np.full((15, 8, 8), np.nan)}, "960 pixels of the images are not finite"),
        ({"images": np.ones((15, 8, 8))}, "images of tilt 0 are constant"),
        ({"images": np.ones((15, 8))}, r"must be \(tilt, section, y, x\)"),
        ({"c1_angstrom": np.zeros(2)}, "c1_angstrom must be one finite number"),
        ({"energy_kev": np.array("300 kV")}, "energy_kev must be one positive number"),
    ],
)
def test_a_bad_file_gets_one_clear_message(change, message, file, tmp_path):
    with np.load(file) as members:
        found = {**{name: members[name] for name in members}, **change}
    np.savez(tmp_path / "bad.npz", **{name: value for name, value in found.items() if value is not None})
    with pytest.raises(FormatError, match=message):
        read_focal_series(tmp_path / "bad.npz")


def test_a_cut_file_and_absent_members_get_one_clear_message(file, tmp_path):
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:3000])
    with pytest.raises(FormatError, match="cannot be read as a focal series"):
        read_focal_series(tmp_path / "cut.npz")
    with pytest.raises(FormatError, match="the series lacks images"):
        add_focal_series(tmp_path / "s.zarr", {"theta_deg": np.zeros(3)})


def test_another_series_or_start_is_not_taken_for_the_one_before(file, tmp_path):
    """What only changes signs or places has the same sums: the angles of a symmetric series turned round."""
    members = read_focal_series(file)
    store = add_focal_series(tmp_path / "s.zarr", members)
    first = store.fingerprint("focal_series")
    add_focal_series(store, members)
    assert store.fingerprint("focal_series") == first
    add_focal_series(store, {**members, "theta_deg": -members["theta_deg"]})
    assert store.fingerprint("focal_series") != first
    start = LocalOrbitalSettings(atoms=tmp_path / "a.xyz")
    prints = []
    for x in (0.0, 0.5):
        start.atoms.write_text(f"1\n\nSi {x} 0 0\n")
        prints.append(module._provenance(store, start).fingerprint)
    assert prints[0] != prints[1]


def test_settings_that_do_not_fit_the_series_are_refused(file, tmp_path):
    settings = QUICK.model_copy(update={"start_defocus_angstrom": (0.0, 1.0, 2.0)})
    with pytest.raises(ConfigurationError, match="3 values for 2 sections"):
        local_orbital(tmp_path / "s.zarr", settings, images=file)


def test_from_the_shell(tmp_path):
    run = lambda *words: CliRunner().invoke(cli.app, [str(word) for word in words])  # noqa: E731
    made = run("simulate-particle", tmp_path / "p.npz", "--atoms", 25, "--semiangle-mrad", 50, "--sections", 2)
    assert made.exit_code == 0
    words = ("local-orbital", tmp_path / "s.zarr", "--images", tmp_path / "p.npz", "--json", tmp_path / "n.json")
    quick = (
        "--set",
        "atom_iterations=4",
        "--set",
        "probe_searches=0",
        "--set",
        "widths=species",
        "--set",
        "rounds=1",
        "--out",
        tmp_path / "a.xyz",
    )
    done = run(*words, *quick)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "n.json").read_text())["atoms"] == 25
    assert (tmp_path / "a.xyz").read_text().startswith("25\n")
    planned = run("local-orbital", tmp_path / "s.zarr", "--plan")
    assert planned.exit_code == 0, planned.output
    assert "local_orbital" in planned.output
    bad = run("local-orbital", tmp_path / "s.zarr", "--images", tmp_path / "absent.npz")
    assert bad.exit_code == 2
    assert "cannot be read as a focal series" in bad.output


def test_a_particle_by_multislice_is_seen_where_the_incoherent_one_is(tmp_path):
    options = {"atoms": 12, "sections": 1, "theta_deg": [0.0], "pixel_angstrom": 0.4}
    images = []
    for name, multislice in (("summed", False), ("scattered", True)):
        simulate_particle(tmp_path / f"{name}.npz", multislice=multislice, executor=ThreadExecutor(1), **options)
        images.append(read_focal_series(tmp_path / f"{name}.npz")["images"][0, 0])
    assert images[1].sum() == pytest.approx(12, rel=1e-3)
    # Neighbours interfere, and a real potential is narrower than the Gaussian: alike, not equal.
    alike, turned = (np.corrcoef(image.ravel(), images[1].ravel())[0, 1] for image in (images[0], images[0][::-1]))
    assert alike > 0.8 > turned + 0.1


def test_the_report_shows_probes_searches_and_deviation_over_depth(blind, file):
    folder, _ = blind
    found = local_orbital(folder / "s.zarr", QUICK, truth=file)["deviation"]
    score = stemtomo.score_atoms(folder / "a.xyz", file)
    assert found["rmsd_pm"] == pytest.approx(score["rmsd_pm"], rel=1e-2)
    layers = Store.open(folder / "s.zarr").read("local_orbital_deviation").compute()
    assert layers["z_angstrom"].values.tolist() == score["by_depth"]["z_angstrom"]
    np.testing.assert_allclose(layers["rmsd_pm"], score["by_depth"]["rmsd_pm"], rtol=0.05, atol=0.02)
    assert (layers["lower_pm"] <= layers["median_pm"]).all()
    page = stemtomo.report(folder / "s.zarr").read_text()
    assert "Local orbitals" in page
    assert "Deviation from the known atoms over depth" in page
    assert page.count("data:image/png;base64") >= 3
    assert "Not complete" not in page
