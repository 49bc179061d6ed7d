"""Functions as rewards: what they are given, what they may return, where and how they are called."""

from __future__ import annotations

import asyncio
import math
import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import CPU, tokenizer

from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, TrainingError
from fairlead.rollout.rewards import is_constant, open_reward
from fairlead.rollout.rewards.spans import token_ends
from fairlead.types import Conversation, Prompt, Rollout, Scores


def _renderer(template: str = "question-answer") -> Renderer:
    return Renderer(tokenizer(), template=template, max_length=128)


def _rollout(prompt: Conversation, text: str, **columns: object) -> Rollout:
    """A response whose tokens write it."""
    ids = _renderer().response_ids([(prompt, text)])[0]
    return Rollout(Prompt(prompt, columns), (3,), ids, (-1.0,) * len(ids), True, text)


def _score(judge: object, *rollouts: Rollout) -> Scores:
    return open_reward(judge, _renderer(), device=CPU)(rollouts)  # pyright: ignore[reportArgumentType]


ROLLOUTS = _rollout("why?", "so", topic="x"), _rollout("how?", "thus")


# --- what a function is given --------------------------------------------------------------------------------------


def test_a_function_gets_samples_prompts_outputs_and_the_prompts_columns() -> None:
    seen = {}

    def judge(samples, prompts, outputs, **columns):
        seen.update(samples=samples, prompts=prompts, outputs=outputs, **columns)
        return [len(output) for output in outputs]

    assert _score(judge, *ROLLOUTS).values == (2.0, 4.0)
    assert seen == {
        "samples": ["Question: why?\n\nAnswer: so", "Question: how?\n\nAnswer: thus"],
        "prompts": ["Question: why?\n\nAnswer:", "Question: how?\n\nAnswer:"],
        "outputs": ["so", "thus"],
        "topic": ["x", None],
    }


def test_a_function_gets_what_it_takes_and_the_tokenizer_and_tokens_where_it_names_them() -> None:
    seen = []

    def judge(outputs, tokenizer, response_ids):
        seen.append(tokenizer)
        return [
            len(tokenizer(f" {output}").input_ids) - len(ids) for output, ids in zip(outputs, response_ids, strict=True)
        ]

    assert _score(judge, *ROLLOUTS).values == (-1.0, -1.0)  # the end of sequence
    assert seen == [tokenizer()]


def test_a_column_by_the_name_of_what_is_given_besides_is_refused() -> None:
    with pytest.raises(TrainingError, match="a column of the prompts is called 'outputs'"):
        _score(lambda outputs: [0.0], _rollout("why?", "so", outputs=3))
    assert _score("rule:length", _rollout("why?", "so", outputs=3)).values == (2.0,)  # which is given no columns


def test_arguments_of_a_source_are_handed_on_and_unknown_ones_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "scaled_judge.py").write_text("def judge(outputs, scale=1): return [scale * len(o) for o in outputs]")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _score({"function": "scaled_judge:judge", "arguments": {"scale": 3}}, *ROLLOUTS).values == (6.0, 12.0)
    with pytest.raises(ConfigError, match=r"(?s)takes no argument 'scala'.*did you mean 'scale'"):
        _score({"function": "scaled_judge:judge", "arguments": {"scala": 3}}, *ROLLOUTS)


def test_a_reward_that_cannot_be_found_says_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no reward 'os:nothing'.*module:function, importable from here"):
        _score("os:nothing")
    with pytest.raises(ConfigError, match="os:sep is a str, not a function"):
        _score("os:sep")
    with pytest.raises(ConfigError, match=r"no reward: \[\] names none"):
        _score([])


# --- what it may return --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5],
        (True, 2.5),
        np.array([1, 2.5], np.float32),
        torch.tensor([1, 2.5]),
        [torch.tensor(1), Decimal("2.5")],
        (value for value in (1, 2.5)),
    ],
    ids=["list", "tuple", "numpy", "torch", "mixed", "generator"],
)
def test_numbers_of_any_make_are_scores(returned: object) -> None:
    assert _score(lambda outputs: returned, *ROLLOUTS) == Scores((1.0, 2.5))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0, math.nan], "returned nan for the sample 'thus'"),
        ([-math.inf, 1.0], "returned -inf for the sample 'so'"),
        ([1.0], "returned 1 scores for 2 samples"),
        ([1.0, 2.0, 3.0], "returned 3 scores for 2 samples"),
        (None, r"returned None \(NoneType\) for 2 samples"),
        (3.0, r"returned 3.0 \(float\) for 2 samples"),
        ({"so": 1.0, "thus": 2.0}, r"returned \{.*\} \(dict\) for 2 samples"),
        ("12", r"returned '12' \(str\) for 2 samples"),
        ([1.0, None], r"returned None \(NoneType\), which is no number, for the sample 'thus'"),
        (["1.0", 1.0], r"returned '1.0' \(str\), which is no number, for the sample 'so'"),
        ([1.0, [2.0]], r"returned \[2.0\] \(list\), which is no number, for the sample 'thus'"),
        ([[(0, 1, 1.0)], 2.0], r"returned 2.0 \(float\) for the sample 'thus', sequences for others"),
        ([[1.0], [1.0, 2.0]], r"returned 1 numbers for the \d tokens of the sample 'so'"),
        ([[(0, 3, 1.0)], []], r"returned \(0, 3, 1.0\) \(tuple\), which is no span of the sample 'so' of 2 characters"),
        ([[(1, 0, 1.0)], []], r"returned \(1, 0, 1.0\) \(tuple\), which is no span"),
        ([[(0, 1.5, 1.0)], []], r"returned \(0, 1.5, 1.0\) \(tuple\), which is no span"),
        ([[(math.nan, 2, 1.0)], []], r"returned \(nan, 2, 1.0\) \(tuple\), which is no span"),
        ([[(0, 1)], []], r"returned \(0, 1\) \(tuple\), which is no span"),
        ([[(0, 1, math.nan)], []], "returned nan for the sample 'so'"),
    ],
)
def test_what_is_no_score_is_an_error_that_names_the_source_and_a_sample(returned: object, said: str) -> None:
    def judge(**_):
        return returned

    with pytest.raises(TrainingError, match=f"^the reward judge {said}"):
        _score(judge, *ROLLOUTS)


