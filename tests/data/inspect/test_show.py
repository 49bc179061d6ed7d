from __future__ import annotations

import io
import json
import re
from collections import Counter
from typing import Any

import pytest
from rich.console import Console
from tests.tiny import tokenizer

from fairlead.data.inspect.measure import measure
from fairlead.data.inspect.rows import draw
from fairlead.data.inspect.show import Inspection, page, print_inspection
from fairlead.data.render import Renderer
from fairlead.data.sources import Counts
from fairlead.types import Preference

HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold red]x[/bold red] :smile: <script>alert(1)</script> & \u202egnp.exe {{ 7*7 }}"
STYLES = re.compile(r"\x1b\[[0-9;]*m")


def inspection(records: list[Any], target: str = "pairs.jsonl", tokens: bool = True) -> Inspection:
    renderer = Renderer(tokenizer(), template="question-answer", max_length=4096)
    measures = measure(records, renderer if tokens else None, tokenizer="tiny" if tokens else None)
    counts = Counts(len(records) + 2, len(records), Counter({"tie": 2}), Counter({"read as preference": len(records)}))
    return Inspection(target, counts, measures, draw(records, measures, renderer if tokens else None, 2))


def printed(found: Inspection, *, is_terminal: bool, width: int = 300) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=is_terminal, markup=False, highlight=False, emoji=False,
        color_system="truecolor" if is_terminal else None, legacy_windows=False, _environ={},
    )  # fmt: skip
    print_inspection(found, console)
    return stream.getvalue()


@pytest.mark.parametrize("tokens", [True, False])
def test_data_cannot_drive_the_terminal_nor_be_read_as_markup(tokens: bool) -> None:
    found = inspection([Preference(HOSTILE, HOSTILE, "no")], HOSTILE, tokens)
    found.counts.dropped[HOSTILE] = 1
    shown = printed(found, is_terminal=True)
    assert "\x1b" in shown
    plain = STYLES.sub("", shown)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", plain)
    assert plain.count("[bold red]x[/bold red] :smile:") == 4
    assert "␛]0;owned␇␛[2J" in plain and "<U+202E>gnp" in plain


def test_masked_tokens_are_dim_learned_ones_plain_and_special_ones_reversed() -> None:
    shown = printed(inspection([Preference("Why?", "Because.", "So.")]), is_terminal=True)
    assert "\x1b[2mQuestion: Why?↵\x1b[0m" in shown
    assert "├─ " in shown and "└─ " in shown
    assert " Because.\x1b[7m<eos>\x1b[0m" in shown


def test_where_there_are_no_styles_the_learned_part_of_a_mixed_run_is_marked() -> None:
    from fairlead.types import Text

    shown = printed(inspection([Text("lamp")]), is_terminal=False)
    assert "\x1b" not in shown
    assert re.search("^ +l«amp<eos>»$", shown, re.MULTILINE)


def test_figures_are_shown_with_their_reasons() -> None:
    shown = printed(
        inspection([Preference("Why?", "Because.", "So.", 1.0), Preference("Who?", "I", "You", 2.0)]), is_terminal=False
    )
    assert "4 rows read as preference" in shown and "2 pairs" in shown
    assert re.search(r"^tie +2$", shown, re.MULTILINE)
    assert "chosen is longer than rejected in 50.0% [9.5%, 90.5%] (1 of 2)" in shown
    assert re.search("^ +1  █{40} 1\n +2  █{40} 1$", shown, re.MULTILINE)
    assert "2 different prompts; 0 records share theirs" in shown
    assert "duplicates: 0 exact, near: 0" in shown


def test_the_page_escapes_everything_and_asks_for_nothing() -> None:
    found = inspection([Preference(HOSTILE, HOSTILE, "no")], HOSTILE)
    found.counts.dropped[HOSTILE] = 1
    html = page(found)
    assert "<script" not in html and html.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp;") == 5
    assert "{{ 7*7 }}" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html)
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(|\bon\w+=", html.replace(HOSTILE, ""))


def test_the_page_shows_what_the_terminal_shows() -> None:
    found = inspection([Preference("Why?", "Because.", "So.", 1.0)])
    text = " ".join(re.sub("<[^>]*>", " ", page(found).partition("<main>")[2]).split())
    lines = [line for line in printed(found, is_terminal=False).splitlines() if not line.startswith("« » hold")]
    words = [word for line in lines for word in re.sub("[│├└─█]", " ", line).replace("<eos>", "").split()]
    assert len(words) > 80
    assert [word for word in words if word not in text] == []
    assert '<span class="masked">Question: Why?↵\n↵\nAnswer:</span>' in page(found)
    assert '<span> Because.</span><span class="special">&lt;eos&gt;</span>' in page(found)


def test_the_measures_are_json_of_known_names() -> None:
    found = json.loads(json.dumps(inspection([Preference("Why?", "Because.", "So.", 1.0)]).as_dict()))
    assert list(found) == [
        "target", "prepared", "counts", "kind", "records", "tokenizer", "template", "lengths", "limits", "packing",
        "shared_prompts", "labels", "histograms", "length_bias", "duplicates", "heldout",
    ]  # fmt: skip
    assert found["counts"] == {"read": 3, "kept": 1, "dropped": {"tie": 2}, "notes": {"read as preference": 1}}
    assert set(found["lengths"]) == {"tokens", "characters"}
    assert set(found["lengths"]["tokens"]["row"]) == {"number", "mean", "p5", "p50", "p95", "max"}
    assert found["length_bias"]["longer"] | {"low": 0, "high": 1} == {
        "hits": 1, "number": 1, "share": 1.0, "low": 0, "high": 1,
    }  # fmt: skip
    assert found["limits"] == {"max_length": 4096, "max_prompt_length": 4095, "kept": 1, "cut": 0, "dropped": {}}
    assert found["histograms"] == {"margin": [{"low": 1.0, "high": 1.0, "number": 1}]}
