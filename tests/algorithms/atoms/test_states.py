"""States registered by what did not move; nuclei followed, and every event of a known series named."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from stemtomo.algorithms.atoms.nuclei import events_between, overlaps, tracks_of
from stemtomo.algorithms.atoms.states import mutual_pairs, register_states, rigid_fit
from stemtomo.errors import ConfigurationError
from tests.algorithms.atoms.crystalline import fcc


def particle(radius=18.0):
    sites = fcc(half=radius)
    return sites[np.linalg.norm(sites, axis=1) < radius]


def test_a_rigid_fit_is_the_motion():
    points = np.random.default_rng(0).normal(size=(30, 3))
    turn = Rotation.from_rotvec([0.2, -0.1, 0.4]).as_matrix()
    rotation, shift = rigid_fit(points, points @ turn.T + [1, 2, 3])
    np.testing.assert_allclose(rotation, turn, atol=1e-12)
    np.testing.assert_allclose(shift, [1, 2, 3], atol=1e-12)


def test_pairs_are_mutual_and_unique():
    a = np.array([[0.0, 0, 0], [0.3, 0, 0], [5.0, 0, 0]])
    b = np.array([[0.2, 0, 0], [9.0, 0, 0]])
    assert mutual_pairs(a, b, 1.0).tolist() == [[1, 0]]


@pytest.mark.parametrize("degrees", [0.0, 4.0, 8.0])
def test_states_are_registered_by_their_common_core(degrees):
    rng = np.random.default_rng(1)
    before = particle()
    # A random alloy: its species tell which of the many coincidences of a lattice with itself is the right one.
    species = rng.choice(["Fe", "Pt"], len(before))
    # A tenth of the atoms is gone, the outer shell has moved, all are 0.15 Å off.
    kept = rng.random(len(before)) > 0.1
    after, after_species = before[kept].copy(), species[kept]
    outer = np.linalg.norm(after, axis=1) > 14
    after[outer] += rng.normal(0, 1.5, (outer.sum(), 3))
    after += rng.normal(0, 0.15 / np.sqrt(3), after.shape)
    turn = Rotation.from_rotvec(np.radians(degrees) * np.array([2, -1, 2]) / 3).as_matrix()
    shift = np.array([1.2, -0.7, 0.4])
    state = (after - shift) @ turn  # so that turn @ state + shift = after
    motion = register_states(state, before, after_species, species, nearest_angstrom=2.885)
    assert Rotation.from_matrix(motion.rotation @ turn.T).magnitude() < np.radians(0.1)
    np.testing.assert_allclose(motion.translation, shift, atol=0.03)
    assert motion.rmsd_angstrom < 0.25
    # The core are the same atoms, but for a few of the shell that came upon another place.
    assert np.mean(np.flatnonzero(kept)[motion.core[:, 0]] == motion.core[:, 1]) > 0.97


def test_states_without_a_common_core_are_refused():
    rng = np.random.default_rng(2)
    a, b = rng.uniform(-20, 20, (300, 3)), rng.uniform(-20, 20, (300, 3))
    one = np.full(300, "X")
    with pytest.raises(ConfigurationError, match="no common core"):
        register_states(a, b, one, one, nearest_angstrom=2.0, largest_rotation_deg=0.0)


def labelled(balls, sites):
    """Return the nucleus of each site: the number of the ball (centre, radius) that it is in, -1 outside."""
    label = np.full(len(sites), -1)
    for number, (centre, radius) in enumerate(balls):
        label[np.linalg.norm(sites - centre, axis=1) < radius] = number
    return label


def test_every_event_of_a_known_series_is_named():
    sites = fcc(half=40.0)
    everyone = np.stack([np.arange(len(sites))] * 2, axis=1)
    grows, fades, joins_a, joins_b, splits, stays, comes = (
        np.array(c)
        for c in ([-30, -30, -30], [30, 30, 30], [-8, 0, 0], [8, 0, 0], [0, 28, -28], [28, -28, 0], [-28, 28, 28])
    )
    before = labelled([(grows, 5), (fades, 5), (joins_a, 6), (joins_b, 6), (splits, 11), (stays, 6)], sites)
    apart = np.array([7.0, 0.0, 0.0])
    left, right = splits - apart, splits + apart
    after = labelled([(grows, 8), ((joins_a + joins_b) / 2, 14), (left, 5), (right, 5), (stays, 6), (comes, 6)], sites)
    sizes = [np.bincount(label[label >= 0]) for label in (before, after)]
    events = events_between(0, overlaps(before, after, everyone), *sizes, least_share=0.2, change=0.2)
    found = {(event.kind, event.parents, event.children) for event in events}
    assert found == {
        ("growth", (0,), (0,)),
        ("dissolution", (1,), ()),
        ("merging", (2, 3), (1,)),
        ("division", (4,), (2, 3)),
        ("persistence", (5,), (4,)),
        ("nucleation", (), (5,)),
    }


def test_tracks_say_the_fate_and_the_end():
    one = np.array([[1]])
    sizes = [np.array([20]), np.array([40]), np.array([22])]
    events = []
    for step in range(2):
        events += events_between(step, one * 20, sizes[step], sizes[step + 1], 0.2, 0.2)
    assert [event.kind for event in events] == ["growth", "shrinkage"]
    (track,) = tracks_of(events, sizes, 0.2)
    assert (track.fate, track.end, track.atoms) == ("fluctuating", "present", (20, 40, 22))
    events += events_between(2, np.zeros((1, 0), int), sizes[2], np.zeros(0, int), 0.2, 0.2)
    (track,) = tracks_of(events, [*sizes, np.zeros(0, int)], 0.2)
    assert track.end == "dissolution"
