"""Rules judge a response by its text alone: what each says of texts whose score is known by hand."""

from __future__ import annotations

import inspect
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import CPU, tokenizer

from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, TrainingError
from fairlead.rollout.rewards import open_reward
from fairlead.rollout.rewards.rules import (
    RULES,
    arguments_of,
    code_fence_share,
    columns_of,
    contains,
    final_number,
    json_valid,
    language,
    length,
    numeric_answer,
    regex,
    repetition,
    starts_with,
)
from fairlead.types import Prompt, Rollout

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "rewards.md"


def _rollout(text: str, **columns: object) -> Rollout:
    return Rollout(Prompt("why?", columns), (3,), (4, 1), (-1.0, -1.0), True, text)


def _score(source: Any, *rollouts: Rollout) -> tuple[float, ...]:
    renderer = Renderer(tokenizer(), template="question-answer", max_length=128)
    return open_reward(source, renderer, device=CPU)(rollouts).values


# --- each rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 10.0),
        ({"unit": "words"}, 2.0),
        ({"target": 10}, 0.0),
        ({"target": 20}, -0.5),
        ({"target": 8}, -0.25),
        ({"max": 40}, 0.0),
        ({"max": 5}, -1.0),
        ({"min": 5, "max": 20}, 0.0),
        ({"min": 40}, -0.75),
        ({"max": 0}, -10.0),
        ({"unit": "words", "min": 4, "max": 6}, -0.5),
    ],
)
def test_length_is_the_share_of_the_bound_that_is_missed(arguments: dict, expected: float) -> None:
    assert length("four fives", **arguments) == expected


def test_a_regular_expression_is_found_or_matches_the_whole_over_lines_too() -> None:
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    text = "<think>one\ntwo</think>\n<answer>3</answer>"
    assert regex(text, pattern=pattern, whole=True) == 1.0
    assert regex(f"{text} and so on", pattern=pattern) == 1.0
    assert regex(f"{text} and so on", pattern=pattern, whole=True) == 0.0
    assert regex("<answer>3</answer>", pattern=pattern) == 0.0


def test_beginnings_and_words_are_looked_for_with_or_without_case() -> None:
    assert starts_with("Sure, here", texts=("No", "Sure")) == 1.0
    assert starts_with("sure, here", texts=("No", "Sure")) == 0.0
    assert starts_with("sure, here", texts=("No", "Sure"), ignore_case=True) == 1.0
    assert contains("the Fuse is loose", texts=("fuse", "loose")) == 0.5
    assert contains("the Fuse is loose", texts=("fuse", "loose"), ignore_case=True) == 1.0


def test_repetition_is_the_share_of_runs_of_words_that_stood_before() -> None:
    assert repetition("one two three four five") == 0.0
    assert repetition("a b c a b c") == -0.25  # abc bca cab abc
    assert repetition("no no no no no") == pytest.approx(-2 / 3)
    assert repetition("No no NO no", n=1) == -0.75
    assert repetition("too short") == repetition("") == 0.0


