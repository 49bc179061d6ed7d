"""Conversations: messages, ShareGPT turns, typed parts, tools, weights."""

import json
from collections import Counter
from typing import Any

import pytest

from fairlead.data.formats import FORMATS, recognise
from fairlead.data.sources import Row
from fairlead.errors import DataError
from fairlead.types import Demonstration, Labelled, Prompt

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds"}}


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def parse(row: dict[str, Any], notes: Counter[str] | None = None) -> Any:
    return recognise(Row(row, "a.jsonl:7")).parse(Row(row, "a.jsonl:7"), notes)


def talk(*turns: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("prompter", "user"),
        ("system", "system"),
        ("developer", "system"),
        ("observation", "tool"),
        ("tool", "tool"),
        ("function", "tool"),
        ("Assistant", "assistant"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
    ],
)
def test_speakers_have_many_names(name: str, role: str) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": name, "value": "x"}, {"from": "gpt", "value": "a"}]
    record = parse({"conversations": turns})
    assert isinstance(record, Demonstration)
    everything = [*record.prompt, turn("assistant", record.response)]
    texts = [(item["role"], item["content"]) for item in everything]
    if role == "user":
        assert texts == [("user", "q\n\nx"), ("assistant", "a")]
    elif role == "assistant":
        assert texts == [("user", "q"), ("assistant", "x\n\na")]
    else:
        assert texts == [("user", "q"), (role, "x"), ("assistant", "a")]


def test_running_turns_of_one_speaker_are_joined_and_noted() -> None:
    notes = Counter[str]()
    row = talk(turn("user", "a"), turn("user", "b"), turn("assistant", "c"), turn("assistant", "d"))
    assert parse(row, notes) == Demonstration((turn("user", "a\n\nb"),), "c\n\nd")  # type: ignore[arg-type]
    assert notes == {"two turns of one speaker running, joined": 1}


def test_tool_results_and_calls_are_never_joined() -> None:
    row = talk(
        turn("user", "q"),
        turn("assistant", None, tool_calls=[CALL, CALL]),
        turn("tool", "1"),
        turn("tool", "2"),
        turn("assistant", "", tool_calls=[CALL]),
        turn("assistant", "a"),
    )
    record = parse(row)
    assert [item["role"] for item in record.prompt] == ["user", "assistant", "tool", "tool", "assistant"]
    assert record.prompt[1] == turn("assistant", "", tool_calls=[CALL, CALL])
    assert record.response == "a"


def test_a_conversation_that_ends_in_a_question_is_a_prompt() -> None:
    row = talk(turn("user", "a"), turn("assistant", "b"), turn("user", "c"), tools=[TOOL])
    assert parse(row) == Prompt((turn("user", "a"), turn("assistant", "b"), turn("user", "c")), tools=(TOOL,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no turns"),
        ([turn("assistant", "a")], "nothing before the answer"),
        ([turn("user", "q"), turn("assistant", "a", loss_weight=0)], "every answer has weight 0"),
    ],
)
def test_a_conversation_without_something_to_learn_is_dropped(turns: list[Any], reason: str) -> None:
    assert parse({"messages": turns}) == reason


# --- tool calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_arguments_of_a_call_are_an_object_or_its_json(arguments: Any) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": arguments}}
    record = parse(talk(turn("user", "q"), turn("assistant", None, tool_calls=[call])))
    assert record == Demonstration((turn("user", "q"),), turn("assistant", "", tool_calls=[CALL]))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [{"name": "add", "arguments": {"a": 1}}, [{"name": "add", "arguments": {"a": 1}}]])
def test_a_function_call_of_sharegpt_is_a_tool_call(value: Any) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(value)}]
    record = parse({"conversations": turns})
    assert record.response == turn("assistant", "", tool_calls=[CALL])


def test_a_function_call_of_the_older_kind_is_a_tool_call() -> None:
    row = talk(turn("user", "q"), turn("assistant", None, function_call={"name": "add", "arguments": '{"a": 1}'}))
    assert parse(row).response == turn("assistant", "", tool_calls=[CALL])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (turn("assistant", None, tool_calls=[{"name": 3}]), "a tool call needs name and arguments"),
        (turn("assistant", None, tool_calls=[{"name": "f", "arguments": "{"}]), "holds a string that is no JSON"),
        (turn("assistant", None, tool_calls=[{"name": "f", "arguments": "[1]"}]), "must be an object, got [1]"),
        ({"from": "function_call", "value": "add"}, "holds a string that is no JSON"),
    ],
)
def test_a_broken_call_is_an_error_with_its_place(message: dict[str, Any], error: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(talk(turn("user", "q"), message))
    assert str(caught.value).startswith("a.jsonl:7: messages")
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "wanted"),
    [
        ([TOOL], (TOOL,)),
        (json.dumps([TOOL]), (TOOL,)),
        (TOOL, (TOOL,)),
        ([TOOL["function"]], (TOOL,)),
        ("", ()),
        ("[]", ()),
        ([], ()),
        (None, ()),
    ],
)
def test_tools_are_a_list_or_its_json_or_nothing(tools: Any, wanted: Any) -> None:
    assert parse(talk(turn("user", "q"), turn("assistant", "a"), tools=tools)).tools == wanted


