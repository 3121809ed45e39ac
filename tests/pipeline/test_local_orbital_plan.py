"""What local-orbital tomography is planned to need: a million atoms on one core, linear in atoms."""

import pytest

from stemtomo.pipeline.local_orbital_plan import epoch_seconds, plan_for, size_of_particle
from stemtomo.pipeline.settings.local_orbital import LocalOrbitalSettings

SETTINGS = LocalOrbitalSettings()


def size(atoms):
    return size_of_particle(atoms, pixel_angstrom=0.34, images=72, sections=3)


def test_a_particle_has_the_size_of_its_atoms():
    # Mao et al. (2024), table S1: 25,000 and 1,000,000 silicon atoms, 9 and 32 nm.
    assert size(25_000).diameter_angstrom == pytest.approx(90, rel=0.1)
    assert size(1_000_000).diameter_angstrom == pytest.approx(320, rel=0.1)


def test_an_epoch_is_linear_in_atoms():
    per_atom = [epoch_seconds(size(count), SETTINGS) / count for count in (25_000, 100_000, 1_000_000)]
    assert max(per_atom) < 1.25 * min(per_atom)


def test_a_million_atoms_fit_into_a_few_gigabytes():
    row = plan_for(size(1_000_000), SETTINGS)
    assert row.bytes_per_worker() < 4e9
    assert 5 * 8 * 1e6 < row.bytes_written < 1e9
    assert row.seconds is not None
    assert 3600 < row.seconds < 12 * 3600


def test_blocks_of_atoms_cap_what_a_sum_holds():
    many = SETTINGS.model_copy(update={"images_per_part": 2})
    whole = many.model_copy(update={"atoms_per_block": 1_000_000})
    capped, uncapped = (plan_for(size(1_000_000), s).bytes_per_task for s in (many, whole))
    # Five arrays of five numbers per atom, four to add and their sum, instead of a part's own.
    assert uncapped - capped == pytest.approx(4 * 5 * 8 * 1_000_000)
    assert plan_for(size(1_000_000), many).resident_bytes > 36 * 5 * 8 * 1_000_000


def test_one_slice_and_fixed_probes_cost_less():
    flat = SETTINGS.model_copy(update={"model": "linear"})
    rigid = SETTINGS.model_copy(update={"model": "rigid"})
    assert plan_for(size(25_000), flat).bytes_per_task < 0.2 * plan_for(size(25_000), SETTINGS).bytes_per_task
    assert plan_for(size(25_000), rigid).seconds < plan_for(size(25_000), SETTINGS).seconds


def test_what_comes_between_searches_counts():
    """Foci that are told are not looked for; rounds ask the residual for atoms."""
    told = SETTINGS.model_copy(update={"start_defocus_angstrom": (10.0, 0.0, -10.0)})
    looked, known = (plan_for(size(25_000), s).seconds for s in (SETTINGS, told))
    assert 1.02 < looked / known < 1.2
    once = told.model_copy(update={"rounds": 0})
    iterations = SETTINGS.atom_iterations * SETTINGS.rounds * epoch_seconds(size(25_000), told)
    assert known - plan_for(size(25_000), once).seconds > 1.1 * iterations
