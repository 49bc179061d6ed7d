import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fairlead.data.records import RecordType, has_heldout, load_records, parse_row, prompt_key, split_records, statement
from fairlead.data.sources import Row
from fairlead.errors import ConfigError, DataError
from fairlead.types import Demonstration, Message, Preference, Prompt, Text


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


TALK: list[Message] = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yes?"), user("Bye")]
HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"


def written(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


# --- forms of rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "wanted"),
    [
        ({"text": " a\n", "id": 3}, Text, Text(" a\n")),
        ({"prompt": "q", "response": "a"}, Demonstration, Demonstration("q", "a")),
        ({"prompt": "q", "completion": "a"}, Demonstration, Demonstration("q", "a")),
        ({"question": "q", "answer": "a"}, Demonstration, Demonstration("q", "a")),
        ({"prompt": TALK, "response": "a"}, Demonstration, Demonstration(tuple(TALK), "a")),
        ({"prompt": [user("q")], "response": [assistant("a")]}, Demonstration, Demonstration((user("q"),), "a")),
        ({"messages": [*TALK, assistant("a")]}, Demonstration, Demonstration(tuple(TALK), "a")),
        ({"prompt": "q", "chosen": "c", "rejected": "r"}, Preference, Preference("q", "c", "r")),
        ({"prompt": "q", "chosen": "c", "rejected": "r", "margin": 2}, Preference, Preference("q", "c", "r", 2.0)),
        ({"prompt": "q", "chosen": "c", "rejected": "r", "margin": None}, Preference, Preference("q", "c", "r")),
        ({"question": "q", "response_j": "c", "response_k": "r"}, Preference, Preference("q", "c", "r")),
        (
            {"prompt": "q", "chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]},
            Preference,
            Preference("q", "c", "r"),
        ),
        ({"chosen": f"{HH} c", "rejected": f"{HH} r"}, Preference, Preference(tuple(TALK[1:]), "c", "r")),
        ({"prompt": "q", "gold": 3, "tag": "x"}, Prompt, Prompt("q", {"gold": 3, "tag": "x"})),
        ({"question": "q"}, Prompt, Prompt("q")),
        ({"messages": TALK, "tag": "x"}, Prompt, Prompt(tuple(TALK), {"tag": "x"})),
    ],
)
def test_a_row_is_recognised_by_its_fields(row: dict[str, Any], kind: RecordType, wanted: Any) -> None:
    (record,) = parse_row(Row(row, "here"), kind)
    assert record == wanted
    assert type(record) is kind


def test_only_the_fields_of_a_message_are_kept() -> None:
    row = {"messages": [{**user("q"), "weight": 1}, assistant("a")]}
    assert parse_row(Row(row, "here"), Demonstration) == [Demonstration((user("q"),), "a")]


def test_a_margin_is_a_float_whatever_number_was_written() -> None:
    (record,) = parse_row(Row({"prompt": "q", "chosen": "c", "rejected": "r", "margin": 2}, "here"), Preference)
    assert (record.margin, type(record.margin)) == (2.0, float)


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"text": " \n"}, Text, "empty text"),
        ({"prompt": "q", "response": " \n"}, Demonstration, "empty response"),
        ({"messages": [user("q"), assistant("")]}, Demonstration, "empty response"),
        ({"messages": TALK}, Demonstration, "does not end in an assistant turn"),
        ({"messages": [assistant("a")]}, Demonstration, "nothing before the answer"),
        ({"messages": []}, Demonstration, "no turns"),
        ({"prompt": [], "response": "a"}, Demonstration, "nothing before the answer"),
        ({"text": None}, Text, "text is null"),
        ({"prompt": "q", "response": None}, Demonstration, "response is null"),
        ({"prompt": None, "response": "a"}, Demonstration, "prompt is null"),
        ({"prompt": "q", "chosen": "c", "rejected": None}, Preference, "rejected is null"),
        ({"prompt": "q", "chosen": "c", "rejected": " c\n"}, Preference, "chosen equal to rejected"),
        ({"prompt": "q", "chosen": "c", "rejected": "r", "margin": 0}, Preference, "tie"),
        ({"prompt": "q", "chosen": "c", "rejected": "r", "margin": -1}, Preference, "chosen scored below rejected"),
        ({"prompt": "q", "chosen": "", "rejected": "r"}, Preference, "empty answer"),
        ({"prompt": "q", "chosen": "c", "rejected": "\t"}, Preference, "empty answer"),
        ({"prompt": "q", "chosen": "c", "rejected": "c"}, Preference, "chosen equal to rejected"),
        ({"chosen": f"{HH} c", "rejected": f"{HH} c"}, Preference, "chosen equal to rejected"),
        ({"chosen": f"{HH} c", "rejected": "\n\nHuman: Other\n\nAssistant: r"}, Preference, "prompts differ"),
        ({"chosen": f"{HH} c", "rejected": HH}, Preference, "empty answer"),
        (
            {"chosen": f"{HH} c\n\nAssistant: d", "rejected": f"{HH} r"},
            Preference,
            "two turns of the same role running",
        ),
        ({"prompt": " "}, Prompt, "empty prompt"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_and_counted_by_reason(
    row: dict[str, Any], kind: RecordType, reason: str
) -> None:
    good: dict[RecordType, dict[str, Any]] = {
        Text: {"text": "t"},
        Demonstration: {"prompt": "q", "response": "a"},
        Preference: {"prompt": "q", "chosen": "c", "rejected": "r"},
        Prompt: {"prompt": "q"},
    }
    records, counts = load_records([row, good[kind], row], kind)
    assert len(records) == 1
    assert (counts.read, counts.kept, dict(counts.dropped)) == (3, 1, {reason: 2})


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"txt": "a"}, Text, "no known format has these fields: txt\nhint: name the columns"),
        ({"txt": None}, Text, "no known format has these fields: txt\nhint: name the columns"),
        ({}, Prompt, "no known format has these fields: none\n"),
        ({"text": ["a"]}, Text, "text must be text, got list ['a']"),
        ({"prompt": "q", "response": 3}, Demonstration, "response must be text, got int 3"),
        ({"prompt": 3, "response": "a"}, Demonstration, "prompt must be a list of messages, got int 3"),
        (
            {"prompt": ["q"], "response": "a"},
            Demonstration,
            "prompt holds 'q', which is no message\nhint: a message is",
        ),
        ({"prompt": {"text": "q"}}, Prompt, "prompt must be a list of messages, got dict"),
        ({"prompt": "q", "response": [user("a")]}, Demonstration, "response does not end in an assistant turn"),
        ({"messages": "q"}, Demonstration, "messages must be a list of messages, got str 'q'"),
        ({"messages": [{"role": "narrator", "content": "q"}]}, Demonstration, "which is no message"),
        ({"messages": [{"role": "user", "content": None}]}, Demonstration, "which is no message"),
        (
            {"prompt": "q", "answr": "a"},
            Demonstration,
            "the row has prompt, answr and is read as prompt (a prompt alone, text or messages); that gives no "
            "demonstrations\nhint: to be prompt-response it lacks completion or response or answer, which data.columns "
            "can name; it can serve as prompts",
        ),
        (
            {"prompt": "q", "chosen": "c"},
            Preference,
            "that gives no pairs\nhint: to be preference it lacks reje",
        ),
        ({"chosen": "c", "rejected": "r"}, Preference, "no known format has these fields: chosen, rejected\n"),
        (
            {"text": "a"},
            Prompt,
            "is read as text (plain text); that gives no prompts\nhint: it can serve",
        ),
        ({"prompt": "q", "response": "a"}, Preference, "; it can serve as demonstrations, prompts, texts"),
    ],
)
def test_a_wrong_row_is_an_error_that_names_its_file_and_line(
    tmp_path: Path, row: dict[str, Any], kind: RecordType, message: str
) -> None:
    blank = "\n"
    path = tmp_path / "rows.jsonl"
    path.write_text(blank + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        load_records(str(path), kind)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("margin", ["2", "true", "[1]", "NaN", "Infinity", "-Infinity", '"nan"'])
def test_a_margin_that_is_no_number_is_an_error(tmp_path: Path, margin: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "chosen": "c", "rejected": "r", "margin": %s}\n' % margin)  # noqa: UP031
    if margin == "2":
        assert load_records(str(path), Preference)[0][0].margin == 2.0
        return
    with pytest.raises(DataError, match=r"rows\.jsonl:1: margin must be a number, got "):
        load_records(str(path), Preference)


def test_rows_in_memory_are_named_by_their_number() -> None:
    with pytest.raises(DataError, match=r"^row 1: no known format has these fields: txt"):
        load_records([{"text": "a"}, {"txt": "b"}], Text)
    with pytest.raises(DataError, match=r"^row 1 must be a mapping of fields, got int"):
        load_records([{"text": "a"}, 3], Text)  # type: ignore[list-item]


def test_no_usable_row_is_an_error_that_says_what_was_dropped(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"text": ""}, {"text": " "})
    with pytest.raises(DataError, match=r"no usable row in .*rows\.jsonl: 2 read, dropped \{'empty text': 2\}"):
        load_records(path, Text)


