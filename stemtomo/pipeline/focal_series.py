"""Focal tilt series of incoherent images: reading them, keeping them in a store, making them up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr

from stemtomo.algorithms.local_orbital.scattered import DarkField, dark_field_image
from stemtomo.algorithms.local_orbital.specimens import amorphous_particle, counted, focal_tilt_series
from stemtomo.distributed import Executor
from stemtomo.distributed import executor as default_executor
from stemtomo.errors import ConfigurationError, FormatError
from stemtomo.geometry import Optics, Pose, TiltSeries
from stemtomo.io.provenance import Provenance
from stemtomo.io.store import Store
from stemtomo.io.untrusted import reading
from stemtomo.locations import location
from stemtomo.physics.electron import wavelength_angstrom

GROUP = "focal_series"
_SILICON = 14
_NEEDED = ("images", "theta_deg", "pixel_angstrom", "energy_kev", "semiangle_mrad")
_OPTIONAL = ("phi_deg", "psi_deg", "c1_angstrom", "c3_angstrom", "defocus_plane_z_angstrom")
_ANGLES = ("theta_deg", "phi_deg", "psi_deg")


def read_focal_series(path: str | Path) -> dict[str, np.ndarray]:
    """Return the members of a focal tilt series in an .npz or HDF5 file.

    Needed: ``images`` (tilt, section, y, x) or (tilt, y, x), the rotation centre at index n // 2; ``theta_deg``
    (tilt,); ``pixel_angstrom``; ``energy_kev``; ``semiangle_mrad``. Optional: ``phi_deg``, ``psi_deg`` (tilt,);
    ``c1_angstrom`` (minus the defocus), ``c3_angstrom``, ``defocus_plane_z_angstrom``.

    Raises
    ------
    FormatError
        If the file cannot be read, a member is missing, shapes do not agree or values are not finite.
    """
    path, names = Path(path), (*_NEEDED, *_OPTIONAL)
    with reading(path, "a focal series (.npz or HDF5)", f"give a file with {', '.join(_NEEDED)}"):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                found = {name: archive[name] for name in names if name in archive}
        else:
            with h5py.File(path, "r") as file:
                found = {name: np.asarray(file[name]) for name in names if name in file}
    return _checked(str(path), found)


def add_focal_series(store: Store | str | Path, members: Mapping[str, Any] | str | Path) -> Store:
    """Put a focal tilt series, a file or its members (see :func:`read_focal_series`), into a store; return that.

    A store that is not there is made.

    Raises
    ------
    FormatError
        See :func:`read_focal_series`.
    """
    found = read_focal_series(members) if isinstance(members, str | Path) else _checked("the series", dict(members))
    if not isinstance(store, Store):
        path = location(store)
        store = Store.open(path, "r+") if path.exists() else Store.create(path, path.stem)
    images = found["images"]
    tilts, sections = images.shape[:2]
    whole = images.reshape(tilts * sections, *images.shape[2:])
    variables: dict[str, Any] = {
        "images": (("image", "y", "x"), whole),
        "section": (("image",), np.tile(np.arange(sections, dtype=np.int64), tilts)),
    }
    for name in _ANGLES:
        variables[name] = (("image",), np.repeat(found.get(name, np.zeros(tilts)), sections).astype(np.float64))
    attrs = {name: float(found[name].item()) for name in (*_NEEDED[2:], *_OPTIONAL[2:]) if name in found}
    content = {name: hashlib.sha256(np.ascontiguousarray(value).data).hexdigest() for name, value in found.items()}
    provenance = Provenance.start(GROUP, {"shape": list(images.shape)}, content)
    if not store.is_complete(GROUP, provenance.fingerprint):
        store.write(GROUP, xr.Dataset(variables, attrs=attrs), provenance)
    return store


def optics_of(series: xr.Dataset) -> Optics:
    """Return the optics that a stored series was taken with."""
    attrs = series.attrs
    aberrations = {"C10": attrs.get("c1_angstrom", 0.0), "C30": attrs.get("c3_angstrom", 0.0)}
    plane = attrs.get("defocus_plane_z_angstrom", 0.0)
    return Optics(attrs["energy_kev"] * 1e3, attrs["semiangle_mrad"] * 1e-3, aberrations, plane)


def rotations_of(series: xr.Dataset) -> np.ndarray:
    """Return R of every image, (image, 3, 3)."""
    theta, phi, psi = (np.radians(series[name].values) for name in _ANGLES)
    poses = (
        Pose(theta_rad=float(t), phi_rad=float(f), psi_rad=float(s)) for t, f, s in zip(theta, phi, psi, strict=True)
    )
    return np.stack([pose.rotation for pose in poses])


def simulate_particle(
    path: str | Path,
    *,
    atoms: int = 2000,
    theta_deg: Sequence[float] | None = None,
    sections: int = 3,
    pixel_angstrom: float = 0.34,
    energy_kev: float = 300.0,
    semiangle_mrad: float = 25.0,
    width_angstrom: float = 0.35,
    electrons_per_atom: float | None = None,
    multislice: bool = False,
    seed: int = 0,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Write a focal tilt series of an amorphous silicon particle, with its known atoms, to ``path`` (.npz).

    Images are incoherent sums over the atoms of the probe at each one's depth, or come from frozen-phonon multislice.
    The foci of ``sections`` images per tilt lie evenly within the middle half of the particle, as in Mao et al. (2024).

    Parameters
    ----------
    theta_deg
        Tilts; -70 to 70 in steps of 2 degrees times the number of sections if not given: equal dose.
    electrons_per_atom
        Counted electrons that an atom scatters in one image; no noise if not given.
    width_angstrom
        Standard deviation of an atom in incoherent images.
    multislice
        Dark-field images by multislice, each with vibrations of its own: 20 CPU s per image of 2,000 atoms.

    Returns
    -------
    dict
        ``atoms``, ``images``, ``diameter_angstrom``, ``depth_of_field_angstrom``, ``defocus_angstrom``.
    """
    if sections < 1 or atoms < 2:
        raise ConfigurationError(f"a focal series needs at least 1 section and 2 atoms, got {sections} and {atoms}")
    theta = np.arange(-70.0, 70.0 + 1e-6, 2.0 * sections) if theta_deg is None else np.asarray(theta_deg, float)
    positions = amorphous_particle(atoms, seed=seed)
    diameter = 2 * float(np.linalg.norm(positions, axis=1).max())
    defocus = np.linspace(-diameter / 4, diameter / 4, sections) if sections > 1 else np.zeros(1)
    optics = Optics(energy_kev * 1e3, semiangle_mrad * 1e-3, {"C10": 0.0})
    edge = 2 * int(np.ceil((diameter + 10) / pixel_angstrom / 2))
    where = (positions, optics, TiltSeries.from_degrees(theta.tolist()).rotations, defocus)
    if multislice:
        images = counted(_scattered(*where, edge, pixel_angstrom, seed, executor), electrons_per_atom, seed)
    else:
        images = _blurred(*where, edge, pixel_angstrom, width_angstrom, electrons_per_atom, seed)
    told: dict[str, Any] = {"pixel_angstrom": pixel_angstrom, "energy_kev": energy_kev, "c1_angstrom": 0.0}
    told |= {"atoms_xyz_A": positions, "atomic_numbers": np.full(atoms, _SILICON), "defocus_angstrom": defocus}
    whole = images.reshape(len(theta), sections, edge, edge)
    np.savez(path, images=whole, theta_deg=theta, semiangle_mrad=semiangle_mrad, **told)
    return {
        "atoms": atoms,
        "images": len(images),
        "diameter_angstrom": diameter,
        "depth_of_field_angstrom": 2 * wavelength_angstrom(energy_kev * 1e3) / (semiangle_mrad * 1e-3) ** 2,
        "defocus_angstrom": defocus.tolist(),
    }


