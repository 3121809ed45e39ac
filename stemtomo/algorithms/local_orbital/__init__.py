"""Local-orbital tomography: atoms seen through a probe that changes with depth (dLOT, nLOT), as array functions."""