@pytest.mark.parametrize("tools", ["{", [3], ["add"], 3])
def test_tools_that_are_none_are_an_error(tools: Any) -> None:
    with pytest.raises(DataError, match=r"^a\.jsonl:7: tools"):
        parse(talk(turn("user", "q"), turn("assistant", "a"), tools=tools))


# --- typed parts ---------------------------------------------------------------------------------------------------


def test_typed_parts_are_text_reasoning_and_calls() -> None:
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "text": "a"},
        {"type": "text", "value": "b"},
        {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    ]
    record = parse(talk(turn("user", [{"type": "text", "value": "q"}]), turn("assistant", parts)))
    assert record.prompt == (turn("user", "q"),)
    assert record.response == turn("assistant", "ab", reasoning_content="hm", tool_calls=[CALL])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content_is_kept(key: str) -> None:
    record = parse(talk(turn("user", "q"), turn("assistant", "a", **{key: "hm"})))
    assert record.response == turn("assistant", "a", reasoning_content="hm")


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "input_audio", "video"])
def test_parts_that_are_no_text_are_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(DataError, match=rf"part of type '{kind}', which is not supported.*\nhint: Fairlead reads text"):
        parse(talk(turn("user", [{"type": kind, "value": "x"}]), turn("assistant", "a")))


def test_images_beside_the_turns_are_refused() -> None:
    with pytest.raises(DataError, match="images are not supported"):
        parse(talk(turn("user", "<image>"), turn("assistant", "a"), images=["a.png"]))
    assert parse(talk(turn("user", "q"), turn("assistant", "a"), images=[])) == Demonstration((turn("user", "q"),), "a")  # type: ignore[arg-type]


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["loss_weight", "weight"])
def test_weight_0_takes_an_answer_out_of_the_loss_and_1_is_nothing(key: str) -> None:
    row = talk(
        turn("user", "q", **{key: 0.0}),
        turn("assistant", "a", **{key: 0}),
        turn("user", "r"),
        turn("assistant", "b", **{key: 1.0}),
    )
    record = parse(row)
    assert record.prompt == (turn("user", "q"), turn("assistant", "a", counts=False), turn("user", "r"))
    assert record.response == "b"


def test_what_follows_the_last_answer_that_counts_is_left_out() -> None:
    notes = Counter[str]()
    turns = [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b", loss_weight=0)]
    assert parse({"messages": turns}, notes) == Demonstration((turn("user", "q"),), "a")  # type: ignore[arg-type]
    assert notes == {"turns after the last that counts left out": 1}


def test_a_weight_on_a_question_is_noted() -> None:
    notes = Counter[str]()
    parse(talk(turn("user", "q", loss_weight=1), turn("assistant", "a")), notes)
    assert notes == {"weight 1 on a turn that is not the assistant's, not learned": 1}


@pytest.mark.parametrize("weight", [0.5, 2, -1, "1", True])
def test_other_weights_are_an_error(weight: Any) -> None:
    with pytest.raises(DataError, match=r"weights other than 0 and 1 are not supported"):
        parse(talk(turn("user", "q"), turn("assistant", "a", loss_weight=weight)))


# --- columns beside the turns --------------------------------------------------------------------------------------


def test_a_system_column_goes_first_unless_a_system_turn_does() -> None:
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}
    assert parse(row).prompt == (turn("system", "s"), turn("user", "q"))
    notes = Counter[str]()
    row["conversations"] = [{"from": "system", "value": "own"}, *row["conversations"]]
    assert parse(row, notes).prompt == (turn("system", "own"), turn("user", "q"))
    assert notes == {"system column beside a system turn, left out": 1}


def test_a_labelled_conversation_is_labelled() -> None:
    row = talk(turn("system", "s"), turn("user", "q"), turn("assistant", "a"), label=False)
    assert parse(row) == Labelled((turn("system", "s"), turn("user", "q")), "a", False)  # type: ignore[arg-type]
    assert parse({**row, "messages": row["messages"][:2]}) == "does not end in an assistant turn"
    call = turn("assistant", None, tool_calls=[CALL])
    assert parse({**row, "messages": [*row["messages"][:2], call]}) == "a tool call is labelled"


def test_every_format_of_conversations_reads_lmflow_and_openai_alike() -> None:
    """LMFlow's `conversation`: conversation_id, system, tools, messages."""
    turns = [turn("user", "q"), turn("assistant", "a")]
    row = {"conversation_id": 1, "system": "s", "tools": [], "messages": turns}
    assert FORMATS["messages"].parse(Row(row, "x")) == Demonstration((turn("system", "s"), turn("user", "q")), "a")  # type: ignore[arg-type]
