"""4D Camera sector files: frames are put together from four receivers that are out of step and lose packets."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stemtomo.errors import AcquisitionError, FormatError
from stemtomo.io.gaps import missing_runs, without_gaps
from stemtomo.io.sources import FrameSource, check_complete, open_frames

SCAN = (3, 5)
RECORD = 16 + 2 * 144 * 576


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Frames (position, ky, kx); the pixels of a frame say its position, row and column."""
    ky, kx = np.indices((576, 576))
    return np.stack([(7 * ky + 3 * kx + 1000 * position) % 65536 for position in range(15)]).astype("<u2")


def record(frame: np.ndarray, position: int, sector: int, version: int, *, scan: int = 9, number: int = -1) -> bytes:
    """A header and a quarter of ``frame``, from the published layout, byte by byte."""
    y, x = divmod(position, SCAN[1])
    head = struct.pack("<IIHHHH", scan, position + 100 if number < 0 else number, SCAN[1], SCAN[0], x, y)
    edge = slice(144 * sector, 144 * sector + 144)
    return head + (frame[:, edge] if version == 4 else frame[edge, :]).tobytes()


def write(
    folder: Path,
    frames: np.ndarray,
    version: int = 5,
    lost: tuple[tuple[int, int], ...] = (),
    order: Callable[[int, list[int]], list[int]] = lambda sector, positions: positions,
    parts: int = 1,
) -> Path:
    """Write the files of four receivers, each in its own ``order``; (sector, position) in ``lost`` never come."""
    for sector in range(4):
        positions = [p for p in order(sector, list(range(len(frames)))) if (sector, p) not in lost]
        for part in range(parts):
            name = folder / f"data_scan0000000009_module{sector}_part{part}.data"
            mine = positions[part::parts]
            name.write_bytes(b"".join(record(frames[p], p, sector, version) for p in mine))
    return folder / "data_scan0000000009_module0_part0.data"


def shuffled(sector: int, positions: list[int]) -> list[int]:
    return [positions[i] for i in np.random.default_rng(sector).permutation(len(positions))]


def open_version(path: Path, version: int = 5, **options: object) -> FrameSource:
    return open_frames(path, format=f"sectors:{version}", **options)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("parts", [1, 3])
def test_frames_are_put_together_whatever_the_order(
    version: int, parts: int, frames: np.ndarray, tmp_path: Path
) -> None:
    path = write(tmp_path, frames, version, order=shuffled, parts=parts)
    (tmp_path / "data_scan0000000008_module0_part0.data").write_bytes(b"another scan")
    source = open_version(path, version)
    assert source.shape == (1, *SCAN, 576, 576)
    check_complete(source)
    assert source.ready() == 15
    np.testing.assert_array_equal(source.read(0, 0, 3).reshape(frames.shape), frames)
    np.testing.assert_array_equal(source.read(0, 1, 2, 3, 5)[0], frames[8:10])


def test_flyback_is_left_out_and_another_scan_refused(frames: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path, frames)
    source = open_version(path, scan_shape=(3, 4), flyback=1)
    np.testing.assert_array_equal(source.read(0, 2, 3)[0], frames[10:14])
    with pytest.raises(AcquisitionError, match=r"says its position in a scan of \(3, 5\).*\(5, 3\) with flyback 0"):
        open_version(path, scan_shape=(5, 3))


def test_the_version_and_the_sector_are_never_guessed(frames: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path, frames[:1])
    with pytest.raises(FormatError, match="do not say their version; give format = 'sectors:4'"):
        open_frames(path)
    (tmp_path / "frames.data").write_bytes(b"")
    with pytest.raises(FormatError, match="says its module, 0 to 3"):
        open_version(tmp_path / "frames.data")


