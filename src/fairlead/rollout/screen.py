"""What is done to a response before it is judged: cleaned, or discarded with a reason. By rules that are built in, or
by functions of a user's own."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, cast

from pydantic import AfterValidator, Field
from torch import Tensor

from fairlead.config import Section
from fairlead.config_file import suggest
from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, TrainingError
from fairlead.types import Rollout

_TURN = re.compile(r"\n\n(?:Human|Assistant|Question|Answer|User|###\s*\w+):|###\s?(?:Human|Assistant)|<\|im_start\|>")
_EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")

# --- clean: text -> text -------------------------------------------------------------------------------------------


def first_turn(text: str) -> str:
    """What stands before the first mark of another turn, as templates write them."""
    found = _TURN.search(text)
    return text[: found.start()] if found else text


def strip(text: str, characters: str | None = None) -> str:
    """Without white space, or the given characters, at both ends."""
    return text.strip(characters)


CLEAN: dict[str, Callable[..., str]] = {"first_turn": first_turn, "strip": strip}

# --- discard: text -> whether --------------------------------------------------------------------------------------


def empty(text: str) -> bool:
    """Nothing but white space."""
    return not text.strip()


def contains(text: str, part: str) -> bool:
    """``part`` stands somewhere in it."""
    return part in text


def too_short(text: str, words: int) -> bool:
    """Fewer words."""
    return len(text.split()) < words


def too_long(text: str, words: int) -> bool:
    """More words."""
    return len(text.split()) > words


def repeats(text: str, share: float = 0.3, n: int = 3) -> bool:
    """The commonest n-gram of words covers more than ``share`` of them."""
    words = text.split()
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    return bool(grams) and max(grams.values()) > 1 and max(grams.values()) * n > share * len(words)


def code_fences(text: str, most: int = 4) -> bool:
    """More fences than a person would write."""
    return text.count("```") > most


def emojis(text: str, most: int = 3) -> bool:
    """More emojis."""
    return len(_EMOJI.findall(text)) > most


def hashes(text: str, most: int = 0) -> bool:
    """More '#'."""
    return text.count("#") > most


DISCARD: dict[str, Callable[..., bool]] = {
    "empty": empty,
    "contains": contains,
    "too_short": too_short,
    "too_long": too_long,
    "repeats": repeats,
    "code_fences": code_fences,
    "emojis": emojis,
    "hashes": hashes,
}

# --- settings ------------------------------------------------------------------------------------------------------


def _known(rules: Mapping[str, Callable[..., Any]]) -> Callable[[Any], Any]:
    def check(given: Any) -> Any:
        name, arguments = _parts(given)
        if ":" not in name and name not in rules:
            raise ValueError(f"no rule {name!r}; {suggest(name, rules)}, or write module:function")
        if name in rules:
            try:
                inspect.signature(rules[name]).bind("", **arguments)
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
        return given

    return check


Rule = str | dict[str, dict[str, Any]]
"""A rule's name or `module:function`, or one such name with its arguments: {too_short: {words: 3}}."""
CleanRule = Annotated[Rule, AfterValidator(_known(CLEAN))]
DiscardRule = Annotated[Rule, AfterValidator(_known(DISCARD))]


