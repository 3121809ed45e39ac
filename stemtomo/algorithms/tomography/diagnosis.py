"""What is wrong with a tilt series, told from its projections alone.

The moments of a projection about its centre of mass are views of the moments of the specimen (the conditions of
Helgason and Ludwig; F. Natterer, The Mathematics of Computerized Tomography (1986), ch. II.4): with six numbers of
second and ten of third order, M_ij and M_ijk, a tilt at R sees

    mu_ab = sum_ij R_ia R_jb M_ij,   mu_abc = sum_ijk R_ia R_jb R_kc M_ijk,   a, b, c in (x, y).

So seven numbers per tilt must agree with sixteen for all, whatever the shifts. Where they agree much better for another
order of the tilts, another axis or another sense of rotation, that is likely what was recorded.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from stemtomo.algorithms.tomography.alignment import near_specimen
from stemtomo.errors import FormatError

_SEEN = ("xx", "xy", "yy", "xxx", "xxy", "xyy", "yyy")
_BETTER = 1.6
"""A diagnosis is made where it lowers the disagreement of the moments by this factor ..."""
_BETTER_BY_SEARCH = 2.5
"""... or by this one, if it was looked for among all orders of the tilts, where noise fits as well."""
_ENOUGH = 0.004
"""Disagreement, relative to the size of the specimen, below which nothing is wrong."""
_FEWEST = 5


class Diagnosis(NamedTuple):
    """What is likely wrong: a name, a sentence, the disagreement of the moments as given and if it is put right."""

    name: str
    text: str
    misfit: float
    corrected: float


def require_sound(images: np.ndarray, valid: np.ndarray, angles_deg: np.ndarray | None = None) -> None:
    """Check that every projection can be used.

    Parameters
    ----------
    images
        (tilt, y, x), rad.
    valid
        Boolean (tilt, y, x).
    angles_deg
        (tilt, ...), the angles of every tilt.

    Raises
    ------
    FormatError
        Naming the first tilt that has no angle, no valid pixel, values that are no numbers, or the same everywhere.
    """
    if angles_deg is not None:
        if len(angles_deg) != len(images):
            raise FormatError(f"{len(images)} projections, but {len(angles_deg)} tilt angles; give one angle for each")
        lost = np.flatnonzero(~np.isfinite(angles_deg).reshape(len(images), -1).all(axis=1))
        if lost.size:
            raise FormatError(f"projection {lost[0]} has no tilt angle; give it, or leave the tilt out")
    for tilt, (image, mask) in enumerate(zip(images, valid, strict=True)):
        seen = image[mask]
        if seen.size == 0:
            raise FormatError(f"projection {tilt} has no valid pixel; leave the tilt out")
        bad = np.argwhere(mask & ~np.isfinite(image))
        if len(bad):
            raise FormatError(
                f"projection {tilt}: {len(bad)} of {seen.size} valid pixels are not numbers, the first at"
                f" (y, x) = ({bad[0][0]}, {bad[0][1]}); mark them as not valid, or leave the tilt out"
            )
        if seen.max() == seen.min():
            raise FormatError(
                f"projection {tilt} is constant ({seen[0]:.4g} rad in all {seen.size} valid pixels); "
                "it shows nothing (beam blanked, or a failed reconstruction): leave the tilt out"
            )


def diagnoses(images: np.ndarray, valid: np.ndarray, rotations: np.ndarray) -> list[Diagnosis]:
    """Return what is likely wrong with the poses ``rotations`` (tilt, 3, 3) of a specimen wholly in view.

    A series about one axis does not tell its sense of rotation, nor a mirrored image: both mirror the volume.
    """
    if len(images) < _FEWEST:
        return []
    moments = central_moments(images, valid)
    given = misfit(moments, rotations)
    if given < _ENOUGH:
        return []
    found = [
        *_usual_orders(moments, rotations, given),
        _axis(moments, rotations, given),
        *_senses(moments, rotations, given),
    ]
    likely = [each for each in found if each.corrected < given / _BETTER]
    if not likely:
        likely = [
            each for each in [_any_order(moments, rotations, given)] if each.corrected < given / _BETTER_BY_SEARCH
        ]
    return sorted(likely, key=lambda each: each.corrected)[:1]


def central_moments(images: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the moments (tilt, 7) of second and third order of every projection, in units of the specimen's radius."""
    found = np.empty((len(images), len(_SEEN)))
    for tilt, (image, mask) in enumerate(zip(images, valid, strict=True)):
        weight = np.where(mask & near_specimen(image, mask), image, 0.0).astype(np.float64)
        total = weight.sum()
        if total <= 0:
            found[tilt] = 0
            continue
        y, x = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in image.shape), indexing="ij")
        x, y = x - (weight * x).sum() / total, y - (weight * y).sum() / total
        axes = {"x": x, "y": y}
        found[tilt] = [(weight * math.prod((axes[a] for a in name), start=1.0)).sum() / total for name in _SEEN]
    radius = math.sqrt(max(float(np.mean(found[:, 0] + found[:, 2])), 1e-30))
    return found / radius ** np.array([len(name) for name in _SEEN])


def misfit(moments: np.ndarray, rotations: np.ndarray) -> float:
    """Return the root mean square by which ``moments`` (tilt, 7) disagree with those of any specimen."""
    return float(np.sqrt(np.mean((predicted(moments, rotations) - moments) ** 2)))


