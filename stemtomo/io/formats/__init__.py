"""Frame files of microscopes and detectors, one module per format."""
