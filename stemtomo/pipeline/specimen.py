"""Specimens made of atoms: a core-shell nanoparticle to simulate, and atoms as XYZ files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from stemtomo.errors import ConfigurationError
from stemtomo.io.export import read_atoms, write_xyz
from stemtomo.io.structures import read_structure
from stemtomo.physics.potential import atomic_number, chemical_symbol

_FCC_BASIS = np.array([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])


@dataclass(frozen=True)
class Specimen:
    """Atoms at rest in sample coordinates.

    Parameters
    ----------
    positions
        (atom, 3), columns x, y, z in Å from the rotation centre.
    atomic_numbers
        (atom,).
    description
        One line for people.
    """

    positions: np.ndarray
    atomic_numbers: np.ndarray
    description: str = ""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def species(self) -> tuple[str, ...]:
        """Chemical symbols, lightest first."""
        return tuple(chemical_symbol(int(number)) for number in np.unique(self.atomic_numbers))

    @property
    def radius_angstrom(self) -> float:
        """Distance of the outermost atom from the rotation centre in Å."""
        return float(np.linalg.norm(self.positions, axis=1).max())


def core_shell_nanoparticle(
    seed: int = 1,
    diameter_angstrom: float = 19.0,
    *,
    core: str = "Cu",
    shell: str = "Au",
    shell_angstrom: float = 3.0,
    lattice_angstrom: float = 3.78,
    displacement_angstrom: float = 0.2,
    missing_fraction: float = 0.05,
) -> Specimen:
    """Return a spherical fcc particle with a core and a shell, in a random orientation.

    A cap of the surface is cut off and single surface atoms are missing, so that no symmetry can stand in for a right
    answer.

    Parameters
    ----------
    seed
        Of orientation, displacements and missing atoms; the same seed gives the same particle.
    diameter_angstrom
        Diameter of the sphere.
    core, shell
        Chemical symbols.
    shell_angstrom
        Thickness of the shell.
    lattice_angstrom
        Edge of the fcc cell.
    displacement_angstrom
        Static random displacement of every atom, root mean square of the three-dimensional distance.
    missing_fraction
        Share of the atoms of the outermost 2.5 Å that are missing beside the cap.
    """
    rng = np.random.default_rng(seed)
    radius = diameter_angstrom / 2
    cells = np.arange(-int(np.ceil(radius / lattice_angstrom)) - 1, int(np.ceil(radius / lattice_angstrom)) + 2)
    corners = np.stack(np.meshgrid(cells, cells, cells, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    lattice = ((corners + _FCC_BASIS).reshape(-1, 3) + rng.uniform(0, 0.5, 3)) * lattice_angstrom
    lattice = lattice @ Rotation.random(random_state=rng).as_matrix().T
    distance = np.linalg.norm(lattice, axis=1)
    pole = rng.normal(size=3)
    pole /= np.linalg.norm(pole)
    missing = (distance > radius - 2.5) & (rng.random(len(lattice)) < missing_fraction)
    kept = (distance <= radius) & (lattice @ pole < 0.8 * radius) & ~missing
    positions, distance = lattice[kept], distance[kept]
    positions = positions + rng.normal(0, displacement_angstrom / np.sqrt(3), positions.shape)
    numbers = np.where(distance > radius - shell_angstrom, atomic_number(shell), atomic_number(core))
    return Specimen(
        positions - positions.mean(axis=0),
        numbers.astype(np.int64),
        f"{core}-{shell} core-shell particle, {len(positions)} atoms, {diameter_angstrom:g} Å across, seed {seed}",
    )


def write_specimen(path: str | Path, specimen: Specimen) -> None:
    """Write ``specimen`` as extended XYZ (Å), replacing ``path`` in one step."""
    symbols = [chemical_symbol(int(number)) for number in specimen.atomic_numbers]
    write_xyz(Path(path), specimen.positions, symbols, comment={"description": specimen.description})


def read_specimen(path: str | Path) -> Specimen:
    """Read a specimen from XYZ (Å), or from an ``.npz`` with ``atoms_xyz_A`` (n, 3) and ``atomic_numbers`` (n,).

    Raises
    ------
    FormatError
        If the file cannot be read, see :func:`stemtomo.io.export.read_atoms`.
    ConfigurationError
        If the species of an atom is not known.
    """
    path = Path(path)
    positions, symbols = read_atoms(path)
    numbers = np.array([atomic_number(symbol) for symbol in symbols], dtype=np.int64)
    return Specimen(positions, numbers, path.name)


def kept_specimen(path: Path, specimen: Specimen) -> Path:
    """Write ``specimen`` to ``path``, or check that it is the one that is there; return ``path``.

    Raises
    ------
    ConfigurationError
        If another one is there.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_specimen(path, specimen)
        return path
    kept = read_specimen(path)
    same = len(kept) == len(specimen) and np.array_equal(kept.atomic_numbers, specimen.atomic_numbers)
    if not same or np.abs(kept.positions - specimen.positions).max() > 1e-5:  # XYZ keeps six decimals
        raise ConfigurationError(
            f"{path} holds {len(kept)} atoms of another specimen than the one to simulate ({specimen.description}); "
            "choose another folder, or remove this one"
        )
    return path


def specimen_of(path: str | Path) -> Specimen:
    """Read a specimen from any file of atoms that :func:`stemtomo.io.structures.read_structure` reads (CIF, PDB, ...).

    Its middle, the mean of the extremes along each axis, becomes the rotation centre.

    Raises
    ------
    FormatError
        If the file cannot be read.
    ConfigurationError
        If the species of an atom is not known.
    """
    path = Path(path)
    atoms = read_structure(path)
    positions = np.stack([atoms[axis].values for axis in "xyz"], axis=1).astype(float)
    numbers = np.array([atomic_number(str(symbol)) for symbol in atoms["species"].values], dtype=np.int64)
    middle = (positions.min(axis=0) + positions.max(axis=0)) / 2
    return Specimen(positions - middle, numbers, path.name)
