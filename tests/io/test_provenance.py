"""A fingerprint says whether the same work was done; times and costs do not change it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stemtomo.errors import ConfigurationError
from stemtomo.io.provenance import Provenance, file_identity


def test_same_work_has_the_same_fingerprint_whatever_it_cost() -> None:
    first = Provenance.start("align", {"a": 1, "path": Path("x"), "c": (1, 2)}, {"projections": "p", "tilt": None})
    second = Provenance.start("align", {"c": [1, 2], "path": "x", "a": np.int64(1)}, {"tilt": None, "projections": "p"})
    assert first.fingerprint == replace(second.finish(), versions={"numpy": "3"}).fingerprint
    assert len(first.fingerprint) == 64


@pytest.mark.parametrize(
    "other",
    [
        Provenance.start("score", {"a": 1}, {"atoms": "p"}),
        Provenance.start("align", {"a": 2}, {"atoms": "p"}),
        Provenance.start("align", {"a": 1}, {"atoms": "q"}),
        Provenance.start("align", {"a": 1}, {"atoms": None}),
        Provenance.start("align", {"a": 1}),
    ],
)
def test_other_work_has_another_fingerprint(other: Provenance) -> None:
    assert other.fingerprint != Provenance.start("align", {"a": 1}, {"atoms": "p"}).fingerprint


def test_the_record_is_json_and_says_versions_and_cost() -> None:
    attrs = json.loads(json.dumps(Provenance.start("align", {}).finish().to_attrs()))
    assert attrs["versions"]["numpy"] == np.__version__
    assert attrs["time_utc"].endswith("+00:00")
    assert 0 <= attrs["cpu_s"] < 5
    assert 0 <= attrs["wall_s"] < 5
    assert attrs["peak_rss_mb"] > 10


def test_a_record_finished_by_another_process_claims_no_processor_time() -> None:
    moved = replace(Provenance.start("align", {}), _process=("elsewhere", 1))
    assert moved.finish().cpu_s is None


def test_what_json_cannot_hold_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"align configuration\.mask is a set"):
        Provenance.start("align", {"mask": {1}})


def test_identity_of_a_file_changes_with_its_ends_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "frames.raw"
    path.write_bytes(bytes(300_000))
    os.utime(path, ns=(1, 1))
    first = file_identity(path)
    assert first["size_bytes"] == 300_000
    assert first == file_identity(path)
    with path.open("r+b") as file:
        file.seek(299_999)
        file.write(b"x")
    os.utime(path, ns=(1, 1))
    assert file_identity(path)["head_tail_sha256"] != first["head_tail_sha256"]
    os.utime(path, ns=(2, 2))
    assert file_identity(path)["mtime_ns"] != first["mtime_ns"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_peak_is_that_of_this_program_and_not_of_what_launched_it() -> None:
    held = bytearray(300_000_000)
    code = "from stemtomo.io.provenance import Provenance; print(Provenance.start('score', {}).finish().peak_rss_mb)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10 < float(child.stdout) < 280
    assert len(held) == 300_000_000
