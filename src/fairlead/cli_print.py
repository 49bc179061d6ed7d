"""What the verbs share: the arguments that most of them have, and how they print."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings, for example seed=1")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]


def print_result(value: Any, as_json: bool, text: str) -> None:
    print(json.dumps(value, indent=2, default=str) if as_json else text)


def kind_lines(kind: dict[str, Any]) -> str:
    use = " (research only)" if kind["research_only"] else ""
    options = [f"    {option['name']}={_yaml(option['default'])}  {option['help']}" for option in kind["options"]]
    return "\n".join(
        [
            f"{kind['name']}: {kind['about']}",
            f"  {kind['source'] or ('made here' if kind['made_here'] else 'your own files')}",
            f"  licence: {kind['licence']}{use}",
            *options,
            "",
        ]
    )


def indented(settings: dict[str, Any]) -> str:
    return "".join(f"  {key}: {_yaml(value)}\n" for key, value in settings.items())


def print_resolved(resolved: Any, as_json: bool) -> None:
    from fairlead.config_resolve import flatten

    flat = flatten(resolved.as_dict())
    if as_json:
        print_result(
            {key: {"value": value, "from": resolved.origins.get(key, "default")} for key, value in flat.items()},
            True,
            "",
        )
        return
    lines = {key: f"{key}: {_yaml(value)}" for key, value in flat.items()}
    width = max(len(line) for line in lines.values() if len(line) < 60)
    for key, line in lines.items():
        print(f"{line:<{width}}  # {resolved.origins.get(key, 'default')}")
    for warning in resolved.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _yaml(value: Any) -> str:
    """A value as it is written in a recipe or behind `key=`."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
