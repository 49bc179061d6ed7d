"""Records to token ids: the one place that knows end-of-sequence tokens, what is learned, and length limits.

A conversation is segments, each tokenised apart and joined as ids, in training as in sampling: the prompt's ids are a
prefix of the row's ids by construction, and an earlier answer has the ids the model itself would have written. The end
token is appended once and learned; a response that was cut at the limit has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fairlead.data.chat import Chat
from fairlead.data.templates import TEMPLATES, Segment, Template
from fairlead.errors import DataError
from fairlead.types import (
    Conversation,
    Demonstration,
    Labelled,
    Message,
    Preference,
    Prompt,
    Ranking,
    Record,
    Text,
    Tools,
)

LossOn = Literal["response", "assistant", "all"]
_GUARD = "\x01"
"""Stands before a piece of a row while it is tokenised, where the tokenizer puts a space before every text."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt run and the response runs that continue it. The responses' tokens count."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    prompt_mask: tuple[bool, ...] = ()
    """Which tokens of the prompt count too; empty: none."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass(slots=True)
class LengthCounts:
    """What the limits did: rows kept whole, cut, and dropped by reason."""

    kept: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])


Rendered = tuple[list[Tree], list[int], LengthCounts]
"""Trees, the index of each one's record, and what the limits did."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """A record as texts."""

    prompt: list[Segment]
    responses: list[str]

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Texts to be tokenised apart, each with whether something stands before it in the row."""
        for index, segment in enumerate(self.prompt):
            yield segment.text, index > 0
        for response in self.responses:
            yield response, bool(self.prompt)


class Renderer:
    """A tokenizer, a template and the limits: what turns records into trees of token ids."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str = "auto",
        max_length: int,
        max_prompt_length: int | None = None,
        loss_on: LossOn = "response",
    ) -> None:
        if template == "auto":
            template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
        if template != "chat" and template not in TEMPLATES:
            raise DataError(f"no template {template!r}", hint=f"there are: chat, {', '.join(sorted(TEMPLATES))}")
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise DataError("data.template=chat, but the tokenizer has no chat template", hint="name another template")
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token", hint="set one, or use another tokenizer")
        if loss_on not in get_args(LossOn):
            raise DataError(f"loss_on={loss_on!r} is none of {', '.join(get_args(LossOn))}")
        self.tokenizer, self.template, self.loss_on = tokenizer, template, loss_on
        self.max_length = max_length
        self.max_prompt_length = max_length - 1 if max_prompt_length is None else min(max_prompt_length, max_length - 1)
        self._template = _open_template(tokenizer, template, loss_on)
        self._text_end = int(tokenizer.eos_token_id)
        end = self._template.end
        self.eos = int(tokenizer.convert_tokens_to_ids(end)) if end else self._text_end
        """The id that ends a response: the template's own end token, or the end of sequence where it has none."""
        bos = tokenizer.bos_token_id
        self._bos = () if bos is None or tokenizer("a").input_ids[:1] != [bos] else (int(bos),)
        first = tokenizer.convert_ids_to_tokens(self._raw_ids(["a"])[0])
        self._guard = self._raw_ids([_GUARD])[0] if first and first[0].startswith(("▁", "Ġ")) else []

    # --- text ---

    def prompt_text(self, prompt: Conversation | Prompt) -> str:
        return self._joined(self._template.prompt(*_asked(prompt)))

    def response_text(self, prompt: Conversation | Prompt, response: str | Message) -> str:
        """The response with what the template puts around it, the end token left out."""
        turns, tools = _asked(prompt)
        return self._template.response(self.prompt_text(prompt), turns, _answer(response), tools)

    def _joined(self, segments: Sequence[Segment]) -> str:
        return "".join(segment.text + (self._template.end if segment.ends else "") for segment in segments)

    # --- ids ---

    def prompts(self, prompts: Sequence[Prompt]) -> tuple[list[tuple[Prompt, tuple[int, ...]]], LengthCounts]:
        """The prompts that fit, each with its ids."""
        counts = LengthCounts()
        kept: list[tuple[Prompt, tuple[int, ...]]] = []
        for prompt, ids in zip(prompts, self.prompt_ids(prompts), strict=True):
            if self._fits(ids, counts):
                kept.append((prompt, ids))
                counts.kept += 1
        self.refuse_none(kept, counts)
        return kept, counts

    def prompt_ids(self, prompts: Sequence[Conversation | Prompt]) -> list[tuple[int, ...]]:
        """Rendered and tokenised prompts, as they begin the rows of `trees`."""
        drafts = [_Draft(self._template.prompt(*_asked(prompt)), []) for prompt in prompts]
        pieces = self._tokenised(drafts)
        return [self._prompt(draft.prompt, pieces)[0] for draft in drafts]

    def response_ids(self, pairs: Sequence[tuple[Conversation | Prompt, str | Message]]) -> list[tuple[int, ...]]:
        """Rendered and tokenised responses to prompts, ended, as they stand in `trees`; no limit is applied."""
        texts = [(self.response_text(prompt, response), True) for prompt, response in pairs]
        return [self._ended(ids) for ids in self._piece_ids(texts)]

    def trees(self, records: Sequence[Record]) -> Rendered:
        """Trees of the records that fit, the index of each one's record, and what the limits did.

        A plain text is one response without a prompt, never cut. A labelled response without a prompt follows the
        beginning-of-sequence token, or the end-of-sequence token where the tokenizer begins no text with one.
        """
        rendered = self.limited(records)
        self.refuse_none(rendered[0], rendered[2])
        return rendered

    def limited(self, records: Sequence[Record]) -> Rendered:
        """`trees` of a part of the records, of which none may be left."""
        counts = LengthCounts()
        trees: list[Tree] = []
        kept: list[int] = []
        drafts = [self._draft(record) for record in records]
        pieces = self._tokenised([draft for draft in drafts if isinstance(draft, _Draft)])
        for index, (record, draft) in enumerate(zip(records, drafts, strict=True)):
            if isinstance(draft, str):
                counts.dropped[draft] += 1
                continue
            prompt, mask = self._prompt(draft.prompt, pieces)
            responses = [next(pieces) for _ in draft.responses]
            if isinstance(record, Text):
                tree = Tree((), ((*self._bos, *self._ended(responses[0], self._text_end)),))
            else:
                if not draft.prompt:
                    prompt = self._bos or (self._text_end,)
                ended = zip(responses, _finished(record, len(responses)), strict=True)
                whole = [self._ended(ids) if is_finished else tuple(ids) for ids, is_finished in ended]
                tree = self._limited(record, prompt, mask, whole, counts)
            if tree is not None:
                trees.append(tree)
                kept.append(index)
        counts.kept = len(trees)
        return trees, kept, counts

    def decode(self, ids: Sequence[int]) -> str:
        ids = list(ids)
        while ids and ids[-1] == self.eos:  # an end token need not be marked as special
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    # --- from a record to a tree ---

    def _draft(self, record: Record) -> _Draft | str:
        """A record as texts, or why nothing is learned from it."""
        if isinstance(record, Text):
            return _Draft([], [record.text])
        responses = _responses_of(record)
        if any(not response.get("counts", True) for response in responses):
            return "the response is marked as not to be learned"
        if isinstance(record, Labelled) and not record.prompt:
            return _Draft([], [record.response])
        turns, tools = _turns(record.prompt), getattr(record, "tools", ())
        prompt = self._template.prompt(turns, tools)
        before = self._joined(prompt)
        return _Draft(prompt, [self._template.response(before, turns, each, tools) for each in responses])

    def _prompt(self, segments: Sequence[Segment], pieces: Iterator[list[int]]) -> tuple[tuple[int, ...], list[bool]]:
        """Ids of a prompt, the beginning-of-sequence token first where the tokenizer has that habit and the template is
        not the tokenizer's own, and which of them an assistant wrote."""
        ids: list[int] = []
        mask: list[bool] = []
        for segment in segments:
            ids += next(pieces)
            if segment.ends:
                ids.append(self.eos)
            mask += [segment.counts] * (len(ids) - len(mask))
        if segments and self.template != "chat" and ids[: len(self._bos)] != list(self._bos):
            ids, mask = [*self._bos, *ids], [False] * len(self._bos) + mask
        return tuple(ids), mask

    def _limited(
        self,
        record: Record,
        prompt: tuple[int, ...],
        mask: list[bool],
        responses: Sequence[tuple[int, ...]],
        counts: LengthCounts,
    ) -> Tree | None:
        """The tree within the limits; none where it is dropped."""
        if not self._fits(prompt, counts):
            return None
        cut = tuple(ids[: self.max_length - len(prompt)] for ids in responses)
        different = len(set(responses)) if isinstance(record, Ranking) else len(cut)
        if len(set(cut)) < different:
            counts.dropped[f"{'both sides' if len(cut) == 2 else 'two responses'} cut to the same tokens"] += 1
            return None
        counts.cut += any(len(short) < len(ids) for short, ids in zip(cut, responses, strict=True))
        if not isinstance(record, Demonstration) or self.loss_on == "response":
            return Tree(prompt, cut)
        mask = [True] * len(prompt) if self.loss_on == "all" else mask
        return Tree(prompt, cut, tuple(mask) if any(mask) else ())

    def _tokenised(self, drafts: Sequence[_Draft]) -> Iterator[list[int]]:
        """Ids of the drafts' pieces, in their order."""
        return iter(self._piece_ids([piece for draft in drafts for piece in draft.pieces()]))

    def _piece_ids(self, pieces: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of pieces of rows, without special tokens of the tokenizer's own. A piece that follows another one
        begins without the space that some tokenizers put before every text."""
        if not self._guard:
            return self._raw_ids([text for text, _ in pieces])
        found = self._raw_ids([_GUARD + text if follows and text else text for text, follows in pieces])
        size = len(self._guard)
        for index, (text, follows) in enumerate(pieces):
            if follows and text:
                is_apart = found[index][:size] == self._guard
                found[index] = found[index][size:] if is_apart else self._raw_ids([text])[0]
        return found

    def _raw_ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).input_ids

    def _ended(self, ids: Sequence[int], end: int | None = None) -> tuple[int, ...]:
        """Ids with one end token behind them, also where the text wrote one out itself."""
        end = self.eos if end is None else end
        size = len(ids)
        while size and ids[size - 1] in (end, self._text_end):
            size -= 1
        return (*ids[:size], end)

    def _fits(self, prompt: tuple[int, ...], counts: LengthCounts) -> bool:
        if not prompt:
            counts.dropped["the prompt has no tokens"] += 1
        elif len(prompt) > self.max_prompt_length:
            counts.dropped[f"prompt longer than {self.max_prompt_length} tokens"] += 1
        else:
            return True
        return False

    def refuse_none(self, kept: Sequence[Any], counts: LengthCounts) -> None:
        """Raises DataError when nothing was kept."""
        if not kept:
            raise DataError(
                f"no record is left to learn from at max_length={self.max_length}, "
                f"max_prompt_length={self.max_prompt_length}: dropped {dict(counts.dropped)}",
                hint="raise data.max_length and data.max_prompt_length, or shorten the prompts",
            )


def _open_template(tokenizer: Any, name: str, loss_on: LossOn) -> Template:
    if name == "chat":
        return Chat(tokenizer, requires_spans=loss_on == "assistant")
    template = TEMPLATES[name]
    if missing := sorted(set(template.specials) - set(tokenizer.get_vocab())):
        raise DataError(
            f"data.template={name}, but the tokenizer has no token {' and no '.join(missing)}",
            hint=f"add them with model.add_tokens=[{', '.join(missing)}], or name another template",
        )
    return template


def _turns(prompt: Conversation) -> Sequence[Message]:
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def _asked(prompt: Conversation | Prompt) -> tuple[Sequence[Message], Tools]:
    return (_turns(prompt.prompt), prompt.tools) if isinstance(prompt, Prompt) else (_turns(prompt), ())


def _answer(response: str | Message) -> Message:
    return Message(role="assistant", content=response) if isinstance(response, str) else response


def _finished(record: Record, number: int) -> Sequence[bool]:
    """Which of a record's responses ended by themselves."""
    if isinstance(record, Preference):
        return record.finished
    return [not isinstance(record, Demonstration) or record.finished] * number


def _responses_of(record: Record) -> list[Message]:
    match record:
        case Preference():
            return [_answer(record.chosen), _answer(record.rejected)]
        case Ranking():
            return [_answer(response) for response in record.responses]
        case Demonstration() | Labelled():
            return [_answer(record.response)]
        case _:
            raise AssertionError(f"{type(record).__name__} holds no response")