def _blurred(
    positions: np.ndarray,
    optics: Optics,
    rotations: np.ndarray,
    defocus: np.ndarray,
    edge: int,
    pixel_angstrom: float,
    width_angstrom: float,
    electrons_per_atom: float | None,
    seed: int,
) -> np.ndarray:
    """Return incoherent images (image, y, x): sums over the atoms of the probe at each one's depth."""
    return np.asarray(
        focal_tilt_series(
            positions,
            optics,
            rotations,
            defocus,
            shape_yx=(edge, edge),
            pixel_angstrom=pixel_angstrom,
            width_angstrom=width_angstrom,
            electrons_per_atom=electrons_per_atom,
            seed=seed,
        ).images
    )


def _scattered(
    positions: np.ndarray,
    optics: Optics,
    rotations: np.ndarray,
    defocus: np.ndarray,
    edge: int,
    pixel: float,
    seed: int,
    executor: Executor | None,
) -> np.ndarray:
    """Return images (image, y, x) by multislice, all foci of a tilt together, in units of one atom's mean signal."""
    pairs = [(rotation, float(change)) for rotation in rotations for change in defocus]
    foci = [(number, *pair) for number, pair in enumerate(pairs)]
    out = np.zeros((len(foci), edge, edge), np.float32)
    workers = executor or default_executor()
    for index, image in workers.map_bounded(_scattered_image, foci, positions, optics, edge, pixel, seed):
        out[index] = image
    return out * (len(positions) * len(out) / out.sum(dtype=np.float64)).astype(np.float32)


