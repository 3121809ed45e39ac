"""What the scheduler of a cluster must do when all workers were lost and new ones come."""

from __future__ import annotations

from distributed import Scheduler, SchedulerPlugin


class Revival(SchedulerPlugin):
    """Lets any worker take the tasks that waited for none in particular while there was none at all.

    A part prefers the worker it was placed on, and any other takes it when that one is lost. A task that becomes ready
    while there is no worker at all is kept, by Distributed, for the worker it preferred, which never comes back.
    """

    name = "stemtomo-revival"
    idempotent = True

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Forget which worker the tasks without one preferred."""
        for task in scheduler.unrunnable:
            if task.loose_restrictions:
                task.worker_restrictions = set()
