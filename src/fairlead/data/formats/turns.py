"""Reads conversations: OpenAI messages, ShareGPT turns, typed content parts, tool calls. Knows no template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fairlead.data.formats.base import Data, Notes, Parsed, first, truth, wrong
from fairlead.data.sources import Row, clip
from fairlead.errors import DataError
from fairlead.types import Conversation, Demonstration, Labelled, Message, Prompt, Tools

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""The names that data sets give to speakers."""
MEDIA = ("images", "audios", "videos")


def parse_messages(row: Row, notes: Notes) -> Parsed:
    """A conversation: a Demonstration of its last answer, or a Prompt where it ends in another turn."""
    turns = conversation(row, first(row.data, "messages|conversations|conversation"), notes)
    if not turns:
        return "no turns"
    if not turns[-1].get("counts", True):
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("counts", True)]
        if not answers:
            return "every answer has weight 0"
        turns = turns[: answers[-1] + 1]
        notes["turns after the last that counts left out"] += 1
    *prompt, answer = turns
    if answer["role"] != "assistant":
        return Prompt(tuple(turns), tools=read_tools(row))
    if not prompt:
        return "nothing before the answer"
    is_text = answer.keys() <= {"role", "content"}
    return Demonstration(tuple(prompt), answer["content"] if is_text else answer, read_tools(row))


def parse_labelled_messages(row: Row, notes: Notes) -> Parsed:
    """A conversation whose last answer is labelled good or bad (KTO)."""
    turns = conversation(row, first(row.data, "messages|conversations"), notes)
    if not turns or turns[-1]["role"] != "assistant":
        return "does not end in an assistant turn"
    answer = plain_answer(turns[-1], notes)
    label = truth(row.data[first(row.data, "label|kto_tag")])
    assert label is not None  # the format's shape has asked
    return "a tool call is labelled" if answer is None else Labelled(tuple(turns[:-1]), answer, label)


def conversation(row: Row, name: str, notes: Notes) -> list[Message]:
    """The turns of a field, a system column and LMFlow's ``{"messages": ...}`` included. Turns of one speaker that run
    are joined by a blank line, and noted."""
    for media in MEDIA:
        if row.data.get(media):
            raise DataError(f"{row.place}: {media} are not supported", "Fairlead reads text only; leave these rows out")
    value, system = row.data[name], row.data.get("system")
    if isinstance(value, Mapping) and "messages" in value:
        value, system = value["messages"], value.get("system")
    if not isinstance(value, list):
        raise wrong(row, name, "a list of messages", value)
    turns: list[Message] = []
    for item in cast(list[Any], value):
        turn = _turn(row, name, item, notes)
        if turns and _joins(turns[-1], turn):
            turns[-1]["content"] += f"\n\n{turn['content']}"
            notes["two turns of one speaker running, joined"] += 1
        else:
            turns.append(turn)
    if isinstance(system, str) and system.strip() and turns:
        if turns[0]["role"] != "system":
            turns.insert(0, Message(role="system", content=system))
        elif turns[0]["content"] != system:
            notes["system column beside a system turn, left out"] += 1
    elif system is not None and not isinstance(system, str):
        raise wrong(row, "system", "text", system)
    return turns


def answer_turns(row: Row, name: str, notes: Notes) -> list[Message]:
    """A response: a text, one turn, or turns that end in the assistant's."""
    value = row.data[name]
    if isinstance(value, str):
        return [Message(role="assistant", content=value)]
    if isinstance(value, Mapping) and "messages" not in value:
        turns = [_turn(row, name, value, notes)]
    elif isinstance(value, list | Mapping):
        turns = conversation(row, name, notes)
    else:
        raise wrong(row, name, "text", value)
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError(f"{row.place}: {name} does not end in an assistant turn: {clip(value)}")
    return turns


def as_turns(prompt: Conversation) -> Sequence[Message]:
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def plain_answer(message: Message, notes: Notes) -> str | None:
    """The text of an answer that is compared or judged; none where it is a tool call."""
    if message.get("tool_calls"):
        return None
    if "reasoning_content" in message:
        notes["reasoning of a compared answer left out"] += 1
    return message["content"]