def _scattered_image(
    focus: tuple[int, np.ndarray, float], positions: np.ndarray, optics: Optics, edge: int, pixel: float, seed: int
) -> np.ndarray:
    index, rotation, change = focus
    setup = DarkField(replace(optics, aberrations={**optics.aberrations, "C10": optics.c1_angstrom + change}))
    numbers = np.full(len(positions), _SILICON)
    return dark_field_image(
        positions, numbers, rotation, setup, shape_yx=(edge, edge), pixel_angstrom=pixel, seed=seed + index
    )


def _checked(name: str, found: dict[str, Any]) -> dict[str, np.ndarray]:
    missing = [key for key in _NEEDED if key not in found]
    if missing:
        raise FormatError(f"{name} lacks {', '.join(missing)}; a focal series has {', '.join(_NEEDED)}")
    members = {key: np.asarray(value) for key, value in found.items() if key in (*_NEEDED, *_OPTIONAL)}
    images = members["images"]
    images = images[:, None] if images.ndim == 3 else images
    if images.ndim != 4:
        raise FormatError(f"{name}: images must be (tilt, section, y, x) or (tilt, y, x), got {images.shape}")
    bad = int((~np.isfinite(images)).sum())
    if bad:
        raise FormatError(f"{name}: {bad} pixels of the images are not finite; mend or leave out these images")
    for key in _ANGLES:
        if key in members and members[key].shape != (len(images),):
            raise FormatError(f"{name}: {len(images)} tilts need as many {key}, got {members[key].shape}")
    for key in (*_NEEDED[2:], *(key for key in _OPTIONAL[2:] if key in members)):
        told, kind = members[key], "positive" if key in _NEEDED else "finite"
        if told.size != 1 or told.dtype.kind not in "iuf" or not np.isfinite(told) or (key in _NEEDED and told <= 0):
            raise FormatError(f"{name}: {key} must be one {kind} number, got {told}")
    flat = np.flatnonzero(images.reshape(len(images), -1).std(axis=1) == 0)
    if flat.size:
        raise FormatError(f"{name}: the images of tilt {int(flat[0])} are constant; leave this tilt out")
    return {**members, "images": images.astype(np.float32)}