def test_a_reward_that_raises_is_named_with_its_reason_and_a_sample() -> None:
    def judge(**_):
        raise KeyError("lost")

    with pytest.raises(
        TrainingError, match=r"judge raised KeyError: 'lost', given 2 samples, the first of which is 'so'"
    ):
        _score(judge, *ROLLOUTS)


def test_a_constant_reward_is_told_from_eight_samples_on() -> None:
    assert is_constant(Scores((0.5,) * 8))
    assert not is_constant(Scores((0.5,) * 7))
    assert not is_constant(Scores((*(0.5,) * 7, 0.6)))


# --- dense ---------------------------------------------------------------------------------------------------------


def test_a_number_a_token_is_kept_and_their_sum_is_the_score() -> None:
    def judge(response_ids):
        return [[float(at) for at in range(len(ids))] for ids in response_ids]

    found = _score(judge, *ROLLOUTS)
    lengths = [len(rollout.response_ids) for rollout in ROLLOUTS]
    assert found.tokens == tuple(tuple(map(float, range(length))) for length in lengths)
    assert found.values == tuple(length * (length - 1) / 2 for length in lengths)


def test_a_span_stands_at_the_last_token_that_holds_a_character_of_it() -> None:
    rollout = _rollout("why?", "the lamp is loose")
    ids = rollout.response_ids
    pieces = [tokenizer().decode([token]) for token in ids[:-1]]
    assert pieces == [" the", " lamp", " is", " loose"]
    for start, end in [(0, 3), (4, 8), (5, 6), (0, 17), (12, 17), (16, 17)]:
        found = _score(lambda outputs, start=start, end=end: [[(start, end, 2.0)]], rollout)
        assert found.tokens is not None
        (at,) = [index for index, value in enumerate(found.tokens[0]) if value]
        before = len("".join(pieces[:at])) - 1  # the text has lost its first space
        assert before < end <= before + len(pieces[at])
        assert found.values == (2.0,) and len(found.tokens[0]) == len(ids)


def test_values_at_one_token_add_up_and_no_span_is_no_reward() -> None:
    found = _score(lambda outputs: [[(0, 1, 1.0), [0, 1, 0.5], (0, 4, -3.0)], []], ROLLOUTS[1], ROLLOUTS[0])
    assert found.values == (-1.5, 0.0) and found.tokens is not None
    assert set(found.tokens[1]) == {0.0}


def test_a_span_without_characters_goes_to_the_token_before_it_or_to_the_first() -> None:
    empty = _rollout("why?", "")
    length = len(ROLLOUTS[1].response_ids)
    found = _score(lambda outputs: [[(0, 0, 1.0)], [(0, 0, 1.0)], [(4, 4, 1.0)]], empty, ROLLOUTS[1], ROLLOUTS[1])
    first, last = (1.0, *[0.0] * (length - 1)), (*[0.0] * (length - 2), 1.0, 0.0)
    assert found.tokens == ((1.0, *[0.0] * (len(empty.response_ids) - 1)), first, last)


def test_a_text_that_ends_before_its_tokens_takes_spans() -> None:
    """As that of a response which a stop string ended."""
    ids = _rollout("why?", "the lamp is loose").response_ids[:-1]
    rollout = Rollout(Prompt("why?"), (3,), ids, (-1.0,) * len(ids), True, "the lamp")
    assert _score(lambda outputs: [[(0, 3, 1.0), (3, 8, 2.0)]], rollout).tokens == ((1.0, 2.0, 0.0, 0.0),)


