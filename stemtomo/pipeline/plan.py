"""The verb ``plan``: what every stage will hold, read and write, from headers and configuration alone."""

from __future__ import annotations

import math

from stemtomo.distributed import Executor, MemoryPlan, PlanRow, available_memory_bytes
from stemtomo.geometry import Detector, Scan
from stemtomo.pipeline.config import STAGES, Configuration, ResourceSettings


def plan(
    configuration: Configuration,
    workers: int = 1,
    until: str | None = None,
    limits: tuple[int, int, int] | None = None,
    executor: Executor | None = None,
) -> MemoryPlan:
    """Return the tasks, memory and bytes of every stage of ``configuration``; nothing is computed or written.

    Parameters
    ----------
    workers
        Number of tasks that run at once, which decides into how many blocks a volume is cut.
    until
        Last stage to plan; all if not given.
    limits
        What :func:`worker_limits` says: a tilt that does not fit it is planned in tiles, a volume that does not in
        files.
    executor
        Where a measurement of seconds tells how long tiles take; not told unless given.

    Raises
    ------
    ConfigurationError, FormatError, AcquisitionError
        If the configuration and the input do not fit together.
    """
    from stemtomo.pipeline.run import skipped_stages

    rows = _rows(configuration, workers, until, limits, executor)
    skipped = skipped_stages(configuration) - {until}
    wanted = ((row.stage.partition(",")[0], row) for row in rows)
    return MemoryPlan([row for stage, row in wanted if _takes_part(stage, until) and stage not in skipped])


def _rows(
    configuration: Configuration,
    workers: int,
    until: str | None,
    limits: tuple[int, int, int] | None,
    executor: Executor | None,
) -> list[PlanRow]:
    """Return the row of every stage, whether it takes part or not."""
    from stemtomo.pipeline import (
        alignment,
        atoms,
        atoms_multislice,
        joint,
        projections,
        ptychography,
        quicklook,
        tomography,
    )
    from stemtomo.pipeline.ingest import open_input, plan_ingest
    from stemtomo.pipeline.preparation import prepared, prepared_detector

    source = open_input(configuration.input, configuration.scan.shape, configuration.theta_deg())
    tilts = source.shape[0]
    scan = configuration.to_scan((source.shape[1], source.shape[2]))
    detector = configuration.to_detector((source.shape[3], source.shape[4]))
    optics = configuration.to_optics()
    poses = configuration.to_tilts(tilts)
    raw, source = source, prepared(source, configuration.ingest)
    detector = prepared_detector(detector, configuration.ingest)
    itemsize, pixel = source.dtype.itemsize, detector.object_pixel_angstrom_yx
    field = projections.field_px(scan, pixel, configuration.projections)
    depth = configuration.tomography.depth_angstrom
    planes = field[1] if depth is None else math.ceil(depth / pixel[0])
    tiled = None
    if limits is not None and _takes_part(ptychography.GROUP, until):
        tiled = _tiled_row(configuration, scan, detector, itemsize, tilts, limits, executor)
    memory = None if limits is None else limits[0] * limits[1]
    told = (scan, detector, optics, itemsize, list(poses))
    last = []
    if configuration.joint.enabled and configuration.atoms.refine and configuration.atoms.refine_model == "multislice":
        last.append(atoms_multislice.plan_row(*told, configuration.atoms, configuration.joint, workers))
    return [
        plan_ingest(raw, configuration.ingest),
        quicklook.plan_row(scan, detector, itemsize, tilts, configuration.quicklook),
        tiled or ptychography.plan_row(scan, detector, optics, itemsize, tilts, configuration.ptychography),
        projections.plan_row(scan, detector, tilts, configuration.projections),
        alignment.plan_row(field, tilts, configuration.alignment),
        tomography.plan_row(field, poses.rotations, pixel[0], configuration.tomography, workers, memory),
        joint.plan_row(*told, configuration.joint, workers),
        atoms.plan_row((planes, *field), configuration.atoms),
        *last,
    ]


def _tiled_row(
    configuration: Configuration,
    scan: Scan,
    detector: Detector,
    itemsize: int,
    tilts: int,
    limits: tuple[int, int, int],
    executor: Executor | None,
) -> PlanRow | None:
    """Return the row of ptychography in tiles, ``None`` where a tilt fits a worker."""
    from stemtomo.pipeline import tile_cost, tile_layout, tile_plan
    from stemtomo.pipeline.tile_layout import Choice, Room

    room = Room(*limits)
    settings = tile_layout.with_known_halo(configuration.ptychography, scan, configuration.to_optics())

    measured = None
    if executor is not None and tile_plan.plan_row(scan, detector, itemsize, tilts, settings, room) is not None:
        rates = tile_cost.measured(executor, detector, configuration.to_optics(), settings)

        def measured(choice: Choice, workers: int, groups: int) -> float:
            return tile_cost.estimate(settings, choice, workers * room.threads, rates, groups).seconds

    return tile_plan.plan_row(scan, detector, itemsize, tilts, settings, room, measured)


def _takes_part(stage: str, until: str | None) -> bool:
    stages = list(STAGES)
    return until is None or stages.index(stage) <= stages.index(until)


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
