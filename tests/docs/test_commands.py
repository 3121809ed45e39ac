"""Every command and Python block of README.md and docs is run, on a small series, in the order of its page."""

import os
import shutil

import pytest
from typer.testing import CliRunner

from stemtomo import cli
from tests.docs.blocks import blocks, commands
from tests.docs.workplace import furnish

#: Programs that are not run here, and what does instead.
OTHER_PROGRAMS = {
    "pip": "installing is what .ci/run does first",
    "pytest": "these are the tests",
    "python": "tests/benchmarks has a test of each",
    "jupyter": "the notebooks run in test_notebooks",
    "sbatch": "for clusters",
    "squeue": "for clusters",
    "scancel": "for clusters",
    "kubectl": "for clusters",
    "helm": "for clusters",
    "docker": "for clusters",
    "curl": "for clusters",
}
#: Beginnings of commands that are not run, and why.
NOT_RUN = {
    "stemtomo demo": "tests/pipeline/test_demo.py does on a smaller particle, and a benchmark does",
    "stemtomo run series.toml --scheduler": "needs a scheduler at that address; --workers runs",
    "stemtomo lattice series.zarr --set crystal=spinel": "needs a spinel: tests/pipeline/test_analysis.py",
    "stemtomo resolution first.mrc": "needs two halves of another program: tests/pipeline/test_resolution.py",
}
#: Pages for clusters, which have tests of their own beside the schedulers.
CLUSTERS = {"docs/clusters.md"}
#: What makes a command small, by its beginning; the options of the page stay.
SMALLER = {
    "stemtomo simulate-particle": ["--atoms", "40"],
    "stemtomo local-orbital": ["--set", "rounds=1", "--set", "probe_searches=1", "--set", "probe_iterations=4"],
    "stemtomo simulate ": [
        *("--set", "simulation.scan_shape=[8,8]", "--set", "simulation.detector_px=24"),
        *("--set", "simulation.tilt_deg=[-50,-25,0,25,50]", "--set", "simulation.phonon_configurations=1"),
        *("--set", "joint.single_slice_epochs=2", "--set", "joint.sweeps=1", "--set", "joint.settling_sweeps=1"),
    ],
    "stemtomo reconstruct series.zarr --set slices=6": [
        *("--set", "epochs=2", "--set", "mistilt_patterns=16", "--set", "mistilt_iterations=3"),
    ],
}
#: Beginnings of commands that say with exit code 2 that small data do not tell what is asked.
MAY_REFUSE = ("stemtomo calibrate series.zarr --require",)
#: Text of Python blocks that cannot stand here, and what stands for it.
IN_PYTHON = {'Client("scheduler.tcp://...")': "None"}

RUNNABLE = [block for block in blocks("console", "python") if block.page not in CLUSTERS]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("furnished"))


def first(table, line):
    """Return the entry of ``table`` whose key begins ``line``, or None."""
    return next((value for key, value in table.items() if line.startswith(key)), None)


def run_command(words):
    line = " ".join(words)
    if words[0] in OTHER_PROGRAMS or first(NOT_RUN, line):
        return
    result = CliRunner().invoke(cli.app, [*words[1:], *(first(SMALLER, line) or ())])
    allowed = (0, 2) if line.startswith(MAY_REFUSE) else (0,)
    assert result.exit_code in allowed, f"{line}\n{result.output}\n{result.exception!r}"


def test_what_is_not_run_is_still_on_a_page():
    lines = [" ".join(words) for block in RUNNABLE if block.language == "console" for words in commands(block)]
    for beginning in (*NOT_RUN, *SMALLER, *MAY_REFUSE):
        assert any(line.startswith(beginning) for line in lines), beginning
    for text in IN_PYTHON:
        assert any(text in block.text for block in RUNNABLE)


@pytest.mark.heavy
@pytest.mark.timeout(900)  # a minute or two on an idle machine
@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in RUNNABLE))
def test_the_blocks_of_a_page_run(page, furnished, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(furnished, folder)
    for state in ("9min", "16min", "26min"):
        shutil.copytree(folder / "series.zarr", folder / f"{state}.zarr")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(os.environ, "MPLBACKEND", "Agg")
    names = {"__name__": "page"}
    for block in (block for block in RUNNABLE if block.page == page):
        if block.language == "console":
            for words in commands(block):
                run_command(words)
            continue
        text = block.text
        for here, there in IN_PYTHON.items():
            text = text.replace(here, there)
        exec(compile(text, page, "exec"), names)
