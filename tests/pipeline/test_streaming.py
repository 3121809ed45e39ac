"""A volume whose blocks lie in files: the same volume as in memory, whatever happens on the way."""

import dataclasses
import math

import numpy as np
import pytest

from stemtomo.distributed import executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import ConfigurationError
from stemtomo.geometry import TiltSeries
from stemtomo.pipeline import streaming
from stemtomo.pipeline.config import TomographySettings
from stemtomo.pipeline.tomography import plan_row, tomography
from tests.pipeline.test_tomography import GENERAL, SINGLE, Stop, _refined_px, _store, _volume

IN_MEMORY = TomographySettings(iterations=12, blocks=3, stream="never")
STREAMED = IN_MEMORY.model_copy(update={"stream": "always"})
GIB = 2**30


@pytest.mark.parametrize("series", [SINGLE, GENERAL], ids=["single axis", "general"])
def test_blocks_in_files_give_the_volume_of_blocks_in_memory(tmp_path, series):
    results = []
    for name, settings in (("memory", IN_MEMORY), ("files", STREAMED)):
        store, _ = _store(tmp_path / f"{name}.zarr", series, drift=1.0, noise=0.02)
        numbers = tomography(store, settings, executor=ThreadExecutor(2))
        results.append((_volume(store), _refined_px(store), numbers["loss"]))
        assert not list(store.checkpoint_path("volume").rglob("*.npz"))  # nothing is left behind
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=0, atol=1e-6 * results[0][0].max())
    np.testing.assert_array_equal(results[1][1], results[0][1])
    assert results[1][2] == results[0][2]


def test_the_plain_gradient_and_a_wider_volume_go_through_files_too(tmp_path):
    volumes = []
    for stream in ("never", "always"):
        store, _ = _store(tmp_path / f"{stream}.zarr")
        settings = TomographySettings(
            method="resire", iterations=5, blocks=4, stream=stream, extended=True, depth_angstrom=6.0
        )
        tomography(store, settings)
        volumes.append(_volume(store))
    np.testing.assert_allclose(volumes[1], volumes[0], rtol=0, atol=1e-6 * volumes[0].max())


@pytest.mark.parametrize("method", ["sirt", "wbp", "cgls", "fista_tv"])
@pytest.mark.parametrize("series", [SINGLE, GENERAL], ids=["single axis", "general"])
def test_every_method_over_blocks_goes_through_files_too(tmp_path, method, series):
    """The smoothing looks 13 rows into blocks of 11 rows; conjugate gradients sum over all blocks."""
    found = []
    for stream, blocks in (("never", 1), ("always", 3)):
        store, _ = _store(tmp_path / f"{stream}.zarr", series, noise=0.02)
        settings = TomographySettings(method=method, iterations=4, blocks=blocks, stream=stream, tv_weight_rad=0.02)
        numbers = tomography(store, settings)
        found.append((_volume(store), numbers["loss"], numbers["r1"]))
        assert not list(store.checkpoint_path("volume").rglob("*.npz"))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=0, atol=1e-5 * np.abs(found[0][0]).max())
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5)
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-5)


def test_the_memory_that_was_told_decides_whether_a_volume_goes_through_files(tmp_path, monkeypatch):
    kept = []
    whole = streaming.StreamedDescent.begin
    monkeypatch.setattr(streaming.StreamedDescent, "begin", lambda self: kept.append(1) or whole(self))
    volumes = []
    for memory_gib in (0.001, 64.0, None):
        store, _ = _store(tmp_path / f"{memory_gib}.zarr")
        tomography(store, TomographySettings(iterations=3, blocks=2, memory_gib=memory_gib))
        volumes.append(_volume(store))
        assert len(kept) == 1
        assert not tomography(store, TomographySettings(iterations=3, blocks=2))["computed"]  # the same volume
    np.testing.assert_allclose(volumes[1], volumes[0], rtol=0, atol=1e-6 * volumes[0].max())


def test_a_streamed_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    whole, _ = _store(tmp_path / "whole.zarr", drift=1.0)
    tomography(whole, STREAMED)
    store, _ = _store(tmp_path / "s.zarr", drift=1.0)
    with pytest.raises(KeyboardInterrupt):
        tomography(store, STREAMED, progress=Stop(7))
    assert len(list((store.checkpoint_path("volume") / "files").glob("step-*"))) == 2
    tomography(store, STREAMED, executor=ThreadExecutor(1))
    np.testing.assert_array_equal(_volume(store), _volume(whole))


