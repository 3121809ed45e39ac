"""A probe that changes along the scan: orthogonal probe relaxation, as a parameter of the solver.

The strongest mode at position j is P + sum_k c_jk V_k: few variation modes V_k that all positions share, with real
weights per position. It takes up slow changes of focus, astigmatism, current or tilt of the beam. Their sizes trade
against one another, so that V_k are kept orthonormal times the probe's norm and c_jk has no mean over the scan, which
P takes up. Source: Odstrčil et al., Opt. Express 24, 8360 (2016).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stemtomo.algorithms.ptychography.model import CURVATURE, Model, probes_adjoint, probes_at
from stemtomo.algorithms.ptychography.parameters import Chunk, Parameter
from stemtomo.backend import Array, array_namespace, real_dtype, to_device_of, to_host

#: Number of positions, and the sums of their weights (k,) and of the products of these (k, k).
_Moments = tuple[float, np.ndarray, np.ndarray]


class Variation(Parameter):
    """Variation modes and their weights; the value is a dict of ``modes`` (k, y, x) and ``weights`` (position, k).

    Parameters
    ----------
    modes
        Number of variation modes.
    step_size
        Share of the Gauss-Newton step that is taken.
    loss
        Of the model, for its curvature.
    """

    name = "variation"
    # Weights belong to positions; the modes are the same in all parts.
    shared = False

    def __init__(self, modes: int = 1, step_size: float = 0.5, loss: str = "anscombe", seed: int = 0) -> None:
        self.modes, self.step_size, self.curvature, self.seed = modes, step_size, CURVATURE[loss], seed

    def start(self, probe: Array, positions: int) -> dict[str, Array]:
        """Return modes that blur and shift ``probe`` (mode, y, x), with small random weights of no mean."""
        ky, kx = (np.fft.fftfreq(length) for length in probe.shape[-2:])
        xp = array_namespace(probe)
        spectrum = xp.fft.fft2(probe[0])
        orders = [(2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (3, 0), (0, 3), (4, 0), (0, 4)]
        factors = [to_device_of(kx[None, :] ** x * ky[:, None] ** y, probe) for x, y in orders[: self.modes]]
        modes = xp.stack([xp.fft.ifft2(1j * spectrum * factor) for factor in factors])
        weights = 1e-3 * np.random.default_rng(self.seed).normal(size=(positions, len(modes)))
        value = {"modes": modes.astype(probe.dtype), "weights": to_device_of(weights, probe)}
        moments = (float(len(weights)), weights.sum(axis=0), weights.T @ weights)
        return self._tidy(value, moments, float(xp.linalg.norm(probe[0])))

    def some(self, value: Any, where: np.ndarray) -> Any:
        """Return the modes, and the weights of the positions ``where``."""
        return {**value, "weights": value["weights"][where]}

    def probes(self, value: Any, probes: Array, model: Model, where: np.ndarray) -> Array:
        """Return the modes with what the weights of the positions ``where`` add to the strongest."""
        xp = array_namespace(probes)
        varied = probes.copy()
        weights = value["weights"][where].astype(real_dtype(probes))
        varied[:, 0] += xp.einsum("jk,jkyx->jyx", weights, probes_at(value["modes"], model.grid, where))
        return varied

    def zero(self, value: Any) -> Any:
        """Return the empty sums."""
        xp = array_namespace(value["modes"])
        return {
            "modes": xp.zeros_like(value["modes"]),
            "weights": xp.zeros_like(value["weights"]),
            "met": xp.zeros(len(value["weights"])),
        }

    def on_chunk(self, sums: Any, value: Any, model: Model, chunk: Chunk) -> None:
        """Add the gradients of modes and of the chunk's weights."""
        xp = array_namespace(value["modes"])
        gradient = chunk.gradient.reshape(-1, chunk.modes, *chunk.gradient.shape[1:])[:, 0]
        weights = value["weights"][chunk.where].astype(real_dtype(gradient))
        there = probes_at(value["modes"], model.grid, chunk.where)
        sums["weights"][chunk.where] += xp.einsum("jkyx,jyx->jk", there.conj(), gradient).real
        sums["met"][chunk.where] += 1
        weighted = weights[:, :, None, None] * gradient[:, None]
        sums["modes"] += probes_adjoint(weighted, model.grid, chunk.where)

    def over_parts(self, value: Any, sums: Any) -> Any:
        """Return the gradient of the modes, and moments of weights and their gradients: all that turns them."""
        xp = array_namespace(value["modes"])
        met = sums["met"] > 0
        weights, slopes = to_host(value["weights"]), to_host(sums["weights"])
        return {
            "modes": sums["modes"],
            "power": to_host(xp.square(value["weights"][met]).sum(axis=0)),
            "met": float(met.sum()),
            "count": float(len(weights)),
            "sum": weights.sum(axis=0),
            "slope": slopes.sum(axis=0),
            "square": weights.T @ weights,
            "cross": weights.T @ slopes,
            "slopes": slopes.T @ slopes,
        }

    def step(self, value: Any, sums: Any, memory: Any, positions: int) -> tuple[Any, Any]:
        """Return modes and weights after a damped step with the curvature that they have behind |t| = 1."""
        xp = array_namespace(value["modes"])
        over = sums.get("over_parts") or self.over_parts(value, sums)
        norm = float(xp.linalg.norm(value["modes"][0]))
        factor = self.step_size / (2 * self.curvature)
        floor = over["power"].mean() + 1e-6 * over["met"]
        scale = to_device_of((factor / (over["power"] + floor))[:, None, None], value["modes"])
        modes = value["modes"] - (scale * over["modes"]).astype(value["modes"].dtype)
        # Those that were not met have no gradient.
        along = factor / norm**2
        weights = value["weights"] - along * sums["weights"]
        total = over["sum"] - along * over["slope"]
        square = over["square"] - along * (over["cross"] + over["cross"].T) + along**2 * over["slopes"]
        return self._tidy({"modes": modes, "weights": weights}, (over["count"], total, square), norm), memory

    def _tidy(self, value: dict[str, Array], moments: _Moments, norm: float) -> dict[str, Array]:
        """Orthonormal modes times ``norm``, strongest first, the same probes; weights of no mean.

        ``moments`` are those of all weights, where these are of a part.
        """
        xp = array_namespace(value["modes"])
        flat = value["modes"].reshape(len(value["modes"]), -1).astype(np.complex128)
        # Weights are real, so the change of basis must be: that of the real inner product.
        real = xp.concatenate([flat.real, flat.imag], axis=1)
        left, sizes, right = xp.linalg.svd(real, full_matrices=False)
        change = to_host(left * sizes) / norm
        count, total, square = moments
        mean = total @ change / count
        _, vectors = np.linalg.eigh(change.T @ square @ change - count * np.outer(mean, mean))
        basis = vectors[:, ::-1].T
        weights = (value["weights"] @ to_device_of(change, flat) - to_device_of(mean, flat)) @ to_device_of(
            basis.T, flat
        )
        right = to_device_of(basis, flat) @ right
        # Signs are free; keeping each mode along the old one lets nothing jump.
        sign = xp.sign((real * right).sum(axis=1)) if len(real) == len(right) else 1.0
        sign = xp.where(sign == 0, 1.0, sign)
        half = right.shape[1] // 2
        modes = norm * sign[:, None] * (right[:, :half] + 1j * right[:, half:])
        return {
            "modes": modes.reshape(value["modes"].shape).astype(value["modes"].dtype),
            "weights": weights * sign,
        }
