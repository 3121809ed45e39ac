"""The imports go one way, as the architecture says; what is pure stays pure."""

import ast
import re
from pathlib import Path

import pytest

import stemtomo

ROOT = Path(stemtomo.__file__).parent
PURE = ("algorithms", "physics", "kernels")
IO_AND_SCHEDULING = {"dask", "distributed", "zarr", "xarray", "h5py"}

#: What each part of the package may import from it, besides itself.
ALLOWED = {
    "errors": set(),
    "backend": {"errors"},
    "process": set(),
    "locations": {"errors"},
    "geometry": {"errors"},
    "kernels": {"backend", "geometry", "errors"},
    "physics": {"kernels", "backend", "geometry", "errors"},
    "algorithms": {"physics", "kernels", "backend", "geometry", "errors"},
    "distributed": {"backend", "locations", "process", "errors"},
    "io": {"kernels", "locations", "process", "geometry", "errors"},
    "pipeline": {"algorithms", "physics", "kernels", "distributed", "io", "backend", "locations", "geometry", "errors"},
    "reporting": {"pipeline", "io", "locations", "physics", "geometry", "errors"},
    "terminal": {"io", "errors", "pipeline"},
    "cli": {"pipeline", "reporting", "terminal", "distributed", "io", "locations", "errors"},
}


def modules():
    return sorted(ROOT.rglob("*.py"))


def name_of(path):
    return path.relative_to(ROOT).with_suffix("").as_posix()


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    """Yield every module that ``path`` imports, at its top or inside a function, as an absolute dotted name."""
    package = ["stemtomo", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def own_parts(path):
    """Return the parts of the package that ``path`` imports."""
    names = (name.split(".") for name in imported(path))
    return {name[1] for name in names if name[0] == "stemtomo" and len(name) > 1 and name[1] != "__version__"}


@pytest.mark.parametrize("path", [p for p in modules() if p != ROOT / "__init__.py"], ids=name_of)
def test_imports_go_down_the_layers(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} is not in the architecture"
    assert own_parts(path) - {part} <= ALLOWED[part]


def test_the_pure_packages_know_no_storage_and_no_scheduler():
    for path in modules():
        if part_of(path) in PURE:
            outside = {name.partition(".")[0] for name in imported(path)}
            assert not outside & IO_AND_SCHEDULING, name_of(path)


def test_only_backend_and_kernels_import_cupy():
    for path in modules():
        if any(name.partition(".")[0] in ("cupy", "cupyx") for name in imported(path)):
            assert part_of(path) in ("backend", "kernels"), name_of(path)


#: Joint tomography is ptychography of all tilts at once.
BUILT_ON = {"joint": "ptychography"}
#: What serves several of them.
SHARED = ("quasi_newton", "total_variation")


def test_algorithms_do_not_know_each_other():
    for path in (ROOT / "algorithms").rglob("*.py"):
        own = path.relative_to(ROOT / "algorithms").parts[0]
        for name in imported(path):
            found = re.match(r"stemtomo\.algorithms\.(\w+)", name)
            allowed = (own, BUILT_ON.get(own), *SHARED)
            assert found is None or found.group(1) in allowed, f"{name_of(path)} imports {name}"


def test_only_the_command_line_prints():
    for path in modules():
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not prints or part_of(path) == "cli", f"{name_of(path)} prints in line {prints}"


def test_plotting_is_for_the_report_alone():
    for path in modules():
        if any(name.partition(".")[0] == "matplotlib" for name in imported(path)):
            assert part_of(path) == "reporting", name_of(path)


def test_there_is_no_attic():
    assert not [name_of(path) for path in modules() if path.stem in ("utils", "helpers", "misc", "common")]
