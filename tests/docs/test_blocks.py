"""Every block of README.md and docs is right as far as can be told without running it (see test_commands)."""

import ast
import importlib
import tomllib

import pytest
import typer

import stemtomo
from stemtomo.cli import app
from stemtomo.pipeline.config import STAGES, Configuration
from stemtomo.pipeline.settings.analysis import AnalysisSettings
from stemtomo.pipeline.settings.local_orbital import FocalSettings
from stemtomo.pipeline.simulate import SimulationSettings
from tests.docs.blocks import PAGES, ROOT, blocks, commands

#: Programs beside stemtomo that pages may name.
PROGRAMS = {"pip", "pytest", "python", "jupyter", "sbatch", "squeue", "scancel", "kubectl", "helm", "docker", "curl"}
#: Commands whose keys belong to one section.
OF_ONE_SECTION = {stage.replace("_", "-"): Configuration.model_fields[name] for stage, name in STAGES.items()}
OF_ONE_SECTION |= {name: AnalysisSettings.model_fields[name] for name in AnalysisSettings.model_fields}
OF_ONE_SECTION |= {"local-orbital": FocalSettings.model_fields["local_orbital"]}
OF_ONE_SECTION.pop("ingest")  # takes the whole file

#: What a series file must say; pages show parts of one.
LEAST = {
    "input": {"path": "frames.npy"},
    "optics": {"energy_kev": 300, "semiangle_mrad": 21},
    "scan": {"step_angstrom": 1},
    "detector": {"pixel_inv_angstrom": 0.1},
    "tilts": {"theta_deg": [0]},
}


def named(block):
    return f"{block.page}: {block.text.strip().splitlines()[0][:50]}"


def section(model, key):
    """Return the model and key that a dotted ``key`` of ``model`` means."""
    name, _, rest = key.partition(".")
    return (model.model_fields[name].annotation, rest) if rest else (model, name)


def test_every_fence_has_a_language():
    assert {block.language for block in blocks()} <= {"console", "python", "toml", "yaml", "text", "bash"}
    for page in PAGES:
        indented = [line for line in page.read_text().splitlines() if line.startswith("    stemtomo ")]
        assert not indented, f"{page.relative_to(ROOT)}: fence it as console: {indented}"


@pytest.mark.parametrize("block", blocks("console"), ids=named)
def test_commands_have_the_options_that_pages_show(block):
    group = typer.main.get_command(app)
    told = list(commands(block))
    assert told, "a console block shows commands behind '$ '"
    for words in told:
        program, *arguments = words
        if program != "stemtomo":
            assert program in PROGRAMS, words
            continue
        if arguments[0].startswith("-"):
            continue
        command = group.commands[arguments[0]]
        with command.make_context(arguments[0], list(arguments[1:])) as context:
            for override in context.params.get("overrides") or ():
                check_key(arguments[0], override.partition("=")[0], words)


def check_key(command, key, words):
    if command in OF_ONE_SECTION:
        model, name = OF_ONE_SECTION[command].annotation, key
    elif command == "simulate" and key.startswith("simulation."):
        model, name = SimulationSettings, key.removeprefix("simulation.")
    elif command == "reconstruct" and "." not in key:
        model, name = Configuration.model_fields["ptychography"].annotation, key
    else:
        model, name = section(Configuration, key)
    assert name in model.model_fields, (words, key)


@pytest.mark.parametrize("block", blocks("toml"), ids=named)
def test_series_files_have_allowed_keys_and_values(block):
    told = {name: dict(section) for name, section in LEAST.items()}
    for name, keys in tomllib.loads(block.text).items():
        told[name] = told.get(name, {}) | {key: value for key, value in keys.items() if not str(value).startswith("@")}
    Configuration.model_validate(told)


@pytest.mark.parametrize("block", blocks("python"), ids=named)
def test_python_compiles_and_names_what_is_there(block):
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "stemtomo":
            assert node.attr in stemtomo.__all__, node.attr
        if isinstance(node, ast.ImportFrom) and node.module.startswith("stemtomo"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), node.module