def test_lost_sectors_are_named_and_never_zeros(frames: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path, frames, lost=((2, 6), (0, 7), (2, 7), (1, 14)))
    source = open_version(path)
    told = r"3 of 15 frames lack sectors: frames 6 to 7 \(from y 1, x 1; sectors 0, 2\), frame 14 \(from y 2, x 4; sect"
    with pytest.raises(AcquisitionError, match=told):
        check_complete(source)
    with pytest.raises(AcquisitionError, match=r"frame 6 .* lacks a sector"):
        source.read(0, 1, 2)
    masked = without_gaps(source)
    assert missing_runs(masked, 0) == [(6, 8), (14, 15)]
    expected = frames.copy()
    expected[[6, 7, 14]] = 0
    np.testing.assert_array_equal(masked.read(0, 0, 3).reshape(frames.shape), expected)


def test_sectors_of_different_frames_are_not_mixed(frames: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path, frames[:5])
    file = tmp_path / "data_scan0000000009_module3_part0.data"
    data = bytearray(file.read_bytes())
    data[2 * RECORD + 4 : 2 * RECORD + 8] = struct.pack("<I", 777)
    file.write_bytes(data)
    with pytest.raises(AcquisitionError, match=r"frame 2 \(from y 0, x 2; sectors of different frames\)"):
        check_complete(open_version(path, scan_shape=SCAN))


def test_ready_waits_for_the_slowest_receiver_and_for_late_packets(frames: np.ndarray, tmp_path: Path) -> None:
    order = [0, 1, 3, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    path = write(tmp_path, frames, order=lambda sector, positions: order)
    contents = {file: file.read_bytes() for file in tmp_path.iterdir()}
    slow = tmp_path / "data_scan0000000009_module1_part0.data"
    source = open_version(path)
    seen = []
    for records in (0, 1, 2.5, 3, 4, 9.1, 15):
        for file, data in contents.items():
            file.write_bytes(data[: int(RECORD * (records if file == slow else min(15, records + 3)))])
        seen.append(source.ready())
    assert seen == [0, 1, 2, 2, 4, 9, 15]  # of 3 records the third is position 3: position 2 is still to come
    slow.unlink()
    assert source.ready() == 0


def test_a_sector_that_is_far_behind_counts_as_lost_and_the_scan_goes_on(tmp_path: Path) -> None:
    header_only = b"\0" * (RECORD - 16)
    for sector in range(4):
        with (tmp_path / f"a_module{sector}.data").open("wb") as file:
            for position in range(3000):
                if (sector, position) != (1, 500):
                    file.seek(RECORD, 1) if position else None
                    x, y = position % 100, position // 100
                    at = file.tell()
                    file.write(struct.pack("<IIHHHH", 1, position, 100, 40, x, y))
                    file.seek(at)
            file.seek(RECORD - 16 + 16 - 1, 1)
            file.write(header_only[:1])
    source = open_version(tmp_path / "a_module0.data")
    assert source.ready() == 3000
    assert without_gaps(source).missing == ((500, 501), (3000, 4000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scan": 8}, r"record 1 says .* expected scan 9 of 5 x 3"),
        ({"number": 5000}, r"has several frames at y 0, x 0; frames of one position are not added"),
    ],
)
def test_records_that_do_not_belong_are_refused(
    change: dict[str, int], message: str, frames: np.ndarray, tmp_path: Path
) -> None:
    path = write(tmp_path, frames[:1])
    with path.open("ab") as file:
        file.write(record(frames[0], 0, 0, 5, **change))
    with pytest.raises((FormatError, AcquisitionError), match=message):
        check_complete(open_version(path))


def test_a_repeated_packet_is_taken_once(frames: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path, frames)
    with path.open("ab") as file:
        file.write(record(frames[3] + 1, 3, 0, 5))
    source = open_version(path)
    check_complete(source)
    np.testing.assert_array_equal(source.read(0, 0, 1, 3, 4)[0, 0], frames[3])


def test_a_record_that_is_cut_off_is_named(frames: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path, frames)
    with path.open("r+b") as file:
        file.truncate(14 * RECORD + 1000)
    with pytest.raises(AcquisitionError, match=f"ends inside record 14 .*1000 of {RECORD} bytes"):
        check_complete(open_version(path))
