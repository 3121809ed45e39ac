"""Order of atoms: crystals with known parameters, the published numbers of a metallic glass, known grains."""

import numpy as np
import pytest
from ase.build import bulk

from stemtomo.algorithms.atoms.blocks import atom_blocks
from stemtomo.algorithms.atoms.chemical import PHASES, VARIANT_AXIS, VARIANT_PHASE, chemical_order, ordered_grains
from stemtomo.algorithms.atoms.frames import cubic_rotations, fcc_frames, grains_of, misorientation
from stemtomo.algorithms.atoms.neighbours import bonds, connected_sets
from stemtomo.algorithms.atoms.order import FCC_Q4, FCC_Q6, bond_order
from stemtomo.algorithms.atoms.pair_distribution import (
    body_of,
    count_pairs,
    expected_pairs,
    first_valley,
    nearest_distance,
    pair_distribution,
)
from stemtomo.errors import ConfigurationError
from tests.algorithms.atoms.crystalline import angle_deg, fcc, repeated, turned
from tests.data import FOLDER, needs


def test_the_fcc_crystal_has_order_one_inside():
    sites = fcc(4.08, 14.0)
    found = bond_order(sites @ turned().T, 3.5)
    inside = (np.abs(sites) < 7).all(axis=1)
    np.testing.assert_allclose(found.q4[inside], FCC_Q4, atol=1e-5)
    np.testing.assert_allclose(found.q6[inside], FCC_Q6, atol=1e-5)
    assert (found.neighbours[inside] == 12).all()


def test_bcc_with_both_shells_has_the_published_q6():
    sites = repeated(bulk("Fe", "bcc", a=2.87, cubic=True), 12.0)
    inside = (np.abs(sites) < 5).all(axis=1)
    # 14 neighbours: q4 = 0.0364, q6 = 0.5107 (Mickel et al., J. Chem. Phys. 138, 044501 (2013)).
    found = bond_order(sites, 3.4)
    np.testing.assert_allclose(found.q6[inside], 0.5107, atol=2e-4)
    np.testing.assert_allclose(found.q4[inside], 0.0364, atol=2e-4)


@needs("metallic_glass_models")
def test_the_published_crystalline_atoms_of_a_metallic_glass():
    with np.load(FOLDER / "metallic_glass_models" / "models.npz") as models:
        positions = models["final_atoms_A"].astype(float)
    order = bond_order(positions, 3.688).order
    assert int((order >= 0.5).sum()) == 2838
    assert round(100 * float((order >= 0.5).mean()), 2) == 15.46


def test_order_does_not_depend_on_how_the_atoms_are_cut():
    positions = np.random.default_rng(0).uniform(-15, 15, (1500, 3))
    whole = bond_order(positions, 3.0)
    blocks = atom_blocks(positions, 200, 6.0)
    assert np.array_equal(np.sort(np.concatenate([b.own for b in blocks])), np.arange(1500))
    for block in blocks:
        part = bond_order(positions[block.around], 3.0)
        np.testing.assert_allclose(part.order[: len(block.own)], whole.order[block.own], atol=2e-5)


def test_one_atom_has_no_order_and_bad_positions_are_refused():
    assert bond_order(np.zeros((1, 3)), 3.0).order.tolist() == [0.0]
    with pytest.raises(ConfigurationError, match="finite"):
        bond_order(np.full((3, 3), np.nan), 3.0)
    with pytest.raises(ConfigurationError, match="positive"):
        bonds(np.zeros((3, 3)), 0.0)


def test_pairs_are_those_of_all_distances():
    positions = np.random.default_rng(1).uniform(0, 10, (200, 3))
    distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
    near = zip(*np.nonzero(np.triu(distance < 2.0, 1)), strict=True)
    assert sorted(zip(*bonds(positions, 2.0, 30), strict=True)) == sorted(near)


