"""``python -m tests.benchmarks.joint_study [FOLDER]``: the conditions of the MSET paper, on a particle of 297 atoms.

Dose at two defoci, the missing wedge, and the step of the scan (Lee et al., Phys. Rev. Applied 19, 054062 (2023)), each
simulated with frozen phonons, reconstructed in three ways and scored blindly. A nightly measurement: about half an hour
of processor time; in a FOLDER that is kept, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from stemtomo.distributed.threads import ThreadExecutor
from stemtomo.pipeline.simulate import SimulationSettings
from stemtomo.pipeline.specimen import Specimen
from stemtomo.pipeline.study import StudySettings, markdown, study
from tests.data import FOLDER

#: As many electrons as make counting noise vanish beside everything else.
WITHOUT_NOISE = 2e9
TILTS_DEG = tuple(float(angle) for angle in np.linspace(-75, 75, 12))
#: Fields, tilts and probe of the paper, at the size of this particle.
SIMULATION = SimulationSettings(
    defocus_c1_angstrom=-200, tilt_deg=TILTS_DEG, scan_shape=(20, 20), dose_per_square_angstrom=2e5
)
STUDIES = {
    "dose": StudySettings(
        dose_per_square_angstrom=(2e3, 1.25e4, 2e5, 2e6, WITHOUT_NOISE), defocus_c1_angstrom=(0.0, -200.0)
    ),
    "wedge": StudySettings(tilt_range_deg=(25.0, 50.0, 75.0, 90.0)),
    "step": StudySettings(scan_step_angstrom=(0.8, 1.6, 3.2)),
}


def particle() -> Specimen:
    """Return the CuAu particle whose atoms are known."""
    with np.load(FOLDER / "cuau_tilt" / "truth.npz") as truth:
        return Specimen(truth["atoms_xyz_A"], truth["atomic_numbers"], "CuAu particle of 297 atoms")


def main() -> None:
    """Print one table per condition that is varied."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.joint_study", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where to keep stores and tables; a temporary one if none")
    parser.add_argument("--only", choices=STUDIES, action="append", help="only this table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for name in given.only or STUDIES:
            told = STUDIES[name].model_copy(update={"ways": ("joint", "single_slice", "sequential")})
            found = study(folder / name, particle(), told, simulation=SIMULATION, executor=ThreadExecutor(1))
            print(f"\n{name}\n{markdown(found['rows'])}", flush=True)


if __name__ == "__main__":
    main()