# --- where rows come from ------------------------------------------------------------------------------------------


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a.jsonl", {"text": "1"}), written(tmp_path / "b.jsonl", {"text": "2"}, {"text": "3"})
    records, counts = load_records((b, a), Text)
    assert ([record.text for record in records], counts.read) == (["2", "3", "1"], 3)


def test_the_limit_counts_usable_records_and_reads_no_further(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": ""}, {"text": "1"}, {"text": "2"}, {"text": "3"}, {"oops": "4"})
    records, counts = load_records(path, Text, limit=2)
    assert [record.text for record in records] == ["1", "2"]
    assert (counts.read, counts.kept, dict(counts.dropped)) == (3, 2, {"empty text": 1})


def test_the_limit_holds_inside_a_row_that_gives_several() -> None:
    records, counts = load_records([{"instruction": "i", "output": ["1", "2", "3"]}], Demonstration, limit=2)
    assert [record.response for record in records] == ["1", "2"]
    assert (counts.read, counts.kept) == (2, 2)


@pytest.mark.parametrize(
    ("kind", "name", "row"),
    [
        (Text, "pretrain.jsonl", {"text": "%s"}),
        (Demonstration, "sft.jsonl", {"prompt": "%s", "response": "a"}),
        (Preference, "preference.jsonl", {"prompt": "%s", "chosen": "c", "rejected": "r"}),
        (Prompt, "prompts.jsonl", {"prompt": "%s"}),
    ],
)
def test_a_prepared_folder_holds_a_file_for_each_kind_of_record(
    tmp_path: Path, kind: RecordType, name: str, row: Mapping[str, str]
) -> None:
    for prefix in ("", "heldout_"):
        written(
            tmp_path / f"{prefix}{name}", {key: value.replace("%s", prefix or "main") for key, value in row.items()}
        )
    for heldout, wanted in ((False, "main"), (True, "heldout_")):
        (record,), _ = load_records(str(tmp_path), kind, heldout=heldout)
        assert prompt_key(record) == wanted


def test_a_prepared_folder_without_the_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    written(tmp_path / "sft.jsonl", {"prompt": "q", "response": "a"})
    with pytest.raises(DataError, match=r"is a directory without heldout_sft\.jsonl.*\nhint: give a file"):
        load_records(str(tmp_path), Demonstration, heldout=True)


def test_a_prepared_folder_without_demonstrations_gives_the_chosen_answers_and_says_so(tmp_path: Path) -> None:
    written(tmp_path / "preference.jsonl", {"prompt": "q", "chosen": "c", "rejected": "r"})
    records, counts = load_records(str(tmp_path), Demonstration)
    assert records == [Demonstration("q", "c")]
    assert "1 demonstrations; taken of it: the chosen answer" in statement(counts, Demonstration)


def test_a_prepared_file_may_be_parquet(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"prompt": "q", "response": "a"}]), tmp_path / "heldout_sft.parquet")
    assert load_records(str(tmp_path), Demonstration, heldout=True)[0] == [Demonstration("q", "a")]
    assert has_heldout(str(tmp_path), Demonstration)
    assert not has_heldout(str(tmp_path), Preference)
    assert not has_heldout(str(tmp_path), Text)


