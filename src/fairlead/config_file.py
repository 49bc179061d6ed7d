"""YAML files of settings: numbers as people write them, lines of keys, `key=value`, shipped files. Knows no schema."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml

from fairlead.errors import ConfigError

MOST_VALUES = 100_000
"""Of a file, what an alias repeats counted each time: a few lines of aliases can stand for more than memory holds."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers people write: 1e-5 is a number; on and off stay words; a key stands once."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
cast(Any, _Loader).add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
)
cast(Any, _Loader).add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, place: str) -> Any:
    """One YAML document as plain Python values. Raises ConfigError with file and line."""
    try:
        return _construct(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{place}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        # the last three: of an explicit tag whose value is none of its kind
        raise ConfigError(f"{place}: not valid YAML: {error}") from error


def _construct(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = cast(Any, loader).get_single_node()
        if node is None:
            return None
        _check(node, iter(range(MOST_VALUES)))
        return cast(Any, loader).construct_document(node)
    finally:
        cast(Any, loader).dispose()


def _check(node: yaml.Node, left: Iterator[int]) -> None:
    """Refuses a key that stands twice or is no word, and more values than are ``left``."""
    if next(left, None) is None:
        problem = f"it stands for more than {MOST_VALUES:,} values, aliases counted each time"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check(child, left)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
            _check(child, left)


def _lines(text: str) -> dict[str, int]:
    """Dotted key -> line number, from 1."""
    lines: dict[str, int] = {}

    def visit(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                dotted = f"{prefix}{key.value}"
                lines[dotted] = key.start_mark.line + 1
                visit(child, f"{dotted}.")

    visit(cast(Any, yaml).compose(text, Loader=_Loader), "")
    return lines


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value` -> (dotted key, value read as YAML)."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"{text!r} is no setting", hint="write section.key=value, for example model.path=runs/sft/model"
        )
    return key.strip(), parse_yaml(value, text)


def shipped(kind: str = "recipe") -> dict[str, Path]:
    """Shipped files by name, with the folder they are in: `recipe`s hold an `algorithm`, `pipeline`s hold `stages`."""
    folder = Path(str(resources.files("fairlead"))) / "recipes"
    marker = "stages:" if kind == "pipeline" else "algorithm:"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
        if any(line.startswith(marker) for line in path.read_text("utf-8").splitlines())
    }


def find_file(name: str, kind: str = "recipe") -> Path:
    """A recipe argument is a file or the name of a shipped one."""
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(
            f"{name} is a directory; a {kind} file was meant", hint=f"give a .yaml file: {name}/recipe.yaml?"
        )
    known = shipped(kind)
    if name in known:
        return known[name]
    inside = [each for each in known if each.startswith(f"{name}/")]
    hint = f"there are: {', '.join(inside)}" if inside else suggest(name, known)
    raise ConfigError(f"no {kind} {name!r}: neither a file nor a shipped {kind}", hint=hint)


def suggest(got: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """A hint that names the nearest known word, or all of them."""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known))}"


def read_mapping(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML file as a mapping, and the line of each dotted key."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})", hint="save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a mapping of settings was expected, got {type(raw).__name__}")
    return cast(dict[str, Any], raw), _lines(text)
