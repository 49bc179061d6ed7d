"""The tokenizer's own chat template: renders conversations with it and finds what an assistant wrote in the text.

A span is found by rendering the conversation as it grew: up to the answer, and with the answer. Where a template
rewrites what was said before, its own generation markers are asked. Knows no ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fairlead.data.templates import Segment
from fairlead.errors import DataError
from fairlead.types import Message, Tools

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "Xylophone"


class _Span(NamedTuple):
    """What an assistant wrote: a stretch of the text, and whether the end token stands behind it."""

    start: int
    stop: int
    ends: bool


class Chat:
    """``requires_spans``: a conversation in which the assistant's turns cannot be found is an error."""

    def __init__(self, tokenizer: Any, *, requires_spans: bool) -> None:
        self._tokenizer, self._requires_spans = tokenizer, requires_spans
        self._eos: str = tokenizer.eos_token
        self.end: str = self._find_end()

    def prompt(self, turns: Sequence[Message], tools: Tools) -> list[Segment]:
        text = self._render(turns, tools, opens=True)
        if tools and text == self._render(turns, (), opens=True):
            raise _left_out("the tools")
        counts = [turn.get("counts", True) for turn in turns if turn["role"] == "assistant"]
        if not counts:
            return [Segment(text)]
        spans = self._grown(turns, tools, text) or self._marked(turns, tools, text)
        if spans is None or len(spans) != len(counts):
            if self._requires_spans:
                raise DataError(
                    "data.loss_on=assistant, but the chat template rewrites earlier turns and has no generation "
                    "markers, so what the assistant wrote cannot be told apart",
                    hint="use data.loss_on=response, or name another template with data.template",
                )
            return [Segment(text)]
        segments: list[Segment] = []
        at = 0
        for span, learned in zip(spans, counts, strict=True):
            segments += [Segment(text[at : span.start]), Segment(text[span.start : span.stop], learned, span.ends)]
            at = span.stop + (len(self.end) if span.ends else 0)
        return [*segments, Segment(text[at:])]

    def response(self, before: str, turns: Sequence[Message], response: Message, tools: Tools) -> str:
        answer = self._answer(before, [*turns, response], tools)
        if answer is None:
            raise DataError(
                "the chat template renders a prompt differently once the response follows it",
                hint="name another template with data.template",
            )
        for key, what in (("tool_calls", "tool calls"), ("reasoning_content", "reasoning")):
            if response.get(key):
                rest: Any = {name: value for name, value in response.items() if name != key}
                if self._answer(before, [*turns, rest], tools) == answer:
                    raise _left_out(f"the {what} of a response")
        return answer[0]

    # --- what an assistant wrote ---

    def _grown(self, turns: Sequence[Message], tools: Tools, text: str) -> list[_Span] | None:
        """Spans by rendering the conversation as it grew; none where the text does not continue what it was."""
        spans: list[_Span] = []
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            if not index:
                return None
            try:
                before = self._render(turns[:index], tools, opens=True)
                answer = self._answer(before, turns[: index + 1], tools)
            except DataError:  # the whole is taken, its beginning is not
                return None
            if answer is None:
                return None
            body, ends = answer
            if not text.startswith(before + body + (self.end if ends else "")):
                return None
            spans.append(_Span(len(before), len(before) + len(body), ends))
        return spans

    def _answer(self, before: str, turns: Sequence[Message], tools: Tools) -> tuple[str, bool] | None:
        """What the last turn adds to the text before it, without its end and what follows that, and whether it ends."""
        text = self._render(turns, tools, opens=False)
        if not text.startswith(before):
            return None
        text = text[len(before) :].rstrip()
        if self.end != self._eos:  # some templates close the whole conversation with it
            text = text.removesuffix(self._eos).rstrip()
        return text.removesuffix(self.end), text.endswith(self.end)

    def _marked(self, turns: Sequence[Message], tools: Tools, text: str) -> list[_Span] | None:
        """Spans by the template's generation markers; none where it has none."""
        from transformers.utils import chat_template_utils

        template = self._template(tools)
        if not _MARKERS.search(template):
            return None
        render: Any = chat_template_utils.render_jinja_template
        rendered, found = render(
            [list(_clean(turns))],
            tools=_listed(tools),
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=True,
            **self._tokenizer.special_tokens_map,
        )
        assert rendered == [text]
        return [self._span(text, *span) for span in found[0]]

    def _span(self, text: str, start: int, stop: int) -> _Span:
        if text.startswith(self.end, stop):
            return _Span(start, stop, True)
        body = text[start:stop].rstrip()
        return (
            _Span(start, start + len(body) - len(self.end), True)
            if body.endswith(self.end)
            else _Span(start, stop, False)
        )

    # --- the template itself ---

    def _find_end(self) -> str:
        """The special token that stands behind an answer; the end-of-sequence token where there is none."""
        turns = [Message(role="user", content="a"), Message(role="assistant", content=_PROBE)]
        try:
            after = self._render(turns, (), opens=False).rpartition(_PROBE)[2].lstrip()
        except DataError:  # the template does not take these turns
            return self._eos
        added = self._tokenizer.added_tokens_decoder.values()
        specials = {self._eos, *self._tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        found = [token for token in specials if token and after.startswith(token)]
        return max(found, key=len, default=self._eos)

    def _render(self, turns: Sequence[Message], tools: Tools, *, opens: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                list(_clean(turns)), tools=_listed(tools), add_generation_prompt=opens, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"the chat template refuses the turns {', '.join(turn['role'] for turn in turns)}: {error}",
                hint="name another template with data.template",
            ) from error

    def _template(self, tools: Tools) -> str:
        return self._tokenizer.get_chat_template(tools=_listed(tools))


def _clean(turns: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """Turns without what is ours alone."""
    for turn in turns:
        yield {key: value for key, value in turn.items() if key != "counts"}


def _listed(tools: Tools) -> list[dict[str, Any]] | None:
    return [dict(tool) for tool in tools] or None


def _left_out(what: str) -> DataError:
    return DataError(
        f"the chat template leaves out {what}",
        hint="name a template that writes them with data.template, chatml for example, or take them out of the rows",
    )
