"""Which file is which tilt: by the angle or number in its name, never by the order of the names."""

from __future__ import annotations

from pathlib import Path

import pytest

from stemtomo.errors import AcquisitionError, ConfigurationError
from stemtomo.io.series import TiltFiles, angles_in_names


def test_angles_are_taken_from_names_and_sorted_as_numbers(tmp_path: Path) -> None:
    for text in ("-10", "+2.5", "10", "-9.75"):
        (tmp_path / f"tilt_{text}deg.mib").touch()
    for name in ("other.mib", ".tilt_30deg.mib", "tilt_40deg.mib.part"):
        (tmp_path / name).touch()
    angles = angles_in_names(tmp_path, "tilt_{theta_deg}deg.mib")
    assert angles == (-10, -9.75, 2.5, 10)
    found = TiltFiles(tmp_path, "tilt_{theta_deg}deg.mib", angles).scan()
    assert [found.files[tilt].name for tilt in range(4)] == [
        "tilt_-10deg.mib", "tilt_-9.75deg.mib", "tilt_+2.5deg.mib", "tilt_10deg.mib",
    ]  # fmt: skip


def test_the_angle_may_be_the_name_of_a_folder(tmp_path: Path) -> None:
    for text in ("-10", "10", "20"):
        (tmp_path / "series" / text).mkdir(parents=True)
    for text in ("-10", "10"):
        (tmp_path / "series" / text / "s_master.h5").touch()
    files = "series/{theta_deg}/s_master.h5"
    assert angles_in_names(tmp_path, files) == (-10, 10)
    found = TiltFiles(tmp_path, files, (-10, 10, 20)).scan()
    assert found.files[1] == tmp_path / "series" / "10" / "s_master.h5"
    assert set(found.files) == {0, 1}  # the third is still to come


def test_double_and_unreadable_angles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"no name fits .* give tilts\.theta_deg if the files are still to come"
    ):
        angles_in_names(tmp_path, "tilt_{theta_deg}.mib")
    for text in ("10", "10.0"):
        (tmp_path / f"tilt_{text}.mib").touch()
    with pytest.raises(AcquisitionError, match=r"tilt_10.0.mib and tilt_10.mib both have the angle 10 deg"):
        angles_in_names(tmp_path, "tilt_{theta_deg}.mib")
    (tmp_path / "tilt_10.0.mib").rename(tmp_path / "tilt_ten.mib")
    with pytest.raises(AcquisitionError, match="'ten' is no angle"):
        angles_in_names(tmp_path, "tilt_{theta_deg}.mib")
    with pytest.raises(ConfigurationError, match="exactly one of"):
        TiltFiles(tmp_path, "{theta_deg}_{theta_deg}.mib", (1.0,))
