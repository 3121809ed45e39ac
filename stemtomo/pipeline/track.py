"""The verb ``track``: several states of one specimen registered, their atoms matched, their nuclei followed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from scipy.spatial.transform import Rotation

from stemtomo.algorithms.atoms.nuclei import Event, Track, events_between, overlaps, tracks_of
from stemtomo.algorithms.atoms.pair_distribution import nearest_distance
from stemtomo.algorithms.atoms.states import RigidMotion, mutual_pairs, register_states
from stemtomo.distributed import Executor
from stemtomo.errors import ConfigurationError
from stemtomo.io.structures import write_structure
from stemtomo.pipeline.order import nuclei_of
from stemtomo.pipeline.progress import Progress, Silent
from stemtomo.pipeline.settings.analysis import TrackSettings
from stemtomo.pipeline.structure import AtomSource, Structure, column, kept, structure

GROUP = "tracking"


class _State(NamedTuple):
    """One state in the frame of the first: positions, order and nucleus of each atom, and how it was moved there."""

    positions: np.ndarray
    order: np.ndarray
    nucleus: np.ndarray
    motion: RigidMotion | None


def track(
    sources: Sequence[AtomSource],
    settings: TrackSettings | None = None,
    *,
    out: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Follow nuclei of ordered atoms through states of one specimen, in the order of time.

    Each state is registered rigidly to the one before by the atoms that did not move (the common core); atoms are
    matched one to one; nuclei are connected sets of atoms of at least ``threshold`` order (of chemical order: of one
    variant); those that share atoms are related, and what happened to each family is named.

    Parameters
    ----------
    sources
        States as for :func:`stemtomo.order`, two or more. If the first is a store, the result is written to its
        ``tracking``.
    settings
        See :class:`~stemtomo.pipeline.settings.analysis.TrackSettings`.
    out
        File to write the atoms of all states to, in the frame of the first, with ``state``, ``order``, ``nucleus`` and
        ``track``: .parquet or .xyz.

    Returns
    -------
    dict
        ``states``: of each the atoms, the rotation (deg) and shift (Å) onto the first, atoms and rmsd of the common
        core with the state before, atoms matched with it, and number of nuclei; ``nuclei``: state, number, atoms, mean
        and largest order, centre, track; ``events``: step, kind (nucleation, growth, shrinkage, persistence,
        dissolution, merging, division, exchange), parents, children, atoms before and after, atoms shared; ``tracks``:
        nuclei, atoms, fate (growing, shrinking, fluctuating, steady) and end.

    Raises
    ------
    ConfigurationError
        If there are fewer than two states, or two have no common core.
    """
    settings = settings or TrackSettings()
    progress = progress or Silent()
    if len(sources) < 2:
        raise ConfigurationError(f"{len(sources)} state(s) were given; two or more are needed to follow anything")
    structures = [structure(source) for source in sources]
    progress.start("track", len(structures), "state")
    inputs = {f"state_{number}": one.identity for number, one in enumerate(structures)}
    result = kept(
        structures[0].store,
        GROUP,
        settings.model_dump(),
        inputs,
        lambda: _tracked(structures, settings, executor, progress),
    )
    if out is not None:
        atoms = {str(n)[5:]: v.variable for n, v in result.data_vars.items() if v.dims == ("atom",)}
        write_structure(out, xr.Dataset(atoms))
    progress.finish("track")
    return dict(result.attrs)


def _tracked(
    structures: list[Structure], settings: TrackSettings, executor: Executor | None, progress: Progress
) -> xr.Dataset:
    states: list[_State] = []
    pairs: list[np.ndarray] = []
    nearest = nearest_distance(structures[0].positions)
    radius = settings.match_radius_angstrom or 0.5 * nearest
    for number, one in enumerate(structures):
        motion, positions = None, one.positions
        if number:
            before = structures[number - 1]
            motion = register_states(
                one.positions,
                states[-1].positions,
                one.species,
                before.species,
                nearest_angstrom=nearest,
                largest_rotation_deg=settings.rotation_deg,
            )
            positions = motion.apply(one.positions)
            pairs.append(mutual_pairs(states[-1].positions, positions, radius))
        states.append(_State(positions, *nuclei_of(one, settings, executor), motion))
        progress.advance()
    sizes = [np.bincount(s.nucleus[s.nucleus >= 0], minlength=s.nucleus.max(initial=-1) + 1) for s in states]
    events: list[Event] = []
    for step, matched in enumerate(pairs):
        table = overlaps(states[step].nucleus, states[step + 1].nucleus, matched)
        events += events_between(step, table, sizes[step], sizes[step + 1], settings.least_share, settings.change)
    return _dataset(structures, states, pairs, events, tracks_of(events, sizes, settings.change))


