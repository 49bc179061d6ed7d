"""`fairlead prove`: runs the cases two at a time, each in a folder of its own, and prints the tables."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fairlead.config_file import suggest
from fairlead.errors import ConfigError, FairleadError, RunError

Row = dict[str, Any]
KINDS = ("convergence", "bias", "invariance")


def names() -> dict[str, str]:
    """Every case, `kind/name`, by the name it is asked for."""
    from fairlead.conformance.bias import ESTIMATORS
    from fairlead.conformance.cases import CASES
    from fairlead.conformance.invariance import ALL

    tables: dict[str, Sequence[str]] = dict(zip(KINDS, (list(CASES), list(ESTIMATORS), list(ALL)), strict=True))
    return {f"{kind}/{name}": kind for kind, table in tables.items() for name in table}


def prove(cases: Sequence[str] = (), *, out: Path | None = None, processes: int = 2) -> dict[str, Any]:
    """The tables of the cases asked for, `convergence/dpo-sigmoid` say, or all of a kind, or all. ``out`` keeps the
    runs and the tables. Raises ConfigError for a case that there is not."""
    wanted = chosen(cases)
    began = time.monotonic()
    with _folder(out) as folder:
        found = dict(_run(wanted, folder, processes))
        rows = [found[name] for name in wanted]
        result = {
            "seconds": round(time.monotonic() - began, 1),
            "pass": all(row["pass"] for row in rows),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            **{kind: [row for name, row in zip(wanted, rows, strict=True) if name.startswith(kind)] for kind in KINDS},
        }
        if out is not None:
            (out / "conformance.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


def chosen(cases: Sequence[str]) -> list[str]:
    known = names()
    picked: list[str] = []
    for case in cases:
        here = [name for name, kind in known.items() if case in (name, kind, name.partition("/")[2])]
        if not here:
            raise ConfigError(f"there is no case {case!r}; {suggest(case, [*KINDS, *known])}")
        picked += here
    return list(dict.fromkeys(picked)) or list(known)


def _run(wanted: Sequence[str], folder: Path, processes: int) -> Iterator[tuple[str, Row]]:
    """The slow ones first, so that all processes end together."""
    for name, row in _rows(sorted(wanted, key=_slowest_first), folder, min(processes, len(wanted))):
        print(f"{'pass' if row['pass'] else 'FAIL'}  {name}", file=sys.stderr, flush=True)
        yield name, row


def _rows(wanted: Sequence[str], folder: Path, processes: int) -> Iterator[tuple[str, Row]]:
    if processes == 1:
        yield from ((name, one(name, folder)) for name in wanted)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin) as pool:
        waiting = {pool.submit(one, name, folder): name for name in wanted}
        yield from ((waiting[done], done.result()) for done in as_completed(waiting))


def _slowest_first(name: str) -> int:
    return ("invariance", "bias", "convergence").index(name.partition("/")[0])


def _begin() -> None:
    import torch

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def one(name: str, folder: Path) -> Row:
    """A row of a table; what its run says stands in a file beside it."""
    kind, _, case = name.partition("/")
    own = folder / kind / case.replace(" ", "-").replace(",", "")
    own.mkdir(parents=True, exist_ok=True)
    with (own / "said.txt").open("w", encoding="utf-8") as said, redirect_stderr(said):
        try:
            return _table(kind)(case, own)
        except FairleadError as error:
            raise RunError(f"{name}: {error.message}", error.hint) from error


def _table(kind: str) -> Callable[[str, Path], Row]:
    if kind == "bias":
        from fairlead.conformance.bias import bias

        return bias
    if kind == "invariance":
        from fairlead.conformance.invariance import invariance

        return invariance
    from fairlead.conformance.cases import CASES
    from fairlead.conformance.converge import converge

    return lambda case, folder: converge(CASES[case], folder)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="fairlead-prove-") as folder:
            yield Path(folder)
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", "choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    yield out


# --- what a person reads -------------------------------------------------------------------------------------------

COLUMNS: Mapping[str, Mapping[str, Callable[[Row], str]]] = {
    "convergence": {
        "case": lambda row: row["case"],
        "algorithm": lambda row: row["algorithm"],
        "task": lambda row: row["task"],
        "reaches": lambda row: row["reaches"],
        "measure": lambda row: row["measure"],
        "distance": lambda row: f"{row['distance']:.1e}",
        "bound": lambda row: f"{row['bound']:.0e}",
        "steps": lambda row: str(row["steps"]),
    },
    "bias": {
        "case": lambda row: row["case"],
        "algorithm": lambda row: row["algorithm"],
        "task": lambda row: row["task"],
        "estimator": lambda row: row["estimator"],
        "relative bias [99.9 %]": lambda row: f"{row['bias']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
        "known": lambda row: row["known"],
    },
    "invariance": {
        "case": lambda row: row["case"],
        "layouts": lambda row: str(row["layouts"]),
        "float64": lambda row: f"{row['float64']:.1e}",
        "float32": lambda row: f"{row['float32']:.1e}",
    },
}


def cells(kind: str, row: Row) -> list[str]:
    """A row as it is shown, its verdict last."""
    return [*(show(row) for show in COLUMNS[kind].values()), "pass" if row["pass"] else "FAIL"]


def show(result: Mapping[str, Any]) -> None:
    from fairlead.evaluation.show import print_rows

    for kind in KINDS:
        if result[kind]:
            print_rows([*COLUMNS[kind], ""], [cells(kind, row) for row in result[kind]])
    failed = sum(not row["pass"] for kind in KINDS for row in result[kind])
    total = sum(len(result[kind]) for kind in KINDS)
    print(f"{total - failed} of {total} pass, in {result['seconds']:.0f} s")