def test_connected_sets_are_numbered_by_size():
    first, second = np.array([0, 1, 3, 5]), np.array([1, 2, 4, 6])
    member = np.array([True] * 6 + [False])
    assert connected_sets(7, first, second, member, 2).tolist() == [0, 0, 0, 1, 1, -1, -1]


def test_a_uniform_ball_has_the_pairs_of_its_set_covariance():
    radius, edges = 20.0, np.linspace(0, 15, 16)
    grid = np.stack(np.meshgrid(*[np.arange(-22, 23)] * 3, indexing="ij"), axis=-1)
    body = body_of(np.zeros((1, 3)), 3.0)._replace(
        inside=np.linalg.norm(grid, axis=-1) < radius, spacing=1.0, origin=np.full(3, -22.0)
    )
    r = (edges[:-1] + edges[1:]) / 2
    volume = 4 / 3 * np.pi * radius**3
    overlap = volume * (1 - 0.75 * r / radius + r**3 / (16 * radius**3))
    np.testing.assert_allclose(expected_pairs(body, edges)[2:], (2 * np.pi * r**2 * overlap)[2:], rtol=0.02)


def test_a_random_gas_has_a_flat_distribution():
    rng = np.random.default_rng(2)
    points = rng.uniform(-20, 20, (12_000, 3))
    points = points[np.linalg.norm(points, axis=1) < 20]
    edges = np.arange(0, 8.01, 0.5)
    names = rng.choice(["A", "B"], len(points))
    counts = count_pairs(points, names, len(points), edges, ["A", "B"])
    assert sum(c.sum() for c in counts.values()) == pytest.approx(len(bonds(points, 8.0)[0]), rel=1e-5)
    found = pair_distribution(counts, {n: int((names == n).sum()) for n in "AB"}, body_of(points, 2.5), edges)
    np.testing.assert_allclose(found.g[4:], 1.0, atol=0.04)
    np.testing.assert_allclose(found.partial["A", "B"][4:], 1.0, atol=0.05)


def test_the_first_valley_of_a_crystal_lies_between_its_shells():
    rng = np.random.default_rng(3)
    sites = fcc(4.0, 16.0)
    sites = sites + rng.normal(0, 0.08, sites.shape)
    edges = np.arange(0, 8.0, 0.05)
    body = body_of(sites, nearest_distance(sites))
    found = pair_distribution(
        count_pairs(sites, np.full(len(sites), "X"), len(sites), edges, ["X"]), {"X": len(sites)}, body, edges
    )
    assert 3.0 < first_valley(found.r_angstrom, found.g) < 3.85  # shells at 2.83 and 4.00 Å


def test_the_cube_has_24_rotations_and_lattices_differ_by_less_than_63_degrees():
    cube = cubic_rotations()
    assert len({tuple(m.ravel()) for m in cube}) == 24
    a, b = np.stack([turned(s) for s in range(40)]), np.stack([turned(s + 99) for s in range(40)])
    found = misorientation(a, b)
    assert np.degrees(found.max()) < 62.81  # Mackenzie's limit
    np.testing.assert_allclose(np.degrees(found), [angle_deg(p, q) for p, q in zip(a, b, strict=True)], atol=1e-4)
    np.testing.assert_allclose(misorientation(a @ cube[7], a @ cube[3]), 0, atol=1e-6)


def test_two_grains_of_one_element_are_told_apart_and_oriented():
    rng = np.random.default_rng(4)
    sites = fcc(4.08, 30.0)
    one, two = turned(1), turned(2)
    left, right = sites @ one.T, sites @ two.T
    left = left[(np.abs(left) < 18).all(axis=1) & (left[:, 0] < -1)]
    right = right[(np.abs(right) < 18).all(axis=1) & (right[:, 0] > 1)]
    positions = np.concatenate([left, right]) + rng.normal(0, 0.08, (len(left) + len(right), 3))
    found = fcc_frames(positions, len(positions), 3.5)
    grain, frames = grains_of(found)
    assert grain.max() == 1
    for atoms, orientation in ((np.arange(len(left)), one), (np.arange(len(left), len(positions)), two)):
        number = np.bincount(grain[atoms][grain[atoms] >= 0]).argmax()
        assert np.mean(grain[atoms] == number) > 0.95
        inside = atoms[(grain[atoms] == number) & (frames.misfit[atoms] < 0.1)]
        # In one setting the frames of a grain can be averaged.
        u, _, vt = np.linalg.svd(frames.rotation[inside].mean(axis=0))
        assert angle_deg(u @ vt, orientation) < 0.5