def _dataset(
    structures: list[Structure],
    states: list[_State],
    pairs: list[np.ndarray],
    events: list[Event],
    tracks: list[Track],
) -> xr.Dataset:
    of_nucleus = {key: track.number for track in tracks for key in track.nuclei}
    rows = _nucleus_rows(states, of_nucleus)
    variables = {
        name: column(np.array([row[name] for row in rows], dtype=int), "1", meaning, "nucleus")
        for name, meaning in (
            ("state", "state that the nucleus is in"),
            ("number", "its number in that state"),
            ("track", "nuclei of one track are one, followed"),
            ("atoms", "number of its atoms"),
        )
    }
    everything = {axis: np.concatenate([s.positions[:, i] for s in states]) for i, axis in enumerate("xyz")}
    for axis, values in everything.items():
        variables[f"atom_{axis}"] = column(values, "Å", "position in the frame of the first state")
    label = np.concatenate([np.full(len(s.positions), n) for n, s in enumerate(states)])
    nucleus = np.concatenate([s.nucleus for s in states])
    followed = [of_nucleus.get((int(s), int(n)), -1) for s, n in zip(label, nucleus, strict=True)]
    variables |= {
        "atom_species": column(np.concatenate([one.species for one in structures]), "1", "species"),
        "atom_state": column(label, "1", "state that the atom is in"),
        "atom_order": column(np.concatenate([s.order for s in states]), "1", "order"),
        "atom_nucleus": column(nucleus, "1", "nucleus of the state, -1 for none"),
        "atom_track": column(np.array(followed), "1", "track of its nucleus, -1 for none"),
    }
    attrs = {
        "states": _state_rows(structures, states, pairs),
        "nuclei": rows,
        "events": [
            {**event._asdict(), "parents": list(event.parents), "children": list(event.children)} for event in events
        ],
        "tracks": [
            {
                "number": one.number,
                "nuclei": [list(key) for key in one.nuclei],
                "atoms": list(one.atoms),
                "fate": one.fate,
                "end": one.end,
            }
            for one in tracks
        ],
    }
    return xr.Dataset(variables, attrs=attrs)


def _nucleus_rows(states: list[_State], of_nucleus: dict[tuple[int, int], int]) -> list[dict[str, Any]]:
    rows = []
    for number, state in enumerate(states):
        for nucleus in range(int(state.nucleus.max(initial=-1)) + 1):
            members = state.nucleus == nucleus
            rows.append(
                {
                    "state": number,
                    "number": nucleus,
                    "track": of_nucleus[(number, nucleus)],
                    "atoms": int(members.sum()),
                    "mean_order": float(state.order[members].mean()),
                    "largest_order": float(state.order[members].max()),
                    "centre_angstrom": state.positions[members].mean(axis=0).tolist(),
                }
            )
    return rows


def _state_rows(structures: list[Structure], states: list[_State], pairs: list[np.ndarray]) -> list[dict[str, Any]]:
    rows = []
    for number, state in enumerate(states):
        motion = state.motion
        turn = Rotation.identity() if motion is None else Rotation.from_matrix(motion.rotation)
        rows.append(
            {
                "name": structures[number].name,
                "atoms": len(state.positions),
                "ordered": int((state.nucleus >= 0).sum()),
                "nuclei": int(state.nucleus.max(initial=-1)) + 1,
                "rotation_deg": turn.as_rotvec(degrees=True).tolist(),
                "shift_angstrom": (np.zeros(3) if motion is None else motion.translation).tolist(),
                "core_atoms": None if motion is None else len(motion.core),
                "core_rmsd_angstrom": None if motion is None else motion.rmsd_angstrom,
                "matched": None if motion is None else len(pairs[number - 1]),
            }
        )
    return rows
