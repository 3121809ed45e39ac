"""One look at frames: what a pass over a block leaves, and the same lazily for frames that xarray holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array
import numpy as np
import xarray as xr
from dask import delayed

from stemtomo import backend
from stemtomo.algorithms.imaging.virtual import (
    Superpixels,
    VirtualImages,
    superpixels,
    virtual_images,
    virtual_weights,
)
from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.geometry import Detector, Optics
from stemtomo.io.schema import FRAME_DIMS
from stemtomo.kernels.masks import FrameSums, frame_sums, prepare
from stemtomo.pipeline.config import QuicklookSettings

#: Frames are summed in bands of this many bytes, which stay near the processor.
_BAND_BYTES = 8 << 20


def detectors(optics: Optics, detector: Detector, settings: QuicklookSettings) -> tuple[np.ndarray, Superpixels]:
    """Return the weights of the virtual detectors and the superpixels of the bright-field stack."""
    fractions = settings.model_dump(exclude={"superpixels"})
    return virtual_weights(optics, detector, **fractions), superpixels(optics, detector, settings.superpixels)


class BlockLook:
    """What one pass over a block of positions leaves, put together from pieces of it; on the GPU where there is one.

    Parameters
    ----------
    region
        First and last + 1 row and column (y0, y1, x0, x1) of the block.
    weights, labels
        See :func:`detectors`.
    """

    def __init__(self, region: tuple[int, int, int, int], weights: np.ndarray, labels: np.ndarray) -> None:
        self._origin = (region[0], region[2])
        self._shape = (region[1] - region[0], region[3] - region[2])
        # On a GPU the kernel finds its own way through the lines.
        self._on_device = backend.gpu_available()
        self._told = (
            (backend.to_device(weights), labels, None)
            if self._on_device
            else (weights, labels, prepare(weights, labels))
        )
        self._images: dict[str, np.ndarray] = {}
        self._patterns: dict[str, np.ndarray] | None = None

    def add(self, y: int, x: int, frames: np.ndarray) -> FrameSums:
        """Look at ``frames`` (y, x, ky, kx), which begin at position (y, x); return what was seen of them."""
        frames = frames.astype(frames.dtype.newbyteorder("="), copy=False)
        frames = backend.to_device(frames) if self._on_device else frames
        look = FrameSums(*map(backend.to_host, frame_sums(frames, *self._told)))
        y, x = y - self._origin[0], x - self._origin[1]
        for name, part in (("weighted", look.weighted), ("superpixels", look.superpixels)):
            if name not in self._images:
                self._images[name] = np.zeros((*self._shape, part.shape[-1]), part.dtype)
            self._images[name][y : y + part.shape[0], x : x + part.shape[1]] = part
        found = {"sum": look.pattern_sum, "maximum": look.pattern_maximum}
        self._patterns = found if self._patterns is None else merge_patterns([self._patterns, found])
        return look

    def result(self) -> dict[str, Any]:
        """Return ``images`` (sums per position) and ``patterns`` (sum and maximum over the positions)."""
        return {"images": self._images, "patterns": self._patterns}


def merge_patterns(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Add the sums and take the larger of the maxima, in the order of the blocks."""
    total, brightest = parts[0]["sum"], parts[0]["maximum"]
    for part in parts[1:]:
        total, brightest = total + part["sum"], np.maximum(brightest, part["maximum"])
    return {"sum": total, "maximum": brightest}


def whole_look(
    weighted: np.ndarray, stack: np.ndarray, patterns: dict[str, np.ndarray], blocks: Superpixels, valid: np.ndarray
) -> xr.Dataset:
    """Return the quicklook of one tilt from the sums at all its positions.

    ``valid`` (y, x) says where there is a frame: the mean is over those, and where some are missing the mask is kept.
    """
    mean = (patterns["sum"] / max(1, int(valid.sum()))).astype(np.float32)
    dataset = look_dataset(virtual_images(weighted), mean, patterns["maximum"], stack, blocks)
    return dataset if valid.all() else dataset.assign(valid=(("y", "x"), valid, {"units": "1"}))


def look_dataset(images: VirtualImages, mean: Any, maximum: Any, stack: Any, blocks: Superpixels) -> xr.Dataset:
    """Put the results of one tilt, in memory or lazy, into a dataset with units."""
    image, pattern = ("y", "x"), ("ky", "kx")
    variables: dict[str, Any] = {
        name: (image, values, {"units": "1/Å" if name.startswith("com_") else "counts"})
        for name, values in images._asdict().items()
    }
    variables["mean_pattern"] = (pattern, mean, {"units": "counts"})
    variables["maximum_pattern"] = (pattern, maximum, {"units": "counts"})
    if blocks.pixels.size:
        variables["bright_field_stack"] = ((*image, "superpixel"), stack, {"units": "counts"})
        variables["superpixel_kx"] = ("superpixel", blocks.k_x, {"units": "1/Å"})
        variables["superpixel_ky"] = ("superpixel", blocks.k_y, {"units": "1/Å"})
        variables["superpixel_pixels"] = ("superpixel", blocks.pixels, {"units": "1"})
    return xr.Dataset(variables)


