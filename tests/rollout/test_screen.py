"""Cleaning and discarding, by the rules that are built in and by functions."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
from tests.tiny import tokenizer

from fairlead.algorithms.raft import Settings
from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, TrainingError
from fairlead.rollout.screen import CLEAN, DISCARD, open_screen
from fairlead.types import Prompt, Rollout


def _renderer() -> Renderer:
    return Renderer(tokenizer(), template="plain", max_length=64)


def _rollout(text: str) -> Rollout:
    return Rollout(Prompt("why?"), (5, 6), (7, 8), (-1.0, -2.0), False, text)


@pytest.mark.parametrize(
    ("name", "arguments", "text", "cleaned"),
    [
        ("first_turn", {}, "so it is.\n\nHuman: and then?", "so it is."),
        ("first_turn", {}, "so it is. ###Human", "so it is. "),
        ("first_turn", {}, "###Human", ""),  # where LMFlow's own rule raises
        ("first_turn", {}, "the human: a study", "the human: a study"),
        ("strip", {}, "  so \n", "so"),
        ("strip", {"characters": "# "}, "## so #", "so"),
    ],
)
def test_each_cleaner(name: str, arguments: dict[str, Any], text: str, cleaned: str) -> None:
    assert CLEAN[name](text, **arguments) == cleaned


@pytest.mark.parametrize(
    ("name", "arguments", "bad", "good"),
    [
        ("empty", {}, " \n", "a"),
        ("contains", {"part": "#"}, "a # b", "a b"),
        ("too_short", {"words": 3}, "one two", "one two three"),
        ("too_long", {"words": 2}, "one two three", "one two"),
        ("repeats", {}, "buy it now " * 6, "buy it now, or wait until the price has fallen again"),
        ("code_fences", {}, "``` " * 5, "```\nls\n```"),
        ("emojis", {}, "\U0001f600" * 4, "fine \U0001f600"),
        ("hashes", {}, "good #", "good"),
        ("hashes", {"most": 1}, "# #", "#"),
    ],
)
def test_each_rule_of_discarding(name: str, arguments: dict[str, Any], bad: str, good: str) -> None:
    assert DISCARD[name](bad, **arguments) and not DISCARD[name](good, **arguments)


def test_a_cleaned_text_is_tokenised_anew_and_ends() -> None:
    renderer = _renderer()
    screen = open_screen(renderer, ["first_turn", "strip"], [])
    assert screen is not None
    kept, changed = _rollout("the fuse is loose."), _rollout("the fuse is loose. \n\nHuman: thanks")
    (first, second), reasons = screen([kept, changed])
    assert first is kept and reasons == [None, None]
    assert second.text == "the fuse is loose." and second.finished
    assert second.response_ids[-1] == renderer.eos
    assert renderer.decode(second.response_ids) == "the fuse is loose."
    assert len(second.behaviour_logprobs) == len(second.response_ids)
    assert all(math.isnan(value) for value in second.behaviour_logprobs)


def test_the_first_rule_that_discards_is_the_reason() -> None:
    screen = open_screen(_renderer(), ["strip"], ["empty", {"too_short": {"words": 2}}, "hashes"])
    assert screen is not None
    assert screen([_rollout(text) for text in ("  ", "#", "a #", "a b")])[1] == ["empty", "too_short", "hashes", None]


def test_without_rules_there_is_no_screen() -> None:
    assert open_screen(_renderer(), [], []) is None


def test_a_function_of_ones_own_and_what_it_may_do_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_rules")
    module.shout = lambda text: text.upper()  # pyright: ignore[reportAttributeAccessIssue]
    module.broken = lambda text: text.missing  # pyright: ignore[reportAttributeAccessIssue]
    module.number = lambda text: 3  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "my_rules", module)
    screen = open_screen(_renderer(), ["my_rules:shout"], [])
    assert screen is not None and screen([_rollout("so")])[0][0].text == "SO"
    for rule, said in (("broken", "raised AttributeError.*'so'"), ("number", "gave a int for sample 0, 'so'")):
        screen = open_screen(_renderer(), [f"my_rules:{rule}"], [])
        assert screen is not None
        with pytest.raises(TrainingError, match=said):
            screen([_rollout("so")])
    with pytest.raises(ConfigError, match="no rule 'my_rules:nothing'"):
        open_screen(_renderer(), [], ["my_rules:nothing"])


@pytest.mark.parametrize(
    ("discard", "said"),
    [
        (["hashs"], "no rule 'hashs'.*hashes"),
        ([{"too_short": {}}], "too_short: missing a required argument: 'words'"),
        ([{"empty": {"x": 1}}], "empty: got an unexpected keyword argument 'x'"),
        ([{"empty": {}, "hashes": {}}], "a rule has one name, got empty, hashes"),
    ],
)
def test_a_wrong_rule_is_refused_when_the_recipe_is_read(discard: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(discard=tuple(discard))
