"""What local-orbital tomography will need, from numbers alone: before there is a store, or from its metadata."""

from __future__ import annotations

import math
from typing import NamedTuple

from stemtomo.algorithms.local_orbital.convolution import padded_shape
from stemtomo.algorithms.local_orbital.insertion import SITES_TOGETHER
from stemtomo.algorithms.local_orbital.model import slices_for
from stemtomo.distributed import PlanRow
from stemtomo.distributed.parts import FAN_IN
from stemtomo.pipeline.settings.local_orbital import LocalOrbitalSettings

#: Processor seconds of one core per image: for a pair of slices n log2(n) of its n pixels, and for an atom. Measured
#: with 1,000 to 25,000 atoms, within 10 %.
_SECONDS_PER_PIXEL_STEP, _SECONDS_PER_ATOM = 1.7e-9, 1.9e-7
#: Of a site that is asked whether an atom is missing there, and sites per atom; of a probe of one slice and section.
_SECONDS_PER_SITE, _SITES_PER_ATOM, _SECONDS_PER_PROBE = 2.6e-8, 50, 2.2e-3
_BYTES_PER_SITE = 76
#: Images of every section that a focus is looked for in, foci that are tried before the first search and before each
#: of the next, and the share of a pass over these images that drawing them is.
_IMAGES_FOR_FOCUS, _FIRST_FOCI, _NEXT_FOCI, _DRAWING = 4, 27, 9, 0.8
#: Positions, intensity, width; with their gradients and the pairs of steps that the search remembers.
_FLOATS_PER_ATOM, _COPIES = 5, 24
_ATOMS_PER_CUBIC_ANGSTROM = 0.05


class Size(NamedTuple):
    """How large a problem is."""

    images: int
    shape_yx: tuple[int, int]
    pixel_angstrom: float
    sections: int
    atoms: int
    diameter_angstrom: float


def size_of_particle(
    atoms: int, pixel_angstrom: float, images: int, sections: int, density: float = _ATOMS_PER_CUBIC_ANGSTROM
) -> Size:
    """Return the size of a round particle of ``atoms`` atoms in images 10 Å wider than it is."""
    diameter = 2 * (3 * atoms / (4 * math.pi * density)) ** (1 / 3)
    edge = 2 * math.ceil((diameter + 10) / pixel_angstrom / 2)
    return Size(images, (edge, edge), pixel_angstrom, sections, atoms, diameter)


def window_px(settings: LocalOrbitalSettings, pixel_angstrom: float) -> int:
    """Return the edge of the probes' window in pixels."""
    return 2 * max(2, round(settings.window_angstrom / pixel_angstrom / 2))


def slices_of(settings: LocalOrbitalSettings, extent_angstrom: float) -> int:
    """Return how many slices the model has for a specimen of this extent."""
    return 1 if settings.model == "linear" else slices_for(extent_angstrom, settings.slice_thickness_angstrom)


def epoch_seconds(size: Size, settings: LocalOrbitalSettings) -> float:
    """Return the processor seconds of one pass over all images: loss and all derivatives, on one core."""
    pixels, slices = _padded(size, settings), slices_of(settings, size.diameter_angstrom + 4)
    transforms = -(-slices // 2) * pixels * math.log2(pixels)
    return size.images * (_SECONDS_PER_PIXEL_STEP * transforms + _SECONDS_PER_ATOM * size.atoms)


def _search_seconds(size: Size, settings: LocalOrbitalSettings) -> float:
    """Return the processor seconds of what comes between searches: foci and missing atoms, in every round."""
    sites = _SITES_PER_ATOM * size.atoms
    asking = size.images * sites * _SECONDS_PER_SITE + -(-sites // SITES_TOGETHER) * epoch_seconds(size, settings)
    asking *= settings.rounds
    if settings.model == "linear" or settings.start_defocus_angstrom is not None:
        return asking
    seen = min(1.0, _IMAGES_FOR_FOCUS * size.sections / size.images)
    probes = size.sections * slices_of(settings, size.diameter_angstrom + 4)
    once = _DRAWING * seen * epoch_seconds(size, settings) + _SECONDS_PER_PROBE * probes
    return asking + (_FIRST_FOCI + _NEXT_FOCI * settings.rounds) * once


def plan_for(size: Size, settings: LocalOrbitalSettings | None = None) -> PlanRow:
    """Return what a problem of this size holds, reads and takes on one core; time for the longest schedule."""
    settings = settings or LocalOrbitalSettings()
    itemsize = 4 if settings.precision == "single" else 8
    slices = 2 * -(-slices_of(settings, size.diameter_angstrom + 4) // 2)
    pixels = math.prod(size.shape_yx)
    tasks = -(-size.images // settings.images_per_part)
    # The slices, their spectra, those of one section's probes and of their gradient; a table of ten per atom, and what
    # is summed: a part's own derivatives, then some parts' derivatives of a block of atoms.
    derivatives = 8 * _FLOATS_PER_ATOM * size.atoms
    added = 8 * _FLOATS_PER_ATOM * min(settings.atoms_per_block, size.atoms) * (min(FAN_IN, tasks) + 1)
    working = _padded(size, settings) * itemsize * slices * 4 + 10 * 8 * size.atoms
    working += max(derivatives, added)
    probes = size.sections * slices * window_px(settings, size.pixel_angstrom) ** 2
    search = 8 * _COPIES * (_FLOATS_PER_ATOM * size.atoms + probes)
    # Between searches, sites at which atoms may be missing, and what every part reads at them.
    sites = _SITES_PER_ATOM * size.atoms * min(1, settings.rounds)
    search = max(search, (_BYTES_PER_SITE + (3 + tasks) * itemsize) * min(sites, SITES_TOGETHER) + 4 * sites)
    passes = settings.atom_iterations * (1 + settings.rounds)
    passes += settings.probe_iterations * (0 if settings.model == "rigid" else settings.probe_searches)
    passes += settings.tilt_iterations * settings.refine_angles + settings.last_iterations
    return PlanRow(
        stage="local_orbital",
        tasks=tasks,
        bytes_per_task=working,
        bytes_read=size.images * pixels * 4,
        bytes_written=10 * 8 * size.atoms,
        seconds=passes * epoch_seconds(size, settings) + _search_seconds(size, settings),
        # Every part's derivatives wait until the last of those that they are added to are there.
        resident_bytes=size.images * pixels * itemsize + search + tasks * derivatives,
    )


def _padded(size: Size, settings: LocalOrbitalSettings) -> int:
    window = window_px(settings, size.pixel_angstrom)
    return math.prod(padded_shape(size.shape_yx, (window, window)))
