"""Other programs beside this one: what they are told and what they answer. None of them need be installed."""

import json

import numpy as np
import pytest

from tests.benchmarks import peer_programs, peers
from tests.data import FOLDER

needs_data = pytest.mark.skipif(not (FOLDER / "sto_zone").is_dir(), reason="reference data absent")


def test_the_answer_is_the_last_line_of_a_chatty_program():
    printed = 'initialising {model}\n"done"\n{"version": "1.0.0", "cpu_s": 3.25, "peak_mb": 750}\n\n'
    assert peers.answer_of(printed) == ("1.0.0", 3.25, 750)


@pytest.mark.parametrize("printed", ["", "Killed", "[1, 2]", '{"version": "1.0.0", "cpu_s": 3.25}', "null"])
def test_an_answer_that_is_none_says_so(printed):
    with pytest.raises(ValueError, match="last line"):
        peers.answer_of(printed)


def test_a_run_is_timed_per_epoch_and_its_phase_summed_over_the_slices(tmp_path, monkeypatch):
    slices = np.exp(1j * np.array([0.1, 0.2, -0.4]))[:, None, None] * np.ones((3, 4, 4))
    ran = []
    monkeypatch.setitem(peer_programs.PROGRAMS, "three", lambda told: (str(told["name"]), ran.append, lambda: slices))
    np.savez(tmp_path / "told.npz", name="0.1")
    said = peer_programs.main("three", str(tmp_path / "told.npz"), str(tmp_path / "phase.npy"), "5")
    assert ran == [5]
    answer = peers.answer_of(json.dumps(said))
    assert answer.version == "0.1"
    assert 0 <= answer.cpu_s < 1
    assert answer.peak_mb > 10
    np.testing.assert_allclose(np.load(tmp_path / "phase.npy"), -0.1)


@needs_data
def test_absent_programs_are_left_out_with_a_line_each(monkeypatch):
    for variable, _ in peers.WHERE.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    rows = peers.peer_rows()
    assert [row.unit for row in rows] == [""] * len(peers.WHERE)
    for row, (variable, _) in zip(rows, peers.WHERE.values(), strict=True):
        assert "absent" in row.work
        assert variable in row.work


@needs_data
def test_the_programs_are_told_one_and_the_same_scan():
    told = peers.conditions()
    rows, columns = told["scan_shape_yx"]
    positions = (told["positions_px_yx"] * told["pixel"]).reshape(rows, columns, 2)
    np.testing.assert_allclose(np.diff(positions[..., 0], axis=0), told["step_yx"][0], atol=1e-4)
    np.testing.assert_allclose(np.diff(positions[..., 1], axis=1), told["step_yx"][1], atol=1e-4)
    assert len(told["patterns"]) == rows * columns
    electrons = told["patterns"].sum() / len(told["patterns"])
    assert (np.abs(told["probe"]) ** 2).sum() == pytest.approx(electrons, rel=1e-3)
