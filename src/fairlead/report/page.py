"""Pages of one file: the house style, numbers as words, every text escaped, written whole. Knows no content."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fairlead.report.numbers import duration, interval, number, signed
from fairlead.report.read import as_text


def setting(value: object) -> str:
    """A setting exactly as it was set."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def render(package: str, template: str, values: Mapping[str, Any]) -> str:
    """A template of a package; `style` is the house style."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number,
        "signed": signed,
        "interval": interval,
        "duration": duration,
        "setting": setting,
        "plain": as_text,
    }
    style = Markup(_text("fairlead.report", "style.css"))
    return environment.from_string(_text(package, template)).render(style=style, **values)


def write(out: Path, page: str) -> Path:
    """Whole or not at all: a reader never sees half a page. A folder gets `report.html`."""
    path = out / "report.html" if out.is_dir() else out
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(page.encode("utf-8", errors="replace"))  # half a surrogate pair is possible
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _text(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
