"""The plan of the house: who may import whom, who may name an algorithm, and what stays light."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fairlead
from fairlead.algorithms import REGISTRY
from fairlead.runner import resolve

PACKAGE = Path(fairlead.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"types", "errors"},
    {"ops"},
    {"config_file"},
    {"config"},
    {"config_resolve"},
    {"models", "data"},
    {"training", "tracking", "rollout"},
    {"algorithms"},
    {"report", "health", "planning"},
    {"assemble", "manifest", "runner", "continuation"},
    {"evaluation", "inspection"},
    {
        "cli",
        "cli_samples",
        "cli_print",
        "pipeline",
        "pipeline_file",
        "pipeline_verbs",
        "sweep",
        "conformance",
        "demo",
        "migration",
        "studio",
        "__main__",
    },
]
"""Imports point down: a room imports itself and rooms of layers above it in this list."""

NEIGHBOURS = {
    ("runner", "assemble"),
    ("runner", "manifest"),
    ("manifest", "assemble"),
    ("continuation", "assemble"),
    ("continuation", "manifest"),
    ("continuation", "runner"),
}
"""Imports inside a layer, besides those of the last one, whose rooms are the ways in."""

LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def room_of(path: Path) -> str:
    """The first part below the package: a folder or a module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, at its top, inside functions and for types alone."""
    package = ["fairlead", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            if module == "fairlead":
                yield from ((node.lineno, f"fairlead.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imports(path):
        if name.startswith("fairlead."):
            yield line, name.split(".")[1]


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in NEIGHBOURS:
        return True
    if LEVEL[importer] == LEVEL[imported]:
        return LEVEL[importer] == len(LAYERS) - 1
    return LEVEL[importer] > LEVEL[imported]


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "room" / "file.py"
    path.parent.mkdir()
    path.write_text(
        "import os, fairlead.a.b as c\nfrom fairlead import d\nfrom fairlead.e import f\nfrom . import g\n"
        "from .h import i\nfrom ..j import k\ndef f():\n    if True:\n        from fairlead.l import m\n"
    )
    assert list(imports(path)) == [
        (1, "os"),
        (1, "fairlead.a.b"),
        (2, "fairlead.d"),
        (3, "fairlead.e"),
        (4, "fairlead.room"),
        (5, "fairlead.room.h"),
        (6, "fairlead.j"),
        (9, "fairlead.l"),
    ]


def test_every_room_stands_in_a_layer() -> None:
    assert {room_of(path) for path in MODULES} - {"__init__"} <= set(LEVEL)


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {imported}"
        for path in MODULES
        if room_of(path) != "__init__"
        for line, imported in rooms_imported(path)
        if imported != "__version__" and not allowed(room_of(path), imported)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("training", "algorithms"),
        ("training", "health"),
        ("training", "evaluation"),
        ("training", "rollout"),
        ("models", "data"),
        ("data", "models"),
        ("runner", "evaluation"),
        ("config", "data"),
        ("ops", "types"),
    ],
)
def test_what_must_not_be_imported(importer: str, imported: str) -> None:
    found = [
        path.name for path in MODULES if room_of(path) == importer and imported in dict(rooms_imported(path)).values()
    ]
    assert found == []


def test_ops_import_torch_and_the_standard_library_only() -> None:
    wrong = [
        (path.name, name)
        for path in MODULES
        if room_of(path) == "ops"
        for _, name in imports(path)
        if name.split(".")[0] not in {"torch", *sys.stdlib_module_names} and not name.startswith("fairlead.ops")
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ["world", "gold", "site"])
def test_the_miniature_world_imports_the_standard_library_and_itself_only(name: str) -> None:
    path = PACKAGE / "demo" / f"{name}.py"
    wrong = [
        found
        for _, found in imports(path)
        if found.split(".")[0] not in sys.stdlib_module_names and not found.startswith("fairlead.demo")
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ["training", "tracking", "cli"])
def test_no_algorithm_is_named_where_none_is_known(room: str) -> None:
    word = re.compile(rf"\b(?:{'|'.join(map(re.escape, REGISTRY))})\b")
    named = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in MODULES
        if room_of(path) == room
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if word.search(line)
    ]
    assert named == []


# --- what stays light ----------------------------------------------------------------------------------------------


def imported_by(code: str) -> set[str]:
    """Heavy packages in memory after running ``code``."""
    heavy = {"torch", "transformers", "datasets", "matplotlib", "numpy", "peft", "sklearn"}
    end = f"\nimport sys\nprint(*sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, check=True)
    return set(result.stderr.split())


@pytest.mark.parametrize(
    "code", ["import fairlead", "import fairlead.config", "import fairlead.errors", "import fairlead.tracking"]
)
def test_importing_what_everything_imports_is_light(code: str) -> None:
    assert imported_by(code) == set()


@pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="the command line is not written yet")
def test_asking_for_help_imports_nothing_heavy() -> None:
    code = """
import sys
sys.argv = ["fairlead", "--help"]
from fairlead.cli import main
try:
    code = main()
except SystemExit as end:
    code = end.code
assert not code
"""
    assert imported_by(code) == set()


# --- public names --------------------------------------------------------------------------------------------------


def test_the_public_names_are_sorted() -> None:
    assert fairlead.__all__ == sorted(set(fairlead.__all__))


@pytest.mark.parametrize("name", fairlead.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    home = fairlead._HOMES.get(name)
    if home is not None:
        place = PACKAGE.joinpath(*home.split(".")[1:])
        if not (place.with_suffix(".py").exists() or (place / "__init__.py").exists()):
            pytest.skip(f"{home} is not written yet")
        assert getattr(importlib.import_module(home), name) is getattr(fairlead, name)
    namespace: dict[str, object] = {}
    exec(f"from fairlead import {name}", namespace)
    assert namespace[name] is getattr(fairlead, name)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fairlead' has no attribute 'trian'"):
        _ = fairlead.trian


# --- recipes -------------------------------------------------------------------------------------------------------


def recipes() -> list[Path]:
    found = sorted((PACKAGE / "recipes").rglob("*.yaml"))
    return [path for path in found if not re.search(r"^stages:", path.read_text("utf-8"), re.MULTILINE)]


def name_of(recipe: Path) -> str:
    return recipe.relative_to(PACKAGE / "recipes").with_suffix("").as_posix()


@pytest.mark.parametrize("path", recipes(), ids=name_of)
def test_every_shipped_recipe_resolves_without_a_warning(path: Path) -> None:
    resolved = resolve(path)
    assert resolved.recipe.algorithm in REGISTRY
    assert resolved.warnings == ()
    assert resolve(name_of(path)).as_dict() == resolved.as_dict()