def _parts(given: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        return given, {}
    held = cast(dict[str, dict[str, Any]], given)
    if len(held) != 1:
        raise ValueError(f"a rule has one name, got {', '.join(held) or 'none'}")
    return next(iter(held.items()))


class ScreenSettings(Section):
    clean: tuple[CleanRule, ...] = ()
    """What is done to each text: first_turn, strip, `module:function`, or a rule with its arguments."""
    discard: tuple[DiscardRule, ...] = ("empty",)
    """Which texts are never selected: empty, contains, too_short, too_long, repeats, code_fences, emojis, hashes,
    `module:function`, or a rule with its arguments."""
    max_empty: float = Field(default=0.5, gt=0, le=1)
    """The run stops where of more than this share of a round's prompts all responses were discarded."""


def share_empty(
    known: Tensor, numbers: Sequence[int], settings: ScreenSettings, discarded: Mapping[str, float]
) -> float:
    """The share of prompts that have no response left: ``known`` [S] says which were not discarded, ``numbers`` of them
    belong to each prompt. Raises TrainingError, with the shares of what was ``discarded`` by reason, where it is above
    `max_empty`."""
    empty = 1 - sum(bool(each.any()) for each in known.split(list(numbers))) / len(numbers)
    if empty > settings.max_empty:
        reasons = {reason: f"{share:.0%}" for reason, share in discarded.items()}
        raise TrainingError(
            f"all responses to {empty:.0%} of the round's prompts were discarded: {reasons}",
            hint=f"look at what was discarded, or raise max_empty={settings.max_empty:g}",
        )
    return empty


# --- what a round asks ---------------------------------------------------------------------------------------------

Screen = Callable[[Sequence[Rollout]], tuple[list[Rollout], list[str | None]]]
"""Rollouts -> those with their texts cleaned, and why each is discarded or none."""


def open_screen(renderer: Renderer, clean: Sequence[Rule], discard: Sequence[Rule]) -> Screen | None:
    """A screen of the rules in their order; none where there are none. A cleaned text is tokenised anew and ends with
    the end of sequence; no sampler drew it. Raises ConfigError for a function that cannot be imported."""
    if not clean and not discard:
        return None
    cleaners, judge = [_open(rule, CLEAN) for rule in clean], open_judge(discard)

    def screen(rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[str | None]]:
        texts = [_cleaned(i, rollout.text, cleaners) for i, rollout in enumerate(rollouts)]
        changed = [i for i, rollout in enumerate(rollouts) if texts[i] != rollout.text]
        ids = renderer.response_ids([(rollouts[i].prompt, texts[i]) for i in changed])
        screened = list(rollouts)
        for i, response in zip(changed, ids, strict=True):
            screened[i] = rewritten(rollouts[i], texts[i], response, finished=True)
        return screened, [judge(i, rollout.text) for i, rollout in enumerate(screened)]

    return screen


def open_judge(discard: Sequence[Rule]) -> Callable[[int, str], str | None]:
    """The number of a sample and its text -> the first of the rules that discards it, or none."""
    judges = [_open(rule, DISCARD) for rule in discard]
    return lambda number, text: next((name for name, rule in judges if _called(name, rule, number, text)), None)


def rewritten(rollout: Rollout, text: str, ids: tuple[int, ...], *, finished: bool) -> Rollout:
    """A response as other tokens, which no sampler drew."""
    return replace(
        rollout,
        text=text,
        response_ids=ids,
        behaviour_logprobs=(math.nan,) * len(ids),
        finished=finished,
        kept=None,
        banned=None,
    )


Opened = tuple[str, Callable[[str], Any]]


def _open(rule: Rule, rules: Mapping[str, Callable[..., Any]]) -> Opened:
    name, arguments = _parts(rule)
    function = rules.get(name)
    if function is None:
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"no rule {name!r}: {error}", hint="write module:function, importable from here"
            ) from error
    made = cast(Callable[..., Any], function)
    return name, lambda text: made(text, **arguments)


def _cleaned(number: int, given: str, cleaners: Sequence[Opened]) -> str:
    text = given
    for name, clean in cleaners:
        text = _called(name, clean, number, text)
        if not isinstance(text, str):
            raise TrainingError(
                f"the rule {name} gave a {type(text).__name__} for sample {number}, {given[:200]!r}, not a text"
            )
    return text


def _called(name: str, function: Callable[[str], Any], number: int, text: str) -> Any:
    try:
        return function(text)
    except Exception as error:
        raise TrainingError(
            f"the rule {name} raised {type(error).__name__}: {error}, for sample {number}, the response {text[:200]!r}",
            hint="mend the function; the same command continues the run",
        ) from error
