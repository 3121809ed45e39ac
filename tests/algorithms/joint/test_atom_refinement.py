"""Atoms refined against a loss that is told to them: the search alone, without patterns."""

import numpy as np
import pytest

from stemtomo.algorithms.joint.atom_refinement import AtomRules, Evaluation, refined_atoms
from stemtomo.algorithms.joint.atoms import AtomGradient, Atoms


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 2, 2, 0, 2]], ids=str)
@pytest.mark.parametrize("per_atom_widths", [False, True])
def test_the_minimum_of_a_quadratic_loss_is_found_also_where_a_class_has_no_atoms(labels, per_atom_widths):
    rng = np.random.default_rng(0)
    start = Atoms(rng.normal(size=(5, 3)), np.ones(5), np.full(5, 0.5))
    target = start.positions + rng.normal(0, 0.05, (5, 3))

    def loss_of(model):
        away = model.positions - target
        slope = AtomGradient(2 * away, 2 * (model.intensity - 1.1), np.zeros(5))
        loss = float((away**2).sum() + ((model.intensity - 1.1) ** 2).sum())
        return Evaluation(loss, slope, np.repeat(np.eye(3)[None], 5, axis=0))

    rules = AtomRules(iterations=30, per_atom_widths=per_atom_widths)
    found = refined_atoms(loss_of, start, np.array(labels), loss_of(start), rules)
    np.testing.assert_allclose(found.positions, target, atol=1e-6)
    np.testing.assert_allclose(found.intensity, 1.1, atol=1e-6)
    np.testing.assert_allclose(found.width_angstrom, 0.5, atol=1e-9)
