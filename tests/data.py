"""Reference data with known answers, kept outside the project."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("STEMTOMO_DATA", Path(__file__).parents[2] / "shared" / "data"))


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test where the data set ``name`` is not at hand."""
    absent = not (FOLDER / name).is_dir()
    return pytest.mark.skipif(absent, reason=f"reference data {name!r} not found; set STEMTOMO_DATA to its folder")
