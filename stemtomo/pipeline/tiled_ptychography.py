"""One tilt in tiles: patterns to the workers, the epochs with their checkpoints, and the result in the store."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography import gauges, held_out, solver
from stemtomo.algorithms.ptychography.constraints import Constraints
from stemtomo.algorithms.ptychography.regularisation import blurred_along_beam
from stemtomo.algorithms.ptychography.tiles import Tile, cut_scan
from stemtomo.algorithms.ptychography.windows import ObjectGrid
from stemtomo.distributed import Checkpoint, Executor, Handle, Parts
from stemtomo.errors import FormatError
from stemtomo.geometry import Scan
from stemtomo.io.store import Store
from stemtomo.pipeline.config import PtychographySettings
from stemtomo.pipeline.mistilt import Found, chosen_patterns, model_of
from stemtomo.pipeline.mistilt import find as find_geometry
from stemtomo.pipeline.positions import position_phases
from stemtomo.pipeline.progress import Progress
from stemtomo.pipeline.ptychography import Job, blur_slices, checked_electrons, good_pixels
from stemtomo.pipeline.solving import (
    Tilt,
    alone_epochs,
    epochs_of,
    filters_of,
    pixelwise,
    solve_tilt,
    variation_of,
)
from stemtomo.pipeline.stitching import Apart
from stemtomo.pipeline.tile_fields import Field, Patterns, Streamed
from stemtomo.pipeline.tile_layout import MARGIN_PX, Layout
from stemtomo.pipeline.tile_mistilt import reconstruct_map
from stemtomo.pipeline.tile_results import publish_tiles, tile_result
from stemtomo.pipeline.tile_search import Search
from stemtomo.pipeline.tile_whole import WholeFilter
from stemtomo.pipeline.tiles import Schedule, Standing, TiledRun


def reconstruct_tiled(job: Job, layout: Layout, executor: Executor, progress: Progress) -> None:
    """Reconstruct one tilt in tiles over all workers and write it; it continues from its last checkpoint.

    Raises
    ------
    FormatError
        If a pattern holds no electrons at all.
    ConfigurationError
        If the electrons that were said contradict the counts.
    StoreError
        If a checkpoint or the result cannot be written; the last checkpoint stays valid.
    """
    store = Store.open(job.path)
    checkpoint = Checkpoint(store.checkpoint_path(job.group), job.provenance.fingerprint)
    layout = _as_before(layout, checkpoint)
    stitching, every = layout.settings.tile_mode == "stitch", job.settings.checkpoint_every
    tiles = layout.tiles()
    numbers, windows = list(range(len(tiles))), [tile.window for tile in tiles]
    # Tiles on their own hold other patterns first.
    counting = replace(layout, resident=False) if stitching else layout
    patterns = Parts.create(executor, load_patterns, numbers, counting)
    counted = patterns.map(count_electrons, layout, each=[numbers]).sum()
    found = executor.submit(find_start, layout, counted)
    pixels = float(np.prod(store.detector(job.tilt).shape_yx))
    name = f"{job.group}, {len(tiles)} tiles"
    progress.start(name, job.settings.epochs, "epoch")

    def on_epoch(_: int, loss: float) -> None:
        progress.advance(loss=loss / pixels)

    if layout.settings.mistilt_map_smoothing_angstrom is not None:
        reconstruct_map(job, layout, patterns, counted, found, on_epoch)
        progress.finish(name)
        return
    schedule = _schedule(layout, executor.gather(executor.submit(start_facts, found)))
    kept, joined = {"tiles": np.array(layout.tiles_yx)}, None
    if stitching:
        joined = _joined(layout, executor, found, schedule, checkpoint, kept, on_epoch)
        patterns = Parts.create(executor, load_patterns, numbers, layout)
    fields = patterns.map(make_field, layout, found, each=[numbers])
    run = TiledRun(executor, fields, windows, schedule, kept)
    if joined is not None:
        now = run.save_trees(*joined, checkpoint)
    else:
        now = run.resumed(checkpoint) or run.start(start_state, found, layout)
        progress.advance(len(now.losses))
    now = run.solve(now, checkpoint=checkpoint, checkpoint_every=every, on_epoch=on_epoch)
    executor.gather(_published(run, now, job, layout, found))
    checkpoint.clear()
    progress.finish(name)


def _joined(
    layout: Layout,
    executor: Executor,
    found: Handle,
    schedule: Schedule,
    checkpoint: Checkpoint,
    kept: dict[str, Any],
    on_epoch: Callable[[int, float], None],
) -> tuple[Parts, list[float]] | None:
    """Return tiles that were on their own as trees of exact ones, and their losses; ``None`` where that is done."""
    settings, tiles = layout.settings, layout.tiles()
    alone = alone_epochs(settings, schedule.epochs)
    mark: Any = checkpoint.latest()
    if mark is not None and mark.step >= alone:
        return None
    wider = replace(layout, halo=settings.stitch_halo or 0)
    numbers, seen = list(range(len(tiles))), wider.tiles()
    patterns = Parts.create(executor, load_patterns, numbers, wider)
    fields = patterns.map(make_field, wider, found, each=[numbers])
    owned = [np.isin(wide.where, tile.where) for wide, tile in zip(seen, tiles, strict=True)]
    layers = 1 if schedule.tied else settings.slices
    apart = Apart(executor, fields, seen, owned, schedule, alone, settings.stitch_meet_epochs, layers, kept)
    saved = Parts.load(executor, checkpoint)
    losses: list[float] = []
    if saved is not None:
        trees, losses = Parts(executor, saved.parts.handles, fields.places), saved.shared["losses"].tolist()
        for epoch, loss in enumerate(losses):
            on_epoch(epoch, loss)
    else:
        trees = apart.start(start_state, executor.submit(fit_probe, layout, found), wider)
    trees, losses = apart.solve(trees, losses, checkpoint, settings.checkpoint_every, on_epoch)
    return apart.joined(trees, [tile.window for tile in tiles]), losses


def _as_before(layout: Layout, checkpoint: Checkpoint) -> Layout:
    """Return ``layout`` with the tiles of the checkpoint that there is, where the choice of them is free."""
    mark = checkpoint.latest()
    if mark is None or tuple(mark.shared["tiles"].tolist()) == layout.tiles_yx:
        return layout
    if layout.settings.tiles != "auto":
        checkpoint.clear()  # another cut was asked for: its parts are other ones
        return layout
    rows, columns = mark.shared["tiles"].tolist()
    return layout.cut_as((rows, columns))


def _schedule(layout: Layout, facts: dict[str, Any]) -> Schedule:
    store, settings = Store.open(layout.path), layout.settings
    told = settings.with_mean_slice(facts["slice_thickness_angstrom"])
    width = blur_slices(told, store.optics(layout.tilt))
    rules, batches = epochs_of(settings)
    positions_from, affine_from = position_phases(settings, len(rules))
    background_from = None if settings.background == "none" else settings.background_from_epoch
    # Tiles on their own leave what all of them share as it is.
    alone = alone_epochs(settings, len(rules)) if settings.tile_mode == "stitch" else 0
    if background_from is not None:
        background_from = max(background_from, alone)
    return Schedule(
        rules,
        batches,
        _members(layout)[0],
        settings.probe_update_start_epoch,
        settings.seed + layout.tilt,
        facts["tied"],
        positions_from,
        affine_from,
        functools.partial(blur_object, width=width, constraints=pixelwise(settings), weights=settings.slice_weights),
        background_from,
        settings.background == "uniform",
        settings.tv_weight_rad,
        settings.held_out_patience if settings.held_out > 0 else None,
        variation_of(settings, settings.seed + layout.tilt),
        max(settings.probe_variations_from_epoch, alone),
        _whole_filter(layout, store.scan(layout.tilt)),
        _search(settings, width),
    )


def _search(settings: PtychographySettings, width_slices: float) -> Search | None:
    if settings.rule != "lbfgs":
        return None
    moves_probe = settings.probe_update_start_epoch < settings.epochs
    return Search(settings.settling_of(settings.epochs), width_slices, moves_probe, settings.damping)


def _whole_filter(layout: Layout, scan: Scan) -> WholeFilter | None:
    grid = layout.grid()
    recorded = np.flatnonzero(Store.open(layout.path).valid(layout.tilt))
    asked = filters_of(layout.settings, scan.positions()[recorded], grid.pixel_angstrom_yx)
    return None if asked == Constraints() else WholeFilter(asked, grid.shape_yx)


def _members(layout: Layout) -> tuple[int, np.ndarray]:
    """Return how many members batches are made of, and the member of each recorded position; -1 if it is held out."""
    store = Store.open(layout.path)
    valid, edge = store.valid(layout.tilt), layout.settings.batch_block
    recorded = np.flatnonzero(valid)
    used, _ = held_out.split(len(recorded), layout.settings.held_out, layout.settings.seed + layout.tilt)
    members = np.full(len(recorded), -1)
    if edge == 1:
        members[used] = np.arange(len(used))
        return len(used), members
    rows, columns = np.divmod(recorded, valid.shape[1])
    across, down = -(-valid.shape[1] // edge), -(-valid.shape[0] // edge)
    members[used] = ((rows // edge) * across + columns // edge)[used]
    return down * across, members


def _published(run: TiledRun, now: Standing, job: Job, layout: Layout, found: Handle) -> Handle:
    shape = layout.grid().shape_yx
    lit = run.illumination(now, shape)
    misfits = run.misfits(now)
    states = now.states.map(tile_result)
    told = {"losses": now.losses, "held_out": now.held_out, "best_epoch": run.best_epoch(now)}
    return run.executor.submit(
        publish_tiles, job, layout, found, told, list(states.handles), lit, list(misfits.handles)
    )


# -- tasks, under the names that a dashboard shows ---------------------------------------------------------------------


def load_patterns(index: int, layout: Layout) -> Patterns:
    """Return the patterns of a tile: in memory, on the GPU where there is one, or where they are in the store."""
    tile = layout.tiles()[index]
    streamed = Streamed(layout.path, layout.tilt, tile.scan, _flat(layout, tile))
    return streamed.resident() if layout.resident else streamed


def count_electrons(patterns: Patterns, layout: Layout, index: int) -> dict[str, float]:
    """Return the electrons of all patterns of a tile, and their number.

    Raises
    ------
    FormatError
        If a pattern holds no electrons at all.
    """
    flat, sums = _flat(layout, layout.tiles()[index]), patterns.sums()
    if (empty := np.flatnonzero(sums <= 0)).size:
        y, x = divmod(int(flat[empty[0]]), Store.open(layout.path).scan(layout.tilt).shape_yx[1])
        raise FormatError(
            f"{layout.path}: tilt {layout.tilt} has {empty.size} patterns without a single electron, the first at"
            f" scan position y {y}, x {x}; the beam was blanked or frames were lost: leave this tilt out"
        )
    return {"electrons": float(sums.sum()), "patterns": len(flat)}


def find_start(layout: Layout, counted: dict[str, float]) -> Found:
    """Return where a tilt starts from: its geometry, found from some of its patterns if that was asked for."""
    store, settings = Store.open(layout.path), layout.settings
    scan, optics = store.scan(layout.tilt), store.optics(layout.tilt)
    mean = counted["electrons"] / counted["patterns"]
    electrons = checked_electrons(str(layout.path), layout.tilt, mean, settings.electrons_per_pattern)
    recorded, grid = np.flatnonzero(store.valid(layout.tilt)), layout.grid()
    where = chosen_patterns(scan, recorded, settings)
    some = replace(grid, corners=grid.corners[where], shifts_px=grid.shifts_px[where])
    everywhere = ((0, scan.shape_yx[0]), (0, scan.shape_yx[1]))
    counts = Streamed(layout.path, layout.tilt, everywhere, recorded[where]).read()
    place = backend.to_device if backend.gpu_available() else np.asarray
    mask = good_pixels(store, layout.tilt, settings)
    mask = None if mask is None else place(mask)
    found = find_geometry(optics, scan, some, recorded[where], place(counts), electrons, settings, mask)
    return found if len(where) == len(recorded) else found._replace(phase=None)


def fit_probe(layout: Layout, found: Found) -> Found:
    """Return ``found`` with the probe that the patterns in the middle of the scan tell, in one piece.

    A ramp of the probe against one of the object is free: it is that of the probe that the fit began with.
    """
    store, settings = Store.open(layout.path), layout.settings
    scan, optics = store.scan(layout.tilt), store.optics(layout.tilt)
    recorded, whole = np.flatnonzero(store.valid(layout.tilt)), layout.grid()
    reach = settings.stitch_probe_positions / 2
    places = np.divmod(recorded, scan.shape_yx[1])
    inside = [np.abs(place - (n - 1) / 2) < reach for place, n in zip(places, scan.shape_yx, strict=True)]
    where = np.flatnonzero(inside[0] & inside[1])
    where = where if len(where) else np.arange(len(recorded))
    everywhere = ((0, scan.shape_yx[0]), (0, scan.shape_yx[1]))
    (tile,) = cut_scan(
        replace(whole, corners=whole.corners[where], shifts_px=whole.shifts_px[where]),
        scan.shape_yx,
        recorded[where],
        [everywhere],
        MARGIN_PX,
    )
    counts = Streamed(layout.path, layout.tilt, everywhere, recorded[where]).read()
    counts = backend.to_device(counts) if backend.gpu_available() else counts
    model = _model(layout, found, tile.grid)
    told = settings.with_mean_slice(found.geometry.slice_thickness_angstrom)
    solving = Tilt(
        model, counts, scan.positions()[recorded[where]], blur_slices(told, optics), found.tied, settings.seed
    )
    solved = solve_tilt(solving, solver.State.start(model, found.probe, tied=found.tied), settings)
    begun = found.probe if found.probe.ndim == 3 else found.probe[None]
    return found._replace(probe=gauges.without_ramp_to(solved.state.probe, begun))


def start_facts(found: Found) -> dict[str, Any]:
    """Return what the schedule of all tiles must know of the start."""
    return {"slice_thickness_angstrom": found.geometry.slice_thickness_angstrom, "tied": found.tied}


def make_field(patterns: Patterns, layout: Layout, found: Found, index: int) -> Field:
    """Return what a tile holds fixed."""
    store, tile = Store.open(layout.path), layout.tiles()[index]
    members = _members(layout)[1][tile.where]
    told = store.scan(layout.tilt).positions()[_flat(layout, tile)]
    recorded = int(np.count_nonzero(store.valid(layout.tilt)))
    return Field(_model(layout, found, tile.grid), tile.where, members, told, patterns, recorded)


def start_state(part: Field, found: Found, layout: Layout) -> solver.State:
    """Return the first state of a tile: vacuum, or its window of what the search for the geometry found."""
    state = solver.State.start(part.model, found.probe, tied=found.tied)
    if found.phase is None:
        return state
    tile = next(tile for tile in layout.tiles() if np.array_equal(tile.where, part.where))
    (y0, y1), (x0, x1) = tile.window
    return replace(state, phase=found.phase[:, y0:y1, x0:x1].copy())


def blur_object(
    state: solver.State,
    _: int,
    *,
    width: float,
    constraints: Constraints,
    weights: tuple[float, ...] | None = None,
) -> solver.State:
    """Return the state with the object blurred along the beam and within its bounds."""
    return constraints.after_update(replace(state, phase=blurred_along_beam(state.phase, width, weights)))


def _model(layout: Layout, found: Found, grid: ObjectGrid) -> solver.Model:
    """Return what is held fixed at the positions of ``grid``."""
    store, settings = Store.open(layout.path), layout.settings
    optics, detector = store.optics(layout.tilt), store.detector(layout.tilt)
    return model_of(found, grid, detector, optics, settings, good_pixels(store, layout.tilt, settings))


def _flat(layout: Layout, tile: Tile) -> np.ndarray:
    return np.flatnonzero(Store.open(layout.path).valid(layout.tilt))[tile.where]
