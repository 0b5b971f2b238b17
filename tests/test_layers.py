"""The shape of the code: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from dmd2.settings import ROOT

# A wing, and the wings that it may import; every wing may also import the ground, which is the
# files beside the wings.
Wings = dict[str, frozenset[str]]


def stacked(*wings: str) -> Wings:
    """Wings of which each may import all that come after it."""
    return {wing: frozenset(wings[i + 1 :]) for i, wing in enumerate(wings)}


DMD2 = stacked("engine", "sampling", "fast", "models", "store", "loras", "request") | {
    "server": frozenset[str]()
}
TRAINING = stacked("demo", "method") | stacked("sdxl", "method")
GATEWAY = stacked("many", "front", "dialects", "life", "keeping") | {
    "hooks": frozenset({"keeping"}),
    "engines": frozenset[str](),
}
for above in ("many", "front", "dialects"):
    GATEWAY[above] |= {"hooks"}
GATEWAY["many"] |= {"engines"}
HOUSES = {"dmd2": DMD2, "training": TRAINING, "deploy.gateway": GATEWAY}
MODULES = sorted((ROOT / "dmd2").rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """The absolute names that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def folder_of(package: str, root: Path = ROOT) -> Path:
    return root.joinpath(*package.split("."))


def imports_within(package: str, root: Path = ROOT) -> dict[str, set[str]]:
    """For each module of a package, by its path inside, the modules of it that it imports."""
    folder = folder_of(package, root)
    paths = {".".join(p.relative_to(folder).with_suffix("").parts): p for p in folder.rglob("*.py")}
    prefix = f"{package}."
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = {name.removeprefix(prefix) for name in imports_of(path) if name.startswith(prefix)}
        found[module] = (names | {f"{name}.__init__" for name in names}) & set(paths)
    return found


def wing_of(module: str) -> str:
    """The wing of a module by its path inside the package; "" is the ground."""
    return module.rpartition(".")[0]


def wrong_imports(package: str, wings: Wings, root: Path = ROOT) -> list[str]:
    """Each import that goes up or sideways, and a circle if there is one."""
    graph = {m: found for m, found in imports_within(package, root).items() if m != "__main__"}
    wrong = [
        f"{module} imports {name}"
        for module, found in graph.items()
        for name in sorted(found)
        if wing_of(name) not in {"", wing_of(module), *wings.get(wing_of(module), ())}
    ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"a circle: {' -> '.join(error.args[1])}")
    return wrong


@pytest.mark.parametrize("house", HOUSES)
def test_every_folder_is_a_wing(house: str) -> None:
    assert {wing_of(module) for module in imports_within(house)} == {"", *HOUSES[house]}


@pytest.mark.parametrize(("house", "wing"), [(h, wing) for h in HOUSES for wing in HOUSES[h]])
def test_a_wing_says_what_lives_in_it_and_what_it_may_import(house: str, wing: str) -> None:
    (only,) = ast.parse((folder_of(house) / wing / "__init__.py").read_text()).body
    assert isinstance(only, ast.Expr)
    text = ast.literal_eval(only.value)
    allowed = text[text.index("May import") :]
    assert {word.strip(",.") for word in allowed.split()} & set(HOUSES[house]) == HOUSES[house][
        wing
    ]
    assert "the ground" in allowed


@pytest.mark.parametrize("house", HOUSES)
def test_nothing_runs_up_and_there_is_no_circle(house: str) -> None:
    assert wrong_imports(house, HOUSES[house]) == []


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("lower.a", "from house.upper.b import x", "lower.a imports upper.b"),
        ("lower.a", "from house.upper import b", "lower.a imports upper.b"),
        ("lower.a", "def f():\n    import house.upper.b", "lower.a imports upper.b"),
        ("lower.a", "from house import upper", "lower.a imports upper.__init__"),
        ("lower.a", "import house.upper", "lower.a imports upper.__init__"),
        ("lower.a", "from house.upper import *", "lower.a imports upper.__init__"),
        ("ground", "from house.lower import a", "ground imports lower.a"),
        ("upper.b", "from house.upper import c", "a circle: upper."),
        ("upper.b", "from house.lower.a import x", None),
    ],
)
def test_an_arrow_up_and_a_circle_are_seen(
    module: str, line: str, wrong: str | None, tmp_path: Path
) -> None:
    files = {"ground": "", "lower.a": "import house.ground", "upper.b": "", "upper.c": ""}
    files |= {"upper.c": "from house.upper.b import y", "upper.__init__": ""}
    for name, source in (files | {module: line}).items():
        path = tmp_path / "house" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    found = wrong_imports("house", stacked("upper", "lower"), tmp_path)
    assert any(each.startswith(wrong) for each in found) if wrong else found == []


@pytest.mark.parametrize("path", [*MODULES, ROOT / "predict.py"], ids=lambda path: path.stem)
def test_the_container_imports_no_neighbour(path: Path) -> None:
    tops = {name.partition(".")[0] for name in imports_of(path)}
    assert not tops & {"training", "deploy", "benchmarks", "tests", "ray", "peft"}


@pytest.mark.parametrize(
    "module",
    [
        "model_card",
        "request.generation_request",
        "store.manifest",
        "store.install",
        "loras.fetching",
        "engine.scheduling",
    ],
)
def test_no_torch_where_none_is_needed(module: str) -> None:
    code = f"import sys, dmd2.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_files_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 60, f"{path.stem}.{node.name}"
