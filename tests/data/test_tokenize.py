import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.data import chat_templates as forms
from tokenizers import pre_tokenizers

from fairlead.data import tokenize
from fairlead.data.render import Renderer
from fairlead.errors import DataError
from fairlead.types import Demonstration, Labelled, Message, Preference, Ranking, Record, Text

TURNS = (
    Message(role="user", content="Q"),
    Message(role="assistant", content="A"),
    Message(role="user", content="é漢🙂"),
)
RECORDS: list[Record] = [
    Demonstration("why?", "so"),
    Demonstration(TURNS, "because"),
    Demonstration("a prompt that is far too long " * 20, "dropped"),
    Demonstration("cut", "a response that is far too long " * 20),
]


def renderer(**options: Any) -> Renderer:
    tokenizer = options.pop("tokenizer", None) or forms.byte_level(forms.CHATML)
    return Renderer(tokenizer, **({"template": "hh", "max_length": 60, "loss_on": "assistant"} | options))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.trees"))


# --- cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "records",
    [
        RECORDS,
        [Text("ab"), Text("c")],
        [Preference("Q", "a", "b")],
        [Ranking("Q", ("a", "b", "c")), Ranking("R", ("a",))],
    ],
)
def test_what_is_read_back_is_what_the_renderer_gives(records: list[Record], tmp_path: Path) -> None:
    wanted = renderer().trees(records)
    made = tokenize.trees(renderer(), records, cache=str(tmp_path))
    (held,) = files(tmp_path)
    before = held.stat().st_mtime_ns
    os.utime(held, (0, 0))
    read = tokenize.trees(renderer(), records, cache=str(tmp_path))
    assert made == read == wanted
    assert files(tmp_path) == [held]
    assert held.stat().st_mtime_ns >= before  # it was used, so it is kept


def _other_tokenizer() -> Any:
    made = forms.byte_level(forms.CHATML)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def _other_end() -> Any:
    made = forms.byte_level(forms.CHATML)
    made.eos_token = "<|end|>"
    return made


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"template": "question-answer"}, None),
        ({"max_length": 61}, None),
        ({"max_prompt_length": 30}, None),
        ({"loss_on": "all"}, None),
        ({"tokenizer": _other_tokenizer()}, None),
        ({"tokenizer": _other_end()}, None),
        ({"tokenizer": forms.byte_level(forms.CHATML, has_habit=True)}, None),
        ({"tokenizer": forms.byte_level(forms.ZEPHYR)}, None),
        ({}, lambda records: records[1:]),
        ({}, lambda records: records[::-1]),
        ({}, lambda records: [replace(records[0], prompt="why!"), *records[1:]]),
        ({}, lambda records: [Labelled(r.prompt, r.response, True) for r in records]),
    ],
)
def test_each_ingredient_that_changes_makes_new_trees(
    options: dict[str, Any], change: Callable[[Sequence[Any]], list[Any]] | None, tmp_path: Path
) -> None:
    tokenize.trees(renderer(), RECORDS, cache=str(tmp_path))
    other = change(RECORDS) if change else RECORDS
    made = tokenize.trees(renderer(**options), other, cache=str(tmp_path))
    assert len(files(tmp_path)) == 2
    assert made == renderer(**options).trees(other)


def test_a_change_of_the_code_makes_new_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize.trees(renderer(), RECORDS, cache=str(tmp_path))
    monkeypatch.setattr(tokenize, "_CODE", ("render.py", "pack.py"))
    tokenize.trees(renderer(), RECORDS, cache=str(tmp_path))
    assert len(files(tmp_path)) == 2


def test_how_the_tokenizer_was_used_before_changes_nothing(tmp_path: Path) -> None:
    used = forms.byte_level(forms.CHATML)
    used(["a", "abc"], padding=True, truncation=True, max_length=2)
    tokenize.trees(renderer(tokenizer=used), RECORDS, cache=str(tmp_path))
    tokenize.trees(renderer(), RECORDS, cache=str(tmp_path))
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:]])
def test_a_damaged_file_is_made_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    wanted = tokenize.trees(renderer(), RECORDS, cache=str(tmp_path))
    (held,) = files(tmp_path)
    sound = held.read_bytes()
    held.write_bytes(damage(sound))
    assert tokenize.trees(renderer(), RECORDS, cache=str(tmp_path)) == wanted
    assert held.read_bytes() == sound


def test_few_records_leave_the_users_cache_alone_and_many_go_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokenize.default_folder() == tmp_path / "fairlead" / "tokens"
    tokenize.trees(renderer(), RECORDS, cache=None)
    assert files(tmp_path) == []
    big = [Text("x" * (1 << 20))]
    tokenize.trees(renderer(), big, cache="none")
    assert files(tmp_path) == []
    tokenize.trees(renderer(), big, cache=None)
    assert [path.parent for path in files(tmp_path)] == [tmp_path / "fairlead" / "tokens"]
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert tokenize.default_folder() == Path.home() / ".cache" / "fairlead" / "tokens"


def test_what_nobody_reads_for_a_month_is_removed(tmp_path: Path) -> None:
    for age, name in ((31, "old.trees"), (29, "new.trees"), (400, "notes.txt")):
        (tmp_path / name).write_bytes(b"x")
        then = time.time() - age * 86400
        os.utime(tmp_path / name, (then, then))
    tokenize.trees(renderer(), RECORDS, cache=str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} >= {"new.trees", "notes.txt"}
    assert not (tmp_path / "old.trees").exists()


def test_a_cache_that_cannot_be_written_is_an_error_where_it_was_named_and_else_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be written"):
        tokenize.trees(renderer(), RECORDS, cache=str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    big = [Text("x" * (1 << 20))]
    assert tokenize.trees(renderer(), big, cache=None) == renderer().trees(big)


# --- processes -----------------------------------------------------------------------------------------------------


def test_several_processes_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    records = [Demonstration("Q" * (i % 80), f"{i} " * (i % 37)) for i in range(tokenize.PARALLEL_FROM + 123)]
    wanted = renderer().trees(records)
    assert tokenize.trees(renderer(), records, workers=2) == wanted
    assert wanted[2].dropped
    assert wanted[2].cut
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_a_mistake_found_in_a_process_is_told_with_its_hint() -> None:
    turns = [Message(role="narrator", content="x")]
    records = [Demonstration("Q", "B")] * tokenize.PARALLEL_FROM + [Demonstration(turns, "B")]
    with pytest.raises(DataError, match=r"role 'narrator'\nhint: roles are"):
        tokenize.trees(renderer(), records, workers=2)


def test_nothing_left_is_said_of_all_records_together() -> None:
    records = [Demonstration("Q" * 100, "B")] * tokenize.PARALLEL_FROM
    with pytest.raises(DataError, match=r"no record is left .*\{'prompt longer than 59 tokens': 4000\}"):
        tokenize.trees(renderer(), records, workers=2)
    kept = tokenize.trees(renderer(), [*records, Demonstration("Q", "B")], workers=2)[1]
    assert kept == [4000]
