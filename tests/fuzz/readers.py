"""Every reader of files from elsewhere, with a small whole file of its kind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stemtomo.errors import StemtomoError
from stemtomo.io.export import read_atoms, write_xyz
from stemtomo.io.formats.registry import contents
from stemtomo.io.sources import check_complete, open_frames
from stemtomo.io.stacks import read_angles, read_stack
from stemtomo.io.store import Store
from stemtomo.io.structures import read_structure, table, write_structure
from stemtomo.io.volume_files import read_volume, write_volume
from tests.io.formats import files, test_sectors

SCAN = (3, 4)


class Reader(NamedTuple):
    """``write`` makes a folder's files and returns what is read; ``read`` reads it, as a user's command would."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]


def _frames(**options: Any) -> Callable[[Path], None]:
    """Return what opens frames, checks them and reads some."""

    def read(path: Path) -> None:
        with contextlib.suppress(StemtomoError):
            contents(path, options.get("format"))
        source = open_frames(path, **options)
        source.identity()
        source.ready()
        with contextlib.suppress(StemtomoError):
            check_complete(source)
        source.read(0, 0, 1, 0, 1)
        last = source.shape[1] - 1
        source.read(source.shape[0] - 1, last, last + 1, source.shape[2] - 1, source.shape[2])

    return read


def _npy(folder: Path) -> Path:
    np.save(folder / "a.npy", files.counts((1, *SCAN, 8, 8), 9).astype("<u2"))
    return folder / "a.npy"


def _npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", frames=files.counts((1, *SCAN, 8, 8), 9).astype("<u2"))
    return folder / "a.npz"


def _npz_compressed(folder: Path) -> Path:
    np.savez_compressed(folder / "a.npz", frames=files.counts((1, *SCAN, 8, 8), 9).astype("<u2"))
    return folder / "a.npz"


def _stack(folder: Path) -> Path:
    np.savez_compressed(folder / "a.npz", projections=np.ones((3, 8, 8), "f4"), theta_deg=np.arange(3.0))
    return folder / "a.npz"


def _merlin(kind: str, depth: int, quad: bool) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        largest = 1 if depth == 1 else 63
        shape = (12, 512, 512) if quad else (12, 4, 256)
        files.write_mib(folder / "a.mib", files.counts(shape, largest), kind, depth, quad=quad)
        (folder / "a.hdr").write_text("HDR,\nFrames in Acquisition (Number):\t12\nScanX:\t4\nScanY:\t3\nEnd\t\n")
        return folder / "a.mib"

    return write


def _empad(folder: Path) -> Path:
    files.write_empad(folder / "a.xml", np.ones((12, 128, 128)), "<pix_x>4</pix_x><pix_y>3</pix_y>")
    return folder / "a.xml"


def _arina(folder: Path) -> Path:
    files.write_arina(folder / "s_master.h5", files.counts((12, 6, 5), 99).astype("u4"), 5)
    return folder / "s_master.h5"


def _thresholds(folder: Path) -> Path:
    files.write_thresholds(folder / "s_master.h5", files.counts((12, 1, 6, 5), 99).astype("u4"), 5, ("one",))
    return folder / "s_master.h5"