def test_the_share_of_code_leaves_out_the_fences_and_takes_an_open_one_to_the_end() -> None:
    assert code_fence_share("text") == code_fence_share("") == code_fence_share("```\n```") == 0.0
    assert code_fence_share("1234\n```python\n12345678\n```\n1234") == 0.5
    assert code_fence_share("12\n```\n1234\n12") == 0.75
    assert code_fence_share("```\nall\n```") == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": [1, 2.5, null]}', 1.0),
        (" 3 ", 1.0),
        ('```json\n{"a": 1}\n```', 1.0),
        ('```\n{"a": 1}\n```\n', 1.0),
        ('Here it is:\n```json\n{"a": 1}\n```', 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": NaN}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_is_all_of_the_text_or_all_of_one_fence(text: str, expected: float) -> None:
    assert json_valid(text) == expected


def test_json_must_be_an_object_with_the_keys_asked_for() -> None:
    assert json_valid('{"a": 1, "b": 2}', keys=("b",)) == 1.0
    assert json_valid('{"a": 1}', keys=("a", "b")) == 0.0
    assert json_valid('["a"]', keys=("a",)) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### 1,234,567 and then 8", "1234567"),
        ("First #### 5, no: #### -6", "-6"),
        ("It is 5.\n#### none", None),
        ("It costs $1,234.50.", "1234.50"),
        ("minus \u22123", "-3"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("It fell by 10-3", "3"),
        ("(2)-7", "7"),
        ("x = -7", "-7"),
        ("10 - 3", "3"),
        ("it is .5", "0.5"),
        ("it is 3.", "3"),
        ("+4", "4"),
        ("2e3 of them", "2000"),
        ("50%", "50"),
        ("1, 2, 3", "3"),
        ("1,2345", "2345"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_final_number_is_read_as_people_write_it(text: str, expected: str | None) -> None:
    assert final_number(text) == (None if expected is None else Decimal(expected))


@given(st.integers(-(10**12), 10**12), st.integers(0, 999), st.sampled_from(["{}", "{} apples.", "So: {}!", "={}"]))
def test_a_number_with_thousands_separators_is_read_back(whole: int, part: int, around: str) -> None:
    assert final_number(around.format(f"{whole:,}.{part:03}")) == Decimal(f"{whole}.{part:03}")


def test_an_answer_is_right_by_its_number_alone() -> None:
    reference = "Natalia sold 48/2 = 24 clips in May.\n#### 72"
    assert numeric_answer("She sold 72.", reference) == 1.0
    assert numeric_answer("It is $72.00", 72) == 1.0
    assert numeric_answer("72 of 73", reference) == 0.0
    assert numeric_answer("I do not know", reference) == 0.0
    assert numeric_answer("3.14", 3.14159) == 0.0
    assert numeric_answer("3.14", 3.14159, tolerance=0.01) == 1.0
    with pytest.raises(ValueError, match="the column holds no number: None"):
        numeric_answer("72", None)


def test_a_language_is_a_probability() -> None:
    pytest.importorskip("py3langid")
    german = "Der schnelle braune Fuchs springt \u00fcber den faulen Hund und freut sich."
    assert language(german, code="de") > 0.9 > 0.1 > language(german, code="en")
    assert sum(language(german, code=code) for code in ("de", "en", "fr")) <= 1.0
    with pytest.raises(ConfigError, match="language 'xx' is not known"):
        language(german, code="xx")


# --- as rewards ----------------------------------------------------------------------------------------------------


def test_a_rule_is_a_reward_by_its_name_and_with_arguments() -> None:
    rollouts = _rollout("four"), _rollout("a long one")
    assert _score("rule:length", *rollouts) == (4.0, 10.0)
    assert _score({"rule": "length", "arguments": {"max": 5}}, *rollouts) == (0.0, -1.0)


def test_a_rule_reads_the_prompts_column_under_its_own_name_or_another() -> None:
    right, wrong = _rollout("72", answer="#### 72", solution="9"), _rollout("71", answer="#### 72", solution="71")
    assert _score("rule:numeric_answer", right, wrong) == (1.0, 0.0)
    source = {"rule": "numeric_answer", "columns": {"answer": "solution"}}
    assert _score(source, right, wrong) == (0.0, 1.0)
    with pytest.raises(TrainingError, match=r"(?s)numeric_answer reads the prompts' column 'answer'.*have topic"):
        _score("rule:numeric_answer", _rollout("72", topic="x"))


def test_a_column_without_a_number_names_the_sample() -> None:
    with pytest.raises(TrainingError, match=r"numeric_answer: the column holds no number: 'none', for the sample '72'"):
        _score("rule:numeric_answer", _rollout("72", answer="none"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("rule:lenght", r"no rule 'lenght'; did you mean 'length'\?"),
        ("rule:regex", r"the rule regex needs pattern: Field required"),
        ({"rule": "length", "arguments": {"maxx": 3}}, r"length has no argument 'maxx'; did you mean 'max'\?"),
        (
            {"rule": "length", "arguments": {"max": "long"}},
            r"the rule length needs max: Input should be a valid integer",
        ),
        ({"rule": "length", "arguments": {"min": 5, "max": 2}}, r"length refuses .*: min=5 is above max=2"),
        ({"rule": "length", "arguments": {"target": 5, "max": 2}}, r"target, and min or max, are both given"),
        ({"rule": "regex", "arguments": {"pattern": "("}}, r"regex refuses .*unterminated subpattern"),
        ({"rule": "repetition", "arguments": {"n": 0}}, r"repetition needs n: Input should be greater"),
        ({"rule": "code_fence_share", "arguments": {"n": 0}}, r"no argument 'n'; it has none"),
        ({"rule": "length", "columns": {"answer": "x"}}, r"length reads no column 'answer': none"),
    ],
)
def test_a_rule_that_is_unknown_or_used_wrongly_is_refused_when_opened(source: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _score(source)


def test_the_guides_table_is_in_step_with_the_rules() -> None:
    section = PAGE.read_text("utf-8").partition("\n## Rules\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line][2:]
    listed = {
        name.strip("`"): (re.findall(r"`(\w+)`(?: \((\w+)\))?", arguments), re.findall(r"`(\w+)`", columns))
        for name, arguments, columns, _ in rows
    }
    assert listed == {
        name: ([(key, _written(each.default)) for key, each in arguments_of(rule).items()], list(columns_of(rule)))
        for name, rule in RULES.items()
    }


def _written(default: object) -> str:
    """A default as the table has it; nothing for none."""
    if default in (None, (), inspect.Parameter.empty):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default).lower()
