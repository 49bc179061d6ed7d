"""Reports and inspection pages of any content: written, or an error with a message; and no text becomes a part of the
page."""

from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from fairlead.data.inspect.show import page
from fairlead.inspection import inspect
from fairlead.report import build_report
from tests.fuzz.hostile import SMUGGLED, bytes_near, markup, nothing_outside, texts, told, tried, values
from tests.report.run_directories import write_pipeline

FILES = (
    *("recipe.yaml", "manifest.json", "summary.json", "metrics.jsonl", "samples.jsonl", "eval_prompts.jsonl"),
    *("alarms.jsonl", "evaluation/metrics.json", "evaluation/reward_quality.json", "evaluation/responses.jsonl"),
)


class Page(HTMLParser):
    """What elements a page has, and what texts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.text += data

    def smuggled(self) -> list[Any]:
        """Elements that a text has become, attributes that it has brought, and what could act."""
        acts = ("script", "iframe", "object", "embed", "img", "base", "link", "form", SMUGGLED)
        return [
            (tag, attributes)
            for tag, attributes in self.elements
            if tag in acts
            or any(name == SMUGGLED or name.startswith("on") for name, _ in attributes)
            or any("javascript:" in (value or "") for name, value in attributes if name in ("href", "src", "action"))
        ]


def test_a_page_with_something_smuggled_in_is_known() -> None:
    for text in (
        f"<p><{SMUGGLED}>",
        "<script>a</script>",
        '<p onclick="a">',
        '<a href="javascript:a">',
        f"<p {SMUGGLED}>",
    ):
        assert Page(text).smuggled()
    assert not Page(f"<p title='{SMUGGLED}'>&lt;script&gt; {SMUGGLED}</p>").smuggled()


# --- reports -------------------------------------------------------------------------------------------------------


def _written(folder: Path, name: str, value: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".yaml"):
        path.write_text(yaml.safe_dump(value))
    elif name.endswith(".json"):
        path.write_text(json.dumps(value))
    else:
        rows = value if isinstance(value, list) else [value]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_any_bytes_in_a_run_directory_are_shown_or_noted(times: int, tmp_path: Path) -> None:
    whole = write_pipeline(tmp_path / "whole")
    samples = [path.read_bytes()[:600] for path in sorted((whole / "ppo").rglob("*.*")) if path.is_file()]
    number = itertools.count()

    @tried(12 * times, st.dictionaries(st.sampled_from(FILES), bytes_near(*samples), min_size=1, max_size=4))
    def holds(files: dict[str, bytes]) -> None:
        run = tmp_path / f"run-{next(number)}"
        for name, content in files.items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(content)
        with told(), nothing_outside(run):
            build_report([run], run)


ROW = {
    "metrics.jsonl": ("step", "loss", "eval/loss", "rewards/chosen", "eval/score", "eval/gold", "eval/kl"),
    "samples.jsonl": ("step", "prompt", "response", "finished"),
    "alarms.jsonl": ("step", "alarm", "message"),
    "evaluation/responses.jsonl": ("prompt", "draw", "response", "finished", "scores"),
    "evaluation/metrics.json": ("metrics", "sampling", "prompts", "draws", "pairs", "reference"),
    "evaluation/reward_quality.json": ("calibration", "scores", "by_source", "by_margin"),
    "manifest.json": ("name", "algorithm", "created", "notes", "data", "parameters", "versions", "inputs"),
    "summary.json": ("status", "steps", "tokens", "seconds", "metrics", "models"),
}


def test_any_values_in_a_run_directory_are_shown_or_noted(times: int, tmp_path: Path) -> None:
    number = itertools.count()
    estimate = st.fixed_dictionaries({"mean": values}, optional={"low": values, "high": values, "n": values})
    scores = st.dictionaries(st.sampled_from(["gold", "score"]) | texts, values, max_size=2)
    inner = values | st.dictionaries(texts | st.sampled_from(["kl", "score"]), estimate, max_size=3) | scores

    def rows(name: str) -> st.SearchStrategy[Any]:
        row = st.dictionaries(st.sampled_from(ROW[name]) | texts, inner | st.integers(0, 3), max_size=6)
        return st.lists(row, min_size=1, max_size=4) if name.endswith("jsonl") else row

    held = {name: rows(name) for name in ROW}
    one = st.fixed_dictionaries({"manifest.json": held.pop("manifest.json")}, optional=held)

    @tried(12 * times, st.lists(one, min_size=1, max_size=2))
    def holds(runs: list[dict[str, Any]]) -> None:
        folder = tmp_path / f"runs-{next(number)}"
        for at, files in enumerate(runs):
            for name, value in files.items():
                _written(folder / str(at), name, value)
        with told(), nothing_outside(folder):
            build_report([folder / str(at) for at in range(len(runs))], folder)


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "recipe.yaml",
            "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40)),
        ),
        ("recipe.yaml", "a: &a\n  b: *a\n"),
        ("recipe.yaml", "a: !!timestamp x"),
        ("manifest.json", '{"a":' * 100_000),
        ("metrics.jsonl", "[" * 100_000 + '\n{"step": 1, "loss": 2}\n'),
        ("summary.json", '{"models": ' + "[" * 100_000),
    ],
)
def test_a_file_that_grows_or_nests_without_end_is_noted(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with told():
        assert name in Page(build_report([tmp_path], tmp_path / "page.html").read_text()).text


def _marked(value: Any, text: str) -> Any:
    """Every string and every key of a file with a text behind it."""
    if isinstance(value, dict):
        return {key if key in _READ else f"{key}{text}": _marked(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked(item, text) for item in value]
    return f"{value}{text}" if isinstance(value, str) else value


_READ = {name for names in ROW.values() for name in names} | {
    "mean",
    "low",
    "high",
    "n",
    "gold",
    "score",
    "kl",
    "train",
}
"""Keys that the report looks for; the others are shown as they are."""


@pytest.mark.timeout(120)
def test_no_text_of_a_run_becomes_a_part_of_the_report(times: int, tmp_path: Path) -> None:
    whole, number = write_pipeline(tmp_path / "whole"), itertools.count()

    @tried(4 * times, markup, st.booleans())
    def holds(text: str, is_named: bool) -> None:
        folder = tmp_path / f"runs-{next(number)}"
        runs = [folder / f"{name} {text.replace('/', '|') if is_named else ''}" for name in ("sft", "ppo")]
        for name, run in zip(("sft", "ppo"), runs, strict=True):
            for path in sorted(path for path in (whole / name).rglob("*.*") if path.is_file()):
                content, relative = path.read_text(), str(path.relative_to(whole / name))
                lines = [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else None
                _written(run, relative, _marked(lines or yaml.safe_load(content), text))
        written = build_report(runs, folder / "page.html", title=f"title {text}").read_text()
        found = Page(written)
        assert found.smuggled() == []
        assert f"title {text}" in found.text

    plain = Page(build_report([whole / "sft", whole / "ppo"], tmp_path / "plain.html").read_text())
    assert plain.smuggled() == []


# --- inspection ----------------------------------------------------------------------------------------------------


def test_no_text_of_a_row_becomes_a_part_of_the_inspection(times: int, tmp_path: Path) -> None:
    number = itertools.count()

    @tried(10 * times, markup, markup, st.booleans())
    def holds(first: str, second: str, is_named: bool) -> None:
        name = first.replace("/", "|") if is_named else ""
        path = tmp_path / f"rows-{next(number)} {name}.jsonl"
        rows = [{"prompt": f"a {first} {at}", "chosen": f"{second} b", "rejected": "c", "source": first} for at in "xy"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = inspect(str(path)).data
        assert data is not None
        found = Page(page(data))
        assert found.smuggled() == []
        assert first in found.text and second in found.text
