"""A synthetic nucleation series, turned and shifted between its states: every event is named right."""

import numpy as np
import pytest
import xarray as xr
from scipy.spatial.transform import Rotation

from stemtomo.errors import ConfigurationError
from stemtomo.io.structures import read_structure
from stemtomo.pipeline.settings.analysis import TrackSettings
from stemtomo.pipeline.track import track
from tests.algorithms.atoms.crystalline import fcc

A = 3.85
GROWS, FADES, LEFT, RIGHT, COMES = (
    np.array(c, dtype=float) for c in ([0, 0, 21], [0, 0, -21], [-9.5, 0, 0], [9.5, 0, 0], [0, 21, 0])
)
#: Balls (centre, radius, axis of the L1_0 layers) of each state.
SERIES = [
    [(GROWS, 7, 0), (FADES, 7.5, 1), (LEFT, 7, 2), (RIGHT, 7, 2)],
    [(GROWS, 9.5, 0), ((LEFT + RIGHT) / 2, 12.5, 2), (COMES, 8, 1)],
    [(GROWS, 7.5, 0), (LEFT, 7, 2), (RIGHT, 7, 2), (COMES, 8, 1)],
]


@pytest.fixture(scope="module")
def states():
    rng = np.random.default_rng(4)
    sites = fcc(A, 30.0)
    sites = sites[np.linalg.norm(sites, axis=1) < 29]
    layer = np.rint(2 * sites / A).astype(int)
    disorder = rng.random(len(sites)) < 0.5
    result = []
    for number, balls in enumerate(SERIES):
        pt = disorder.copy()
        for centre, radius, axis in balls:
            inside = np.linalg.norm(sites - centre, axis=1) < radius
            pt[inside] = layer[inside, axis] % 2 == 0
        turn = Rotation.from_rotvec(np.radians(2.5 * number) * np.array([1, 2, -2]) / 3).as_matrix()
        positions = (sites + rng.normal(0, 0.1, sites.shape)) @ turn.T + number * np.array([0.8, -0.5, 0.3])
        kept = rng.random(len(sites)) > 0.02
        result.append((positions[kept], np.where(pt, "Pt", "Fe")[kept]))
    return result


@pytest.fixture(scope="module")
def found(states, tmp_path_factory):
    out = tmp_path_factory.mktemp("track") / "series.parquet"
    settings = TrackSettings(order="chemical", cutoff_angstrom=3.3, threshold=0.55, smallest_nucleus=30)
    return track(states, settings, out=out), out


def place(numbers, state, number):
    row = next(r for r in numbers["nuclei"] if (r["state"], r["number"]) == (state, number))
    return np.array(row["centre_angstrom"])


def near(numbers, event, *, parents=(), children=()):
    """Whether the event's nuclei lie where they were put, in the frame of the first state."""
    placed = [(event["step"], p, c) for p, c in zip(event["parents"], parents, strict=True)]
    placed += [(event["step"] + 1, p, c) for p, c in zip(event["children"], children, strict=True)]
    return all(np.linalg.norm(place(numbers, s, n) - c) < 4 for s, n, c in placed)


def test_every_event_is_named_right(found):
    numbers, _ = found
    events = numbers["events"]
    assert sorted((e["step"], e["kind"]) for e in events) == [
        (0, "dissolution"), (0, "growth"), (0, "merging"), (0, "nucleation"),
        (1, "division"), (1, "persistence"), (1, "shrinkage"),
    ]  # fmt: skip
    named = {(e["step"], e["kind"]): e for e in events}
    assert near(numbers, named[0, "dissolution"], parents=[FADES])
    assert near(numbers, named[0, "growth"], parents=[GROWS], children=[GROWS])
    assert near(numbers, named[0, "nucleation"], children=[COMES])
    assert near(numbers, named[1, "persistence"], parents=[COMES], children=[COMES])
    assert near(numbers, named[1, "shrinkage"], parents=[GROWS], children=[GROWS])


def test_tracks_tell_the_whole_story(found):
    fates = {(t["fate"], t["end"], len(t["nuclei"])) for t in found[0]["tracks"]}
    assert ("fluctuating", "present", 3) in fates  # grew, then shrank
    assert ("steady", "dissolution", 1) in fates
    assert ("steady", "merging", 1) in fates
    assert ("steady", "division", 1) in fates


def test_states_lie_on_the_first(found):
    for number, state in enumerate(found[0]["states"][1:], start=1):
        turn = Rotation.from_rotvec(state["rotation_deg"], degrees=True)
        known = Rotation.from_rotvec(-2.5 * number * np.array([1, 2, -2]) / 3, degrees=True)
        assert np.degrees((turn * known.inv()).magnitude()) < 0.1
        assert state["matched"] > 0.93 * state["atoms"]


def test_the_atoms_of_all_states_are_written(found):
    atoms = read_structure(found[1])
    assert isinstance(atoms, xr.Dataset)
    assert set(np.unique(atoms["state"])) == {0, 1, 2}
    assert atoms.sizes["atom"] == sum(state["atoms"] for state in found[0]["states"])


def test_one_state_cannot_be_followed(states):
    with pytest.raises(ConfigurationError, match="two or more"):
        track(states[:1])