def test_spans_of_a_text_that_its_tokens_do_not_write_are_refused() -> None:
    rollout = Rollout(Prompt("why?"), (3,), (4, 1), (-1.0, -1.0), True, "another")
    with pytest.raises(TrainingError, match="returned spans of the sample 'another', whose tokens read"):
        _score(lambda outputs: [[(0, 1, 1.0)]], rollout)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12))
def test_token_ends_are_the_lengths_of_decoded_beginnings(text: str) -> None:
    """Wherever a beginning ends with a whole character, and never backwards."""
    ids = [*tokenizer()(text).input_ids, tokenizer().eos_token_id]
    ends = token_ends(_renderer(), ids)
    decoded = [tokenizer().decode(ids[: at + 1], skip_special_tokens=True) for at in range(len(ids))]
    assert ends[-1] == len(text) and ends == sorted(ends)
    for end, beginning in zip(ends, decoded, strict=True):
        if not beginning.endswith("\ufffd"):
            assert end == len(beginning)


def test_token_ends_of_a_tokenizer_that_drops_the_first_space() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, "▁the": 1, "▁lamp": 2, "s": 3, "▁": 4, "<0xC3>": 5, "<0xA9>": 6}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", clean_up_tokenization_spaces=False)
    renderer = Renderer(fast, template="plain", max_length=16)
    assert fast.decode([1, 2, 3, 4, 5, 6, 0], skip_special_tokens=True) == "the lamps é"
    assert token_ends(renderer, [1, 2, 3, 4, 5, 6, 0]) == [3, 8, 9, 10, 10, 11, 11]
    assert token_ends(renderer, [1, 5]) == [3, 4]  # bytes that never became a character


# --- where and how it is called ------------------------------------------------------------------------------------

MODULE = """
import asyncio, os
def where(outputs): return [float(os.getpid())] * len(outputs)
def lengths(samples, prompts, outputs, tokenizer, topic): return [len(o) + len(tokenizer) / 1e6 for o in outputs]
async def later(outputs):
    return [len(o) for o in outputs]
begun = 0
async def together(outputs):
    global begun
    begun += 1
    async with asyncio.timeout(20):
        while begun < 10: await asyncio.sleep(0)
    return [len(o) for o in outputs]
def sizes(outputs): return [len(outputs)] * len(outputs)
def short(outputs): return [1.0] * (len(outputs) - 1)
def dies(outputs): os._exit(1)
def lost(outputs): raise KeyError("lost")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"judges_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_an_async_function_is_awaited_and_its_batches_run_side_by_side(module: str) -> None:
    async def judge(outputs):
        await asyncio.sleep(0)
        return [len(output) for output in outputs]

    assert _score(judge, *ROLLOUTS).values == (2.0, 4.0)
    many = [_rollout("why?", "so")] * 10
    assert _score({"function": f"{module}:together", "batch_size": 1}, *many).values == (2.0,) * 10


def test_an_async_function_is_awaited_where_a_loop_runs_already() -> None:
    async def judge(outputs):
        return [1.0] * len(outputs)

    async def notebook():
        return _score(judge, *ROLLOUTS).values

    assert asyncio.run(notebook()) == (1.0, 1.0)


def test_a_batch_size_cuts_the_samples_into_calls(module: str) -> None:
    many = [_rollout("why?", "so")] * 5
    assert _score({"function": f"{module}:sizes", "batch_size": 2}, *many).values == (2.0, 2.0, 2.0, 2.0, 1.0)
    with pytest.raises(TrainingError, match="returned 1 scores for 2 samples"):
        _score({"function": f"{module}:short", "batch_size": 2}, *many)


def test_processes_call_a_function_with_the_same_results_in_order(module: str) -> None:
    rollouts = [_rollout("why?", "x" * size, topic=size) for size in range(1, 6)]
    source = {"function": f"{module}:lengths", "batch_size": 2}
    wanted = tuple(size + len(tokenizer()) / 1e6 for size in range(1, 6))
    assert _score(source, *rollouts).values == wanted
    reward = open_reward(source | {"workers": 2}, _renderer(), device=CPU)
    assert reward(rollouts).values == reward(rollouts).values == wanted
    assert _score({"function": f"{module}:sizes", "workers": 2}, *rollouts).values == (3.0, 3.0, 3.0, 2.0, 2.0)
    elsewhere = open_reward({"function": f"{module}:where", "workers": 1}, _renderer(), device=CPU)(ROLLOUTS).values
    assert float(os.getpid()) not in elsewhere
    assert _score({"function": f"{module}:later", "workers": 1}, *ROLLOUTS).values == (2.0, 4.0)


def test_what_goes_wrong_in_another_process_is_named(module: str) -> None:
    with pytest.raises(TrainingError, match="lost raised KeyError: 'lost', given 2 samples"):
        _score({"function": f"{module}:lost", "workers": 1}, *ROLLOUTS)
    with pytest.raises(TrainingError, match=r"(?s)a process that called the reward .*:dies was killed.*fewer workers"):
        _score({"function": f"{module}:dies", "workers": 1}, *ROLLOUTS)
