"""From growing files to atoms in one call: phases of a tilt while the next is recorded, then every stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.io.store import Store
from stemtomo.pipeline.references import parse_configuration
from stemtomo.pipeline.simulate import simulate
from stemtomo.pipeline.specimen import write_specimen
from stemtomo.pipeline.watch import watch
from tests.clock import ScriptedClock
from tests.pipeline.test_demo import PARTICLE, SIMULATION

TILTS = len(SIMULATION.tilt_deg)


class AtOnce(ThreadExecutor):
    """A task has ended when it has been submitted: what is there does not depend on the speed of threads."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        handle = super().submit(function, *args, **kwargs)
        self.wait([handle])
        return handle


def told(folder: Path) -> Any:
    optics, scan, detector = SIMULATION.optics, SIMULATION.scan, SIMULATION.detector
    return parse_configuration(
        {
            "series": {"name": "s"},
            "input": {
                "path": str(folder / "in"),
                "files": "tilt_{theta_deg}.raw",
                "axes": ["y", "x", "ky", "kx"],
                "dtype": "<u2",
                "shape": [*scan.shape_yx, *detector.shape_yx],
            },
            "optics": {
                "energy_kev": SIMULATION.energy_kev,
                "semiangle_mrad": SIMULATION.semiangle_mrad,
                "defocus_c1_angstrom": SIMULATION.defocus_c1_angstrom,
                "defocus_plane_z_angstrom": optics.defocus_plane_z_angstrom,
            },
            "scan": {"step_angstrom": SIMULATION.scan_step_angstrom},
            "detector": {"pixel_inv_angstrom": detector.pixel_inv_angstrom},
            "tilts": {"theta_deg": list(SIMULATION.tilt_deg)},
            "ptychography": {"epochs": 12, "settling_epochs": 6},
            "tomography": {"iterations": 80},
            "atoms": {"species": list(PARTICLE.species)},
            "score": {"truth": str(folder / "truth.xyz")},
            "watch": {"poll_s": 1.0, "deadline_s": 20.0, "publish_s": 0.0, "then_run": True},
        }
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Frames of every tilt as a detector writes them."""
    path = tmp_path_factory.mktemp("made") / "made.zarr"
    simulate(path, PARTICLE, SIMULATION, executor=ThreadExecutor(1))
    return [Store.open(path).frames(tilt)[:].astype("<u2").tobytes() for tilt in range(TILTS)]


@pytest.mark.heavy
def test_atoms_of_a_series_that_was_watched(tmp_path: Path, recorded: list[bytes]) -> None:
    (tmp_path / "in").mkdir()
    write_specimen(tmp_path / "truth.xyz", PARTICLE)
    seen: list[tuple[int, list[int], bool]] = []

    def record(tilt: int, half: int) -> None:
        store = Store(tmp_path / "s.zarr")
        phases = [n for n in range(TILTS) if store.fingerprint(f"ptychography/{n:03d}")]
        seen.append((tilt, phases, store.fingerprint("atoms") is not None))
        size = len(recorded[tilt]) // 2 + 11
        with (tmp_path / "in" / f"tilt_{SIMULATION.tilt_deg[tilt]:g}.raw").open("ab") as file:
            file.write(recorded[tilt][size * half : size * (half + 1)])

    steps: list[Callable[[], None]] = [lambda t=t, h=h: record(t, h) for t in range(TILTS) for h in range(2)]
    reports = watch(
        tmp_path / "in", tmp_path / "s.zarr", told(tmp_path), clock=ScriptedClock(steps), executor=AtOnce(1)
    )
    numbers: dict[str, Any] = {}
    while not numbers:
        try:
            next(reports)
        except StopIteration as end:
            numbers = end.value
    # While a tilt is recorded there are the phases of all before it, and no atoms yet.
    assert seen == [(tilt, list(range(tilt)), False) for tilt in range(TILTS) for _ in range(2)]
    result = numbers["run"]
    assert result["stages"]["ptychography"]["computed"] == 0
    assert (result["recall"], result["precision"], result["species_accuracy"]) == (1, 1, 1)
    assert result["rmsd_pm"] < 10
