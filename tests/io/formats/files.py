"""Small files of detectors, written pixel by pixel from what the formats say, and not by the code that reads them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np


def counts(shape: tuple[int, ...], largest: int, seed: int = 0) -> np.ndarray:
    """Whole numbers up to ``largest``, which is among them."""
    frames = np.random.default_rng(seed).integers(0, largest, shape, endpoint=True)
    frames.flat[0] = largest
    return frames


def raw_row(row: np.ndarray, bits: int) -> bytes:
    """One row of a chip as it leaves it: 64-bit big-endian words, the first pixel in the lowest bits."""
    width = {1: 1, 6: 8, 12: 16}[bits]
    per_word = 64 // width
    words = []
    for start in range(0, len(row), per_word):
        word = sum(int(value) << (width * place) for place, value in enumerate(row[start : start + per_word]))
        words.append(word.to_bytes(8, "big"))
    return b"".join(words)


def raw_frame(frame: np.ndarray, bits: int, quad: bool) -> bytes:
    """A raw frame: rows of one chip, or for a quad of chips 4, 3, 2, 1 side by side, 3 and 4 upside down."""
    if bits == 24:
        return raw_frame(frame >> 12, 12, quad) + raw_frame(frame & 0xFFF, 12, quad)
    if not quad:
        return b"".join(raw_row(row, bits) for row in frame)
    half_y, half_x = frame.shape[0] // 2, frame.shape[1] // 2
    upper, lower = frame[:half_y], frame[half_y:][::-1, ::-1]  # turned: its left half is now chip 4
    rows = []
    for above, below in zip(upper, lower, strict=True):
        chips = (below[:half_x], below[half_x:], above[half_x:], above[:half_x])
        rows += [raw_row(chip, bits) for chip in chips]
    return b"".join(rows)


def write_mib(
    path: Path,
    frames: np.ndarray,
    kind: str,
    depth: int,
    *,
    quad: bool = False,
    first: int = 1,
    lost: tuple[int, ...] = (),
) -> None:
    """Write ``frames`` (frame, ky, kx) as cooked (U08, U16, U32) or raw (R64); numbers in ``lost`` are left out."""
    height, width = frames.shape[1:]
    if kind == "R64":
        height, width = (height // 2, width * 2) if quad else (height, width * (2 if depth == 24 else 1))
    chips, layout = (4, "2x2") if quad else (1, "1x1")
    header_bytes = 768 if quad else 384
    data = b""
    for index, frame in enumerate(frames):
        if first + index in lost:
            continue
        text = (
            f"MQ1,{first + index:06d},{header_bytes:05d},{chips:02d},{width:04d},{height:04d},{kind},   {layout},01,"
            f"2026-01-02 03:04:05.678901,0.001000,0,0,0,2.0E+0,3RX,175,010,MQ1A,2026-01-02T03:04:05Z,1000ns,{depth},"
        )
        pixels = raw_frame(frame, depth, quad) if kind == "R64" else frame.astype(f">u{int(kind[1:]) // 8}").tobytes()
        data += text.encode().ljust(header_bytes, b"\0") + pixels
    path.write_bytes(data)


def write_empad(path: Path, frames: np.ndarray, xml: str) -> None:
    """Write ``frames`` (frame, 128, 128) as ``path``.raw with two rows of metadata each, and ``xml`` beside it."""
    rows = np.full((len(frames), 130, 128), np.nan, "<f4")
    rows[:, :128] = frames
    path.with_suffix(".raw").write_bytes(rows.tobytes())
    path.write_text(f'<root name="a">{xml}<raw_file filename="{path.stem}.raw"/></root>')


def write_arina(path: Path, frames: np.ndarray, per_file: int, promised: int | None = None) -> list[Path]:
    """Write frames (frame, ky, kx) as the old layout: a master that links data files, compressed by bitshuffle."""
    import hdf5plugin

    files = []
    with h5py.File(path, "w") as master:
        for number, start in enumerate(range(0, len(frames), per_file), 1):
            file = path.with_name(path.name.replace("master", f"data_{number:06d}"))
            part = frames[start : start + per_file]
            with h5py.File(file, "w") as data:
                dataset = data.create_dataset(
                    "entry/data/data", data=part, chunks=(1, *part.shape[1:]), **hdf5plugin.Bitshuffle(cname="lz4")
                )
                dataset.attrs["image_nr_low"], dataset.attrs["image_nr_high"] = start + 1, start + len(part)
            master[f"entry/data/data_{number:06d}"] = h5py.ExternalLink(file.name, "/entry/data/data")
            files.append(file)
        specific = master.create_group("entry/instrument/detector/detectorSpecific")
        specific["nimages"], specific["ntrigger"] = 1, promised or len(frames)
    return files


def write_thresholds(path: Path, frames: np.ndarray, per_file: int, names: tuple[str, ...]) -> list[Path]:
    """Write frames (frame, threshold, ky, kx) as the layout of 2024: one virtual dataset over the data files."""
    layout = h5py.VirtualLayout(frames.shape, frames.dtype)
    files = []
    for number, start in enumerate(range(0, len(frames), per_file), 1):
        file = path.with_name(path.name.replace("master", f"data_{number:06d}"))
        part = frames[start : start + per_file]
        with h5py.File(file, "w") as data:
            data["entry/data/data"] = part
        layout[start : start + len(part)] = h5py.VirtualSource(file.name, "entry/data/data", part.shape)
        files.append(file)
    with h5py.File(path, "w") as master:
        master.create_virtual_dataset("entry/data/data", layout)
        master["entry/data/channel"] = list(names)
    return files


def write_counted(path: Path, frames: np.ndarray, scan: tuple[int, int], version: int) -> None:
    """Write ``frames`` (position, ky, kx) of electrons as stempy does in ``version``."""
    lists: list[np.ndarray] = []
    positions: list[int] = []
    largest = int(frames.max())
    for position, frame in enumerate(frames):
        flat = frame.ravel()
        if version == 1:  # a pixel as often as it was hit
            lists.append(np.repeat(np.arange(flat.size), flat))
            positions.append(position)
            continue
        for electron in range(largest):  # every list has a pixel once
            hit = np.flatnonzero(flat > electron)
            if version == 3 or len(hit) or electron == 0:
                lists.append(hit)
                positions.append(position)
    if version == 2:  # lists of further hits stand after all first ones
        seen: set[int] = set()
        repeated = [position in seen or bool(seen.add(position)) for position in positions]
        order = np.argsort(repeated, kind="stable")
        lists, positions = [lists[i] for i in order], [positions[i] for i in order]
    with h5py.File(path, "w") as file:
        if version > 1:
            file.attrs["version"] = version
        dataset = file.create_dataset("electron_events/frames", (len(lists),), h5py.vlen_dtype(np.uint32))
        for index, pixels in enumerate(lists):
            dataset[index] = pixels.astype(np.uint32)
        dataset.attrs["Nx"], dataset.attrs["Ny"] = frames.shape[1:]
        stored = positions if version < 3 else np.arange(len(frames))
        scans = file.create_dataset("electron_events/scan_positions", data=np.asarray(stored))
        scans.attrs["Nx"], scans.attrs["Ny"] = scan[1], scan[0]
