"""A teacher's answers in the tokens of its student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import CPU, base, tokenizer

from fairlead.config import ScratchSection
from fairlead.data.render import Renderer
from fairlead.errors import ModelError
from fairlead.models import precision
from fairlead.models.export import save_model
from fairlead.models.load import build, prepare, train_tokenizer
from fairlead.models.roles import Models
from fairlead.rollout.native import NativeSampler
from fairlead.rollout.teacher import TeacherSampler, open_policy, open_teacher
from fairlead.types import Prompt, Rollout, Sampling

PROMPTS = [Prompt("why?"), Prompt("the lamp")]


class Says:
    """Answers what it is told to."""

    def __init__(self, *answers: tuple[str, bool]) -> None:
        self._answers = answers

    def generate(self, prompts: Sequence[Prompt], *, num_samples: int = 1, **_: Any) -> list[Rollout]:
        asked = [prompt for prompt in prompts for _ in range(num_samples)]
        return [
            Rollout(prompt, (99, 98), (97, 96, 95), (-1.0,) * 3, finished, text, kept=((97,),) * 3)
            for prompt, (text, finished) in zip(asked, self._answers, strict=True)
        ]


def _renderer(max_length: int = 64) -> Renderer:
    return Renderer(tokenizer(), template="question-answer", max_length=max_length)


def test_prompts_and_responses_are_tokenised_as_the_student_reads_them() -> None:
    renderer = _renderer()
    sampler = TeacherSampler(Says(("the fuse is loose.", True), ("the fuse", False)), renderer)
    whole, cut = sampler.generate(PROMPTS, sampling=Sampling(8), key=(0,))
    expected = renderer.response_ids([(PROMPTS[0], "the fuse is loose."), (PROMPTS[1], "the fuse")])
    assert [whole.prompt_ids, cut.prompt_ids] == renderer.prompt_ids(PROMPTS)
    assert whole.response_ids == expected[0] and whole.response_ids[-1] == renderer.eos and whole.finished
    assert cut.response_ids == expected[1][:-1] and not cut.finished  # what did not end is not taught to end
    assert all(math.isnan(value) for value in whole.behaviour_logprobs) and whole.kept is None


def test_several_responses_to_a_prompt_stand_side_by_side() -> None:
    says = Says(*((text, True) for text in ("a", "b", "c", "d")))
    rollouts = TeacherSampler(says, _renderer()).generate(PROMPTS, sampling=Sampling(8), key=(0,), num_samples=2)
    assert [(r.prompt.prompt, r.text) for r in rollouts] == [
        ("why?", "a"),
        ("why?", "b"),
        ("the lamp", "c"),
        ("the lamp", "d"),
    ]
    assert rollouts[0].prompt_ids == rollouts[1].prompt_ids != rollouts[2].prompt_ids


def test_what_the_students_rows_have_no_room_for_is_cut_and_does_not_end() -> None:
    renderer = _renderer(max_length=20)
    sampler = TeacherSampler(Says(("the fuse is loose. " * 9, True), ("", False)), renderer)
    long, empty = sampler.generate(PROMPTS, sampling=Sampling(8), key=(0,))
    assert len(long.prompt_ids) + len(long.response_ids) == 20 and not long.finished
    assert len(empty.response_ids) == 1  # there is no response of no tokens


def test_a_saved_model_with_a_tokenizer_of_its_own_answers_what_it_would_by_itself(tmp_path: Path) -> None:
    words = train_tokenizer(["the belt of the pump is worn."] * 9, 280, 64)
    sizes: Any = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 280, "context_length": 64}
    made = prepare(build(ScratchSection(**sizes), words, 3, torch.float32), words, None, CPU)
    save_model(Models(made, ("policy",)), tmp_path / "teacher", template="plain", eos=words.eos_token_id)
    teacher = open_teacher(str(tmp_path / "teacher"), _renderer(), engine="native", rows=4, device=CPU)
    alone = NativeSampler(Models(made, ("policy",)), Renderer(words, template="plain", max_length=64))
    given: Any = {"sampling": Sampling(8), "key": (5, "x"), "num_samples": 3}
    assert [r.text for r in teacher.generate(PROMPTS, **given)] == [r.text for r in alone.generate(PROMPTS, **given)]


def test_a_teacher_multiplies_in_what_the_device_is_fast_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(Models(base(), ("policy",)), tmp_path / "teacher", template="plain", eos=1)
    kinds = list[torch.dtype]()
    for fast in (False, True):
        monkeypatch.setattr(precision, "fast_at_bf16", lambda _, fast=fast: fast)
        models, _ = open_policy(str(tmp_path / "teacher"), "teacher", max_length=64, device=CPU)
        assert models.causal.dtype == torch.float32
        with models.autocast():
            kinds.append(torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype)
    assert kinds == [torch.float32, torch.bfloat16]


def test_a_reward_model_is_no_teacher(tmp_path: Path) -> None:
    save_model(Models(base(), ("reward",)), tmp_path / "reward", template="plain", eos=1)
    with pytest.raises(ModelError, match="reward model, which answers nothing"):
        open_teacher(str(tmp_path / "reward"), _renderer(), engine="native", rows=4, device=CPU)