@pytest.mark.parametrize("name", ["missing.jsonl", "folder/missing.jsonl", "./a/b", "/a/b", "word", "a/b/c"])
def test_a_missing_file_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_records(name, Text)


# --- what the user says --------------------------------------------------------------------------------------------


def test_columns_are_taken_under_the_names_of_their_fields() -> None:
    rows = [{"ask": "q", "say": "a", "prompt": "another", "id": 3}]
    columns = {"prompt": "ask", "response": "say"}
    assert load_records(rows, Demonstration, columns=columns)[0] == [Demonstration("q", "a")]
    assert load_records(rows, Prompt, columns=columns)[0] == [Prompt("q", {"response": "a", "id": 3})]


def test_a_named_column_that_is_missing_is_an_error_with_the_place() -> None:
    with pytest.raises(
        DataError, match=r"^row 0: there is no column 'asks', which data\.columns names for prompt\nhint"
    ):
        load_records([{"ask": "q", "say": "a"}], Demonstration, columns={"prompt": "asks"})


def test_a_format_that_is_named_wins_over_the_first_that_fits() -> None:
    rows = [{"instruction": "i", "output": "o", "prompt": "q", "response": "a"}]
    assert load_records(rows, Demonstration)[0] == [Demonstration("i", "o")]
    assert load_records(rows, Demonstration, format="prompt-response")[0] == [Demonstration("q", "a")]


