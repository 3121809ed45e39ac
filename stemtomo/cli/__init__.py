"""The command line. The only package that prints; everything it calls is imported when a command needs it."""

from __future__ import annotations

from stemtomo.cli import (
    acquisition,
    analysis,
    ingest,
    local_orbital,
    quality,
    reconstruct,
    series,
    simulate,
    stacks,
    stages,
)
from stemtomo.cli.application import app

__all__ = [
    "acquisition",
    "analysis",
    "app",
    "ingest",
    "local_orbital",
    "main",
    "quality",
    "reconstruct",
    "series",
    "simulate",
    "stacks",
    "stages",
]


def main() -> None:
    """Run the command line."""
    app()
