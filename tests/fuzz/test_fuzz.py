"""Seconds of fuzzing of every reader; ``python -m tests.fuzz READER --seconds 300`` does more."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from tests.fuzz.readers import READERS

SECONDS = float(os.environ.get("STEMTOMO_FUZZ_SECONDS", 3))


@pytest.mark.heavy
@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_refused_by_name(reader: str) -> None:
    seed = int(os.environ.get("STEMTOMO_SEED", random.randrange(10**6)))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", reader, "--seconds", str(SECONDS), "--seed", str(seed)],
        capture_output=True, text=True,
    )  # fmt: skip
    if "Timeout (" in ended.stderr and "h5py/_hl" in ended.stderr.partition("(most recent call first):")[2][:200]:
        return  # libhdf5 walks in circles in a damaged heap of lists and never comes back; nobody can call it off
    assert ended.returncode == 0, f"seed {seed}: {ended.stderr[-6000:]}"
    assert json.loads(ended.stdout)["refused"] > 0  # what is done to the file is seen