@pytest.fixture(scope="module")
def alloy():
    """A random alloy with two L1_0 grains (layers across x and z) and one of L1_2, turned, with displacements."""
    rng = np.random.default_rng(1)
    a = 3.85
    sites = fcc(a, 28.0)
    sites = sites[np.linalg.norm(sites, axis=1) < 27]
    layer = np.rint(2 * sites / a).astype(int)
    is_a = rng.random(len(sites)) < 0.5
    balls = [np.linalg.norm(sites - c, axis=1) < r for c, r in (((12, 0, 0), 11), ((-12, 0, 0), 11), ((0, 16, 5), 9))]
    is_a[balls[0]] = layer[balls[0], 0] % 2 == 0
    is_a[balls[1]] = layer[balls[1], 2] % 2 == 1
    is_a[balls[2]] = ~(layer[balls[2]] % 2 == 0).all(axis=1)
    positions = sites @ turned().T + rng.normal(0, 0.12, sites.shape)
    return positions, is_a, balls


def test_known_l10_and_l12_grains_are_found(alloy):
    positions, is_a, balls = alloy
    oriented, frames = grains_of(fcc_frames(positions, len(positions), 3.3))
    found = chemical_order(frames, is_a)
    grain = ordered_grains(frames, found, oriented, 0.5, 30)
    assert grain.max() == 2
    axes = []
    for ball, phase in zip(balls, ("L1_0", "L1_0", "L1_2 A3B"), strict=True):
        number = np.bincount(grain[ball] + 1).argmax() - 1
        members = grain == number
        shared = np.count_nonzero(members & ball)
        assert shared > 0.6 * ball.sum()  # its outermost atoms have neighbours outside
        assert shared > 0.88 * members.sum()
        assert {PHASES[VARIANT_PHASE[v]] for v in np.unique(found.variant[members])} == {phase}
        axes.append(VARIANT_AXIS[found.variant[members][0]])
    assert axes[0] != axes[1]
    assert axes[2] == 0


def test_a_perfect_l10_crystal_has_order_one_and_an_antisite_is_found():
    sites = fcc(3.85, 12.0)
    is_a = np.rint(2 * sites[:, 2] / 3.85).astype(int) % 2 == 0
    centre = int(np.argmin(np.linalg.norm(sites, axis=1)))
    _, frames = grains_of(fcc_frames(sites, len(sites), 3.3))
    inside = (np.abs(sites) < 6).all(axis=1)
    perfect = chemical_order(frames, is_a)
    np.testing.assert_allclose(perfect.order[inside], 1.0, atol=0.03)
    is_a[centre] = ~is_a[centre]
    found = chemical_order(frames, is_a)
    assert np.flatnonzero(found.antisite & inside).tolist() == [centre]


def test_an_antiphase_boundary_divides_a_grain():
    sites = fcc(3.85, 18.0)
    layer = np.rint(2 * sites[:, 2] / 3.85).astype(int)
    is_a = (layer + (sites[:, 0] > 0.5)) % 2 == 0
    oriented, frames = grains_of(fcc_frames(sites, len(sites), 3.3))
    grain = ordered_grains(frames, chemical_order(frames, is_a), oriented, 0.5, 30)
    assert grain.max() == 1
    for side in (sites[:, 0] < -4, sites[:, 0] > 4):
        assert len(np.unique(grain[side & (grain >= 0)])) == 1
