"""Atoms in three dimensions, on a canvas that can be turned; the script is atoms.js."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stemtomo.reporting import markup

_MOST_ATOMS_DRAWN = 60_000
BALL_ANGSTROM = 0.85


class Kind(NamedTuple):
    """Atoms that are drawn alike and can be switched off together."""

    name: str
    colour: str
    radius: float = BALL_ANGSTROM
    shown: bool = True


def canvas(anchor: str, positions: np.ndarray, kind: np.ndarray, kinds: Sequence[Kind]) -> str:
    """Return a canvas with atoms at ``positions`` (atom, 3) in Å; ``kind`` (atom,) numbers ``kinds``."""
    step = max(1, -(-len(positions) // _MOST_ATOMS_DRAWN))
    content = {
        **{axis: np.round(positions[::step, i], 3).tolist() for i, axis in enumerate("xyz")},
        "kind": [int(number) for number in kind[::step]],
        "species": [{"name": k.name, "colour": k.colour, "radius": k.radius, "shown": k.shown} for k in kinds],
        "radius": max(k.radius for k in kinds),
    }
    boxes = "".join(
        f'<label><input type="checkbox"{" checked" if k.shown else ""} data-kind="{index}">'
        f'<i class="swatch" style="background:{k.colour}"></i>{markup.escape(k.name)}</label>'
        for index, k in enumerate(kinds)
    )
    views = "".join(f'<button type="button" data-view="{axis}">along {axis}</button>' for axis in "zyx")
    some = f"; every {step}th atom is drawn" if step > 1 else ""
    return (
        f'<div class="atoms"><canvas id="{anchor}-canvas" data-atoms="{anchor}-data" tabindex="0" role="img" '
        f'aria-label="Atoms in three dimensions"></canvas><div class="bar">{boxes}<span style="flex:1"></span>{views}'
        f'<span class="soft">drag to turn, wheel to zoom{some}</span></div></div>'
        + markup.data_script(f"{anchor}-data", content)
    )
