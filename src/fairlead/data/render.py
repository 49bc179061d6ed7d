"""Records to token ids: the one place that knows templates, end-of-sequence tokens and length limits.

The prompt's ids are a prefix of the row's ids by construction: prompt and response are tokenised apart and joined as
ids, in training as in sampling. The end-of-sequence token is appended once and learned; a response that was cut at
the limit has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairlead.errors import DataError
from fairlead.types import Conversation, Demonstration, Message, Preference, Prompt, Record, Text


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt run and the response runs that continue it. The responses' tokens count, the prompt's do not."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass(slots=True)
class LengthCounts:
    """What the limits did: rows kept whole, cut, and dropped by reason."""

    kept: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])


def _question_answer(turns: Sequence[Message]) -> str:
    names = {"user": "Question", "assistant": "Answer", "system": "System"}
    return "\n\n".join([*(f"{names[turn['role']]}: {turn['content']}" for turn in turns), "Answer:"])


def _hh(turns: Sequence[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "\n\n".join([*(f"{names[turn['role']]}: {turn['content']}" for turn in turns), "Assistant:"])


def _plain(turns: Sequence[Message]) -> str:
    return "".join(turn["content"] for turn in turns)


TEMPLATES: dict[str, tuple[Callable[[Sequence[Message]], str], str]] = {
    "plain": (_plain, ""),
    "question-answer": (_question_answer, " "),
    "hh": (_hh, " "),
}
"""Name -> (turns to prompt text, what stands between prompt and response)."""


class Renderer:
    """A tokenizer, a template and the limits: what turns records into trees of token ids."""

    def __init__(
        self, tokenizer: Any, *, template: str = "auto", max_length: int, max_prompt_length: int | None = None
    ) -> None:
        if template == "auto":
            template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
        if template != "chat" and template not in TEMPLATES:
            raise DataError(f"no template {template!r}", hint=f"there are: chat, {', '.join(sorted(TEMPLATES))}")
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise DataError("data.template=chat, but the tokenizer has no chat template", hint="name another template")
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token", hint="set one, or use another tokenizer")
        self.tokenizer, self.template = tokenizer, template
        self.max_length = max_length
        self.max_prompt_length = max_length - 1 if max_prompt_length is None else min(max_prompt_length, max_length - 1)
        self.eos = int(tokenizer.eos_token_id)
        bos = tokenizer.bos_token_id
        self._bos = () if bos is None or tokenizer("a").input_ids[:1] != [bos] else (int(bos),)

    def prompt_text(self, prompt: Conversation) -> str:
        turns = _turns(prompt)
        if self.template == "chat":
            return self._chat(turns, open_answer=True)
        return TEMPLATES[self.template][0](turns)

    def response_text(self, prompt: Conversation, response: str) -> str:
        """The response with what the template puts around it, the end-of-sequence token left out."""
        if self.template != "chat":
            return TEMPLATES[self.template][1] + response
        turns = [*_turns(prompt), Message(role="assistant", content=response)]
        before = self.prompt_text(prompt)
        whole = self._chat(turns, open_answer=False)
        if not whole.startswith(before):
            raise DataError(
                "the chat template renders a prompt differently once the response follows it",
                hint="name another template with data.template",
            )
        return whole[len(before) :].rstrip().removesuffix(self.tokenizer.eos_token)

    def _chat(self, turns: Sequence[Message], *, open_answer: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(list(turns), add_generation_prompt=open_answer, tokenize=False)
        except TemplateError as error:
            raise DataError(
                f"the chat template refuses the turns {', '.join(turn['role'] for turn in turns)}: {error}",
                hint="name another template with data.template",
            ) from error

    def prompts(self, prompts: Sequence[Prompt]) -> tuple[list[tuple[Prompt, tuple[int, ...]]], LengthCounts]:
        """The prompts that fit, each with its ids."""
        counts = LengthCounts()
        kept: list[tuple[Prompt, tuple[int, ...]]] = []
        for prompt, ids in zip(prompts, self.prompt_ids([p.prompt for p in prompts]), strict=True):
            if self._fits(ids, counts):
                kept.append((prompt, ids))
        self._refuse_none(kept, counts)
        return kept, counts

    def trees(self, records: Sequence[Record]) -> tuple[list[Tree], list[int], LengthCounts]:
        """Trees of the records that fit, the index of each one's record, and what the limits did."""
        counts = LengthCounts()
        trees: list[Tree] = []
        kept: list[int] = []
        if records and isinstance(records[0], Text):
            texts = [record.text for record in records if isinstance(record, Text)]
            pieces = [(*self._bos, *self._ended(ids)) for ids in self.token_ids(texts)]
            counts.kept = len(pieces)
            return [Tree((), (ids,)) for ids in pieces], list(range(len(pieces))), counts
        prompts = self.prompt_ids([_prompt_of(record) for record in records])
        sides = [_responses_of(record) for record in records]
        texts = [
            self.response_text(_prompt_of(r), text) for r, side in zip(records, sides, strict=True) for text in side
        ]
        responses = iter(self.token_ids(texts))
        for index, (prompt, side) in enumerate(zip(prompts, sides, strict=True)):
            whole = [self._ended(next(responses)) for _ in side]
            if not self._fits(prompt, counts):
                continue
            cut = tuple(ids[: self.max_length - len(prompt)] for ids in whole)
            if len(set(cut)) < len(cut):
                counts.dropped["both sides cut to the same tokens"] += 1
                continue
            counts.cut += any(len(short) < len(ids) for short, ids in zip(cut, whole, strict=True))
            counts.kept += 1
            trees.append(Tree(prompt, cut))
            kept.append(index)
        self._refuse_none(trees, counts)
        return trees, kept, counts

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def prompt_ids(self, prompts: Sequence[Conversation]) -> list[tuple[int, ...]]:
        """Rendered and tokenised prompts, the beginning-of-sequence token first where the tokenizer has that habit."""
        rows = self.token_ids([self.prompt_text(prompt) for prompt in prompts])
        return [tuple(ids) if ids[: len(self._bos)] == list(self._bos) else (*self._bos, *ids) for ids in rows]

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without special tokens."""
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else []

    def _ended(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Ids with one end-of-sequence token behind them, also where the text wrote it out itself."""
        while ids and ids[-1] == self.eos:
            ids = ids[:-1]
        return (*ids, self.eos)

    def _fits(self, prompt: tuple[int, ...], counts: LengthCounts) -> bool:
        if not prompt:
            counts.dropped["the prompt has no tokens"] += 1
        elif len(prompt) > self.max_prompt_length:
            counts.dropped[f"prompt longer than {self.max_prompt_length} tokens"] += 1
        else:
            return True
        return False

    def _refuse_none(self, kept: Sequence[Any], counts: LengthCounts) -> None:
        if not kept:
            raise DataError(
                f"no record is left to learn from at max_length={self.max_length}, "
                f"max_prompt_length={self.max_prompt_length}: dropped {dict(counts.dropped)}",
                hint="raise data.max_length and data.max_prompt_length, or shorten the prompts",
            )


def _turns(prompt: Conversation) -> Sequence[Message]:
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def _prompt_of(record: Record) -> Conversation:
    assert isinstance(record, (Demonstration, Preference, Prompt))
    return record.prompt


def _responses_of(record: Record) -> tuple[str, ...]:
    if isinstance(record, Preference):
        return (record.chosen, record.rejected)
    assert isinstance(record, Demonstration)
    return (record.response,)
