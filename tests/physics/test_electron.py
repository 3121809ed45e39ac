import pytest

from stemtomo.errors import ConfigurationError
from stemtomo.physics.electron import interaction_parameter, wavelength_angstrom


# Wavelengths: Reimer & Kohl, Transmission Electron Microscopy (2008), table A.2; sigma: Kirkland (2010), table 5.1.
@pytest.mark.parametrize(
    ("energy_ev", "wavelength", "sigma"),
    [(80e3, 0.041757, 1.00870e-3), (200e3, 0.025079, 0.728840e-3), (300e3, 0.019687, 0.652616e-3)],
)
def test_tabulated_constants(energy_ev, wavelength, sigma):
    assert wavelength_angstrom(energy_ev) == pytest.approx(wavelength, abs=1e-6)
    assert interaction_parameter(energy_ev) == pytest.approx(sigma, rel=2e-5)


@pytest.mark.parametrize("energy_ev", [-300e3, 0.0, float("nan"), float("inf")])
def test_an_impossible_energy_is_refused_by_value(energy_ev):
    with pytest.raises(ConfigurationError, match="positive"):
        wavelength_angstrom(energy_ev)
    with pytest.raises(ConfigurationError, match="positive"):
        interaction_parameter(energy_ev)
