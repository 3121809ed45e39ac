"""The verb ``plan``: what every stage will hold, read and write, from headers and configuration alone."""

from __future__ import annotations

import math

from stemtomo.distributed import Executor, MemoryPlan, available_memory_bytes
from stemtomo.pipeline.config import STAGES, Configuration, ResourceSettings


def plan(
    configuration: Configuration, workers: int = 1, until: str | None = None, memory_bytes: int | None = None
) -> MemoryPlan:
    """Return the tasks, memory and bytes of every stage of ``configuration``; nothing is computed or written.

    Parameters
    ----------
    workers
        Number of tasks that run at once, which decides into how many blocks a volume is cut.
    until
        Last stage to plan; all if not given.
    memory_bytes
        Memory of all workers together, which decides whether a volume is kept in files.

    Raises
    ------
    ConfigurationError, FormatError, AcquisitionError
        If the configuration and the input do not fit together.
    """
    from stemtomo.pipeline import alignment, atoms, projections, ptychography, quicklook, tomography
    from stemtomo.pipeline.ingest import open_input, plan_ingest
    from stemtomo.pipeline.preparation import prepared, prepared_detector

    source = open_input(configuration.input, configuration.scan.shape, configuration.theta_deg())
    tilts = source.shape[0]
    scan = configuration.to_scan((source.shape[1], source.shape[2]))
    detector = configuration.to_detector((source.shape[3], source.shape[4]))
    optics = configuration.to_optics()
    rotations = configuration.to_tilts(tilts).rotations
    raw, source = source, prepared(source, configuration.ingest)
    detector = prepared_detector(detector, configuration.ingest)
    itemsize, pixel = source.dtype.itemsize, detector.object_pixel_angstrom_yx
    field = projections.field_px(scan, pixel, configuration.projections)
    depth = configuration.tomography.depth_angstrom
    planes = field[1] if depth is None else math.ceil(depth / pixel[0])
    rows = [
        plan_ingest(raw, configuration.ingest),
        quicklook.plan_row(scan, detector, itemsize, tilts, configuration.quicklook),
        ptychography.plan_row(scan, detector, optics, itemsize, tilts, configuration.ptychography),
        projections.plan_row(scan, detector, tilts, configuration.projections),
        alignment.plan_row(field, tilts, configuration.alignment),
        tomography.plan_row(field, rotations, pixel[0], configuration.tomography, workers, memory_bytes),
        atoms.plan_row((planes, *field)),
    ]
    stages = list(STAGES)
    last = len(stages) if until is None else stages.index(until)
    return MemoryPlan([row for row in rows if stages.index(row.stage) <= last])


def worker_limits(executor: Executor, resources: ResourceSettings) -> tuple[int, int, int]:
    """Return the bytes of memory of one worker, the number of workers, and the threads of one.

    ``resources.memory_gib`` stands for all workers together; without it, workers say their limit, and threads of this
    process have what the machine and its control group leave.
    """
    client = getattr(executor, "client", None)
    if client is None:
        workers, threads, limit = 1, executor.workers, available_memory_bytes()
    else:
        described = client.scheduler_info(n_workers=-1)["workers"].values()
        workers = max(1, len(described))
        threads = max((worker["nthreads"] for worker in described), default=1)
        limits = [worker["memory_limit"] for worker in described if worker["memory_limit"]]
        limit = min(limits, default=available_memory_bytes() // workers)
    if resources.memory_gib is not None:
        limit = math.floor(resources.memory_gib * 2**30 / workers)
    return limit, workers, threads