def _counted(version: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        files.write_counted(folder / "a.h5", files.counts((12, 8, 8), 2), SCAN, version)
        return folder / "a.h5"

    return write


def _sectors(version: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        return test_sectors.write(folder, np.ones((15, 576, 576), "<u2"), version)

    return write


def _hdf5(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "a.h5", "w") as file:
        frames = files.counts((*SCAN, 8, 8), 9).astype("<u2")
        file.create_dataset("scan/frames", data=frames, chunks=(1, 2, 8, 8), compression="gzip", shuffle=True)
        file["scan/frames"].attrs["units"] = "counts"
    return folder / "a.h5"


def _zarr(folder: Path) -> Path:
    import zarr

    frames = files.counts((*SCAN, 8, 8), 9).astype("<u2")
    zarr.create_array(folder / "a.zarr", data=frames, chunks=(1, 2, 8, 8))
    return folder / "a.zarr"


def _store(folder: Path) -> Path:
    from tests.pipeline.series import make_series

    return make_series(folder / "series.zarr").path


def _read_store(path: Path) -> None:
    store = Store.open(path)
    store.info()
    store.tilt_series()
    for tilt in range(min(store.tilt_count, 3)):
        store.optics(tilt), store.scan(tilt), store.detector(tilt), store.valid(tilt)
        store.read_frames(tilt, (slice(1), slice(1)))
        for _ in store.read_pieces(tilt, 0, 0):
            pass
    for group in ("volume", "atoms"):
        with contextlib.suppress(StemtomoError):
            store.read(group)


def _volume(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_volume(folder / f"a{suffix}", np.ones((4, 5, 6), "f4"), 0.5)
        return folder / f"a{suffix}"

    return write


def _structure(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        positions = np.random.default_rng(0).normal(0, 5, (6, 3))
        write_structure(folder / f"a{suffix}", table(positions, ["Si"] * 6))
        return folder / f"a{suffix}"

    return write


def _xyz(folder: Path) -> Path:
    write_xyz(folder / "a.xyz", np.eye(3), ["Cu", "Au", "O"])
    return folder / "a.xyz"


def _known_atoms(folder: Path) -> Path:
    np.savez(folder / "a.npz", atoms_xyz_A=np.eye(3), atomic_numbers=np.array([6, 7, 8]))
    return folder / "a.npz"


def _angles(folder: Path) -> Path:
    (folder / "a.rawtlt").write_text("-60\n-30.0\n0 # middle\n30\n")
    return folder / "a.rawtlt"


def _configuration(folder: Path) -> Path:
    from tests.deploy.tiny import write_series

    return write_series(folder, folder / "frames.npz")


def _read_configuration(path: Path) -> None:
    from stemtomo.pipeline.references import load_configuration

    load_configuration(path)


def _ripple(folder: Path) -> Path:
    """A file of another program: a header of text and raw numbers, read by RosettaSciIO."""
    lines = ("width 8", "height 8", "depth 12", "offset 0", "data-length 2", "data-type unsigned", "record-by image")
    text = "".join(f"{line.replace(' ', chr(9))}\n" for line in ("key value", *lines, "byte-order little-endian"))
    (folder / "a.rpl").write_text(text)
    (folder / "a.raw").write_bytes(files.counts((12, 8, 8), 9).astype("<u2").tobytes())
    return folder / "a.rpl"


#: Readers by name.
READERS: dict[str, Reader] = {
    "npy": Reader(_npy, _frames()),
    "npz": Reader(_npz, _frames()),
    "npz compressed": Reader(_npz_compressed, _frames()),
    "merlin U08": Reader(_merlin("U08", 6, False), _frames(scan_shape=SCAN)),
    "merlin U16": Reader(_merlin("U16", 12, False), _frames()),
    "merlin R64 quad": Reader(_merlin("R64", 6, True), _frames(scan_shape=SCAN)),
    "empad": Reader(_empad, _frames()),
    "arina": Reader(_arina, _frames(scan_shape=SCAN)),
    "thresholds": Reader(_thresholds, _frames(scan_shape=SCAN)),
    "counted 1": Reader(_counted(1), _frames()),
    "counted 3": Reader(_counted(3), _frames()),
    "sectors 4": Reader(_sectors(4), _frames(format="sectors:4")),
    "sectors 5": Reader(_sectors(5), _frames(format="sectors:5")),
    "hdf5": Reader(_hdf5, _frames(axes=("y", "x", "ky", "kx"))),
    "zarr": Reader(_zarr, _frames(axes=("y", "x", "ky", "kx"))),
    "ripple": Reader(_ripple, _frames(axes=("position", "ky", "kx"), scan_shape=SCAN)),
    "store": Reader(_store, _read_store),
    "volume mrc": Reader(_volume(".mrc"), read_volume),
    "volume npy": Reader(_volume(".npy"), lambda path: read_volume(path, 0.5)),
    "stack mrc": Reader(_volume(".mrc"), read_stack),
    "stack tiff": Reader(_volume(".tif"), read_stack),
    "stack npz": Reader(_stack, read_stack),
    "angles": Reader(_angles, read_angles),
    "atoms xyz": Reader(_xyz, read_atoms),
    "atoms npz": Reader(_known_atoms, read_atoms),
    "atoms cif": Reader(_structure(".cif"), read_structure),
    "atoms pdb": Reader(_structure(".pdb"), read_structure),
    "atoms parquet": Reader(_structure(".parquet"), read_structure),
    "configuration": Reader(_configuration, _read_configuration),
}