def test_a_format_that_is_unknown_or_does_not_fit_is_an_error() -> None:
    rows = [{"prompt": "q", "response": "a"}]
    with pytest.raises(
        ConfigError, match=r"data\.format=alpacca: there is no such format\nhint: did you mean alpaca\?"
    ):
        load_records(rows, Demonstration, format="alpacca")
    with pytest.raises(
        DataError, match=r"^row 0: the row is not of the format alpaca: it has prompt, response\nhint: al"
    ):
        load_records(rows, Demonstration, format="alpaca")
    with pytest.raises(DataError, match=r"^row 0: the row has .* is read as text \(plain text\); that gives no demons"):
        load_records([{"text": "a", "prompt": "q", "response": "a"}], Demonstration, format="text")


def test_each_row_of_a_mixed_file_is_recognised_by_itself_and_the_user_is_told(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "response": "a", "messages": None},
        {"prompt": None, "response": None, "messages": [user("q"), assistant("b")]},
        {"instruction": "i", "output": ["1", "2"]},
        {"prompt": "q", "chosen": "c</s>", "rejected": "r"},
        {"prompt": "q", "response": ""},
    ]
    records, counts = load_records(written(tmp_path / "rows.jsonl", *rows), Demonstration)
    assert [record.response for record in records] == ["a", "b", "1", "2", "c</s>"]
    assert (counts.read, counts.kept, dict(counts.dropped)) == (6, 5, {"empty response": 1})
    assert statement(counts, Demonstration) == (
        "6 rows read as preference (1) and alpaca (1) and messages (1) and prompt-response (2): 5 demonstrations; "
        "taken of it: the chosen answer; dropped 1: empty response; noted 1: special token written as text"
    )


def test_one_format_is_stated_with_what_it_is() -> None:
    _, counts = load_records([{"text": "a"}], Text)
    assert statement(counts, Text) == "1 rows read as text (plain text): 1 texts"


def test_control_characters_and_line_separators_stay() -> None:
    text = "a\x85b\x91c\u2028d\x00"
    assert load_records([{"text": text}], Text)[0] == [Text(text)]


# --- weights -------------------------------------------------------------------------------------------------------


