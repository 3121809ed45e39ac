"""Pages that are made from the package itself, so that nothing is said twice: settings, API, changes."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import stemtomo
from stemtomo.reporting.parameters import parameter_page

ROOT = Path(__file__).parents[1]
#: A reference as docstrings write it, in the HTML that comes of it.
_ROLE = re.compile(r":(?:func|class|mod|data|meth):<code>(~?)([^<]*)</code>")
GEOMETRY = ("Detector", "Optics", "Pose", "Scan", "TiltSeries")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the page of clusters beside the other tasks where it is."""
    if (ROOT / "docs" / "clusters.md").exists():
        tasks = next(entry["How to"] for entry in config.nav if "How to" in entry)
        if not any("clusters.md" in entry.values() for entry in tasks):
            tasks.append({"Run on a cluster": "clusters.md"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name, text in {"parameters.md": parameter_page(), "api.md": api_page(), "changes.md": changes}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Show references in docstrings as code, without their roles."""
    return _ROLE.sub(lambda role: f"<code>{role[2].rpartition('.')[2] if role[1] else role[2]}</code>", html)


def api_page() -> str:
    """Return a page with the docstring of every public name."""
    lines = ["# Python API", "", "Everything below is `stemtomo.NAME`; it is imported when first used."]
    verbs = [name for name in stemtomo.__all__ if name not in GEOMETRY]
    for heading, names in (("Verbs", verbs), ("Geometry", GEOMETRY)):
        lines += ["", f"## {heading}"]
        for name in names:
            found = getattr(stemtomo, name)
            lines += ["", f"::: {found.__module__}.{found.__name__}"]
    lines += ["", "## Errors", "", "::: stemtomo.errors"]
    lines += ["    options:", "      members: true", "      show_root_heading: false"]
    return "\n".join(lines) + "\n"
