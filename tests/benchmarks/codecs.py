"""How frames are packed: size, speed and the time to one pattern by codec, level, chunk; and what ingest adds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.blosc import Blosc

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.geometry import Detector, Optics, Scan, TiltSeries
from stemtomo.io.electrons import decode_counts, encode_counts
from stemtomo.io.shards import ShardCodec, build
from stemtomo.io.sources import open_frames
from stemtomo.io.store import Store
from stemtomo.pipeline.config import IngestSettings
from stemtomo.pipeline.ingest import ingest
from tests.benchmarks.measure import Row, cpu_seconds, rate_row

PIXELS = 256
MEANS = {"0.05 e/px": 0.05, "0.5 e/px": 0.5, "dense, 200 counts": 200.0}
SHUFFLES = {"bit": Blosc.BITSHUFFLE, "byte": Blosc.SHUFFLE}
CODECS: dict[str, tuple[str, int, str]] = {
    f"{name}-{level} {shuffle}shuffle": (name, level, shuffle)
    for name, level, shuffle in (
        ("lz4", 1, "bit"),
        ("lz4", 5, "bit"),
        ("lz4", 5, "byte"),
        ("zstd", 1, "bit"),
        ("zstd", 3, "bit"),
        ("zstd", 1, "byte"),
    )
}


def counted(mean: float, positions: int = 16) -> np.ndarray:
    """Poisson counts (y, x, ky, kx), uint16, of a disc, six more and a halo; positions differ by 30 %."""
    ky, kx = np.indices((PIXELS, PIXELS)) - PIXELS // 2
    radius = np.hypot(ky, kx)
    pattern = np.where(radius < 40, 1.0, 0.02) + 0.15 * np.exp(-((radius / 70) ** 2))
    for angle in np.arange(6) * np.pi / 3:
        pattern += 0.15 * (np.hypot(ky - 75 * np.cos(angle), kx - 75 * np.sin(angle)) < 40)
    rng = np.random.default_rng(0)
    pattern *= mean / pattern.mean()
    return np.stack(
        [rng.poisson(pattern * rng.uniform(0.7, 1.3), (positions, PIXELS, PIXELS)) for _ in range(positions)]
    ).astype("u2")


def coder(name: str) -> tuple[Callable[[np.ndarray], bytes], Callable[[bytes, np.ndarray], Any]]:
    """Return how chunks are encoded, and decoded into an array."""
    if name == "by density":
        return encode_counts, decode_counts
    codec, level, shuffle = CODECS[name]
    blosc = Blosc(codec, level, SHUFFLES[shuffle])
    return blosc.encode, lambda data, out: blosc.decode(data, out)


def codec_rows(work: str, frames: np.ndarray, name: str, edge: int) -> list[Row]:
    """Measure one codec on chunks of ``edge`` x ``edge`` positions."""
    encode, decode = coder(name)
    starts = range(0, frames.shape[0], edge)
    chunks = [np.ascontiguousarray(frames[y : y + edge, x : x + edge]) for y in starts for x in starts]
    encoded = [encode(chunk) for chunk in chunks]
    out = np.empty_like(chunks[0])
    size = frames.nbytes / 1e9
    told = f"{work}, {name}, chunks {edge} x {edge}"
    one = cpu_seconds(lambda: decode(encoded[0], out), 5)
    return [
        Row("codec ratio", told, frames.nbytes / sum(map(len, encoded)), "bytes in per byte stored"),
        Row("codec encode", told, size / cpu_seconds(lambda: [encode(chunk) for chunk in chunks]), "GB/CPU s"),
        Row("codec decode", told, size / cpu_seconds(lambda: [decode(data, out) for data in encoded]), "GB/CPU s"),
        Row("codec pattern", told, 1e3 * one, "CPU ms to one pattern"),
    ]


def ingest_rows(work: str, frames: np.ndarray, tilts: int = 2) -> list[Row]:
    """Measure ingest of a raw file in the page cache against its floor: reading the bytes and encoding the shards."""
    detector, scan = Detector((PIXELS, PIXELS), 0.02), Scan((frames.shape[0], frames.shape[1]), (1.0, 1.0))
    geometry = (Optics(300e3, 21e-3), scan, detector, TiltSeries.from_degrees(np.linspace(-9, 9, tilts).tolist()))
    size = tilts * frames.nbytes / 1e9
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.raw"
        path.write_bytes(frames.tobytes() * tilts)
        source = open_frames(path, dtype="<u2", shape=(tilts, *frames.shape))
        names = iter("abcdef")
        executor = ThreadExecutor(1)
        cost = cpu_seconds(
            lambda: ingest(Path(folder) / f"{next(names)}.zarr", source, *geometry, executor=executor), 2
        )
        store = Store.open(Path(folder) / "a.zarr")
        codec = ShardCodec.of(store.frames(0))
        assert codec is not None
        out = np.empty(frames.shape, "u2")

        def floor() -> None:
            with path.open("rb", buffering=0) as file:
                for _ in range(tilts):
                    file.readinto(memoryview(out.reshape(-1)).cast("B"))
                    edge = codec.chunk_yx[0]
                    pieces = (
                        (y, x, out[y : y + edge, x : x + edge])
                        for y in range(0, frames.shape[0], edge)
                        for x in range(0, frames.shape[1], edge)
                    )
                    data = b"".join(build(codec, pieces))
                    (Path(folder) / "floor").write_bytes(data)

        return [rate_row("ingest beside its codec", work, size / cost, "GB/CPU s", size / cpu_seconds(floor, 2))]


def shard_rows(work: str, frames: np.ndarray) -> list[Row]:
    """Measure ingest of 2 x 2 shards of 128 MiB, cut into smaller ones."""
    source = np.tile(frames, (4, 4, 1, 1))
    detector, scan = Detector((PIXELS, PIXELS), 0.02), Scan(source.shape[:2], (1.0, 1.0))
    geometry = (Optics(300e3, 21e-3), scan, detector, TiltSeries.from_degrees([0.0]))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.raw"
        source.tofile(path)
        raw = open_frames(path, dtype="<u2", shape=(1, *source.shape))
        size = source.nbytes / 1e9
        del source
        for edge in (8, 16, 32):
            settings, names = IngestSettings(shard_mib=edge**2 * PIXELS**2 * 2 / 2**20), iter("abc")
            cost = cpu_seconds(
                lambda settings=settings, names=names, edge=edge: ingest(
                    Path(folder) / f"{edge}{next(names)}.zarr", raw, *geometry, settings, executor=ThreadExecutor(1)
                ),
                2,
            )
            rows.append(Row("ingest by shard", f"{work}, shards {edge} x {edge}", size / cost, "GB/CPU s"))
    return rows


def benchmark(edges: tuple[int, ...] = (4, 8, 16)) -> list[Row]:
    """Measure every codec at chunks of 8 x 8, the chosen one at other chunks, and ingest."""
    rows = []
    for work, mean in MEANS.items():
        frames = counted(mean)
        for name in ("by density", *CODECS):
            rows += codec_rows(work, frames, name, 8)
        for edge in edges:
            rows += codec_rows(work, frames, "by density", edge) if edge != 8 else []
        rows += shard_rows(work, frames) if mean < 1 else []
        rows += ingest_rows(f"{work}, shards of 32 x 32", np.tile(frames, (2, 2, 1, 1)))
    return rows