def test_files_of_a_run_that_was_stopped_do_not_outlive_one_in_memory(tmp_path):
    store, _ = _store(tmp_path / "s.zarr", drift=1.0)
    with pytest.raises(KeyboardInterrupt):
        tomography(store, STREAMED, progress=Stop(2))
    tomography(store, STREAMED.model_copy(update={"stream": "never", "iterations": 2}))
    assert not list(store.checkpoint_path("volume").rglob("*.npz"))


@pytest.mark.parametrize("method", ["cgls", "fista_tv"])
def test_any_method_that_was_stopped_goes_on_to_the_same_bits(tmp_path, method):
    settings = STREAMED.model_copy(update={"method": method, "iterations": 5})
    volumes = []
    for name, after in (("whole", None), ("first", 1), ("later", 3)):
        store, _ = _store(tmp_path / f"{name}.zarr", drift=1.0)
        if after is not None:
            with pytest.raises(KeyboardInterrupt):
                tomography(store, settings, progress=Stop(after))
            assert list((store.checkpoint_path("volume") / "files").glob("step-*/part-*"))
            assert not list((store.checkpoint_path("volume") / "files").rglob("*.rough*"))
        numbers = tomography(store, settings, executor=ThreadExecutor(2))
        assert len(numbers["loss"]) == 5
        volumes.append(_volume(store))
    np.testing.assert_array_equal(volumes[1], volumes[0])
    np.testing.assert_array_equal(volumes[2], volumes[0])


def test_a_cluster_streams_the_bits_of_the_threads_though_a_worker_dies(tmp_path, client):
    settings = STREAMED.model_copy(update={"method": "fista_tv", "iterations": 9})
    here, _ = _store(tmp_path / "threads.zarr", drift=1.0)
    tomography(here, settings, executor=ThreadExecutor(2))
    store, _ = _store(tmp_path / "cluster.zarr", drift=1.0)

    class Murder(Stop):
        def advance(self, n=1, **numbers):
            self.left -= n
            if self.left == 0:
                client.restart_workers(list(client.scheduler_info(n_workers=-1)["workers"])[:1])

    tomography(store, settings, executor=executor(client), progress=Murder(4))
    np.testing.assert_array_equal(_volume(store), _volume(here))


def test_methods_that_need_the_whole_volume_say_so(tmp_path):
    store, _ = _store(tmp_path / "s.zarr")
    with pytest.raises(ConfigurationError, match="in files; take one of fista, fista_tv, resire, sirt, cgls, wbp"):
        tomography(store, TomographySettings(method="genfire", stream="always"))
    with pytest.raises(ConfigurationError, match=r"GiB, on one worker, which has 0.001 GiB; .* one of fista, fista_tv"):
        tomography(store, TomographySettings(method="genfire", memory_gib=0.001))


def _row(edge, memory_gib, **settings):
    rotations = TiltSeries.from_degrees(np.linspace(-70, 70, 36)).rotations
    return plan_row((edge, edge), rotations, 0.35, TomographySettings(**settings), 2, int(memory_gib * GIB))


def test_the_plan_of_a_volume_beyond_the_memory_fits_two_workers_of_two_gib():
    for edge in (512, 1024):
        row = _row(edge, 4)
        assert row.bytes_per_worker(2, 1) < 1.7 * GIB
        assert row.bytes_written >= 200 * 4 * edge**3
        assert row.tasks >= 16
        assert row.seconds is not None
    for method in ("cgls", "fista_tv"):
        row = _row(1024, 4, method=method)
        assert row.bytes_per_worker(2, 1) < 1.8 * GIB
        assert row.bytes_written >= 200 * 2 * 4 * 1024**3
    assert _row(1024, 4, stream="never").bytes_per_worker(2, 1) > 4 * GIB
    assert _row(1024, 64).resident_bytes >= 8 * 1024**3  # it fits, and stays in memory
    assert not streaming.streams(TomographySettings(method="genfire"), 1024**3, 36, 1024**2, GIB)


def test_the_plan_knows_of_material_beside_the_images():
    """At 70 degrees a film of depth D is seen over w / cos + D tan: the box is wider by that."""
    plain, extended = (
        _row(100, 64, depth_angstrom=35.0, extended=extended, stream="never") for extended in (False, True)
    )
    wider = (extended.bytes_written - plain.bytes_written) / (plain.bytes_written)
    expected = 1 / math.cos(math.radians(70)) + math.tan(math.radians(70)) - 1
    assert wider == pytest.approx(expected, rel=0.02)
    assert dataclasses.replace(plain, seconds=None) != extended
