"""Joint multislice electron tomography: the volume straight from the patterns of all tilts.

After Lee et al., Phys. Rev. Applied 19, 054062 (2023) (MSET; one slice per view is its SSET).
"""
