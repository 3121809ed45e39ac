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
    from stemtomo.pipeline.ingest_series import ingest
    from stemtomo.pipeline.plan import plan
    from stemtomo.pipeline.projections import projections
    from stemtomo.pipeline.ptychography import ptychography
    from stemtomo.pipeline.quicklook import quicklook
    from stemtomo.pipeline.references import load_configuration
    from stemtomo.pipeline.run import run
    from stemtomo.pipeline.score import score
    from stemtomo.pipeline.simulate import simulate
    from stemtomo.pipeline.tomography import tomography
    from stemtomo.pipeline.watch import watch
    from stemtomo.reporting import report

#: Public name and the module it lives in; imported when first used, so that ``import stemtomo`` costs nothing.
_HOME = {
    "Detector": "stemtomo.geometry",
    "Optics": "stemtomo.geometry",
    "Pose": "stemtomo.geometry",
    "Scan": "stemtomo.geometry",
    "TiltSeries": "stemtomo.geometry",
    "align": "stemtomo.pipeline.alignment",
    "calibrate": "stemtomo.pipeline.calibrate",
    "find_atoms": "stemtomo.pipeline.atoms",
    "ingest": "stemtomo.pipeline.ingest_series",
    "load_configuration": "stemtomo.pipeline.references",
    "open": "stemtomo.io.tree",
    "plan": "stemtomo.pipeline.plan",
    "projections": "stemtomo.pipeline.projections",
    "ptychography": "stemtomo.pipeline.ptychography",
    "quicklook": "stemtomo.pipeline.quicklook",
    "report": "stemtomo.reporting",
    "run": "stemtomo.pipeline.run",
    "score": "stemtomo.pipeline.score",
    "simulate": "stemtomo.pipeline.simulate",
    "tomography": "stemtomo.pipeline.tomography",
    "watch": "stemtomo.pipeline.watch",
}

__all__ = [
    "Detector",
    "Optics",
    "Pose",
    "Scan",
    "TiltSeries",
    "align",
    "calibrate",
    "find_atoms",
    "ingest",
    "load_configuration",
    "open",
    "plan",
    "projections",
    "ptychography",
    "quicklook",
    "report",
    "run",
    "score",
    "simulate",
    "tomography",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
