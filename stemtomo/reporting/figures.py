"""The pictures of the report: arrays in, PNG bytes out, transparent with mid-grey text for light and dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

INK = "#7d838c"  # contrast of at least 3.5 on white and on near-black
COLOURS = ("#2a7fb8", "#d2691e", "#3a9a5b", "#a05195", "#b8860b", "#c0392b", "#5b6abf", "#708090")
_DPI = 120
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.transparent": True,
    "image.interpolation": "nearest",
}


@dataclass(frozen=True)
class Picture:
    """One image of a row or a montage.

    Parameters
    ----------
    values
        (row, column).
    title
        What it is.
    unit
        Unit of the values, written on the colour bar.
    pixel
        Size of a pixel in ``length`` units, rows and columns; ``None`` for no scale bar.
    length
        Unit of ``pixel``: Å or Å⁻¹.
    axes
        Names of the axes, rows first.
    cmap
        Name of a matplotlib colour map; ``diverging`` maps are centred on zero.
    valid
        Mask of the pixels that hold data; the others are left empty.
    """

    values: np.ndarray
    title: str
    unit: str = ""
    pixel: tuple[float, float] | None = None
    length: str = "Å"
    axes: tuple[str, str] = ("y", "x")
    cmap: str = "gray"
    diverging: bool = False
    logarithmic: bool = False
    valid: np.ndarray | None = None
    circle: tuple[float, float, float] | None = None
    """Circle to draw: row, column and radius in pixels."""


def row(pictures: Sequence[Picture], height: float = 2.6) -> bytes:
    """Draw pictures side by side, each with its own colour bar, scale bar and axis names."""
    with _style():
        widths = [height * min(3.0, max(0.4, _aspect(picture))) + 1.0 for picture in pictures]
        figure = _figure(sum(widths), height + 0.55)
        axes = figure.subplots(1, len(pictures), width_ratios=widths, squeeze=False)
        for axis, picture in zip(axes[0], pictures, strict=True):
            image = _draw(axis, picture)
            bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.03, aspect=24)
            bar.outline.set_linewidth(0.4)
            bar.ax.tick_params(labelsize=7, width=0.5, length=2)
            bar.set_label(picture.unit, fontsize=8)
            axis.set_xlabel(picture.axes[1], labelpad=2)
            axis.set_ylabel(picture.axes[0], labelpad=2)
        return _png(figure)


def montage(pictures: Sequence[Picture], columns: int = 8, size: float = 1.25) -> bytes:
    """Draw many pictures of one kind as a grid with one common grey scale and one colour bar."""
    with _style():
        columns = min(columns, len(pictures))
        rows = math.ceil(len(pictures) / columns)
        tall = size / max(0.5, min(2.0, _aspect(pictures[0])))
        figure = _figure(columns * size + 0.9, rows * (tall + 0.28))
        axes = figure.subplots(rows, columns, squeeze=False)
        low, high = common_range([_shown(picture) for picture in pictures])
        image: Any = None
        for axis in axes.flat[len(pictures) :]:
            axis.set_axis_off()
        for index, (axis, picture) in enumerate(zip(axes.flat, pictures, strict=False)):
            image = _draw(axis, picture, limits=(low, high), bar=index == 0)
        bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, aspect=30)
        bar.outline.set_linewidth(0.4)
        bar.ax.tick_params(labelsize=7, width=0.5, length=2)
        bar.set_label(pictures[0].unit, fontsize=8)
        return _png(figure)


def curves(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    x: str,
    y: str,
    logarithmic: bool = False,
    points: bool = False,
    whole_numbers: bool = True,
) -> bytes:
    """Draw ``(label, x values, y values)`` lines; more than eight lines become a fan from one colour to another."""
    import matplotlib

    with _style():
        figure = _figure(5.4, 2.7)
        axis = figure.subplots()
        many = len(lines) > len(COLOURS)
        fan = matplotlib.colormaps["viridis"]
        for index, (label, xs, ys) in enumerate(lines):
            colour = fan(0.1 + 0.8 * index / max(1, len(lines) - 1)) if many else COLOURS[index]
            named = label if not many or index in (0, len(lines) - 1) else None
            axis.plot(
                xs,
                ys,
                color=colour,
                linewidth=1.2,
                label=named,
                marker="o" if points or len(xs) == 1 else None,
                markersize=3,
            )
        everything = np.concatenate([np.asarray(ys, dtype=float) for _, _, ys in lines])
        if logarithmic and everything.min() > 0 and everything.max() > 5 * everything.min():
            axis.set_yscale("log")
        if whole_numbers and not points:
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(True, color=INK, alpha=0.2, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        if any(label for label, _, _ in lines):
            axis.legend(fontsize=8)
        return _png(figure)


def histogram(groups: Sequence[tuple[str, np.ndarray]], x: str, y: str = "atoms") -> bytes:
    """Draw the distribution of one number in several groups on common bins."""
    with _style():
        figure = _figure(5.4, 2.4)
        axis = figure.subplots()
        everything = np.concatenate([values for _, values in groups])
        bins = np.histogram_bin_edges(everything, bins=min(60, max(10, int(math.sqrt(everything.size) * 2))))
        for index, (label, values) in enumerate(groups):
            axis.hist(values, bins=bins, color=COLOURS[index % len(COLOURS)], alpha=0.75, label=label)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.spines[["top", "right"]].set_visible(False)
        if len(groups) > 1:
            axis.legend(fontsize=8)
        return _png(figure)


def common_range(images: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return limits of grey that clip at most one pixel in 500 at either end, over all ``images``."""
    values = np.concatenate([np.ravel(image)[:: max(1, image.size // 20000)] for image in images])
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, [0.2, 99.8]))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def scale_bar_length(extent: float) -> float:
    """Return a round length (1, 2 or 5 times a power of ten) of a seventh to a third of ``extent``."""
    longest = extent * 0.35
    power = 10.0 ** math.floor(math.log10(longest))
    return max(step * power for step in (1, 2, 5) if step * power <= longest)


@contextmanager
def _style() -> Iterator[None]:
    """Use this module's style inside; matplotlib is imported when the first picture is drawn."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _figure(width: float, height: float) -> Any:
    """Return a figure of ``width`` x ``height`` inches beside pyplot, which keeps the figures of the caller."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _aspect(picture: Picture) -> float:
    rows, columns = picture.values.shape
    dy, dx = picture.pixel or (1.0, 1.0)
    return (columns * dx) / (rows * dy)


def _shown(picture: Picture) -> np.ndarray:
    values = np.asarray(picture.values, dtype=float)
    if picture.logarithmic:
        floor = values[values > 0].min() if (values > 0).any() else 1.0
        values = np.log10(np.maximum(values, floor))
    return values if picture.valid is None else np.where(picture.valid, values, np.nan)


def _draw(axis: Any, picture: Picture, limits: tuple[float, float] | None = None, bar: bool = True) -> Any:
    values = _shown(picture)
    low, high = common_range([values]) if limits is None else limits
    if picture.diverging:
        high = max(abs(low), abs(high))
        low = -high
    dy, dx = picture.pixel or (1.0, 1.0)
    # The first row is at the top: y (or z) grows downwards, as in the arrays.
    image = axis.imshow(values, cmap=picture.cmap, vmin=low, vmax=high, aspect=dy / dx)
    axis.set_title(picture.title, pad=3)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_linewidth(0.4)
    if picture.circle is not None:
        from matplotlib.patches import Circle

        centre_row, centre_column, radius = picture.circle
        axis.add_patch(
            Circle((centre_column, centre_row), radius, fill=False, color="white", linewidth=0.8, linestyle=(0, (4, 3)))
        )
    if picture.pixel is not None and bar:
        _scale_bar(axis, values.shape, dx, picture.length)
    return image


def _scale_bar(axis: Any, shape: tuple[int, ...], dx: float, unit: str) -> None:
    from matplotlib.patches import Rectangle

    length = scale_bar_length(shape[1] * dx)
    wide, (x, y) = length / (shape[1] * dx), (0.05, 0.055)
    shade = Rectangle(
        (x - 0.025, y - 0.03), wide + 0.05, 0.14, transform=axis.transAxes, color="black", alpha=0.5, linewidth=0
    )
    axis.add_patch(shade)
    axis.plot([x, x + wide], [y, y], transform=axis.transAxes, color="white", linewidth=2, solid_capstyle="butt")
    label = f"{length:g} {unit}"
    axis.text(
        x + wide / 2, y + 0.022, label, transform=axis.transAxes, color="white", fontsize=7.5, va="bottom", ha="center"
    )
