"""Nothing that can be set is undocumented, and what the page says is what the settings check."""

import pytest
from pydantic import ValidationError

from stemtomo.pipeline.parameters import parameters_of, unit_of
from stemtomo.pipeline.settings import PtychographySettings, TomographySettings
from stemtomo.reporting.parameters import parameter_page, sections

MODELS = {name: model for _, _, models in sections() for name, model in models.items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_has_a_meaning_and_says_what_is_allowed(name):
    assert MODELS[name].__doc__
    for row in parameters_of(MODELS[name]):
        assert len(row.meaning) > 10, row
        assert row.meaning.endswith("."), row
        assert row.allowed, row
        assert row.default, row


def test_every_section_of_a_series_file_is_on_the_page():
    from stemtomo.pipeline.config import Configuration

    page = parameter_page()
    for section in Configuration.model_fields:
        assert f"\n### {section}\n" in page
    for model in MODELS.values():
        for key in model.model_fields:
            assert f"| `{key}` |" in page


def test_limits_on_the_page_are_those_that_are_checked():
    rows = {row.name: row for row in parameters_of(PtychographySettings)}
    assert rows["momentum"].allowed == "number ≥ 0 and < 1"
    with pytest.raises(ValidationError):
        PtychographySettings(momentum=1)
    assert rows["rule"].allowed == '`"nesterov"`, `"lsqml"`, `"adam"`, `"lbfgs"`'
    assert rows["tiles"].allowed == '`"auto"` or [whole number > 0, whole number > 0]'
    assert rows["slice_thickness_angstrom"][1:4] == ("Å", "-", "number > 0 or list of: number > 0")
    assert rows["mistilt_mrad"].default == "[0, 0]"


def test_units_come_from_the_ends_of_names():
    assert unit_of("highest_inv_angstrom") == "1/Å"
    assert unit_of("dose_per_square_angstrom") == "1/Å²"
    assert unit_of("theta_deg") == "°"
    assert unit_of("slices") == ""


def test_settings_show_as_a_table():
    text = TomographySettings(iterations=7)._repr_html_()
    assert "<td><code>iterations</code></td><td>7</td>" in text
    assert "<b>TomographySettings</b>" in text
