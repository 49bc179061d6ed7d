"""Rules that judge a response by its text alone, or against a column of its prompt: pure functions, light to import.

A rule's first parameter is the response, further positional ones are columns of the prompt by name, and keyword-only
ones are its arguments.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, NoReturn, get_type_hints

from pydantic import Field, ValidationError, create_model

from fairlead.config import Section
from fairlead.config_file import suggest
from fairlead.errors import ConfigError

Rule = Callable[..., float]


def length(
    text: str,
    *,
    target: int | None = None,
    min: int | None = None,
    max: int | None = None,
    unit: Literal["characters", "words"] = "characters",
) -> float:
    """-distance from the length to ``target``, or to ``min`` .. ``max``, as a share of the bound that is missed (of 1,
    where that is 0); without any, the length itself."""
    size = len(text) if unit == "characters" else len(text.split())
    if target is None and min is None and max is None:
        return float(size)
    if target is not None and (min, max) != (None, None):
        raise ValueError("target, and min or max, are both given")
    low, high = (target, target) if target is not None else (min or 0, float("inf") if max is None else max)
    if low > high:
        raise ValueError(f"min={low} is above max={high}")
    if low <= size <= high:
        return 0.0
    missed = low if size < low else high
    return -abs(size - missed) / (missed or 1)


def regex(text: str, *, pattern: str, whole: bool = False) -> float:
    """1 where the regular expression is found, or with ``whole`` matches all of the text; else 0. A dot is a line break
    too."""
    compiled = re.compile(pattern, re.DOTALL)
    return float((compiled.fullmatch(text) if whole else compiled.search(text)) is not None)


def starts_with(text: str, *, texts: tuple[str, ...], ignore_case: bool = False) -> float:
    """1 where it begins with one of ``texts``, else 0."""
    return float(_cased(text, ignore_case).startswith(tuple(_cased(each, ignore_case) for each in texts)))


def contains(text: str, *, texts: tuple[str, ...], ignore_case: bool = False) -> float:
    """Share of ``texts`` that stand in it."""
    held = _cased(text, ignore_case)
    return sum(_cased(each, ignore_case) in held for each in texts) / len(texts)


def _cased(text: str, ignore_case: bool) -> str:
    return text.casefold() if ignore_case else text


def repetition(text: str, *, n: Annotated[int, Field(ge=1)] = 3) -> float:
    """-share of the runs of ``n`` words that have stood before; 0 where there are fewer than ``n`` words."""
    words = text.lower().split()
    grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def code_fence_share(text: str) -> float:
    """Share of the characters inside ``` fences, the fences' own lines left out of both; what is left open goes on to
    the end."""
    inside, counts = False, {False: 0, True: 0}
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            inside = not inside
        else:
            counts[inside] += len(line)
    return counts[True] / total if (total := sum(counts.values())) else 0.0


def json_valid(text: str, *, keys: tuple[str, ...] = ()) -> float:
    """1 where the text, or all that stands in its one ``` fence, is JSON (RFC 8259), and with ``keys`` an object that
    has them; else 0."""
    fenced = re.fullmatch(r"\s*```(?:json)?[^\S\n]*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return 0.0
    return float(not keys or (isinstance(found, dict) and all(key in found for key in keys)))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_MINUS = "\u2212"
_NUMBER = re.compile(
    r"(?:(?<![\w)\]%])([-+\u2212]))?"  # a sign, where it is no operator between two numbers
    r"(?:[$\u20ac\u00a3]\s?)?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"([eE][-+]?[0-9]{1,3}(?![0-9]))?"
)


def numeric_answer(text: str, answer: Any, *, tolerance: Annotated[float, Field(ge=0)] = 0.0) -> float:
    """1 where the number answered is that of the column, within ``tolerance``; else 0. Of both texts it is the first
    number after the last ``####`` (Cobbe et al. 2021), or without one the last number."""
    wanted = final_number(str(answer))
    if wanted is None:
        raise ValueError(f"the column holds no number: {answer!r}")
    found = final_number(text)
    return float(found is not None and abs(found - wanted) <= Decimal(str(tolerance)))


def final_number(text: str) -> Decimal | None:
    """1,234.5, -3, $5, .5 and 2e3 are read as people write them; `10-3` holds 10 and 3, `3.` is 3."""
    _, marked, after = text.rpartition("####")
    found = list(_NUMBER.finditer(after if marked else text))
    if not found:
        return None
    sign, digits, exponent = (found[0] if marked else found[-1]).groups(default="")
    return Decimal(f"{sign.replace(_MINUS, '-')}{digits.replace(',', '')}{exponent}")


def language(text: str, *, code: str) -> float:
    """Probability that it is written in the language of the ISO 639-1 code (needs the extra `data`)."""
    ranked: dict[str, float] = dict(_identifier().rank(text))
    if code not in ranked:
        raise ConfigError(f"language {code!r} is not known", hint=f"ISO 639-1 codes: {', '.join(sorted(ranked))}")
    return float(ranked[code])


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ConfigError(
            "the rule language needs py3langid, which is not installed", hint="pip install 'fairlead[data]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (
        length,
        regex,
        starts_with,
        contains,
        repetition,
        code_fence_share,
        json_valid,
        numeric_answer,
        language,
    )
}


def columns_of(rule: Rule) -> tuple[str, ...]:
    """The columns of a prompt that a rule reads."""
    return tuple(name for name, each in _parameters(rule).items() if each.kind is each.POSITIONAL_OR_KEYWORD)[1:]


def arguments_of(rule: Rule) -> dict[str, inspect.Parameter]:
    return {name: each for name, each in _parameters(rule).items() if each.kind is each.KEYWORD_ONLY}


def _parameters(rule: Rule) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(rule).parameters


def bound(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a rule, those given checked and in their types. Raises ValueError for one that is unknown,
    missing or of another type."""
    rule = RULES[name]
    hints, known = get_type_hints(rule, include_extras=True), arguments_of(rule)
    for key in arguments:
        if key not in known:
            raise ValueError(
                f"the rule {name} has no argument {key!r}; {suggest(key, known) if known else 'it has none'}"
            )
    fields: dict[str, Any] = {
        key: (hints[key], ... if each.default is each.empty else each.default) for key, each in known.items()
    }
    try:
        found = create_model(name, __base__=Section, **fields).model_validate(dict(arguments))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"the rule {name} needs {first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}"
        ) from error
    return {key: getattr(found, key) for key in known}
