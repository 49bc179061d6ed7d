"""Draws records as the model will see them: token ids decoded one by one, which of them are learned, which are special.

A drawing is plain data; how it looks on a terminal or a page is not known here. Text from data is made harmless: no
control character, no bidirectional mark, no half of a surrogate pair is left in it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fairlead.data.filters import parts, responses
from fairlead.data.inspect.measure import Measures, response_names
from fairlead.data.render import Renderer, Tree
from fairlead.types import Labelled, Ranking, Record, Text

HEAD, TAIL = 240, 80
"""Tokens of a run that are shown from its start and from its end."""
CHARACTERS = 4
"""Characters that stand for a token where there is no tokenizer."""
_HARMLESS = {"\n", "\t"}
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of tokens of one style; ``left_out`` is one that says how much is not shown."""

    text: str
    is_learned: bool
    is_special: bool = False
    is_left_out: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    name: str
    size: str
    """In words: tokens, and how many are learned."""
    pieces: tuple[Piece, ...]
    is_branch: bool
    """A response that continues the prompt drawn before it."""


@dataclass(frozen=True, slots=True)
class Drawing:
    record: int
    """Its number among the records, from 1."""
    runs: tuple[Run, ...]


def visible(text: str) -> str:
    """The text with every character that could drive a terminal or hide another one spelled out; line ends and tabs
    stay."""
    return "".join(_spelled(c) for c in text) if not text.isprintable() else text


def _spelled(character: str) -> str:
    if character in _HARMLESS or unicodedata.category(character) not in _UNSAFE:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures: ␛ for escape
    return f"<U+{code:04X}>"


def draw(records: Sequence[Any], measures: Measures, renderer: Renderer | None, number: int) -> list[Drawing]:
    """``number`` records, evenly spread from the first on: their trees with a renderer, their text without."""
    held: Sequence[int] = range(len(records)) if renderer is None else measures.kept
    number = min(number, len(held))
    drawings: list[Drawing] = []
    for position in (i * len(held) // number for i in range(number)):
        record = records[held[position]]
        if renderer is None:
            runs = tuple(_text_runs(record))
        else:
            runs = tuple(_token_runs(record, measures.trees[position], renderer))
        drawings.append(Drawing(held[position] + 1, runs))
    return drawings


def _names(record: Record) -> list[str]:
    names = list(response_names(record))
    if isinstance(record, Ranking):
        scores = record.scores or [None] * len(names)
        names = [f"response {i}" + ("" if s is None else f" (score {s:g})") for i, s in enumerate(scores, start=1)]
    return names


def _text_runs(record: Record) -> Iterator[Run]:
    texts = list(zip(_names(record), responses(record), strict=True))
    if not isinstance(record, Text):
        prompt = parts(record)[0]
        yield Run("prompt", f"{len(prompt):,} characters", tuple(_clipped_text(prompt)), False)
    for name, text in texts:
        yield Run(name, f"{len(text):,} characters", tuple(_clipped_text(text)), not isinstance(record, Text))


def _clipped_text(text: str) -> Iterator[Piece]:
    head, tail = HEAD * CHARACTERS, TAIL * CHARACTERS
    if len(text) <= head + tail:
        yield Piece(visible(text), True)
        return
    yield Piece(visible(text[:head]), True)
    yield Piece(f" … {len(text) - head - tail:,} characters … ", True, is_left_out=True)
    yield Piece(visible(text[-tail:]), True)


def _token_runs(record: Record, tree: Tree, renderer: Renderer) -> Iterator[Run]:
    if tree.prompt or not isinstance(record, Text | Labelled):
        mask = tree.prompt_mask or (False,) * len(tree.prompt)
        yield _run("prompt", tree.prompt, mask, (), renderer)
    for name, ids in zip(_names(record), tree.responses, strict=False):
        # The first token of a row is predicted from nothing, so it is not learned.
        mask = (bool(tree.prompt), *[True] * (len(ids) - 1))[: len(ids)]
        yield _run(name, ids, mask, tree.prompt[-8:], renderer)


def _run(name: str, ids: Sequence[int], mask: Sequence[bool], before: Sequence[int], renderer: Renderer) -> Run:
    learned = sum(mask)
    what = "not learned" if not learned else "learned" if learned == len(ids) else f"{learned:,} learned"
    if before and ids[-1] != renderer.eos:
        what += ", cut before its end"
    size = f"{len(ids):,} tokens, {what}"
    tokenizer, ends = renderer.tokenizer, {renderer.eos}  # an end token need not be marked as special
    if len(ids) <= HEAD + TAIL:
        found = pieces(tokenizer, ids, mask, before, ends)
    else:
        gap = Piece(f" … {len(ids) - HEAD - TAIL:,} tokens … ", False, is_left_out=True)
        tail = pieces(tokenizer, ids[-TAIL:], mask[-TAIL:], ids[-TAIL - 8 : -TAIL], ends)
        found = [*pieces(tokenizer, ids[:HEAD], mask[:HEAD], before, ends), gap, *tail]
    return Run(name, size, tuple(found), bool(before))


def pieces(
    tokenizer: Any, ids: Sequence[int], mask: Sequence[bool], before: Sequence[int] = (), ends: Set[int] = frozenset()
) -> list[Piece]:
    """Ids as stretches of text of one style. ``before`` is what precedes them, for tokenizers whose tokens read
    differently at the start of a text; ``ends`` are shown as special besides those that the tokenizer calls so."""
    special = {*tokenizer.all_special_ids, *ends}
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    decoded = _decoded(tokenizer, ids, mask, list(before), special)
    return [
        Piece(visible("".join(text for text, _, _ in group)), is_learned, is_special)
        for (is_learned, is_special), group in groupby(decoded, key=lambda item: item[1:])
    ]


def _decoded(
    tokenizer: Any, ids: Sequence[int], mask: Sequence[bool], before: list[int], special: set[int]
) -> Iterator[tuple[str, bool, bool]]:
    """(text, learned, special) token by token; a token that ends inside a character waits for the rest of it."""

    def text_of(some: list[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False) if some else ""

    known, waiting = before, list[int]()
    for position, (number, is_learned) in enumerate(zip(ids, mask, strict=True)):
        if number in special:
            yield str(tokenizer.convert_ids_to_tokens(number)), is_learned, True
            known = [number]
            continue
        waiting.append(number)
        text = text_of(known + waiting)
        is_last = position + 1 == len(ids) or ids[position + 1] in special or mask[position + 1] != is_learned
        if text.endswith("\ufffd") and not is_last:
            continue
        yield text[len(text_of(known)) :], is_learned, False
        known, waiting = waiting, []
