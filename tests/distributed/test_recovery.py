"""A killed worker costs time, never correctness."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from stemtomo.distributed import Checkpoint, Parts, executor
from stemtomo.distributed.threads import ThreadExecutor
from tests.distributed import toy

STEPS = 12


def solve_with_kills(client: Any, directory: Path, kill_before: set[int]) -> tuple[np.ndarray, float, list[float]]:
    workers = executor(client)
    specs = toy.bands(4)
    windows = [window for _, window in specs]
    data = Parts.create(workers, toy.build_data, specs)
    image = Parts.create(workers, toy.build_image, specs, beside=data)
    scale, losses = 1.0, []
    for iteration in range(STEPS):
        if iteration in kill_before:
            image.gather()
            pids = client.run(os.getpid)
            os.kill(pids[min(pids)], signal.SIGKILL)
        image, scale, loss = toy.step(image, data, scale, windows)
        losses.append(loss)
        if iteration % 4 == 3:
            saved = image.save(Checkpoint(directory), iteration + 1, {"scale": scale, "losses": losses})
            image, scale, losses = saved.parts, saved.shared["scale"], saved.shared["losses"]
    return toy.dense(image.gather(), windows), scale, losses


def test_killed_workers_change_no_bit_of_the_result(client: Any, tmp_path: Path) -> None:
    expected = toy.solve(ThreadExecutor(2), 4, STEPS)
    # Once in the first steps, which have no checkpoint, and once between two checkpoints.
    result = solve_with_kills(client, tmp_path, kill_before={2, 9})
    assert np.array_equal(result[0], expected[0], equal_nan=True)
    assert result[1:] == expected[1:]


def test_restart_from_a_checkpoint_gives_the_uninterrupted_result(tmp_path: Path) -> None:
    expected = toy.solve(ThreadExecutor(2), 3, STEPS)
    specs = toy.bands(3)
    windows = [window for _, window in specs]
    for last in (5, STEPS):  # the first process stops after step 5, the second finds its checkpoint
        workers = ThreadExecutor(2)
        data = Parts.create(workers, toy.build_data, specs)
        saved = Parts.load(workers, Checkpoint(tmp_path))
        if saved is None:
            first, image, (scale, losses) = 0, Parts.create(workers, toy.build_image, specs), (1.0, [])
        else:
            first, image, (scale, losses) = saved
        for _ in range(first, last):
            image, scale, loss = toy.step(image, data, scale, windows)
            losses.append(loss)
        image.save(Checkpoint(tmp_path), last, (scale, losses))
    assert first == 5
    assert np.array_equal(toy.dense(image.gather(), windows), expected[0], equal_nan=True)
    assert (scale, losses) == expected[1:]


def test_tasks_go_on_when_all_workers_were_lost(client: Any) -> None:
    workers = executor(client)
    parts = Parts.create(workers, toy.build_image, toy.bands(2))
    expected = parts.map(np.copy).gather()
    for pid in client.run(os.getpid).values():
        os.kill(pid, signal.SIGKILL)
    for image, before in zip(parts.map(np.copy).gather(), expected, strict=True):
        assert np.array_equal(image, before, equal_nan=True)
