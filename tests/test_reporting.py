"""The report holds everything a store holds, needs nothing beside itself, says what is missing, and renders."""

import base64
import io
import json
import re
import shutil
import subprocess

import matplotlib.image
import matplotlib.pyplot
import numpy as np
import pytest
import xarray as xr

import stemtomo
from stemtomo.errors import StoreError
from stemtomo.geometry import Detector, Optics, Pose, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.pipeline.settings.analysis import LatticeSettings, StrainSettings, TrackSettings
from stemtomo.reporting import report
from stemtomo.reporting.figures import scale_bar_length
from stemtomo.reporting.markup import number
from tests.algorithms.atoms.crystalline import fcc

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TILTS, PIXELS = 3, 24


def blobs(*shape, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 0.05, shape)
    image[..., shape[-2] // 3 : shape[-2] // 2, shape[-1] // 3 : shape[-1] // 2] += 1
    return image.astype(np.float32)


def add_frames(path):
    """Make a store with frames for every tilt and nothing else."""
    store = Store.create(path, "<particle & co>")
    store.declare_tilts(TILTS)
    for index in range(TILTS):
        store.create_tilt(
            index, (8, 8, 16, 16), "u2", Optics(300e3, 0.021, {"C10": 200.0}), Scan((8, 8), (1.6, 1.6)),
            Detector((16, 16), 0.2), Pose(theta_rad=np.radians(30.0 * (index - 1))),
        )  # fmt: skip
        store.write_frames(index, 0, 0, np.ones((8, 8, 16, 16), np.uint16))
        store.record_frames(index, [0])
        store.complete_tilt(index, Provenance.start("ingest", {"shard_mib": 1.0}, {}).finish())
    store.complete_tilts(Provenance.start("ingest", {"shard_mib": 1.0}, {}))
    return store


def images(**names):
    return {name: (("y", "x"), blobs(8, 8, seed=seed)) for name, seed in names.items()}


def add_results(store):
    """Fill every other group with made-up results of the right form."""

    def write(group, dataset):
        store.write(group, dataset, Provenance.start(group.partition("/")[0], {"told": group}, {}))

    tilt = np.arange(TILTS)
    for index in tilt:
        write(
            f"quicklook/{index:03d}",
            xr.Dataset(
                {"mean_pattern": (("ky", "kx"), blobs(16, 16) + 1)}
                | images(total_counts=0, bright_field=1, dark_field=2, com_x=3, com_y=4)
            ),
        )
        write(
            f"ptychography/{index:03d}",
            xr.Dataset(
                {
                    "object": (("slice", "y", "x"), np.exp(1j * blobs(1, PIXELS, PIXELS)).astype(np.complex64)),
                    "phase_sum": (("y", "x"), blobs(PIXELS, PIXELS)),
                    "illumination": (("y", "x"), np.ones((PIXELS, PIXELS), np.float32)),
                    "probe": (("probe_y", "probe_x"), np.exp(1j * blobs(16, 16)).astype(np.complex64)),
                    "loss": (("epoch",), 1 / np.arange(1.0, 9.0)),
                },
                attrs={"pixel_angstrom": [0.4, 0.4]},
            ),
        )
    shifts = {f"shift_{axis}_angstrom": ("tilt", 0.1 * tilt) for axis in "xy"}
    write(
        "projections",
        xr.Dataset(
            {
                "phase": (("tilt", "y", "x"), blobs(TILTS, PIXELS, PIXELS)),
                "valid": (("tilt", "y", "x"), np.ones((TILTS, PIXELS, PIXELS), bool)),
                "theta_deg": ("tilt", 30.0 * (tilt - 1)),
                "phi_deg": ("tilt", 0.0 * tilt),
                "psi_deg": ("tilt", 0.0 * tilt),
            },
            attrs={"pixel_angstrom": 0.4},
        ),
    )
    write("alignment", xr.Dataset({**shifts, "score": ("tilt", np.ones(TILTS))}))
    write(
        "volume",
        xr.Dataset(
            {"potential": (("z", "y", "x"), blobs(20, 22, 24)), "loss": ("iteration", 1 / np.arange(1.0, 20.0))},
            attrs={"voxel_angstrom": 0.4},
        ),
    )
    rng = np.random.default_rng(1)
    count = 40
    write(
        "atoms",
        xr.Dataset(
            {axis: ("atom", rng.uniform(-8, 8, count)) for axis in "xyz"}
            | {
                "species": ("atom", np.array(["Cu", "Au"] * (count // 2))),
                "intensity": ("atom", np.tile([160.0, 360.0], count // 2) + rng.normal(0, 5, count)),
                "width_angstrom": ("atom", np.full(count, 0.27)),
                "fit_residual": ("atom", np.full(count, 0.02)),
            }
        ),
    )
    attrs = {"recall": 0.975, "precision": 1.0, "rmsd_pm": 3.21, "species_accuracy": 0.9512}
    write("score", xr.Dataset(attrs=attrs))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = add_frames(tmp_path_factory.mktemp("report") / "particle.zarr")
    add_results(store)
    return store


@pytest.fixture(scope="module")
def path(store):
    return report(store.path)


@pytest.fixture(scope="module")
def page(path):
    return path.read_text(encoding="utf-8")


def test_the_file_lies_beside_the_store(path, store):
    assert path == store.path.with_name("particle-report.html")


def test_the_page_needs_nothing_beside_itself(page):
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"https?://|@import|url\(", page)


@pytest.mark.parametrize(
    "text",
    [
        "0.975", "3.21", "0.951", "atoms found",
        "21 mrad", "200 Å", "-30, 0, 30",
        "Mean diffraction pattern", "Dark field of every tilt", "Loss of every tilt", "Phase of every tilt",
        "after alignment", "three slices through the rotation centre", "Loss of the tomography",
        "mirrored in z", "median intensity (V Å³)", "fingerprint", "numcodecs",
    ],
)  # fmt: skip
def test_every_part_is_there(page, text):
    assert text in page


def test_names_are_escaped(page):
    assert "<h1>&lt;particle &amp; co&gt;</h1>" in page
    assert "<particle" not in page


def test_the_atoms_in_the_page_are_those_of_the_store(page, store):
    data = json.loads(re.search(r'id="atoms-data">(.*?)</script>', page, re.S).group(1))
    np.testing.assert_allclose(data["x"], store.read("atoms")["x"], atol=6e-4)
    assert [item["name"] for item in data["species"]] == ["Cu", "Au"]  # faint to bright
    assert data["kind"][:2] == [0, 1]


def test_every_picture_is_a_picture_with_something_on_it(page):
    pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert len(pictures) >= 10
    for picture in pictures:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)), format="png")
        assert pixels[..., :3].std() > 0.02


def test_a_store_of_frames_alone_is_reported_and_says_what_is_missing(tmp_path):
    store = add_frames(tmp_path / "frames.zarr")
    page = report(store).read_text(encoding="utf-8")
    assert "Not complete: quicklook, ptychography, projections, align, tomography, find_atoms." in page
    assert "atoms-canvas" not in page
    assert "Experiment" in page


def test_a_series_that_is_being_recorded_is_reported(tmp_path):
    store = Store.create(tmp_path / "live.zarr", "live")
    store.declare_tilts(TILTS)
    assert "3 tilts, none recorded yet" in report(store).read_text(encoding="utf-8")
    store.create_tilt(
        1, (8, 8, 16, 16), "u2", Optics(300e3, 0.021), Scan((8, 8), (1.6, 1.6)), Detector((16, 16), 0.2), Pose(0.5)
    )
    page = report(store).read_text(encoding="utf-8")
    assert "1, single axis (about y), 2 to come" in page
    assert "8 × 8 probe positions" in page


def test_pictures_leave_the_session_of_a_user_alone(tmp_path, store):
    matplotlib.use("svg")
    figure = matplotlib.pyplot.figure()
    before = dict(matplotlib.rcParams)
    report(store, tmp_path / "report.html")
    assert (matplotlib.get_backend(), matplotlib.pyplot.get_fignums()) == ("svg", [figure.number])
    assert dict(matplotlib.rcParams) == before
    matplotlib.pyplot.close(figure)


def test_a_half_finished_stage_says_how_far_it_is(tmp_path, store):
    path = tmp_path / "half.zarr"
    shutil.copytree(store.path, path)
    shutil.rmtree(path / "ptychography" / "002")
    shutil.rmtree(path / "volume")
    page = report(path).read_text(encoding="utf-8")
    assert "ptychography (2 of 3 tilts), tomography" in page
    assert "Loss of the tomography" not in page


def test_no_store_and_no_way_to_write_are_said(tmp_path, store):
    with pytest.raises(StoreError, match="no such store"):
        report(tmp_path / "absent.zarr")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        report(store, tmp_path / "file" / "report.html")


@pytest.mark.parametrize(("extent", "length"), [(38.4, 10.0), (2.5, 0.5), (1000.0, 200.0), (6.0, 2.0)])
def test_scale_bars_are_round_and_shorter_than_the_picture(extent, length):
    assert scale_bar_length(extent) == length


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (297, "297"), (8640, "8\u202f640"), (2.64485, "2.645")])
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to render the page with")
def test_a_browser_renders_the_page(page, tmp_path):
    def browser(html, *arguments):
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,6000",
            *arguments,
            (tmp_path / "page.html").as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout

    def coloured(html):
        browser(html, f"--screenshot={tmp_path / 'page.png'}")
        pixels = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
        assert pixels.shape[:2] == (6000, 1400)
        return float((np.ptp(pixels, axis=-1) > 0.25).sum())

    canvas_alone = re.sub("<img[^>]*>", "", page)
    assert 'data-atoms="40"' in browser(page, "--dump-dom")  # the script says how many atoms it drew
    balls = coloured(canvas_alone)
    assert balls > 40 * 100  # each ball covers more than 100 pixels
    assert coloured(page) > balls + 200_000  # and the pictures are there