def predicted(moments: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Return the moments (tilt, 7) of the specimen that agrees best with ``moments``, as seen at ``rotations``."""
    out = np.empty_like(moments)
    for columns, order in ((slice(0, 3), 2), (slice(3, 7), 3)):
        names = _SEEN[columns]
        matrix = np.stack([_views(rotations, name, order) for name in names], axis=1)
        flat = matrix.reshape(-1, matrix.shape[-1])
        solution = np.linalg.lstsq(flat, moments[:, columns].ravel(), rcond=1e-9)[0]
        out[:, columns] = matrix @ solution
    return out


def _views(rotations: np.ndarray, name: str, order: int) -> np.ndarray:
    """Return by how much every independent moment of the specimen enters the seen moment ``name``: (tilt, moment)."""
    seen = [np.asarray(rotations)[:, :, "xy".index(axis)] for axis in name]
    columns: dict[tuple[int, ...], np.ndarray] = {}
    for indices in itertools.product(range(3), repeat=order):
        term = np.prod([view[:, i] for view, i in zip(seen, indices, strict=True)], axis=0)
        key = tuple(sorted(indices))
        columns[key] = columns.get(key, 0) + term
    return np.stack([columns[key] for key in sorted(columns)], axis=1)


def _axis(moments: np.ndarray, rotations: np.ndarray, given: float) -> Diagnosis:
    """Look for a turn of the images in their plane."""
    turns = np.arange(-85, 91, 5)
    errors = [misfit(moments, rotations @ _about_z(math.radians(turn))) for turn in turns]
    turn = int(turns[int(np.argmin(errors))])
    text = (
        f"the tilt axis seems to lie {turn} degrees from where the angles say, in the plane of the images"
        + (" (along x instead of y: turn the images)" if abs(turn) == 90 else "")
        + "; correct phi_deg or the rotation of the scan"
    )
    return Diagnosis("tilt_axis", text, given, float(min(errors)) if abs(turn) >= 5 else given)


def _senses(moments: np.ndarray, rotations: np.ndarray, given: float) -> list[Diagnosis]:
    """Look for angles of the other sense and for mirrored images, which several axes can tell."""
    rotations = np.asarray(rotations)
    mirrored, across = np.diag([-1.0, 1.0, -1.0]), np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    return [
        Diagnosis(
            "tilt_axis",
            "the tilt axis seems to lie along x instead of y: transpose the images",
            given,
            misfit(moments, rotations @ across),
        ),
        Diagnosis(
            "tilt_sense",
            "the angles seem to be counted in the other sense; negate them (all rotations are the inverse ones)",
            given,
            misfit(moments, rotations.transpose(0, 2, 1)),
        ),
        Diagnosis(
            "mirrored",
            "the images seem to be mirrored; flip them along x",
            given,
            misfit(moments, rotations @ mirrored),
        ),
    ]


def _usual_orders(moments: np.ndarray, rotations: np.ndarray, given: float) -> list[Diagnosis]:
    """Look for orders in which series are often recorded or kept."""
    thetas = np.arctan2(rotations[:, 0, 2], rotations[:, 2, 2])
    rank = np.argsort(thetas, kind="stable")
    symmetric = rank[np.argsort(np.abs(thetas[rank]), kind="stable")]
    upward = [i for i in rank if thetas[i] >= 0]
    downward = [i for i in rank[::-1] if thetas[i] < 0]
    orders = {
        "sorted by angle": rank,
        "from small angles to large, both senses in turn": symmetric,
        "from zero upwards, then from zero downwards": np.array([*upward, *downward]),
    }
    text = "the projections seem to be in another order than their angles: {}; sort the angles (or the files) alike"
    return [
        Diagnosis("tilt_order", text.format(name), given, misfit(moments, rotations[order]))
        for name, order in orders.items()
        if not np.array_equal(order, np.arange(len(order)))
    ]


def _any_order(moments: np.ndarray, rotations: np.ndarray, given: float) -> Diagnosis:
    """Look for the angle that every projection fits best."""
    error, order = _assigned(moments, rotations, np.arange(len(moments)))
    wrong = np.flatnonzero(order != np.arange(len(order)))
    shown = ", ".join(f"{tilt} fits the angle of {order[tilt]}" for tilt in wrong[:4]) + ", ..." * (len(wrong) > 4)
    text = f"the projections seem to be in another order than their angles: {shown}; put them right"
    return Diagnosis("tilt_order", text, given, error)


def _assigned(moments: np.ndarray, rotations: np.ndarray, order: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the misfit and the order after some rounds of giving every projection the angle it fits best."""
    best, kept = misfit(moments, rotations[order]), order
    for _ in range(4):
        views = np.empty_like(moments)
        views[order] = predicted(moments, rotations[order])
        distance = np.abs(moments[:, None] - views[None]).sum(axis=2)
        _, columns = linear_sum_assignment(distance)
        if np.array_equal(columns, order):
            break
        order = columns
        error = misfit(moments, rotations[order])
        if error < best:
            best, kept = error, order
    return best, kept


def _about_z(angle_rad: float) -> np.ndarray:
    c, s = math.cos(angle_rad), math.sin(angle_rad)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
