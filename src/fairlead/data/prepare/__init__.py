"""Turns raw data, as their owners publish them, into the folder every stage reads. Knows not what trains on it.

    pretrain      {"text"}
    sft           {"prompt", "response"}
    preference    {"prompt", "chosen", "rejected"}, and where they come from
    ranking       {"prompt", "responses"}, best first
    labelled      {"prompt", "response", "label"}
    prompts       {"prompt"}, and columns for a reward function
    heldout_*     the same, for evaluation
    manifest.json inputs, options, outputs by checksum, and what was dropped and why

Each file is ``.jsonl`` or ``.parquet``, as the kind of data asks for; files without rows are left out. The folder is
built beside its place and renamed, so it is whole or absent, and a killed preparation is taken up again. It holds no
time and no absolute path: equal inputs give equal bytes.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from fairlead.data.prepare.folder import MANIFEST as MANIFEST
from fairlead.data.prepare.folder import building, digests, finished, once, outputs, publish, refuse_strangers, sweep
from fairlead.data.prepare.hub import fetch
from fairlead.data.prepare.kind import OUTPUTS as OUTPUTS
from fairlead.data.prepare.kind import Kind as Kind
from fairlead.data.prepare.kind import Say
from fairlead.data.prepare.kind import Source as Source
from fairlead.data.prepare.kinds import KINDS as KINDS
from fairlead.data.prepare.rows import join_text
from fairlead.data.text import text_files
from fairlead.errors import ConfigError, DataError

FORMAT_VERSION = 2


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def prepare(
    kind: str,
    path: str | Path | None,
    out: str | Path,
    *,
    text: str | Path | None = None,
    seed: int = 0,
    say: Say = _say,
    **options: Any,
) -> dict[str, Any]:
    """Prepares the raw data at ``path`` into the folder ``out`` and returns its manifest.

    ``kind`` is one of KINDS, each with ``options`` of its own; without a ``path`` the published files are fetched from
    the hub, and a kind that is made here takes none. ``text`` adds plain text to what is pretrained on. When ``out``
    already holds what these inputs give, nothing is done; what a killed call left is taken up again.

    Raises ConfigError for an unknown kind or option, DataError for paths, rows and disks that do not serve.
    """
    settings = check_options(kind, options)
    chosen, out = KINDS[kind], Path(out).resolve()
    files, inputs = _inputs(chosen, path, say)
    texts = [] if text is None else text_files(text)
    if text is not None:
        inputs += [{**entry, "is_text": True} for entry in _describe(texts, Path(text), Source(""), say)]
    request: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "inputs": inputs,
        "seed": seed,
        "options": asdict(settings),
    }
    if (manifest := finished(out, request, say)) is not None:
        sweep(out)
        return manifest
    refuse_strangers(out)
    with building(out, request, say) as (work, done):
        counts = once(work / ".counts.json", lambda: _written(chosen, files, work, settings, seed, say))
        rows = outputs(work)
        if texts:
            counts = counts | {"text": join_text(work, done, texts)}
            rows |= outputs(done)
        origin = {"source": chosen.source.url, "licence": chosen.licence, "research_only": chosen.research_only}
        manifest = request | origin | {"counts": counts}
        publish(work, done, manifest, rows, say)
    return manifest


def _inputs(kind: Kind, path: str | Path | None, say: Say) -> tuple[list[Path], list[dict[str, Any]]]:
    """The files to read, and what the manifest says of them; none where the rows are made here."""
    if kind.find is None:
        if path is not None:
            raise DataError(f"{kind.name} is made of its options and a seed alone, and {path} is given", "leave it out")
        return [], []
    path = fetch(kind, say) if path is None else Path(path)
    files = kind.find(path)
    return files, _describe(files, path, kind.source, say)


def _written(kind: Kind, files: Sequence[Path], work: Path, settings: Any, seed: int, say: Say) -> dict[str, Any]:
    counts = kind.write(files, work, settings, seed, say)
    if not counts["kept"]:
        raise DataError(
            f"nothing of {', '.join(map(str, files[:3]))} can be used: {counts['read']} read, "
            f"dropped {counts['dropped']}",
            f"is this really {kind.name} data?",
        )
    return counts


def check_options(kind: str, options: dict[str, Any]) -> Any:
    """The options of ``kind`` with every default in place. Raises ConfigError for an unknown kind, an option it does
    not have, and a value that does not serve."""
    from pydantic import TypeAdapter, ValidationError

    if kind not in KINDS:
        raise ConfigError(f"unknown kind of data {kind!r}", f"known are {', '.join(KINDS)}")
    known = [field.name for field in fields(KINDS[kind].options)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{kind} has no option {name!r}",
                f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}",
            )
    try:
        return TypeAdapter(KINDS[kind].options).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or kind
        raise ConfigError(f"{name}: {first['msg']}, got {first['input']!r}") from error


def describe_kinds() -> list[dict[str, Any]]:
    """What `fairlead prepare --list` shows: of each kind the name, source, licence and options with help."""
    return [
        {
            "name": kind.name,
            "about": kind.about,
            "source": kind.source.url or None,
            "hub": kind.source.hub,
            "made_here": kind.find is None,
            "licence": kind.licence,
            "research_only": kind.research_only,
            "options": _describe_options(kind.options),
        }
        for kind in KINDS.values()
    ]


def _describe_options(options: type) -> list[dict[str, Any]]:
    """Name, default and help of each field; the help is the docstring that stands under it."""
    help_texts: dict[str, str] = {}
    for owner in reversed(options.__mro__[:-1]):
        (node,) = ast.parse(inspect.cleandoc(inspect.getsource(owner))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in pairwise(node.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    help_texts[name] = " ".join(words.split())
                case _:
                    pass
    defaults = asdict(options())
    return [{"name": name, "default": defaults[name], "help": help_texts.get(name, "")} for name in defaults]


def _describe(files: Sequence[Path], root: Path, source: Source, say: Say) -> list[dict[str, Any]]:
    """Files by their path from ``root``, so that the manifest does not name the machine; ``published`` says whether a
    file whose checksum is known is the one its owners published. A file in the hub's cache bears its checksum as its
    name; raises DataError where it has another."""
    name, described = Path(root.resolve().name), list[dict[str, Any]]()
    for file in files:
        algorithm, _, expected = source.checksums.get(file.name, "").partition(":")
        found = digests(file, say, {"sha256", algorithm} - {""})
        entry: dict[str, Any] = {
            "path": (name / file.relative_to(root)).as_posix(),
            "sha256": found["sha256"],
            "bytes": file.stat().st_size,
        }
        blob = file.resolve()
        if file.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob.name):
            if blob.name != found["sha256"]:
                raise DataError(
                    f"{file} is damaged: its sha256 is not {blob.name}", f"remove {blob} and fetch it again"
                )
            entry["published"] = True
        if expected:
            entry["published"] = found[algorithm] == expected
            if not entry["published"]:
                say(f"note: {file} is not the published file: its {algorithm} is not {expected}")
        described.append(entry)
    return described
