"""What can go wrong with tiles while they run, and what is left of it: nothing is lost that a checkpoint held."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from stemtomo.distributed import executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import StoreError
from stemtomo.io.store import Store
from stemtomo.pipeline.ptychography import ptychography
from tests.pipeline.scanned import make_scan
from tests.pipeline.test_tiled_ptychography import SETTINGS, StopAfter, reconstructed

TILED = SETTINGS.model_copy(update={"tiles": (2, 1)})
NAMES = ("object", "probe", "loss", "loss_map", "position_x")

CLIENT = """
import sys
from distributed import Client
from stemtomo.distributed import executor
from stemtomo.pipeline.ptychography import ptychography
from tests.pipeline.test_tile_faults import TILED

class Say:
    def start(self, *_):
        pass
    def advance(self, n=1, **numbers):
        print("epoch" if "loss" in numbers else "", flush=True)
    def finish(self, *_):
        pass

with Client(sys.argv[1], set_as_default=False) as client:
    ptychography(sys.argv[2], TILED, executor=executor(client), progress=Say())
"""


def test_a_full_disk_at_the_result_leaves_the_checkpoint(tmp_path, monkeypatch):
    store = make_scan(tmp_path / "full.zarr")
    write = Store.write

    def full(*_):
        raise StoreError("the store cannot be written") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(StoreError):
        ptychography(store, TILED, executor=ThreadExecutor(2))
    monkeypatch.setattr(Store, "write", write)
    folder = store.checkpoint_path("ptychography/000")
    assert [path.name for path in folder.glob("step-*")] == ["step-00000004"]
    counting = StopAfter(99)
    ptychography(store, TILED, executor=ThreadExecutor(2), progress=counting)
    assert counting.left == 99 - 2  # epochs 5 and 6
    found, expected = store.read("ptychography/000").load(), reconstructed(tmp_path, "undisturbed", tiles=(2, 1))
    for name in NAMES:
        np.testing.assert_array_equal(found[name].values, expected[name].values)


@pytest.mark.heavy
def test_a_client_that_goes_away_leaves_a_cluster_that_works_and_a_run_that_continues(tmp_path, client):
    expected = reconstructed(tmp_path, "undisturbed", tiles=(2, 1))
    store = make_scan(tmp_path / "left.zarr")
    command = [sys.executable, "-c", CLIENT, client.scheduler.address, str(store.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        seen = 0
        while seen < 3:
            seen += process.stdout.readline().startswith("epoch")
        os.kill(process.pid, signal.SIGKILL)
    # The scheduler forgets what nobody waits for: no task of the client that is gone stays behind.
    until = time.monotonic() + 60
    while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
    counting = StopAfter(99)
    ptychography(store, TILED, executor=executor(client), progress=counting)
    assert 99 - 4 <= counting.left <= 99 - 2  # from the checkpoint of epoch 2 or of epoch 4
    found = store.read("ptychography/000").load()
    for name in NAMES:
        np.testing.assert_array_equal(found[name].values, expected[name].values)
