"""Stores on S3: equal to local ones, whole after every fault of the network, and resumable when the storage stays away.

The server is moto's on the loopback, in this process; faults come from a proxy before it.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import stemtomo
from stemtomo.cli import app
from stemtomo.distributed import Checkpoint
from stemtomo.errors import ConfigurationError, RefusedError, UnreachableError
from stemtomo.io.store import Store
from stemtomo.locations import PATIENCE_VARIABLE, ObjectPath, location
from stemtomo.pipeline.references import load_configuration
from tests.deploy.faulty_proxy import FAULTS, FaultyProxy
from tests.deploy.tiny import differing, environ, write_frames, write_series

pytest.importorskip("obstore")
moto_server = pytest.importorskip("moto.server")

BUCKET = "series"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    threaded = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request
    threaded.start()
    yield threaded.get_host_and_port()
    threaded.stop()


@pytest.fixture
def proxy(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    import urllib.request

    opened = FaultyProxy(server)
    for name, value in credentials(opened.url).items():
        monkeypatch.setenv(name, value)
    request = urllib.request.Request(f"http://{server[0]}:{server[1]}/{BUCKET}", method="PUT")
    urllib.request.urlopen(request).close()
    yield opened
    opened.close()


def credentials(url: str, patience_s: float = 20.0) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        PATIENCE_VARIABLE: str(patience_s),
    }


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_frames(tmp_path_factory.mktemp("frames"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, frames: Path) -> Path:
    """Store of a run on a local disk, to the projections."""
    folder = tmp_path_factory.mktemp("local")
    stemtomo.run(write_series(folder, frames, folder / "series.zarr", epochs=4), until="projections")
    return folder / "series.zarr"


def url(tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}/series.zarr"


# -- paths ------------------------------------------------------------------------------------------------------------


def test_a_location_is_a_path_or_an_object() -> None:
    assert location("a/b.zarr") == Path("a/b.zarr")
    assert (
        location("s3://bucket/a/b.zarr/") == location(Path("s3://bucket/a/b.zarr")) == ObjectPath("bucket", "a/b.zarr")
    )
    path = location("s3://bucket/a/b.zarr")
    assert str(path / "tilt" / "000") == "s3://bucket/a/b.zarr/tilt/000"
    assert (path.name, path.stem, str(path.parent)) == ("b.zarr", "b", "s3://bucket/a")
    assert pickle.loads(pickle.dumps(path)) == path
    with pytest.raises(ConfigurationError, match="names no bucket"):
        location("s3:///")
    with pytest.raises(TypeError):
        Path(path)  # never a local folder by the name of a bucket


def test_an_object_path_answers_as_a_path_does(proxy: FaultyProxy, tmp_path: Path) -> None:
    for folder in (tmp_path, location(f"s3://{BUCKET}/{tmp_path.name}")):
        for name in ("a/one.txt", "a/two.txt", "a/deep/three.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode())
        assert sorted(path.name for path in (folder / "a").iterdir()) == ["deep", "one.txt", "two.txt"]
        assert sorted(path.name for path in (folder / "a").glob("*.txt")) == ["one.txt", "two.txt"]
        assert (folder / "a/one.txt").read_text() == "a/one.txt"
        assert (folder / "a/one.txt").stat().st_size == 9
        assert [(folder / name).exists() for name in ("a", "a/one.txt", "a/one", "b")] == [True, True, False, False]
        assert [(folder / name).is_dir() for name in ("a", "a/one.txt")] == [True, False]
        (folder / "a/one.txt").unlink()
        (folder / "a/one.txt").unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError):
            (folder / "a/one.txt").read_text()


def test_a_checkpoint_is_kept_in_a_bucket(proxy: FaultyProxy, tmp_path: Path) -> None:
    kept = Checkpoint(location(url(tmp_path)) / ".checkpoints", "fingerprint")
    state = {"loss": [3.0, 2.0], "probe": np.arange(6.0).reshape(2, 3) * 1j}
    for step in (5, 10):
        kept.begin(step, 0)
        kept.commit(step, [], state)
    mark = kept.latest()
    assert mark is not None
    assert mark.step == 10
    assert np.array_equal(mark.shared["probe"], state["probe"])
    assert kept._steps() == [10]
    kept.clear()
    assert kept.latest() is None


def test_what_a_bucket_cannot_hold_is_refused_before_the_work(proxy: FaultyProxy, tmp_path: Path, frames: Path) -> None:
    toml = str(write_series(tmp_path, frames))
    for words in (
        ("demo", "--out", url(tmp_path)),
        ("watch", str(frames.parent), url(tmp_path), "--config", toml),
        ("run", toml, "--set", f"series.store={url(tmp_path)}", "--set", "tomography.stream=always"),
    ):
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 2, result.output
        assert "on a file system" in result.stderr
    assert not list(location(f"s3://{BUCKET}/{tmp_path.name}").iterdir())
    assert not Path("s3:").exists()


# -- stores -----------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_first_look_on_s3_equals_a_local_one(proxy: FaultyProxy, tmp_path: Path, frames: Path) -> None:
    for number, store in enumerate((url(tmp_path), tmp_path / "local.zarr")):
        stemtomo.run(write_series(tmp_path / str(number), frames, store), until="quicklook")
    assert differing(url(tmp_path), tmp_path / "local.zarr") == []
    again = stemtomo.run(tmp_path / "0" / "series.toml", until="quicklook")
    assert again["stages"]["quicklook"]["computed"] == 0


@pytest.mark.heavy
def test_a_run_on_s3_equals_a_local_one(proxy: FaultyProxy, tmp_path: Path, frames: Path, local: Path) -> None:
    """In Python and on the command line: run, run again, open, info, report."""
    toml = write_series(tmp_path, frames, url(tmp_path), epochs=4)
    numbers = stemtomo.run(toml, until="projections")
    assert differing(url(tmp_path), local) == []
    assert numbers["store"] == url(tmp_path)
    again = stemtomo.run(toml, until="projections")
    assert again["stages"]["ptychography"]["computed"] == 0
    tree = stemtomo.open(url(tmp_path))
    total = tree["tilt/000"]["frames"].sum().compute()
    assert int(total) == int(Store.open(local).frames(0)[:].sum())
    listed = CliRunner().invoke(app, ["info", url(tmp_path), "--json"])
    assert listed.exit_code == 0, listed.output
    stored = {row["group"]: row["stored_bytes"] for row in json.loads(listed.stdout)["groups"]}
    expected = {row["group"]: row["stored_bytes"] for row in Store.open(local).info()}
    assert stored["tilt"] == pytest.approx(expected["tilt"], rel=0.05)  # the metadata name other times and folders
    out = tmp_path / "report.html"
    assert CliRunner().invoke(app, ["report", url(tmp_path), "--out", str(out)]).exit_code == 0
    assert url(tmp_path) in out.read_text()
    assert not list(location(f"{url(tmp_path)}/.checkpoints").iterdir())


@pytest.mark.heavy
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["ptychography.tiles=[2,1]", "ptychography.checkpoint_every=3"],
        ["joint.enabled=true", "joint.sweeps=3", "joint.checkpoint_every=1"],
    ],
    ids=["sequential", "in tiles", "joint"],
)
def test_every_way_to_atoms_on_s3_equals_a_local_one(
    proxy: FaultyProxy, tmp_path: Path, frames: Path, overrides: list[str]
) -> None:
    for number, store in enumerate((url(tmp_path), tmp_path / "local.zarr")):
        toml = write_series(tmp_path / str(number), frames, store, epochs=12)
        stemtomo.run(load_configuration(toml, overrides))
    assert differing(url(tmp_path), tmp_path / "local.zarr") == []
    assert Store.open(url(tmp_path)).fingerprint("atoms")


@pytest.mark.heavy
def test_workers_read_and_write_the_bucket(proxy: FaultyProxy, tmp_path: Path, frames: Path, local: Path) -> None:
    toml = write_series(tmp_path, frames, url(tmp_path), epochs=4)
    command = ["stemtomo", "run", str(toml), "--until", "projections", "--workers", "2"]
    subprocess.run(command, cwd=tmp_path, env=environ(**credentials(proxy.url)), check=True, capture_output=True)
    assert differing(url(tmp_path), local) == []


@pytest.mark.heavy
def test_nothing_is_lost_to_a_network_that_fails(proxy: FaultyProxy, tmp_path: Path, frames: Path, local: Path) -> None:
    seed = int(os.environ.get("STEMTOMO_SEED", time.time_ns() % 100000))  # give the printed one to repeat a run
    print(f"seed {seed}")
    chance = random.Random(seed)
    proxy.choose = lambda number, method: chance.choice(FAULTS) if chance.random() < 0.04 else None
    stemtomo.run(write_series(tmp_path, frames, url(tmp_path), epochs=4), until="projections")
    proxy.choose = lambda number, method: None
    assert differing(url(tmp_path), local) == [], f"seed {seed}"
    assert set(proxy.faults) == set(FAULTS), f"{proxy.requests} requests, {proxy.faults}, seed {seed}"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_met_by_each_kind_of_request(proxy: FaultyProxy, tmp_path: Path, fault: str) -> None:
    path = location(url(tmp_path)) / "object"
    requests = (
        lambda: path.write_bytes(b"content" * 100),
        lambda: path.read_bytes(),
        lambda: path.stat().st_size,
        lambda: list(path.parent.iterdir()),
        lambda: path.unlink(),
    )
    for request in requests:
        fails = iter([fault, fault])
        proxy.choose = lambda number, method, fails=fails: next(fails, None)
        request()
        assert next(fails, None) is None
    proxy.choose = lambda number, method: None
    assert not path.exists()


def test_storage_that_hangs_is_given_up(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = FaultyProxy(server, hang_s=4.0)
    hanging.choose = lambda number, method: "timeout"
    for name, value in credentials(hanging.url, patience_s=1.0).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="did not answer for 1 s"):
        (location(f"s3://{BUCKET}/object")).read_bytes()
    assert time.monotonic() - began < 10
    hanging.close()


@pytest.mark.heavy
def test_storage_that_stays_away_is_one_message_and_the_run_continues(
    proxy: FaultyProxy, tmp_path: Path, frames: Path, local: Path
) -> None:
    toml = write_series(tmp_path, frames, url(tmp_path), epochs=4)
    proxy.choose = lambda number, method: "503" if number > 80 else None
    command = ["stemtomo", "run", str(toml), "--until", "projections"]
    env = environ(**credentials(proxy.url, patience_s=1.0))
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 75, ended.stderr
    message = ended.stderr.strip().splitlines()[-1]
    assert message.startswith(f"Error: s3://{BUCKET}/")
    assert "did not answer for 1 s" in message
    assert "run the same command again" in message
    assert "Traceback" not in ended.stderr
    proxy.choose = lambda number, method: None
    stemtomo.run(toml, until="projections")
    assert differing(url(tmp_path), local) == []


def test_a_result_that_is_replaced_is_the_old_one_or_none(proxy: FaultyProxy, tmp_path: Path) -> None:
    """At every request of a replacement, a reader sees the old result whole, the new one whole, or none."""
    import xarray as xr

    from stemtomo.io.provenance import Provenance

    store = Store.create(url(tmp_path), "replaced")

    def result(value: float) -> xr.Dataset:
        units = {"units": "V"}
        volume = xr.DataArray(np.full((4, 4, 4), value, "f4"), dims=("z", "y", "x"), attrs=units)
        loss = xr.DataArray(np.full(3, value), dims="iteration", attrs={"units": "1"})
        return xr.Dataset({"potential": volume, "loss": loss}, attrs={"voxel_angstrom": 1.0})

    store.write("volume", result(1.0), Provenance.start("tomography", {"value": 1}))
    seen = set()
    direct = dict(credentials(proxy.url, patience_s=0.0))
    last = proxy.requests + 400
    count = 0
    while proxy.requests < last:
        count += 1
        stop_at = proxy.requests + count
        proxy.choose = lambda number, method, stop_at=stop_at: "503" if number >= stop_at else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(PATIENCE_VARIABLE, direct[PATIENCE_VARIABLE])
            try:
                store.write("volume", result(2.0), Provenance.start("tomography", {"value": 2}))
                done = True
            except (UnreachableError, OSError):
                done = False
        proxy.choose = lambda number, method: None
        if store.fingerprint("volume") is None:
            seen.add("none")
        else:
            values = np.unique(store.read("volume")["potential"].values)
            assert values.size == 1
            seen.add(float(values[0]))
        if done:
            break
    assert done
    assert seen == {1.0, "none", 2.0}


def test_a_bucket_that_is_not_there_is_named(proxy: FaultyProxy) -> None:
    with pytest.raises(RefusedError, match="there is no bucket absent; make it first"):
        Store.create("s3://absent/series.zarr", "name")
