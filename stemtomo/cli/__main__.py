"""Run the command line as ``python -m stemtomo.cli``."""

from stemtomo.cli import main

main()