def _joins(before: Message, turn: Message) -> bool:
    same = before["role"] == turn["role"] and before["role"] in ("user", "assistant")
    return same and before.keys() | turn.keys() <= {"role", "content"}


def _turn(row: Row, name: str, item: Any, notes: Notes) -> Message:
    place = f"{row.place}: {name}"
    fields: Data = item if isinstance(item, Mapping) else {}
    speaker = fields.get("role", fields.get("from"))
    content = fields["content"] if "content" in fields else fields.get("value")
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    calls = _calls(place, fields)
    if role is None or (content is None and role != "assistant"):
        raise _no_message(place, item)
    message = Message(role=role, content="")
    if isinstance(speaker, str) and speaker.lower() == "function_call":
        calls += [_call(place, call) for call in as_list(_json(place, content))]
    elif isinstance(content, str):
        message["content"] = content
    elif isinstance(content, list):
        calls += _parts(place, content, message)
    elif content is not None:
        raise _no_message(place, item)
    reasoning = next((fields[key] for key in ("reasoning_content", "reasoning", "thinking") if fields.get(key)), None)
    if isinstance(reasoning, str):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    _weigh(place, fields, message, notes)
    return message


def _no_message(place: str, item: object) -> DataError:
    return DataError(
        f"{place} holds {clip(item)}, which is no message",
        'a message is {"role": "user", "content": "..."} or {"from": "human", "value": "..."}; roles are '
        "system, user, assistant, tool",
    )


def _weigh(place: str, fields: Data, message: Message, notes: Notes) -> None:
    weight = fields.get("loss_weight", fields.get("weight"))
    if weight is None:
        return
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{place}: loss_weight {weight!r}: weights other than 0 and 1 are not supported")
    if message["role"] == "assistant" and not weight:
        message["counts"] = False
    elif message["role"] != "assistant" and weight:
        notes["weight 1 on a turn that is not the assistant's, not learned"] += 1


def _parts(place: str, parts: list[Any], message: Message) -> list[dict[str, Any]]:
    """Joins the text parts of a typed content; returns the tool calls among them."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = next((part[key] for key in ("value", "text", str(kind)) if key in part), None) if kind else None
        if kind == "tool_call":
            calls += [_call(place, call) for call in as_list(_json(place, value))]
        elif kind in ("text", "reasoning", "thinking") and isinstance(value, str):
            key = "content" if kind == "text" else "reasoning_content"
            message[key] = message.get(key, "") + value
        else:
            media = isinstance(kind, str) and kind.removeprefix("input_").split("_")[0] in ("image", "audio", "video")
            raise DataError(
                f"{place} holds a part of type {kind!r}, which is not supported: {clip(part)}",
                "Fairlead reads text only; leave these rows out"
                if media
                else 'a part is {"type": "text", "text": "..."}, or of type reasoning or tool_call',
            )
    return calls


def _calls(place: str, fields: Data) -> list[dict[str, Any]]:
    calls = as_list(fields.get("tool_calls") or ())
    if fields.get("function_call"):  # OpenAI's older form
        calls = [*calls, fields["function_call"]]
    return [_call(place, call) for call in calls]


def _call(place: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: a tool call needs name and arguments, got {clip(call)}")
    arguments = function.get("arguments")
    arguments = _json(place, arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"{place}: arguments of a tool call must be an object, got {clip(arguments)}")
    return {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def read_tools(row: Row) -> Tools:
    """The column ``tools``: a list, the same as a JSON string, or empty."""
    value = row.data.get("tools")
    if isinstance(value, str):
        value = _json(f"{row.place}: tools", value) if value.strip() else None
    tools: list[Mapping[str, Any]] = []
    for tool in as_list(value or ()):
        if not isinstance(tool, Mapping) or not ("function" in tool or "name" in tool):
            raise DataError(f"{row.place}: tools must be function descriptions, got {clip(tool)}")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _json(place: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{place} holds a string that is no JSON ({error}): {clip(value)}") from error
