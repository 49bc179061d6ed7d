"""Sums with worked answers: what Python makes of the same sums."""

import re
from pathlib import Path

import pytest
from tests.data.prepare.raw import contents, every_row_loads, outputs, rows

from fairlead.data.prepare import prepare
from fairlead.errors import ConfigError
from fairlead.rollout.rewards.rules import numeric_answer


def silent(text: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("arithmetic") / "out"
    prepare("arithmetic", None, out, solved=200, unsolved=300, heldout=100, say=silent)
    return out


def result(prompt: str) -> int:
    assert re.fullmatch(r"\d+( [+-] \d+)+ =", prompt)
    return eval(prompt.removesuffix(" ="))


def test_each_split_has_the_problems_asked_for_and_shares_none(made: Path) -> None:
    assert every_row_loads(made)
    assert outputs(made) == {"heldout_prompts": 100, "heldout_sft": 100, "prompts": 300, "sft": 200}
    asked = [row["prompt"] for name in ("sft", "prompts", "heldout_prompts") for row in rows(made, name)]
    assert len(set(asked)) == 600
    assert [row["prompt"] for row in rows(made, "heldout_sft")] == asked[500:]


def test_an_answer_shows_its_steps_which_are_all_true_or_is_the_result_alone(made: Path) -> None:
    shown = 0
    for row in rows(made, "sft") + rows(made, "heldout_sft"):
        first, *steps, last = row["response"].split("\n")
        assert first == ""
        assert last == f"#### {result(row['prompt'])}"
        assert len(steps) in (0, 5)
        shown += bool(steps)
        terms = row["prompt"].removesuffix(" =").split(" ")
        for number, step in enumerate(steps):
            left, right = step.split(" = ")
            assert left.split(" ")[1:] == terms[2 * number + 1 : 2 * number + 3]
            assert eval(left) == int(right) == eval(" ".join(terms[: 2 * number + 3]))
    assert 85 < shown < 155  # 120 of 300 expected, standard deviation 8.5


@pytest.mark.parametrize(("worked", "lines"), [(0.0, 2), (1.0, 7)])
def test_all_answers_show_their_steps_or_none_does_where_that_is_asked_for(
    tmp_path: Path, worked: float, lines: int
) -> None:
    prepare("arithmetic", None, tmp_path / "out", solved=50, unsolved=1, heldout=1, worked=worked, say=silent)
    assert {len(row["response"].split("\n")) for row in rows(tmp_path / "out", "sft")} == {lines}


def test_the_column_holds_the_result_and_the_rule_knows_a_right_answer_from_a_wrong_one(made: Path) -> None:
    answers = {row["prompt"]: row["answer"] for row in rows(made, "heldout_prompts")}
    assert answers == {prompt: str(result(prompt)) for prompt in answers}
    for row in rows(made, "heldout_sft"):
        right = answers[row["prompt"]]
        assert numeric_answer(row["response"], right) == 1.0
        assert numeric_answer(row["response"] + "0", right) == float(right == "0")
        assert numeric_answer(row["response"], str(int(right) + 1)) == 0.0


def test_the_number_of_terms_and_their_size_are_as_asked_for(tmp_path: Path) -> None:
    prepare("arithmetic", None, tmp_path / "out", solved=20, unsolved=10, heldout=2, terms=2, largest=3, say=silent)
    asked = [row["prompt"] for name in ("sft", "prompts", "heldout_prompts") for row in rows(tmp_path / "out", name)]
    assert set(asked) == {f"{a} {sign} {b} =" for a in range(4) for b in range(4) for sign in "+-"}


def test_more_problems_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="33 problems are asked for, and 2 terms up to 3 make 32"):
        prepare("arithmetic", None, tmp_path / "out", solved=21, unsolved=10, heldout=2, terms=2, largest=3, say=silent)
    assert not (tmp_path / "out").exists()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        prepare("arithmetic", None, tmp_path / name, seed=seed, solved=9, unsolved=9, heldout=9, say=silent)
    assert contents(tmp_path / "one") == contents(tmp_path / "same")
    assert rows(tmp_path / "one", "sft") != rows(tmp_path / "other", "sft")
