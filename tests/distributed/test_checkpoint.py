from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stemtomo.distributed import Checkpoint, Executor, Parts
from stemtomo.distributed import states as states_module
from stemtomo.distributed.checkpoint import read_state, write_state
from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.errors import StoreError


def state_of(spec: int) -> dict[str, Any]:
    return {"object": np.full((2, 3), spec, np.complex64), "moments": (np.float64(spec), None)}


def advanced(state: dict[str, Any]) -> dict[str, Any]:
    return {"object": state["object"] + 1, "moments": (state["moments"][0] + 1, None)}


def saved_parts(directory: Path, step: int, start: int = 0) -> Parts:
    parts = Parts.create(ThreadExecutor(2), state_of, [start, start + 1])
    return parts.save(Checkpoint(directory), step, shared={"loss": [1.0] * step}).parts


def test_state_comes_back_with_types_dtypes_and_bits(tmp_path: Path) -> None:
    state = {
        "object": (np.arange(6).reshape(2, 3) * (1 + 0.1j)).astype(np.complex64),
        "valid": np.array([[True, False]]),
        "empty": np.zeros((0, 4), np.float32),
        "numbers": [1, 2.5, True, None, "defocus", 1 / 3, 2 + 1j, np.float32(0.1), np.int64(3)],
        3: (np.float64(1e-300), ()),
    }
    path = tmp_path / "state.npz"
    assert write_state(path, state) == path.stat().st_size
    back = read_state(path)
    assert list(back) == list(state)
    for key in ("object", "valid", "empty"):
        assert back[key].dtype == state[key].dtype
        assert np.array_equal(back[key], state[key])
    assert back["numbers"] == state["numbers"]
    assert [type(item) for item in back["numbers"]] == [type(item) for item in state["numbers"]]
    assert back[3] == state[3]
    assert [item.name for item in tmp_path.iterdir()] == ["state.npz"]


@pytest.mark.parametrize("state", [{"a": object()}, np.array([None]), {(1, 2): 3}, {"a": {1, 2}}])
def test_state_that_would_need_pickle_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(TypeError):
        write_state(tmp_path / "state.npz", state)
    assert list(tmp_path.iterdir()) == []


def test_save_and_load_continue_where_they_stopped(workers: Executor, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run")
    assert Parts.load(workers, checkpoint) is None
    parts = Parts.create(workers, state_of, [10, 20, 30]).map(advanced)
    probe = workers.submit(np.ones, 4)
    saved = parts.save(checkpoint, 7, shared={"loss": [3.0, 2.0], "probe": probe, "note": "ok"})
    found = Parts.load(workers, Checkpoint(tmp_path / "run"))
    assert found is not None
    for record in (saved, found):
        assert record.step == 7
        assert record.shared["loss"] == [3.0, 2.0]
        assert np.array_equal(record.shared["probe"], np.ones(4))
        states = record.parts.map(advanced).gather()
        assert [state["moments"] for state in states] == [(12.0, None), (22.0, None), (32.0, None)]
        assert states[2]["object"].dtype == np.complex64


def test_older_checkpoints_are_removed_and_all_when_cleared(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved_parts(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    Checkpoint(tmp_path).clear()
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_other_settings_does_not_count(tmp_path: Path) -> None:
    parts = Parts.create(ThreadExecutor(1), state_of, [1])
    parts.save(Checkpoint(tmp_path, fingerprint="slices=1"), 5)
    assert Checkpoint(tmp_path, fingerprint="slices=2").latest() is None
    mark = Checkpoint(tmp_path, fingerprint="slices=1").latest()
    assert mark is not None
    assert mark.step == 5
    Parts.create(ThreadExecutor(1), state_of, [1]).save(Checkpoint(tmp_path, fingerprint="slices=2"), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("broken", ["part-00001.npz", "mark.json", "shared.npz"])
def test_kill_before_any_rename_resumes_from_the_step_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    saved_parts(tmp_path, 4)
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target).name == broken and "step-00000008" in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    # A kill leaves everything as it is; nothing may depend on the cleaning up that an exception allows.
    monkeypatch.setattr(Checkpoint, "discard", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        saved_parts(tmp_path, 8, start=5)
    monkeypatch.undo()
    found = Parts.load(ThreadExecutor(1), Checkpoint(tmp_path))
    assert found is not None
    assert found.step == 4
    assert len(found.shared["loss"]) == 4
    assert [state["moments"][0] for state in found.parts.gather()] == [0, 1]
    saved_parts(tmp_path, 9)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]


@pytest.mark.parametrize("damage", ["truncate part", "remove part", "truncate shared", "garble mark"])
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    keeping = Checkpoint(tmp_path, keep=2)
    for step in (4, 8):
        Parts.create(ThreadExecutor(1), state_of, [step]).save(keeping, step)
    last = tmp_path / "step-00000008"
    if damage == "remove part":
        (last / "part-00000.npz").unlink()
    elif damage == "garble mark":
        (last / "mark.json").write_text('{"format": 1, "st')
    else:
        os.truncate(last / ("shared.npz" if damage == "truncate shared" else "part-00000.npz"), 100)
    mark = Checkpoint(tmp_path).latest()
    assert mark is not None
    assert mark.step == 4


def test_flipped_bit_is_reported_with_the_file(tmp_path: Path) -> None:
    saved_parts(tmp_path, 1)
    path = tmp_path / "step-00000001" / "part-00001.npz"
    content = bytearray(path.read_bytes())
    content[content.index(np.full(6, 1, np.complex64).tobytes())] ^= 1
    path.write_bytes(content)
    found = Parts.load(ThreadExecutor(1), Checkpoint(tmp_path))
    assert found is not None
    with pytest.raises(StoreError, match="part-00001"):
        found.parts.gather()


def test_a_flipped_bit_anywhere_is_named_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "part.npz"
    write_state(path, {"object": np.arange(8.0), "loss": [1.0, "x", None]})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            state = read_state(path)
        except StoreError as error:
            assert "part.npz cannot be read" in str(error)  # noqa: PT017
        else:
            np.testing.assert_array_equal(state["object"], np.arange(8.0))
            assert state["loss"] == [1.0, "x", None]


@pytest.mark.parametrize("full_at", ["part", "mark"])
def test_full_disk_leaves_the_previous_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    saved_parts(tmp_path, 4)

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if full_at == "part":
        monkeypatch.setattr(states_module.np, "savez", lambda *_, **__: no_room())
    else:
        monkeypatch.setattr(json, "dumps", lambda *_, **__: no_room(), raising=True)
    with pytest.raises(StoreError, match=r"No space left on device.*before it is untouched") as caught:
        saved_parts(tmp_path, 8)
    monkeypatch.undo()
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    mark = Checkpoint(tmp_path).latest()
    assert mark is not None
    assert mark.step == 4


def test_failure_of_the_computation_is_not_blamed_on_the_checkpoint(tmp_path: Path) -> None:
    def missing(_: int) -> None:
        raise FileNotFoundError("frames/017.npy")

    with pytest.raises(FileNotFoundError, match="frames/017"):
        Parts.create(ThreadExecutor(1), missing, [1]).save(Checkpoint(tmp_path), 1)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_directory_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Parts.create(ThreadExecutor(1), state_of, [1]).save(Checkpoint(tmp_path / "file"), 1)
