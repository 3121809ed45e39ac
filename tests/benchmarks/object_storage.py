"""Reading frames from a bucket beside a local disk: moto's server on the loopback, so the storage itself is slow."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from stemtomo.geometry import Detector, Optics, Pose, Scan
from stemtomo.io.frames import shard_file, shard_regions
from stemtomo.io.store import Store
from tests.benchmarks.codecs import PIXELS, counted
from tests.benchmarks.measure import Row, rate_row

EDGE, SHARDS = 32, (2, 2)


def benchmark() -> list[Row]:
    """Read every shard of one tilt: GB of counts per second of wall time; the floor is fetching the objects alone."""
    with tempfile.TemporaryDirectory() as folder, _server():
        local, remote = (_store(path) for path in (f"{folder}/local.zarr", "s3://frames/remote.zarr"))
        rows = []
        read = {}
        for name, store in (("local disk (page cache)", local), ("S3 (moto, loopback)", remote)):
            size = store.frames(0, require_complete=False).nbytes
            rate = size / 1e9 / _seconds(lambda store=store: _read(store))
            floor = size / 1e9 / _seconds(lambda store=store: _fetch(store))
            rows.append(rate_row("s3", f"frames from {name}", rate, "GB/s", floor))
            read[name] = [frames.sum(dtype=np.uint64) for _, frames in _pieces(store)]
        assert len({tuple(sums) for sums in read.values()}) == 1
        stored = sum(file.stat().st_size for file in _files(remote))
        seconds = _seconds(lambda: _fetch(remote))
        rows.append(rate_row("s3", "objects of the bucket, as stored", stored / 1e9 / seconds, "GB/s"))
        return rows


def _store(path: str) -> Store:
    block = np.tile(counted(0.5), (2, 2, 1, 1))
    scan = (EDGE * SHARDS[0], EDGE * SHARDS[1])
    store = Store.create(path, "frames")
    store.declare_tilts(1)
    detector = Detector((PIXELS, PIXELS), 0.02)
    pose = Pose(0.0)
    store.create_tilt(0, (*scan, PIXELS, PIXELS), "u2", Optics(300e3, 20e-3), Scan(scan, (0.4, 0.4)), detector, pose)
    for y in range(0, scan[0], EDGE):
        for x in range(0, scan[1], EDGE):
            store.write_frames(0, y, x, block)
    return store


def _pieces(store: Store) -> Iterator[tuple[int, np.ndarray]]:
    for number, (y0, _y1, x0, _x1) in shard_regions(store.frames(0, require_complete=False)):
        for _y, _x, frames in store.read_pieces(0, y0, x0):
            yield number, frames


def _files(store: Store) -> list[Path]:
    array, folder = store.frames(0, require_complete=False), store.path / "tilt" / "000" / "frames"
    return [shard_file(array, folder, y0, x0) for _, (y0, _y1, x0, _x1) in shard_regions(array)]


def _read(store: Store) -> None:
    for _ in _pieces(store):
        pass


def _fetch(store: Store) -> None:
    for file in _files(store):
        file.read_bytes()


def _seconds(work: Callable[[], None], repeats: int = 3) -> float:
    work()
    costs = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        costs.append(time.perf_counter() - began)
    return min(costs)


@contextmanager
def _server() -> Iterator[None]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request
    server.start()
    host, port = server.get_host_and_port()
    told = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        request = urllib.request.Request(f"{told['AWS_ENDPOINT_URL']}/frames", method="PUT")
        urllib.request.urlopen(request).close()
        yield
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
