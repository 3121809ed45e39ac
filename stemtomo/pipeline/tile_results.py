"""What tiles are in the end: put together, and written as the result of a tilt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from stemtomo import backend
from stemtomo.algorithms.ptychography import solver
from stemtomo.algorithms.ptychography.parameters import Background
from stemtomo.algorithms.ptychography.positions import Positions, moved_grid
from stemtomo.algorithms.ptychography.variation import Variation
from stemtomo.distributed.trees import map_tree
from stemtomo.io.store import Store
from stemtomo.pipeline.mistilt import Found, model_of
from stemtomo.pipeline.phase_results import loss_map, result_of_solved
from stemtomo.pipeline.positions import affine_attrs, position_variables
from stemtomo.pipeline.ptychography import Job, good_pixels
from stemtomo.pipeline.solving import Solved
from stemtomo.pipeline.tile_layout import Layout


def tile_result(state: solver.State) -> dict[str, Any]:
    """Return what the result holds of a tile, in host memory."""
    moved = state.extra.get(Positions.name)
    background = state.extra.get(Background.name)
    return {
        "background": None if background is None else backend.to_host(background),
        "phase": backend.to_host(state.phase),
        "probe": backend.to_host(state.probe),
        "moved": None if moved is None else backend.to_host(moved),
        "variation": map_tree(backend.to_host, state.extra.get(Variation.name, {})),
    }


def publish_tiles(
    job: Job,
    layout: Layout,
    found: Found,
    told: dict[str, Any],
    states: list[dict[str, Any]],
    lit: backend.Array,
    misfits: list[np.ndarray],
) -> float:
    """Put the tiles together and write the result of the tilt; return its last loss per pixel."""
    store, settings, tiles = Store.open(job.path, "r+"), job.settings, layout.tiles()
    scan, detector, optics = store.scan(job.tilt), store.detector(job.tilt), store.optics(job.tilt)
    grid, recorded = layout.grid(), np.flatnonzero(store.valid(job.tilt))
    phase = np.zeros((len(states[0]["phase"]), *grid.shape_yx), states[0]["phase"].dtype)
    for tile, state in zip(tiles, states, strict=True):
        (y0, y1), (x0, x1) = tile.window
        phase[:, y0:y1, x0:x1] = state["phase"]  # tiles agree where they overlap
    order = np.argsort(np.concatenate([tile.where for tile in tiles]))
    extra: dict[str, Any] = {}
    if states[0]["moved"] is not None:
        extra[Positions.name] = np.concatenate([state["moved"] for state in states])[order]
        grid = moved_grid(grid, extra[Positions.name])
    # The states are in host memory, and so is the model.
    found_here = found._replace(probe=backend.to_host(found.probe))
    model = model_of(found_here, grid, detector, optics, settings, good_pixels(store, job.tilt, settings))
    whole = solver.State(phase, states[0]["probe"], extra)
    settings = settings.with_mean_slice(found.geometry.slice_thickness_angstrom)
    pixels = float(np.prod(detector.shape_yx))
    beside: list[solver.Parameter] = []
    if states[0]["background"] is not None:
        beside, extra[Background.name] = [Background()], states[0]["background"]
    if varied := states[0]["variation"]:
        weights = np.concatenate([state["variation"]["weights"] for state in states])[order]
        beside, extra[Variation.name] = [*beside, Variation()], {"modes": varied["modes"], "weights": weights}
    whole = replace(whole, extra=extra)
    solved = Solved(whole, model, told["losses"], told["held_out"], told["best_epoch"], beside)
    dataset = result_of_solved(solved, settings, optics, detector, lit)
    dataset = dataset.assign(loss_map=loss_map(np.concatenate(misfits)[order] / pixels, recorded, scan))
    dataset = dataset.assign(found.variables()).assign_attrs(found.attrs(settings.slices))
    dataset = dataset.assign_attrs(tiles=list(layout.tiles_yx))
    if settings.refine_positions_from_epoch is not None:
        places = scan.positions()[recorded]
        dataset = dataset.assign(position_variables(places, whole))
        dataset = dataset.assign_attrs(scan_affine=affine_attrs(places, whole))
    store.write(job.group, dataset, job.provenance)
    return float(told["losses"][-1] / pixels)