def lazy_quicklook(
    data: xr.Dataset | xr.DataArray,
    settings: QuicklookSettings | None = None,
    optics: Optics | None = None,
    detector: Detector | None = None,
) -> xr.Dataset:
    """Return the quicklook of frames that xarray holds, lazy: one task per block of frames makes everything at once.

    Parameters
    ----------
    data
        Frames (y, x, ky, kx), whole patterns in each chunk; or a dataset with the variable ``frames``, such as a tilt
        of ``stemtomo.open(path)``, whose attributes ``optics`` and ``detector`` are used.
    optics, detector
        In place of those attributes.

    Returns
    -------
    Dataset with the variables of the group ``quicklook`` of a store. Compute it whole (``.compute()``): then every
    byte is read once; variables computed one by one read the frames once each.

    Raises
    ------
    FormatError
        If dims are missing or patterns are cut into chunks.
    ConfigurationError
        If neither the arguments nor the attributes say optics and detector.
    """
    frames = data["frames"] if isinstance(data, xr.Dataset) else data
    attrs = {**frames.attrs, **data.attrs}
    if set(frames.dims) != set(FRAME_DIMS):
        raise FormatError(f"frames have dims {frames.dims}; expected {FRAME_DIMS}: select one tilt, name the axes")
    frames = frames.transpose(*FRAME_DIMS)
    optics = optics or (Optics.from_attrs(attrs["optics"]) if "optics" in attrs else None)
    detector = detector or (Detector.from_attrs(attrs["detector"]) if "detector" in attrs else None)
    if optics is None or detector is None:
        raise ConfigurationError("the frames carry no optics and detector as attributes; give optics= and detector=")
    if detector.shape_yx != frames.shape[2:]:
        raise FormatError(f"patterns are {frames.shape[2:]} pixels, the detector is {detector.shape_yx}")
    lazy = dask.array.asarray(frames.data)
    if max(lazy.numblocks[2:]) > 1:
        raise FormatError(f"patterns are cut into chunks {lazy.chunks[2:]}; rechunk with ky=-1, kx=-1 first")
    weights, blocks = detectors(optics, detector, settings or QuicklookSettings())
    valid = np.asarray(data["valid"]) if isinstance(data, xr.Dataset) and "valid" in data else None
    result = _lazy_dataset(lazy, weights, blocks, lazy.shape[0] * lazy.shape[1] if valid is None else int(valid.sum()))
    if valid is not None:
        result = result.assign(valid=(("y", "x"), valid, {"units": "1"}))
    kept = {name: coordinate for name, coordinate in frames.coords.items() if set(coordinate.dims) <= set(FRAME_DIMS)}
    return result.assign_coords(kept)


def _lazy_dataset(lazy: dask.array.Array, weights: np.ndarray, blocks: Superpixels, frames: int) -> xr.Dataset:
    shared = delayed((weights, blocks.labels), pure=True)
    looks = [[delayed(_look_at_block)(block, shared) for block in row] for row in lazy.to_delayed()[:, :, 0, 0]]

    def image(name: str, depth: int) -> dask.array.Array:
        rows = [
            [
                dask.array.from_delayed(look["images"][name], (height, width, depth), dtype=np.float32)
                for look, width in zip(row, lazy.chunks[1], strict=True)
            ]
            for row, height in zip(looks, lazy.chunks[0], strict=True)
        ]
        joined = [dask.array.concatenate(row, axis=1) for row in rows]
        return dask.array.concatenate(joined, axis=0)

    patterns = delayed(merge_patterns)([look["patterns"] for row in looks for look in row])
    total = dask.array.from_delayed(patterns["sum"], lazy.shape[2:], dtype=np.float64)
    maximum = dask.array.from_delayed(patterns["maximum"], lazy.shape[2:], dtype=lazy.dtype)
    # Blocks along the last axis are single, so the six images come from one task each.
    images = image("weighted", len(weights)).map_blocks(_stacked_images, dtype=np.float32)
    named = VirtualImages(*(images[..., index] for index in range(len(VirtualImages._fields))))
    stack = image("superpixels", blocks.pixels.size) if blocks.pixels.size else None
    return look_dataset(named, (total / max(1, frames)).astype(np.float32), maximum, stack, blocks)


def _look_at_block(block: np.ndarray, shared: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    look = BlockLook((0, block.shape[0], 0, block.shape[1]), *shared)
    rows = max(1, _BAND_BYTES // max(1, block[:1].nbytes))
    for y in range(0, len(block), rows):
        look.add(y, 0, block[y : y + rows])
    return look.result()


def _stacked_images(weighted: np.ndarray) -> np.ndarray:
    return np.stack(virtual_images(weighted), axis=-1)