def test_order_lattice_strain_and_states_are_shown_and_turn(tmp_path):
    store = add_frames(tmp_path / "alloy.zarr")
    rng = np.random.default_rng(0)
    sites = fcc(3.85, 11.0)
    species = np.where(np.rint(2 * sites[:, 2] / 3.85).astype(int) % 2 == 0, "Fe", "Pt")
    known = {name: ("atom", np.ones(len(sites))) for name in ("intensity", "width_angstrom", "fit_residual")}
    columns = {axis: ("atom", sites[:, i] + rng.normal(0, 0.05, len(sites))) for i, axis in enumerate("xyz")}
    atoms = xr.Dataset({**columns, "species": ("atom", species), **known})
    store.write("atoms", atoms, Provenance.start("find_atoms", {}))
    stemtomo.order(store)
    stemtomo.lattice(store, LatticeSettings(crystal="fcc", a_angstrom=3.85))
    stemtomo.strain(store, StrainSettings(crystal="fcc", a_angstrom=3.85))
    stemtomo.track([store, store], TrackSettings(order="chemical"))
    page = report(store).read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", page)
    for anchor in ("atoms", "order", "grains", "lattice", "strain", "tracking"):
        data = json.loads(re.search(rf'id="{anchor}-data">(.*?)</script>', page, re.S).group(1))
        assert len(data["kind"]) == len(data["x"]) > 100
        assert max(data["kind"]) < len(data["species"])
        assert f'data-atoms="{anchor}-data"' in page
    for text in ("Pair distribution", "L1_0", "occupied sites", "Resolution 9.4 Å", "persistence"):
        assert text in page


