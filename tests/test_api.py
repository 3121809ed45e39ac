"""The public names: every one can be reached, and the verbs take a store or its path."""

import inspect

import pytest

import stemtomo
from stemtomo.pipeline.config import PtychographySettings
from tests.pipeline.series import make_series


def test_every_public_name_is_there_and_documented():
    for name in stemtomo.__all__:
        assert inspect.getdoc(getattr(stemtomo, name)), name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = stemtomo.nonsense


def test_verbs_take_the_path_of_a_store(tmp_path):
    path = make_series(tmp_path / "tiny.zarr").path
    settings = PtychographySettings(epochs=2)
    assert stemtomo.ptychography(str(path), settings)["computed"] == 3
    assert len(stemtomo.projections(path)["observed_fraction"]) == 3
    assert stemtomo.open(path)["projections/phase"].dims == ("tilt", "y", "x")


def test_run_takes_the_path_of_a_configuration(tmp_path):
    with pytest.raises(stemtomo.errors.ConfigurationError, match=r"absent\.toml: no such configuration file"):
        stemtomo.run(tmp_path / "absent.toml")
