"""What [ptychography] can be asked for beside its defaults, from a store to its results."""

import numpy as np
import pytest
import xarray as xr
from pydantic import ValidationError
from typer.testing import CliRunner

import stemtomo
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.detection import blurred
from stemtomo.algorithms.ptychography.positions import without_gauges
from stemtomo.cli import app
from stemtomo.distributed import Checkpoint
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import Detector, Scan
from stemtomo.io.provenance import Provenance
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ptychography import ptychography
from tests.algorithms.ptychography import test_positions as positions
from tests.pipeline.series import DETECTOR, OPTICS, SCAN, build_model, make_series
from tests.pipeline.test_mistilt import write

SETTINGS = PtychographySettings(epochs=12, settling_epochs=4, batches=8)


def run(store, **changes):
    numbers = ptychography(store, SETTINGS.model_copy(update=changes), executor=ThreadExecutor(1), tilts=[0])
    return numbers, store.read("ptychography/000").compute()


@pytest.fixture
def store(tmp_path):
    return make_series(tmp_path / "tiny.zarr", tilts=1)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Patterns (position, ky, kx), zero frequency first, of a tilt before counting, and its phase."""
    from stemtomo.physics.probe import probe_wave
    from tests.pipeline.series import true_phase

    model = build_model(SCAN, DETECTOR, OPTICS, SETTINGS)
    probe = probe_wave(OPTICS, DETECTOR.shape_yx, model.grid.pixel_angstrom_yx, plane_z_angstrom=0, intensity=1e5)
    phase = true_phase(model.grid.shape_yx, 0)
    state = solver.State(phase[None].astype(np.float32), probe[None])
    return solver.patterns(state, model, np.arange(SCAN.count)), phase


def counted(tmp_path, expected):
    counts = np.random.default_rng(0).poisson(np.maximum(expected, 0))
    return write(tmp_path / "counted.zarr", counts, OPTICS, SCAN, DETECTOR)


@pytest.mark.parametrize("rule", ["lsqml", "adam", "lbfgs"])
def test_every_rule_ends_where_the_default_does(store, rule):
    step = 0.2 if rule == "adam" else 1.0
    numbers, result = run(store, rule=rule, step=step)
    assert len(numbers["loss"][0]) == 12
    assert numbers["loss"][0][-1] == pytest.approx(numbers["noise_floor"][0], rel=0.15)
    assert result.attrs["best_epoch"] == 11


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(
    "changes",
    [
        {"refine_positions_from_epoch": 2, "held_out": 0.1, "background": "uniform", "probe_modes": 2},
        {"rule": "adam", "probe_variations": 1, "probe_variations_from_epoch": 3, "object": "complex"},
    ],
)
def test_a_killed_tilt_continues_to_the_same_bits(store, tmp_path, monkeypatch, changes):
    changes = {**changes, "checkpoint_every": 5}
    other = make_series(tmp_path / "other.zarr", tilts=1)
    _, expected = run(other, **changes)
    commit, epoch_of = Checkpoint.commit, []

    def killed(self, step, *rest):
        commit(self, step, *rest)
        epoch_of.append(step)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "commit", killed)
        with pytest.raises(Killed):
            run(store, **changes)
    assert epoch_of == [5]
    epochs = []
    monkeypatch.setattr(
        Checkpoint, "commit", lambda self, step, *rest: (epochs.append(step), commit(self, step, *rest))
    )
    _, found = run(store, **changes)
    assert epochs == [10]  # and not 5 again
    for name in expected.variables:
        np.testing.assert_array_equal(found[name].values, expected[name].values)
    assert not any((store.path / ".checkpoints").rglob("*.npz"))


@pytest.mark.parametrize(
    ("at", "changes"),
    [
        (12, {"background": "uniform", "background_from_epoch": 2, "refine_positions_from_epoch": 4}),
        (8, {"rule": "lbfgs", "background": "uniform", "background_from_epoch": 2, "refine_positions_from_epoch": 4}),
    ],
)
def test_a_tilt_killed_behind_its_last_batches_knows_what_moved(store, tmp_path, monkeypatch, at, changes):
    changes = {**changes, "checkpoint_every": 4}
    _, expected = run(make_series(tmp_path / "other.zarr", tilts=1), **changes)
    commit = Checkpoint.commit

    def killed(self, step, *rest):
        commit(self, step, *rest)
        if step == at:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "commit", killed)
        with pytest.raises(Killed):
            run(store, **changes)
    _, found = run(store, **changes)
    for name in expected.variables:
        np.testing.assert_array_equal(found[name].values, expected[name].values)
    assert found.attrs["noise_floor"] == expected.attrs["noise_floor"]


def test_held_out_patterns_stop_a_run_that_follows_the_noise(tmp_path, truth):
    expected, _ = truth
    store = counted(tmp_path, expected / 2000)  # 50 electrons per pattern
    numbers, result = run(store, epochs=60, settling_epochs=50, held_out=0.1, held_out_patience=4, probe_step=0.3)
    held = result["held_out_loss"].values
    assert len(held) < 60
    assert result.attrs["best_epoch"] == int(np.argmin(held))
    assert len(held) == result.attrs["best_epoch"] + 5
    assert numbers["loss"][0][-1] < numbers["loss"][0][result.attrs["best_epoch"]]


def test_a_background_is_found_and_kept_out_of_the_object(tmp_path, truth):
    expected, _ = truth
    store = counted(tmp_path, expected + 3.0)
    _, result = run(store, epochs=30, settling_epochs=10, background="uniform", background_from_epoch=2, loss="poisson")
    assert result["background"].values.mean() == pytest.approx(3.0, rel=0.03)


def test_a_detector_blur_is_part_of_the_model(tmp_path, truth):
    expected, _ = truth
    store = counted(tmp_path, blurred(expected, 1.0))
    told, _ = run(store, detector_blur_px=1.0)
    untold, _ = run(store)
    assert told["loss"][0][-1] < 0.8 * untold["loss"][0][-1]


def test_pixels_that_a_calibration_found_bad_are_left_out(tmp_path, truth):
    expected, _ = truth
    spoilt = expected.copy()
    spoilt[:, 3, 30] = 5e4  # hot
    store = counted(tmp_path, spoilt)
    spoilt_loss = run(store)[0]["loss"][0][-1]
    bad = np.zeros(DETECTOR.shape_yx, np.uint8)
    bad[(3 + 16) % 32, (30 + 16) % 32] = 2
    attrs = {"found": {}, "metadata": {}, "difference": {}, "undetermined": {}}
    dataset = xr.Dataset({"bad_pixels": (("ky", "kx"), bad)}, attrs=attrs)
    store.write("calibration/000", dataset, Provenance.start("calibrate", {}))
    numbers, result = run(store)
    assert numbers["computed"] == 1  # the calibration is one of its sources now
    assert result.attrs["masked_pixels"] == 1
    assert numbers["loss"][0][-1] < 0.7 * spoilt_loss
    assert numbers["loss"][0][-1] == pytest.approx(numbers["noise_floor"][0], rel=0.15)
    assert run(store, mask_bad_pixels=False)[1].attrs["masked_pixels"] == 0


def test_constraints_hold_in_the_result(store):
    limits = {"object": "complex", "amplitude_limits": (0.97, 1.02), "positive_phase": True}
    filters = {"tv_weight_rad": 1e-3, "kz_filter": 0.5, "vacuum_percentile": 20.0}
    _, result = run(store, **limits, **filters, slices=2, slice_thickness_angstrom=5.0, detector_padding=0.0)
    size = np.abs(result["object"].values)
    assert size.min() > 0.95
    assert size.max() < 1.04


def test_bounds_that_cannot_be_are_refused():
    with pytest.raises(ValidationError, match="the first below the second"):
        PtychographySettings(object="complex", amplitude_limits=(1.02, 0.9))
    with pytest.raises(ValidationError, match=r"\|t\| = 1"):
        PtychographySettings(amplitude_limits=(0.9, 1.02))


def test_tiles_and_one_piece_leave_out_the_same_pixels_and_keep_the_same_bounds(store, tmp_path):
    bad = np.zeros(DETECTOR.shape_yx, np.uint8)
    bad[20, 17] = 1
    attrs = {"found": {}, "metadata": {}, "difference": {}, "undetermined": {}}
    results = []
    for tiles in ("auto", (2, 1)):
        one = make_series(tmp_path / f"{tiles[0]}.zarr", tilts=1)
        dataset = xr.Dataset({"bad_pixels": (("ky", "kx"), bad)}, attrs=attrs)
        one.write("calibration/000", dataset, Provenance.start("calibrate", {}))
        results.append(run(one, tiles=tiles, object="complex", amplitude_limits=(0.97, 1.02))[1])
    whole, cut = results
    assert whole.attrs["masked_pixels"] == 1
    np.testing.assert_allclose(cut["loss"], whole["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "asked",
    [{"mistilt_map_smoothing_angstrom": 5.0, "slices": 3, "slice_thickness_angstrom": 5.0, "tile_mode": "stitch"}],
)
def test_what_needs_a_tilt_in_one_piece_is_refused_in_tiles_before_anything_is_done(asked, tmp_path):
    one = make_series(tmp_path / "s.zarr", tilts=1)
    with pytest.raises(ConfigurationError, match=next(iter(asked))):
        run(one, tiles=(2, 1), **asked)
    assert one.members("ptychography") == []


def test_a_jitter_of_40_pm_is_recovered_to_5_pm_from_the_settings(tmp_path):
    _, _, told, jitter, counts = positions.experiment(14, 0.8, np.complex64, 0.04, slices=1)
    detector = Detector((32, 32), 1 / 12.8)
    store = write(tmp_path / "jitter.zarr", counts, positions.OPTICS, Scan((14, 14), (0.8, 0.8)), detector)
    settings = PtychographySettings(
        epochs=60,
        settling_epochs=10,
        batches=4,
        refine_positions_from_epoch=8,
        probe_update_start_epoch=99,
        electrons_per_pattern=1e5,
    )
    ptychography(store, settings, executor=ThreadExecutor(1))
    result = store.read("ptychography/000").compute()
    moved = np.column_stack([result["position_x"].values, result["position_y"].values]) - told
    assert np.sqrt((jitter**2).mean()) == pytest.approx(0.04, abs=0.004)
    assert np.sqrt((without_gauges(moved - jitter, told, affine=True) ** 2).mean()) < 0.005
    assert result.attrs["scan_affine"]["jitter_rms_pm"] == pytest.approx(4, rel=0.15)


def test_slices_of_unequal_thickness_are_said_one_by_one(store):
    some = {"slices": 3, "detector_padding": 0.0, "epochs": 2, "settling_epochs": 0}
    _, plain = run(store, **some, slice_thickness_angstrom=5.0)
    _, alike = run(store, **some, slice_thickness_angstrom=(5.0, 5.0, 5.0))
    np.testing.assert_array_equal(alike["object"], plain["object"])
    numbers, result = run(store, **some, slice_thickness_angstrom=(2.0, 4.0, 9.0))
    assert numbers["thickness_angstrom"] == [pytest.approx(15.0)]
    assert result.attrs["slice_thicknesses_angstrom"] == pytest.approx([2.0, 4.0, 9.0])
    assert result.attrs["slice_thickness_angstrom"] == pytest.approx(5.0)
    assert result.attrs["first_slice_z_angstrom"] == pytest.approx(-7.5 + 1.0)
    assert not np.array_equal(result["object"], plain["object"])
    assert result["loss"][-1] == pytest.approx(float(plain["loss"][-1]), rel=0.05)  # thin all the same
    model = build_model(
        SCAN, DETECTOR, OPTICS, SETTINGS.model_copy(update={**some, "slice_thickness_angstrom": (2.0, 4.0, 9.0)})
    )
    assert model.weights == pytest.approx([0.4, 0.8, 1.8])


def test_the_raster_of_a_turned_scan_is_not_taken_out_along_the_axes(tmp_path):
    turned = Scan(SCAN.shape_yx, SCAN.step_angstrom_yx, rotation_rad=0.3)
    store = write(tmp_path / "turned.zarr", np.zeros((SCAN.count, *DETECTOR.shape_yx), int), OPTICS, turned, DETECTOR)
    with pytest.raises(ConfigurationError, match=r"scan.rotation_deg turns that of tilt 0: 17.2"):
        run(store, notch_scan_raster=True)


def test_a_list_of_slices_must_fit():
    with pytest.raises(ValidationError, match="lists 2 slices, but slices is 3"):
        PtychographySettings(slices=3, slice_thickness_angstrom=[5.0, 6.0])
    with pytest.raises(ValidationError, match="kz_filter needs slices of one thickness"):
        PtychographySettings(slices=2, slice_thickness_angstrom=[5.0, 6.0], kz_filter=0.5)


def test_phase_and_loss_are_there_while_a_tilt_is_reconstructed(store, tmp_path):
    assert stemtomo.underway(store) is None
    asked = {"checkpoint_every": 2, "epochs": 6, "slices": 2, "slice_thickness_angstrom": 5.0, "detector_padding": 0.0}
    seen = []

    class Looking(Checkpoint):
        def commit(self, *told, **more):
            mark = super().commit(*told, **more)
            seen.append(stemtomo.underway(store.path))
            if len(seen) == 2:
                result = CliRunner().invoke(app, ["underway", str(store.path), "--image", str(tmp_path / "so_far.png")])
                assert result.exit_code == 0, result.output
                assert "4 epochs" in result.output
            return mark

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("stemtomo.pipeline.ptychography.Checkpoint", Looking)
        _, result = run(store, **asked)
    assert [len(look["loss"]) for look in seen] == [2, 4, 6]
    np.testing.assert_allclose(seen[-1]["phase_sum"], result["phase_sum"], atol=1e-5)
    assert seen[-1].attrs["pixel_angstrom"] == pytest.approx(result.attrs["pixel_angstrom"])
    pixels = np.prod(DETECTOR.shape_yx)
    np.testing.assert_allclose(seen[-1]["loss"] / pixels, result["loss"], rtol=1e-12)
    assert (tmp_path / "so_far.png").read_bytes().startswith(b"\x89PNG")
    assert stemtomo.underway(store) is None  # finished: the result is in the store
