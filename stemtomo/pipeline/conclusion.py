"""What follows the mark of a tilt while later ones are still recorded: its quicklook, and its reconstruction."""

from __future__ import annotations

from pathlib import Path

from stemtomo.distributed import Executor, Handle
from stemtomo.errors import StemtomoError
from stemtomo.io.schema import tilt_name
from stemtomo.io.store import Store
from stemtomo.pipeline.config import Configuration, PtychographySettings, QuicklookSettings, ResourceSettings
from stemtomo.pipeline.live import QUICKLOOK, LiveTilt
from stemtomo.pipeline.plan import worker_limits
from stemtomo.pipeline.quicklook import look_provenance, quicklook


def conclude_tilt(path: Path, tilt: int, look: QuicklookSettings, solve: PtychographySettings | None) -> None:
    """Look at the complete ``tilt`` unless that was done, and reconstruct it if told how: one task."""
    store = Store.open(path, "r+")
    quicklook(store, look, tilts=[tilt])
    if solve is not None:
        from stemtomo.pipeline.ptychography import ptychography

        ptychography(store, solve, tilts=[tilt])


class Conclusions:
    """The tasks that follow the marks of tilts, as many at a time as leave a worker for the frames that still come."""

    def __init__(self, store: Store, configuration: Configuration, executor: Executor) -> None:
        self._store, self._executor = store, executor
        self._look = configuration.quicklook
        self._solve = configuration.ptychography if configuration.watch.then_run else None
        self._waiting: list[int] = []
        self._under_way: dict[int, Handle] = {}

    def add(self, tilt: int, live: LiveTilt | None = None) -> None:
        """Say that ``tilt`` is marked; what ``live`` has seen of its frames on their way is its quicklook.

        Raises
        ------
        ConfigurationError
            If nothing was counted in the tilt.
        StoreError
            If the store cannot be written.
        """
        group = f"{QUICKLOOK}/{tilt_name(tilt)}"
        provenance = look_provenance(self._store, tilt, self._look)
        if live is not None and not self._store.is_complete(group, provenance.fingerprint):
            self._store.write(group, live.finished(self._store), provenance)
        if self._solve is not None or not self._store.is_complete(group, provenance.fingerprint):
            self._waiting.append(tilt)

    def go_on(self, wait: bool = False) -> dict[str, str]:
        """Begin what there is room for, and return what went wrong with what has ended; ``wait`` for all of it."""
        problems: dict[str, str] = {}
        while True:
            for tilt in [tilt for tilt, handle in self._under_way.items() if wait or handle.done()]:
                try:
                    self._executor.gather(self._under_way.pop(tilt))
                except StemtomoError as error:
                    problems[f"{QUICKLOOK} {tilt}"] = str(error)
            room = max(1, self._executor.workers - 1)
            while self._waiting and len(self._under_way) < room:
                tilt = self._waiting.pop(0)
                told = (self._store.path, tilt, self._look, self._with_its_share(room))
                self._under_way[tilt] = self._executor.submit(conclude_tilt, *told)
            if not (wait and self._under_way):
                return problems

    def _with_its_share(self, room: int) -> PtychographySettings | None:
        """Return how a tilt is reconstructed in its share of the memory of a process that may work on several."""
        if self._solve is None:
            return None
        limit, _, threads = worker_limits(self._executor, ResourceSettings(memory_gib=self._solve.memory_gib))
        return self._solve.model_copy(update={"memory_gib": limit / min(room, threads) / 2**30})
