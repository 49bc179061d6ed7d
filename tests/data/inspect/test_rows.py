from __future__ import annotations

import unicodedata
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import tokenizer

from fairlead.data.inspect.measure import measure
from fairlead.data.inspect.rows import HEAD, TAIL, Piece, draw, pieces, visible
from fairlead.data.render import Renderer
from fairlead.types import Demonstration, Message, Preference, Ranking, Text


def drawn(records: list[Any], number: int = 9, max_length: int = 4096) -> list[Any]:
    renderer = Renderer(tokenizer(), template="question-answer", max_length=max_length)
    return draw(records, measure(records, renderer, tokenizer="tiny"), renderer, number)


def ids(text: str) -> list[int]:
    return tokenizer()(text).input_ids


# --- harmless text -------------------------------------------------------------------------------------------------


@given(st.text())
def test_nothing_that_drives_a_terminal_or_hides_text_is_left(text: str) -> None:
    left = {c for c in visible(text) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert left <= {"\n", "\t"}


@given(st.text(st.characters(exclude_categories=("C", "Z"))))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_control_characters_are_spelled_out() -> None:
    assert visible("\x1b[31m\x07\x00a\r\n\tb") == "␛[31m␇␀a␍\n\tb"
    assert visible("\x7f\x9b\x85\u202e\u200b\ud800") == "<U+007F><U+009B><U+0085><U+202E><U+200B><U+D800>"


# --- tokens --------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=("Cs", "Cc", "Cf", "Zl", "Zp")), max_size=40), st.data())
def test_pieces_put_together_are_the_decoded_text(text: str, data: st.DataObject) -> None:
    """Where the style changes inside a character, its bytes cannot be shown: the mask changes between characters."""
    first, second = ids(text), ids("the lamp")
    mask = [data.draw(st.booleans())] * len(first) + [data.draw(st.booleans())] * len(second)
    found = pieces(tokenizer(), first + second, mask)
    assert "".join(piece.text for piece in found) == tokenizer().decode(first + second)
    assert all(one.is_learned != other.is_learned for one, other in pairwise(found))


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    smile = ids("🙂")
    assert len(smile) == 4
    assert pieces(tokenizer(), smile, [True] * 4) == [Piece("🙂", True)]
    assert pieces(tokenizer(), smile[:2], [True] * 2) == [Piece("\ufffd", True)]


def test_special_tokens_stand_apart_also_where_the_text_spells_them() -> None:
    end = tokenizer().eos_token_id
    found = pieces(tokenizer(), [*ids("a"), end, *ids("b"), end], [False, False, True, True])
    assert found == [
        Piece("a", False),
        Piece("<eos>", False, is_special=True),
        Piece("b", True),
        Piece("<eos>", True, is_special=True),
    ]


# --- drawings ------------------------------------------------------------------------------------------------------


def test_a_pair_is_one_prompt_with_two_branches() -> None:
    (drawing,) = drawn([Preference("Why?", "Because.", "So.")])
    prompt, chosen, rejected = drawing.runs
    assert (prompt.name, prompt.is_branch) == ("prompt", False)
    assert prompt.pieces == (Piece("Question: Why?\n\nAnswer:", False),)
    assert prompt.size == str(len(ids("Question: Why?\n\nAnswer:"))) + " tokens, not learned"
    assert [run.name for run in (chosen, rejected)] == ["chosen", "rejected"]
    assert chosen.is_branch and rejected.is_branch
    assert chosen.pieces == (Piece(" Because.", True), Piece("<eos>", True, is_special=True))
    assert rejected.size == f"{len(ids(' So.')) + 1} tokens, learned"


def test_earlier_answers_of_the_assistant_are_drawn_as_learned_where_they_are() -> None:
    turns: list[Message] = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "So?"},
    ]
    records = [Demonstration(turns, "No.")]
    renderer = Renderer(tokenizer(), template="question-answer", max_length=4096, loss_on="assistant")
    (drawing,) = draw(records, measure(records, renderer, tokenizer="tiny"), renderer, 1)
    learned = [piece for piece in drawing.runs[0].pieces if piece.is_learned]
    assert learned == [Piece(" Because.", True), Piece("<eos>", True, is_special=True)]
    assert drawing.runs[0].size.endswith(f" tokens, {len(ids(' Because.')) + 1} learned")


def test_the_first_token_of_a_text_is_predicted_from_nothing() -> None:
    (drawing,) = drawn([Text("lamp")])
    (run,) = drawing.runs
    assert [piece.is_learned for piece in run.pieces] == [False, True, True]
    assert "".join(piece.text for piece in run.pieces) == "lamp<eos>"
    assert not run.is_branch


def test_a_cut_response_is_drawn_without_its_end() -> None:
    (drawing,) = drawn([Demonstration("Why?", "the fuse " * 50)], max_length=40)
    assert not any(piece.is_special for piece in drawing.runs[-1].pieces)
    assert drawing.runs[-1].size.endswith(" tokens, learned, cut before its end")


def test_the_middle_of_a_long_run_is_left_out_and_counted() -> None:
    text = "".join(chr(ord("A") + i % 26) for i in range(1000))
    (drawing,) = drawn([Text(text)])
    (run,) = drawing.runs
    size = len(ids(text)) + 1
    gap = next(piece for piece in run.pieces if piece.is_left_out)
    assert gap.text == f" … {size - HEAD - TAIL:,} tokens … "
    before, after = ids(text)[:HEAD], [*ids(text), tokenizer().eos_token_id][-TAIL:]
    shown = "".join(piece.text for piece in run.pieces)
    assert shown == tokenizer().decode(before) + gap.text + tokenizer().decode(after)


def test_records_are_drawn_evenly_from_the_first_on() -> None:
    texts = [Text(f"text {i}") for i in range(10)]
    assert [drawing.record for drawing in drawn(texts, 3)] == [1, 4, 7]
    assert [drawing.record for drawing in drawn(texts[:2], 3)] == [1, 2]
    assert drawn(texts, 0) == []


def test_without_a_tokenizer_the_text_is_drawn_and_made_harmless() -> None:
    records = [Ranking("Why\x1b[0m?", ("one", "two" * 900), (2.0, 1.0))]
    (drawing,) = draw(records, measure(records), None, 1)
    prompt, first, second = drawing.runs
    assert prompt.pieces == (Piece("Why␛[0m?", True),)
    assert first.name == "response 1 (score 2)"
    assert second.pieces[1].text == f" … {2700 - 4 * (HEAD + TAIL):,} characters … "
