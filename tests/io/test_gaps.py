"""Frames that were lost: the others keep their places, the mask says which are not there, and nothing is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stemtomo.errors import AcquisitionError
from stemtomo.io.gaps import MaskedFrames, missing_runs, without_gaps
from stemtomo.io.sources import check_complete, open_frames
from tests.io.formats import files

SCAN = (4, 4)


def check(source: Any, frames: np.ndarray, lost: list[int]) -> None:
    """Compare with ``frames`` (position, ky, kx), of which those of ``lost`` never came."""
    with pytest.raises(AcquisitionError, match=r"ingest.missing = 'mask'"):
        check_complete(source)
    masked = without_gaps(source)
    check_complete(masked)
    expected = frames.copy()
    expected[lost] = 0
    expected = expected.reshape(*SCAN, *frames.shape[1:])
    np.testing.assert_array_equal(masked.read(0, 0, 4), expected)
    np.testing.assert_array_equal(masked.read(0, 1, 3, 2, 4), expected[1:3, 2:4])
    assert [p for start, stop in missing_runs(masked, 0) for p in range(start, stop)] == lost
    assert masked.identity() == source.identity()


def test_lost_sequence_numbers_of_merlin(tmp_path: Path) -> None:
    frames = files.counts((16, 4, 256), 63).astype("u1")
    files.write_mib(tmp_path / "a.mib", frames, "U08", 6, lost=(3, 8, 9, 10))
    check(open_frames(tmp_path / "a.mib", scan_shape=SCAN), frames, [2, 7, 8, 9])


def test_frames_lost_between_and_behind_files_of_merlin(tmp_path: Path) -> None:
    frames = files.counts((16, 4, 256), 63).astype("u1")
    files.write_mib(tmp_path / "a_1.mib", frames[:6], "U08", 6)
    files.write_mib(tmp_path / "a_2.mib", frames[8:13], "U08", 6, first=9)
    (tmp_path / "a.hdr").write_text("HDR,\n")
    check(open_frames(tmp_path / "a.hdr", scan_shape=SCAN), frames, [6, 7, 13, 14, 15])


def test_lost_frames_count_with_flyback_and_skip(tmp_path: Path) -> None:
    recorded = files.counts((21, 4, 256), 63).astype("u1")  # one frame before the scan, lines of 4 and one of flyback
    files.write_mib(tmp_path / "a.mib", recorded, "U08", 6, lost=(4, 6, 12, 13))  # frames 3, 5, 11, 12
    frames = recorded[1:21].reshape(4, 5, 4, 256)[:, :4].reshape(16, 4, 256)
    source = open_frames(tmp_path / "a.mib", scan_shape=SCAN, skip=1, flyback=1)
    check(source, frames, [2, 8, 9])  # frame 5 was flyback


@pytest.mark.parametrize("part", [2, 3])
def test_a_data_file_of_dectris_that_is_not_there(part: int, tmp_path: Path) -> None:
    frames = files.counts((16, 6, 5), 99).astype("u4")
    files.write_arina(tmp_path / "s_master.h5", frames, 6)
    (tmp_path / f"s_data_00000{part}.h5").unlink()
    lost = list(range(6, 12)) if part == 2 else list(range(12, 16))
    check(open_frames(tmp_path / "s_master.h5", scan_shape=SCAN), frames, lost)


def test_positions_of_counted_events_without_a_list(tmp_path: Path) -> None:
    frames = files.counts((16, 7, 5), 3).astype("u2")
    files.write_counted(tmp_path / "a.h5", frames, SCAN, 1)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        events, positions = file["electron_events/frames"], file["electron_events/scan_positions"]
        positions[5] = 4
        events[5] = np.empty(0, "u4")
    check(open_frames(tmp_path / "a.h5"), frames, [5])


def test_a_raw_file_that_ends_inside_a_frame(tmp_path: Path) -> None:
    frames = files.counts((16, 6, 5), 99).astype("u2")
    (tmp_path / "a.raw").write_bytes(frames.tobytes()[: 13 * 60 + 7])
    check(
        open_frames(tmp_path / "a.raw", dtype="<u2", shape=(*SCAN, 6, 5), axes=("y", "x", "ky", "kx")),
        frames,
        [13, 14, 15],
    )


def test_a_mask_for_one_tilt_of_several_files(tmp_path: Path) -> None:
    frames = files.counts((2, 16, 4, 256), 63).astype("u1")
    files.write_mib(tmp_path / "0.mib", frames[0], "U08", 6)
    files.write_mib(tmp_path / "1.mib", frames[1], "U08", 6, lost=(16,))
    masked = without_gaps(open_frames([tmp_path / "0.mib", tmp_path / "1.mib"], scan_shape=SCAN))
    assert [missing_runs(masked, tilt) for tilt in range(2)] == [[], [(15, 16)]]
    np.testing.assert_array_equal(masked.read(0, 0, 4).reshape(frames[0].shape), frames[0])
    np.testing.assert_array_equal(masked.read(1, 3, 4, 0, 3)[0], frames[1, 12:15])


def test_whole_files_stay_as_they_are_and_too_much_or_nothing_is_refused(tmp_path: Path) -> None:
    frames = files.counts((16, 4, 256), 63).astype("u1")
    files.write_mib(tmp_path / "a.mib", frames, "U08", 6)
    whole = open_frames(tmp_path / "a.mib", scan_shape=SCAN)
    assert without_gaps(whole) is whole
    assert not isinstance(whole, MaskedFrames)
    with pytest.raises(AcquisitionError, match="longer than its 12 frames"):
        without_gaps(open_frames(tmp_path / "a.mib", scan_shape=(3, 4)))
    files.write_mib(tmp_path / "b.mib", frames, "U08", 6, lost=(3, 5))
    with pytest.raises(AcquisitionError, match="holds 4 frames beyond its scan"):
        without_gaps(open_frames(tmp_path / "b.mib", scan_shape=(3, 4)))
    files.write_mib(tmp_path / "c.mib", frames, "U08", 6, lost=(3,))  # 15 are there, but one is not of the scan
    with pytest.raises(AcquisitionError, match=r"holds 1 frames beyond its scan .* some in it are missing"):
        without_gaps(open_frames(tmp_path / "c.mib", scan_shape=(3, 5)))
    (tmp_path / "a.raw").write_bytes(b"123")
    nothing = open_frames(tmp_path / "a.raw", dtype="<u2", shape=(*SCAN, 6, 5), axes=("y", "x", "ky", "kx"))
    with pytest.raises(AcquisitionError, match="holds no whole frame"):
        without_gaps(nothing)
