"""A small inverse problem with the shape of every solver here: overlapping windows, a shared unknown, a global loss.

An image x is measured through patches at scattered positions, y_k = a <w, x[patch k]>, and x and a are recovered by
gradient descent. A part owns a band of positions and the window of x that their patches cover.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from stemtomo.distributed import Executor, Parts, Window
from stemtomo.distributed.windows import bounding_window

SHAPE = (24, 20)
PATCH = 5
WEIGHTS = np.outer(np.hanning(PATCH + 2)[1:-1], np.hanning(PATCH + 2)[1:-1])
STEP = 0.05


def positions() -> np.ndarray:
    corners = np.stack(np.mgrid[0 : SHAPE[0] - PATCH + 1 : 2, 0 : SHAPE[1] - PATCH + 1 : 2], axis=-1).reshape(-1, 2)
    return corners[np.lexsort((corners[:, 1], corners[:, 0]))]


def measured(corners: np.ndarray) -> np.ndarray:
    truth = np.random.default_rng(7).normal(size=SHAPE)
    return np.array([1.3 * np.sum(WEIGHTS * truth[y : y + PATCH, x : x + PATCH]) for y, x in corners])


def bands(count: int) -> list[tuple[np.ndarray, Window]]:
    """Cut the positions into ``count`` uneven bands, each with the window its patches cover."""
    corners = positions()
    edges = np.linspace(0, 1, count + 1) ** 1.3 * len(corners)
    cut = [corners[int(a) : int(b)] for a, b in itertools.pairwise(edges)]
    return [(band, bounding_window([((y, y + PATCH), (x, x + PATCH)) for y, x in band.tolist()])) for band in cut]


def build_data(spec: tuple[np.ndarray, Window]) -> dict[str, Any]:
    corners, window = spec
    return {"local": corners - [window[0][0], window[1][0]], "measured": measured(corners)}


def build_image(spec: tuple[np.ndarray, Window]) -> np.ndarray:
    (y0, y1), (x0, x1) = spec[1]
    return np.zeros((y1 - y0, x1 - x0))


def gradient(image: np.ndarray, scale: float, data: dict[str, Any]) -> dict[str, Any]:
    out = np.zeros_like(image)
    loss = scale_gradient = 0.0
    for (y, x), value in zip(data["local"], data["measured"], strict=True):
        patch = slice(y, y + PATCH), slice(x, x + PATCH)
        seen = float(np.sum(WEIGHTS * image[patch]))
        residual = scale * seen - value
        loss += residual**2
        scale_gradient += residual * seen
        out[patch] += residual * scale * WEIGHTS
    return {"image": out, "numbers": {"loss": loss, "scale": scale_gradient}}


def descend(image: np.ndarray, summed: np.ndarray) -> np.ndarray:
    return image - STEP * summed


def step(image: Parts, data: Parts, scale: float, windows: list[Window]) -> tuple[Parts, float, float]:
    gradients = image.map(gradient, scale, each=(data,))
    summed = gradients.pick("image").halo_sum(windows)
    numbers = image.executor.gather(gradients.pick("numbers").sum())
    return image.map(descend, each=(summed,)), scale - 1e-4 * numbers["scale"], numbers["loss"]


def solve(workers: Executor, count: int, steps: int) -> tuple[np.ndarray, float, list[float]]:
    specs = bands(count)
    windows = [window for _, window in specs]
    data = Parts.create(workers, build_data, specs)
    image = Parts.create(workers, build_image, specs, beside=data)
    scale, losses = 1.0, []
    for _ in range(steps):
        image, scale, loss = step(image, data, scale, windows)
        losses.append(loss)
    return dense(image.gather(), windows), scale, losses


def dense(images: list[np.ndarray], windows: list[Window]) -> np.ndarray:
    """Put the windows into one image; parts that share a pixel must agree on its bits."""
    whole = np.full(SHAPE, np.nan)
    for image, ((y0, y1), (x0, x1)) in zip(images, windows, strict=True):
        held = whole[y0:y1, x0:x1]
        assert np.array_equal(held[~np.isnan(held)], image[~np.isnan(held)])
        whole[y0:y1, x0:x1] = image
    return whole
