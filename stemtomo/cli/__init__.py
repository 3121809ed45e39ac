"""The command line. The only package that prints; everything it calls is imported when a command needs it."""

from __future__ import annotations

from stemtomo.cli import acquisition, quality, reconstruct, series, stages
from stemtomo.cli.application import app

__all__ = ["acquisition", "app", "main", "quality", "reconstruct", "series", "stages"]


def main() -> None:
    """Run the command line."""
    app()
