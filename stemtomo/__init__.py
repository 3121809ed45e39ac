"""stemtomo: raw 4D-STEM tilt series to three-dimensional volumes and atoms, out of core, on a laptop or a cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stemtomo.geometry import Detector, Optics, Pose, Scan, TiltSeries
    from stemtomo.io.tree import open
    from stemtomo.pipeline.alignment import align
    from stemtomo.pipeline.atoms import find_atoms
    from stemtomo.pipeline.calibrate import calibrate
    from stemtomo.pipeline.focal_series import add_focal_series, simulate_particle
    from stemtomo.pipeline.import_stack import import_stack
    from stemtomo.pipeline.ingest_series import ingest
    from stemtomo.pipeline.joint import joint
    from stemtomo.pipeline.lattice import lattice
    from stemtomo.pipeline.local_orbital import local_orbital
    from stemtomo.pipeline.order import order
    from stemtomo.pipeline.plan import plan
    from stemtomo.pipeline.projections import projections
    from stemtomo.pipeline.ptychography import ptychography
    from stemtomo.pipeline.quicklook import quicklook
    from stemtomo.pipeline.references import load_configuration
    from stemtomo.pipeline.resolution import resolution
    from stemtomo.pipeline.run import run
    from stemtomo.pipeline.score import score, score_atoms
    from stemtomo.pipeline.simulate import simulate
    from stemtomo.pipeline.strain import strain
    from stemtomo.pipeline.study import study
    from stemtomo.pipeline.tomography import tomography
    from stemtomo.pipeline.track import track
    from stemtomo.pipeline.underway import underway
    from stemtomo.pipeline.watch import watch
    from stemtomo.reporting import report

#: Public name and the module it lives in; imported when first used, so that ``import stemtomo`` costs nothing.
_HOME = {
    "Detector": "stemtomo.geometry",
    "Optics": "stemtomo.geometry",
    "Pose": "stemtomo.geometry",
    "Scan": "stemtomo.geometry",
    "TiltSeries": "stemtomo.geometry",
    "add_focal_series": "stemtomo.pipeline.focal_series",
    "align": "stemtomo.pipeline.alignment",
    "calibrate": "stemtomo.pipeline.calibrate",
    "find_atoms": "stemtomo.pipeline.atoms",
    "import_stack": "stemtomo.pipeline.import_stack",
    "ingest": "stemtomo.pipeline.ingest_series",
    "joint": "stemtomo.pipeline.joint",
    "lattice": "stemtomo.pipeline.lattice",
    "load_configuration": "stemtomo.pipeline.references",
    "local_orbital": "stemtomo.pipeline.local_orbital",
    "open": "stemtomo.io.tree",
    "order": "stemtomo.pipeline.order",
    "plan": "stemtomo.pipeline.plan",
    "projections": "stemtomo.pipeline.projections",
    "ptychography": "stemtomo.pipeline.ptychography",
    "quicklook": "stemtomo.pipeline.quicklook",
    "report": "stemtomo.reporting",
    "resolution": "stemtomo.pipeline.resolution",
    "run": "stemtomo.pipeline.run",
    "score": "stemtomo.pipeline.score",
    "score_atoms": "stemtomo.pipeline.score",
    "simulate": "stemtomo.pipeline.simulate",
    "simulate_particle": "stemtomo.pipeline.focal_series",
    "strain": "stemtomo.pipeline.strain",
    "study": "stemtomo.pipeline.study",
    "tomography": "stemtomo.pipeline.tomography",
    "track": "stemtomo.pipeline.track",
    "underway": "stemtomo.pipeline.underway",
    "watch": "stemtomo.pipeline.watch",
}

__all__ = [
    "Detector",
    "Optics",
    "Pose",
    "Scan",
    "TiltSeries",
    "add_focal_series",
    "align",
    "calibrate",
    "find_atoms",
    "import_stack",
    "ingest",
    "joint",
    "lattice",
    "load_configuration",
    "local_orbital",
    "open",
    "order",
    "plan",
    "projections",
    "ptychography",
    "quicklook",
    "report",
    "resolution",
    "run",
    "score",
    "score_atoms",
    "simulate",
    "simulate_particle",
    "strain",
    "study",
    "tomography",
    "track",
    "underway",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
