"""Named templates as data: what stands around the turns of a conversation, and which stretches an assistant wrote.

Knows no tokenizer; the tokenizer's own chat template is in `chat`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fairlead.errors import DataError
from fairlead.types import Message, Tools


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a prompt that is tokenised apart from its neighbours."""

    text: str
    counts: bool = False
    """An assistant wrote it, and it may be learned."""
    ends: bool = False
    """The end token follows it. Where a template has an end of its own, that is the template's text too."""


class Template(Protocol):
    """Turns to text. The joined text of the segments, ends included, is the template's text to the letter."""

    @property
    def end(self) -> str:
        """The token that ends a response; empty: the tokenizer's end-of-sequence token, which is not written out."""
        ...

    def prompt(self, turns: Sequence[Message], tools: Tools) -> list[Segment]:
        """The turns, and what opens the answer."""
        ...

    def response(self, before: str, turns: Sequence[Message], response: Message, tools: Tools) -> str:
        """The answer to the turns, whose text is ``before``, without its end."""
        ...


@dataclass(frozen=True, slots=True)
class Named:
    heads: Mapping[str, str] = field(default_factory=dict[str, str])
    """Role -> text before its content; empty: any role, nothing before it."""
    close: str = ""
    """After every turn that another one follows."""
    lead: str = ""
    """What the assistant itself writes before its content."""
    end: str = ""
    """The token that ends every turn; empty: answers alone end, in the end-of-sequence token, which is not text."""
    opening: str = ""
    """The system turn of a conversation that has none."""
    trims: bool = False
    """White space around contents is left out."""

    def prompt(self, turns: Sequence[Message], tools: Tools) -> list[Segment]:
        segments: list[Segment] = []
        text = ""
        for turn in self._with_system(turns, tools):
            head, content = self._head(turn["role"]), self._content(turn)
            if turn["role"] == "assistant":
                segments.append(Segment(text + head))
                segments.append(Segment(self.lead + content, counts=turn.get("counts", True), ends=True))
                text = self.close
            else:
                text += head + content + self.end + self.close
        return [*segments, Segment(text + self._head("assistant"))]

    def response(self, before: str, turns: Sequence[Message], response: Message, tools: Tools) -> str:
        return self.lead + self._content(response)

    @property
    def specials(self) -> list[str]:
        """What must be single tokens for the template to be what its name says."""
        written = "".join([*self.heads.values(), self.end])
        return sorted(set(re.findall(r"<\|\w+\|>", written)))

    def _content(self, turn: Message) -> str:
        content = said(turn)
        return content.strip() if self.trims else content

    def _head(self, role: str) -> str:
        if self.heads and role not in self.heads:
            raise DataError(
                f"no template has a turn of the role {role!r}", hint=f"roles are {', '.join(sorted(self.heads))}"
            )
        return self.heads.get(role, "")

    def _with_system(self, turns: Sequence[Message], tools: Tools) -> Sequence[Message]:
        system = self.opening
        if turns and turns[0]["role"] == "system":
            system, turns = said(turns[0]), turns[1:]
        elif not system and not tools:
            return turns
        if tools:
            listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            system = "\n\n".join([*([system] if system else []), TOOLS.format(listed)])
        return [Message(role="system", content=system), *turns]


def said(turn: Message) -> str:
    """A turn as text: reasoning in think tags, then the content, then tool calls in the form of Qwen and Hermes."""
    parts: list[str] = []
    if reasoning := turn.get("reasoning_content"):
        parts.append(f"<think>\n{reasoning.strip()}\n</think>\n")
    if turn["content"]:
        parts.append(turn["content"])
    parts += [f"<tool_call>\n{_call(call)}\n</tool_call>" for call in turn.get("tool_calls", ())]
    return "\n".join(parts)


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)


TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""How a system turn lists tools; the wording of Hermes and Qwen2.5."""


def _roles(form: str, lead_in: str = "", **names: str) -> dict[str, str]:
    """Heads of one form; what the assistant writes after its head is not part of it."""
    wanted = {"system": "system", "user": "user", "tool": "tool", "assistant": "assistant"} | names
    return {role: form.format(name) + ("" if role == "assistant" else lead_in) for role, name in wanted.items()}


TEMPLATES: dict[str, Named] = {
    "plain": Named(),
    "question-answer": Named(
        _roles("{}:", " ", system="System", user="Question", assistant="Answer", tool="Tool"), close="\n\n", lead=" "
    ),
    "hh": Named(
        _roles("{}:", " ", system="System", user="Human", assistant="Assistant", tool="Tool"), close="\n\n", lead=" "
    ),
    "hash": Named(_roles("### {}:", " ", system="System", user="Human", assistant="Assistant", tool="Tool"), lead=" "),
    "chatml": Named(_roles("<|im_start|>{}\n"), close="\n", end="<|im_end|>"),
    "llama-3": Named(
        _roles("<|start_header_id|>{}<|end_header_id|>\n\n", tool="ipython"), end="<|eot_id|>", trims=True
    ),
    "alpaca": Named(
        {
            "system": "",
            "user": "### Instruction:\n",
            "tool": "### Tool:\n",
            "assistant": "### Response:",
        },
        close="\n\n",
        opening="Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.",
    ),
}
"""question-answer: StackLLaMA; hh: Anthropic's transcripts; hash: Guanaco; chatml: OpenAI, Qwen; llama-3: Meta, whose
beginning token is the tokenizer's affair; alpaca: Stanford's, without a line break before the response."""
