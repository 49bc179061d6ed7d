"""Reads prompts, alone, with an answer, or with several: Alpaca, Self-Instruct, KTO, question sets. Knows no pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from fairlead.data.formats.base import Data, Notes, Parsed, first, is_list_of, string, strings, truth, wrong
from fairlead.data.formats.transcripts import read_prompt
from fairlead.data.formats.turns import answer_turns, as_turns, conversation, plain_answer, read_tools
from fairlead.data.sources import Row
from fairlead.errors import DataError
from fairlead.types import Conversation, Demonstration, Labelled, Message, Prompt, Record

PROMPTS = "prompt|question|instruction|query"

_NO_INPUT = re.compile(r"\W*(?:no\W?input|(?<=<)none(?=>))\W*", re.IGNORECASE)


def read_conversation(row: Row, names: str, notes: Notes) -> Conversation:
    """The prompt of a row: a text, turns, a transcript, or Alpaca's fields; the column ``system`` goes before it."""
    name = first(row.data, names)
    if name == "instruction":
        return alpaca_prompt(row, notes)
    if not isinstance(row.data[name], str):
        return tuple(conversation(row, name, notes))
    return _after(_system(row), read_prompt(string(row, name), notes))


def alpaca_prompt(row: Row, notes: Notes) -> Conversation:
    """Instruction and input, a blank line between, after the turns of a system text and a history."""
    asked, given = string(row, "instruction"), string(row, "input|context", default="")
    if _NO_INPUT.fullmatch(given):
        notes["input that says there is none, left out"] += 1
        given = ""
    history = row.data.get("history") or []
    if not is_list_of(history, list, tuple) or not all(is_list_of(turn, str) and len(turn) == 2 for turn in history):
        raise wrong(row, "history", "a list of [question, answer]", history)
    turns = _system(row)
    for question, answer in history:
        turns += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return _after(turns, f"{asked}\n\n{given}" if given.strip() else asked)


def _system(row: Row) -> list[Message]:
    system = string(row, "system|system_prompt", default="")
    return [Message(role="system", content=system)] if system.strip() else []


def _after(turns: list[Message], prompt: Conversation) -> Conversation:
    return (*turns, *as_turns(prompt)) if turns else prompt


def demonstration(prompts: str, response: str) -> Any:
    """A parser of one prompt and one response, by the names of their fields."""

    def parse(row: Row, notes: Notes) -> Parsed:
        prompt = read_conversation(row, prompts, notes)
        *lead, last = answer_turns(row, first(row.data, response), notes)
        if not isinstance(prompt, str) and not prompt:
            return "nothing before the answer"
        answer = last["content"] if last.keys() <= {"role", "content"} else last
        finished = "sample" not in row.data or row.data.get("finished") is not False
        return Demonstration((*as_turns(prompt), *lead) if lead else prompt, answer, read_tools(row), finished)

    return parse


def several(prompts: str, responses: str) -> Any:
    """A parser of one prompt and either one response or a list of samples, each a demonstration."""
    single = demonstration(prompts, responses)

    def parse(row: Row, notes: Notes) -> Parsed:
        name = first(row.data, responses)
        if not isinstance(row.data[name], list):
            return single(row, notes)
        prompt, samples = read_conversation(row, prompts, notes), strings(row, name)
        return [Demonstration(prompt, sample) for sample in samples] or "no answers"

    return parse


def parse_seed_task(row: Row, notes: Notes) -> Parsed:
    """A Self-Instruct seed task: one demonstration for each of its instances."""
    instances = row.data["instances"]
    if not is_list_of(instances, Mapping):
        raise wrong(row, "instances", "a list of {input, output}", instances)
    records: list[Record] = []
    for instance in cast(list[dict[str, Any]], instances):
        given = Row({"instruction": row.data["instruction"], **instance}, row.place)
        records.append(Demonstration(alpaca_prompt(given, notes), string(given, "output")))
    return records or "no instances"


def parse_labelled(row: Row, notes: Notes) -> Parsed:
    """A prompt, a completion and whether it is good (KTO)."""
    prompt = read_conversation(row, PROMPTS, notes)
    *lead, last = answer_turns(row, first(row.data, "completion|response|output"), notes)
    label = truth(row.data[first(row.data, "label|kto_tag")])
    answer = plain_answer(last, notes)
    assert label is not None  # the format's shape has asked
    if answer is None:
        return "a tool call is labelled"
    return Labelled((*as_turns(prompt), *lead) if lead else prompt, answer, label)


def parse_graded(row: Row, notes: Notes) -> Parsed:
    """gsm8k's model solutions: columns of ``{"solution", "is_correct"}`` beside a question."""
    question = string(row, "question")
    records: list[Record] = []
    for name, value in row.data.items():
        if is_graded(value):
            label = truth(value["is_correct"])
            if label is None or not isinstance(value["solution"], str):
                raise wrong(row, name, '{"solution": text, "is_correct": true or false}', value)
            records.append(Labelled(question, value["solution"], label))
    return records


def is_graded(value: object) -> bool:
    return isinstance(value, Mapping) and {"solution", "is_correct"} <= value.keys()


def is_answered(data: Data) -> bool:
    """A checkable answer that is no text (42) is a column for the reward and no demonstration."""
    name = first(data, "completion|response|answer")
    return name != "answer" or isinstance(data[name], str)


def has_label(data: Data) -> bool:
    return truth(data[first(data, "label|kto_tag")]) is not None


def parse_questions(row: Row, notes: Notes) -> Parsed:
    """MT-Bench: the first question is the prompt, the later ones stay in the column ``turns``."""
    head, *rest = strings(row, "turns") or [""]
    return Prompt(head, {"turns": rest})


def parse_prompt(row: Row, notes: Notes) -> Parsed:
    prompt = read_conversation(row, PROMPTS, notes)
    if not isinstance(prompt, str) and prompt and prompt[-1]["role"] == "assistant":
        raise DataError(f"{row.place}: the prompt ends in an assistant turn", "name a conversation `messages`")
    return Prompt(prompt, tools=read_tools(row))