def test_a_weight_takes_records_again_or_leaves_some_out(tmp_path: Path) -> None:
    paths = tuple(written(tmp_path / f"{name}.jsonl", *({"text": f"{name}{i}"} for i in range(400))) for name in "abc")
    records, counts = load_records(paths, Text, weights=(2, 0.5, 1))
    taken = Counter(record.text for record in records)
    assert {taken[f"a{i}"] for i in range(400)} == {2}
    assert {taken[f"c{i}"] for i in range(400)} == {1}
    halves = sum(taken[f"b{i}"] for i in range(400))
    assert 150 < halves < 250  # 200 expected, standard deviation 10
    assert max(taken[f"b{i}"] for i in range(400)) == 1
    assert counts.kept == len(records) == 1200 + halves
    assert dict(counts.dropped) == {"left out by the weight of its source": 400 - halves}
    assert counts.read == counts.kept + counts.dropped.total()
    assert counts.notes["taken again by the weight of its source"] == 400
    assert [record.text for record in load_records(paths, Text, weights=(2, 0.5, 1))[0]] == [r.text for r in records]


def test_held_out_records_have_no_weight(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": "1"}, {"text": "2"})
    assert len(load_records(path, Text, weights=(3,))[0]) == 6
    assert len(load_records(path, Text, weights=(3,), heldout=True)[0]) == 2


def test_a_record_taken_twice_is_held_out_once(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", *({"prompt": f"q{i}"} for i in range(100)))
    records, _ = load_records(path, Prompt, weights=(2,))
    train, held_out = split_records(records, 0.3, 0)
    assert len(train) + 2 * len(held_out) == 200
    assert len({record.prompt for record in held_out}) == len(held_out)


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (1, -1), (0, 0), (1, float("nan"))])
def test_weights_that_are_none_are_an_error(tmp_path: Path, weights: tuple[float, ...]) -> None:
    paths = tuple(written(tmp_path / f"{name}.jsonl", {"text": name}) for name in "ab")
    with pytest.raises(ConfigError, match=r"data\.weights"):
        load_records(paths, Text, weights=weights)


# --- splits --------------------------------------------------------------------------------------------------------


def test_equal_prompts_land_on_one_side_and_nothing_is_lost() -> None:
    records = [Preference(f"q{i % 100}", f"c{i}", f"r{i}") for i in range(400)]
    train, held_out = split_records(records, 0.25, 0)
    assert sorted([*train, *held_out], key=records.index) == records
    prompts, held_out_prompts = {r.prompt for r in train}, {r.prompt for r in held_out}
    assert not prompts & held_out_prompts
    assert 10 <= len(held_out_prompts) <= 40  # 25 expected, 4.3 standard deviation
    assert [r for r in records if r in train] == train


def test_a_prompt_as_text_and_as_its_one_user_turn_are_equal() -> None:
    """They become the same tokens, so one must not be evaluated on after training on the other."""
    both = [Demonstration(f"q{i}", "a") for i in range(60)] + [
        Demonstration(({"role": "user", "content": f"q{i}"},), "b") for i in range(60)
    ]
    train, held_out = split_records(both, 0.5, 0)
    for side in (train, held_out):
        assert {prompt_key(r) for r in side if r.response == "a"} == {prompt_key(r) for r in side if r.response == "b"}


def test_prompts_of_other_turns_or_roles_differ() -> None:
    prompts: list[Any] = [
        "q",
        ({"role": "system", "content": "q"},),
        ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}),
        ({"role": "user", "content": "q"}, {"role": "user", "content": "a"}),
        (),
    ]
    assert len({prompt_key(Prompt(prompt)) for prompt in prompts}) == len(prompts)


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    records = [Prompt(f"q{i}") for i in range(100)]
    held_out = [{r.prompt for r in split_records(records, 0.3, seed)[1]} for seed in (0, 1)]
    assert held_out[0] != held_out[1]
    assert {r.prompt for r in split_records(records[::-1], 0.3, 0)[1]} == held_out[0]


def test_a_fraction_that_leaves_one_side_empty_is_an_error() -> None:
    with pytest.raises(
        DataError, match=r"data\.eval_fraction=0\.5 of 1 records leaves [01] to train on and [01] to ev"
    ):
        split_records([Prompt("q")], 0.5, 0)
