"""What the published files hold. The numbers were counted with json, wc and grep, not with Fairlead's readers."""

import os
from pathlib import Path
from typing import Any

import pytest

from fairlead.data.formats import RecordType
from fairlead.data.records import load_records, statement
from fairlead.errors import DataError
from fairlead.types import Demonstration, Labelled, Preference, Prompt, Record, Text

EVAL = "alpaca_eval/{}.annotations.json"
READ, TAKEN = "read as ", "taken: "


@pytest.fixture
def data() -> Path:
    path = Path(os.environ.get("FAIRLEAD_DATA", ""))
    if not os.environ.get("FAIRLEAD_DATA") or not path.is_dir():
        pytest.skip("FAIRLEAD_DATA names no folder with the published files")
    return path


FILES: list[tuple[str, str, RecordType, int, dict[str, int], dict[str, int]]] = [
    # file, format, kind, records, dropped, noted
    ("hh-rlhf/harmless-base/test.jsonl.gz", "hh", Preference, 1592,
     {"empty answer": 4, "two turns of the same role running": 4}, {"marker inside a turn": 35}),
    ("rt-polarity/rt-polarity.pos", "sentiment", Labelled, 4000, {}, {"lines decoded as cp1252": 72}),
    ("rt-polarity/rt-polarity.neg", "sentiment", Labelled, 4000, {}, {"lines decoded as cp1252": 73}),
    ("alpaca/alpaca_data_cherry_5_percent.json", "alpaca", Demonstration, 2359, {},
     {"input that says there is none, left out": 48}),
    ("alpaca/alpaca_data_long_2000.json", "alpaca", Demonstration, 884, {},
     {"input that says there is none, left out": 17}),
    ("alpaca/alpaca_data_first_145.json", "alpaca", Demonstration, 104, {}, {}),
    ("alpaca/seed_tasks.jsonl", "seed-tasks", Demonstration, 130, {}, {}),
    ("llamafactory/dpo_en_demo.json", "conversation-preference", Preference, 220, {}, {}),
    ("llamafactory/dpo_zh_demo.json", "conversation-preference", Preference, 150, {}, {}),
    ("llamafactory/kto_en_demo.json", "kto-messages", Labelled, 220, {}, {"special token written as text": 1}),
    ("llamafactory/alpaca_en_demo.json", "alpaca", Demonstration, 750, {},
     {"input that says there is none, left out": 6}),
    ("llamafactory/glaive_toolcall_en_demo.json", "sharegpt", Demonstration, 220, {}, {}),
    ("llamafactory/c4_demo.jsonl", "text", Text, 220, {}, {}),
    ("llamafactory/reason_tool_use_demo_50.jsonl", "messages", Demonstration, 35, {}, {}),
    ("llamafactory/v1_sft_demo.jsonl", "messages", Demonstration, 400, {}, {}),
    ("llamafactory/v1_dpo_demo.jsonl", "implicit-preference", Preference, 10, {}, {}),
    ("llamafactory/identity.json", "alpaca", Demonstration, 91, {}, {}),
    ("fastchat/dummy_conversation.json", "sharegpt", Demonstration, 500, {}, {}),
    ("fastchat/mt_bench_question.jsonl", "mt-bench", Prompt, 80, {}, {}),
    ("gsm8k/train.jsonl", "prompt-response", Demonstration, 4000, {}, {}),
    ("gsm8k/test.jsonl", "prompt-response", Demonstration, 500, {}, {}),
    ("gsm8k/example_model_solutions.jsonl", "graded-solutions", Labelled, 2000, {}, {}),
    (EVAL.format("alpaca-7b.alpaca_eval_gpt4"), "alpaca-eval", Preference, 462, {"tie": 7}, {}),
    (EVAL.format("alpaca-farm-ppo-human.alpaca_eval_gpt4"), "alpaca-eval", Preference, 465, {"tie": 4}, {}),
    (EVAL.format("zephyr-7b-beta.alpaca_eval_gpt4"), "alpaca-eval", Preference, 328, {"not judged": 2}, {}),
    (EVAL.format("alpaca-farm-ppo-human.weighted_alpaca_eval_gpt4_turbo"), "alpaca-eval", Preference, 149,
     {"tie": 1}, {}),
    ("alpaca_farm/outputs_baseline.json", "alpaca", Demonstration, 140, {}, {}),
    ("alpaca_farm/outputs_sft.json", "alpaca", Demonstration, 140, {}, {}),
    ("alpaca_farm/outputs_rlhf.json", "alpaca", Demonstration, 140, {}, {}),
    ("alpaca_farm/multisamples_sft.json", "alpaca", Demonstration, 32, {}, {}),
    ("ultrafeedback/train.jsonl", "preference", Preference, 624,
     {"tie": 73, "chosen equal to rejected": 2, "empty answer": 1}, {"special token written as text": 3}),
    ("ultrafeedback/eval.jsonl", "preference", Preference, 64, {"tie": 15, "chosen equal to rejected": 1}, {}),
    ("torchtune/stack_exchange_paired_tiny.json", "stack-exchange-paired", Preference, 25, {}, {}),
    ("instruction_preference/instruction-data-with-preference.json", "alpaca-preference", Preference, 794,
     {"chosen equal to rejected": 6}, {}),
    ("lmflow/wikitext-2-raw-v1/test", "text", Text, 2210, {"empty text": 1086}, {}),
    ("text/tinyshakespeare/input.txt", "text", Text, 29242, {}, {}),
    ("text/wikitext-2/valid.txt", "text", Text, 2461, {}, {"special token written as text": 1838}),
    ("text/tinystories/tiny_stories.txt", "text", Text, 4281, {}, {}),
    ("text/gutenberg/11-0.txt", "text", Text, 2791, {}, {}),
    ("text/gutenberg/120-0.txt", "text", Text, 6192, {}, {}),
    ("text/gutenberg/1342-0.txt", "text", Text, 11033, {}, {}),
    ("text/gutenberg/1661-8.txt", "text", Text, 10387, {}, {"lines decoded as cp1252": 13}),
    ("text/gutenberg/236-0.txt", "text", Text, 4695, {}, {}),
    ("text/gutenberg/2591-0.txt", "text", Text, 8304, {}, {}),
    ("text/gutenberg/55.txt", "text", Text, 3781, {}, {}),
    ("text/wikipedia/wiki_demo.txt", "text", Text, 18, {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "format", "kind", "number", "dropped", "noted"), FILES, ids=[row[0] for row in FILES])
def test_a_published_file_loads_as_what_it_is(
    data: Path, name: str, format: str, kind: RecordType, number: int, dropped: dict[str, int], noted: dict[str, int]
) -> None:
    records, counts = load_records(str(data / name), kind)
    assert (len(records), dict(counts.dropped)) == (number, dropped)
    assert counts.read == number + sum(dropped.values())
    assert {type(record) for record in records} == {kind}
    notes = {note: count for note, count in counts.notes.items() if not note.startswith(READ)}
    assert notes == noted
    assert [note for note in counts.notes if note.startswith(READ)] == [READ + format]
    assert f"read as {format} (" in statement(counts, kind)


def test_imdb_is_read_from_its_archive_by_split(data: Path) -> None:
    path = str(data / "imdb/aclImdb_v1.tar.gz")
    labelled, counts = load_records(path, Labelled)
    assert (len(labelled), sum(record.label for record in labelled)) == (3600, 1800)
    assert dict(counts.dropped) == {"label is null": 500}  # unsup: 500 reviews that nobody labelled
    assert len(load_records(path, Text)[0]) == 4100
    heldout, counts = load_records(path, Labelled, heldout=True)
    assert (len(heldout), sum(record.label for record in heldout), counts.dropped.total()) == (2000, 1000, 0)


def test_the_description_of_other_files_is_no_data(data: Path) -> None:
    with pytest.raises(DataError, match=r"dataset_info\.json:1: this is LLaMA-Factory's description of data files"):
        load_records(str(data / "llamafactory/dataset_info.json"), Demonstration)


OTHERS: list[tuple[str, RecordType, int, dict[str, int], str]] = [
    ("hh-rlhf/harmless-base/test.jsonl.gz", Demonstration, 1592,
     {"empty response": 4, "two turns of the same role running": 4}, "the chosen answer"),
    ("llamafactory/kto_en_demo.json", Demonstration, 113, {"labelled as bad": 107}, "the answers labelled as good"),
    ("gsm8k/example_model_solutions.jsonl", Demonstration, 758, {"labelled as bad": 1242},
     "the answers labelled as good"),
    ("gsm8k/example_model_solutions.jsonl", Prompt, 500, {}, "the prompt"),
    ("alpaca_farm/multisamples_sft.json", Prompt, 8, {}, "the prompt"),
    ("ultrafeedback/train.jsonl", Demonstration, 700, {}, "the chosen answer"),
    ("ultrafeedback/train.jsonl", Prompt, 700, {}, "the prompt"),
    ("torchtune/stack_exchange_paired_tiny.json", Labelled, 50, {}, "the chosen answer as good, the rejected as bad"),
    ("rt-polarity/rt-polarity.neg", Text, 4000, {}, "the text without its label"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "number", "dropped", "taken"), OTHERS)
def test_a_published_file_serves_as_another_kind_and_says_so(
    data: Path, name: str, kind: RecordType, number: int, dropped: dict[str, int], taken: str
) -> None:
    records, counts = load_records(str(data / name), kind)
    assert (len(records), dict(counts.dropped)) == (number, dropped)
    assert f"taken of it: {taken}" in statement(counts, kind)


def load(data: Path, name: str, kind: RecordType) -> list[Any]:
    return load_records(str(data / name), kind)[0]


def roles(record: Record) -> tuple[str, ...]:
    assert not isinstance(record, Text | str)
    assert not isinstance(record.prompt, str)
    return tuple(turn["role"] for turn in record.prompt)


def test_tool_calls_of_sharegpt_are_calls_and_their_tools_are_read(data: Path) -> None:
    records = load(data, "llamafactory/glaive_toolcall_en_demo.json", Demonstration)
    turns = [turn for record in records for turn in record.prompt]
    calls = [call for turn in turns for call in turn.get("tool_calls", ())]
    assert len(calls) == 149
    assert all(isinstance(call["function"]["arguments"], dict) for call in calls)
    assert sum(turn["role"] == "tool" for turn in turns) == 149
    assert sum(bool(record.tools) for record in records) == 135  # the others have "[]"


def test_typed_parts_keep_reasoning_calls_and_tools(data: Path) -> None:
    records = load(data, "llamafactory/reason_tool_use_demo_50.jsonl", Demonstration)
    turns = [turn for record in records for turn in (*record.prompt, record.response)]
    assert sum("reasoning_content" in turn for turn in turns) == 93
    assert sum(len(turn.get("tool_calls", ())) for turn in turns) == 59
    assert all(record.tools and roles(record)[:2] == ("system", "user") for record in records)


def test_weights_of_published_messages_leave_every_answer_counting(data: Path) -> None:
    for record in load(data, "llamafactory/v1_sft_demo.jsonl", Demonstration):
        assert roles(record) == ("user",)
        assert isinstance(record.response, str)


def test_labels_scores_and_judgements_are_those_of_the_files(data: Path) -> None:
    assert sum(r.label for r in load(data, "llamafactory/kto_en_demo.json", Labelled)) == 113
    margins = [r.margin for r in load(data, EVAL.format("zephyr-7b-beta.alpaca_eval_gpt4"), Preference)]
    assert set(margins) == {1.0}
    turbo = EVAL.format("alpaca-farm-ppo-human.weighted_alpaca_eval_gpt4_turbo")
    assert all(0 < r.margin <= 1 for r in load(data, turbo, Preference))
    assert all(r.margin > 0 for r in load(data, "ultrafeedback/train.jsonl", Preference))


def test_system_turns_come_first(data: Path) -> None:
    assert sum(roles(r)[0] == "system" for r in load(data, "llamafactory/dpo_en_demo.json", Preference)) == 58
    assert sum(roles(r)[0] == "system" for r in load(data, "llamafactory/dpo_zh_demo.json", Preference)) == 28


def test_a_second_question_stays_beside_the_first(data: Path) -> None:
    for record in load(data, "fastchat/mt_bench_question.jsonl", Prompt):
        assert len(record.columns["turns"]) == 1
        assert {"question_id", "category"} <= record.columns.keys()