def test_joint_tomography_shows_its_volume_its_epochs_and_what_was_refined(tmp_path):
    store = add_frames(tmp_path / "joint.zarr")
    shape, tilt = (20, 22, 24), np.arange(float(TILTS))
    variables = {
        "potential": (("z", "y", "x"), blobs(*shape)),
        "loss": ("epoch", 1 / np.arange(1.0, 6.0)),
        "projection": (("tilt", "y", "x"), blobs(TILTS, *shape[1:])),
        "probe": (("tilt", "mode", "probe_y", "probe_x"), np.ones((TILTS, 1, 16, 16), np.complex64)),
        "focus_change_angstrom": ("tilt", tilt),
        **{f"shift_{axis}_angstrom": ("tilt", 0 * tilt) for axis in "xy"},
        **{f"{angle}_deg": ("tilt", tilt) for angle in ("theta", "phi", "psi")},
    }
    attrs = {
        "voxel_angstrom": 0.4, "slice_thickness_angstrom": 2.0, "slices": 4, "final_loss": 0.1562,
        "sigma_rad_per_volt_angstrom": 6.5e-4, "epochs": ["single"] * 3 + ["sweep"] * 2,
    }  # fmt: skip
    store.write("joint", xr.Dataset(variables, attrs=attrs), Provenance.start("joint", {}, {}))
    page = report(store.path).read_text(encoding="utf-8")
    assert "Joint multislice tomography" in page
    assert "4 slice(s) of 2 Å" in page
    assert "0.1562" in page
    assert "C1 (Å)" in page
    assert "shift (Å)" not in page
    assert "cannot be seen in the images" in page
    attrs["tilt_sign"] = {"verdict": "right", "sentence": "the sign of the tilt fits (loss 1 against 2)"}
    store.write("joint", xr.Dataset(variables, attrs=attrs), Provenance.start("joint", {"checked": True}, {}))
    assert "Checked: the sign of the tilt fits" in report(store.path).read_text(encoding="utf-8")
