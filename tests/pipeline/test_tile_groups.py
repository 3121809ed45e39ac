"""Several tilts in tiles at once, each on its own group of workers: the same bits as one after another."""

import numpy as np
import pytest

from stemtomo.distributed import executor
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import FormatError
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.ptychography import ptychography
from tests.pipeline.series import make_series

SETTINGS = PtychographySettings(epochs=3, settling_epochs=1, batches=2, tiles=(2, 1), checkpoint_every=2)


class Noted:
    """Progress that notes what is said."""

    def __init__(self):
        self.stages, self.losses = [], []

    def start(self, stage, total, unit=""):
        self.stages.append((stage, total))

    def advance(self, n=1, **numbers):
        self.losses += [numbers["loss"]] if "loss" in numbers else []

    def finish(self, stage):
        pass


def test_groups_share_no_worker_and_leave_none_out(client):
    whole = executor(client)
    groups = whole.groups(5)
    assert [len(group.among) for group in groups] == [1, 1]
    assert {address for group in groups for address in group.among} == set(client.nthreads())
    assert whole.groups(1) == [whole]
    for group in groups:
        assert set(group.places(3)) == set(group.among)
        assert group.gather(group.submit(sum, [1, 2])) == 3


def test_tilts_on_groups_of_workers_are_those_of_threads(tmp_path, client):
    found = []
    for name, workers in (("threads", ThreadExecutor(2)), ("cluster", executor(client))):
        store, noted = make_series(tmp_path / f"{name}.zarr", tilts=2), Noted()
        ptychography(store, SETTINGS, executor=workers, progress=noted)
        found.append([store.read(f"ptychography/{tilt:03d}").load() for tilt in range(2)])
    assert noted.stages[-1] == ("ptychography, 2 tilts on 2 groups of workers", 6)
    assert len(noted.losses) == 6
    for one, other in zip(*found, strict=True):
        for name in ("object", "probe", "loss"):
            np.testing.assert_array_equal(one[name].values, other[name].values)


def test_a_tilt_that_fails_is_said_and_the_others_are_there(tmp_path, client, monkeypatch):
    from stemtomo.pipeline import tile_groups

    store, reconstruct = make_series(tmp_path / "series.zarr", tilts=2), tile_groups.reconstruct_tiled

    def failing(job, *others):
        if job.tilt == 1:
            raise FormatError("tilt 1 is broken")
        reconstruct(job, *others)

    monkeypatch.setattr(tile_groups, "reconstruct_tiled", failing)
    with pytest.raises(FormatError, match="tilt 1 is broken"):
        ptychography(store, SETTINGS, executor=executor(client))
    assert store.fingerprint("ptychography/000") is not None
    assert store.fingerprint("ptychography/001") is None
