"""Stages chain on adapters: SFT, reward, PPO and DPO stand on one base into which nothing is merged, and what is the
reference follows from where a stage starts."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.end_to_end.rows import PAIRS, PROMPTS, ROWS, SCRATCH, brevity, settings
from tests.tiny import CPU

import fairlead
from fairlead.config import ModelSection
from fairlead.data.render import Tree
from fairlead.errors import ConfigError
from fairlead.evaluation import evaluate
from fairlead.models.load import load_base, load_tokenizer
from fairlead.models.roles import Models
from fairlead.rollout.experience import measure_tokens

ADAPTER = {"rank": 2}
VALUE = {"trunk": "adapter", "start": "reward"}


def _run(algorithm: str, folder: Path, **more: Any) -> Path:
    given = settings(algorithm, folder, **{"data.template": "auto", **more})
    return fairlead.train({"algorithm": algorithm}, given, data=ROWS[algorithm]).path


def _notes(run: Path) -> list[str]:
    return json.loads((run / "manifest.json").read_text())["notes"]


def _logprobs(run: Path, section: dict[str, Any]) -> torch.Tensor:
    found = ModelSection(path=str(run), **section)
    base = load_base(found, load_tokenizer(str(run)), None, seed=0, device=CPU)
    models = Models(base, ("policy",), adapter=found.adapter)
    return measure_tokens(models, [Tree((3, 4, 5), ((6, 7, 8),))], temperature=1.0, budget=64)["behaviour_logprobs"][0]


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_sft_reward_ppo_and_dpo_chain_on_one_base(quantize: str | None, tmp_path: Path) -> None:
    if quantize:
        pytest.importorskip("bitsandbytes")
    form: dict[str, Any] = {"model.adapter": ADAPTER, "model.quantize": quantize, "model.roles": "shared"}
    first = {"model.scratch": SCRATCH | {"hidden_size": 64}, "data.template": "question-answer"}
    base = _run("pretrain", tmp_path, **first)
    weights = (base / "model" / "model.safetensors").read_bytes()
    sft = _run("sft", tmp_path, **{"model.path": str(base), "data.template": "question-answer"}, **form)
    reward = _run("reward", tmp_path, **{"model.path": str(sft)}, **form)
    ppo = _run("ppo", tmp_path, **{"model.path": str(sft), "ppo.reward": str(reward), "ppo.value": VALUE}, **form)
    dpo = _run("dpo", tmp_path, **{"model.path": str(ppo)}, **form)

    place = base / "model"
    for run in (sft, reward, ppo, dpo):
        saved = json.loads((run / "model" / "adapter_config.json").read_text())
        meta = json.loads((run / "model" / "fairlead.json").read_text())
        assert saved["base_model_name_or_path"] == meta["base"]["path"] == str(place)
        assert meta["base"]["sha256"] == hashlib.sha256(weights).hexdigest()
        assert not (run / "model" / "model.safetensors").exists()
    assert (place / "model.safetensors").read_bytes() == weights
    for run, start in ((ppo, sft), (dpo, ppo)):
        digest = hashlib.sha256((start / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()
        assert f"reference: the frozen adapter {start / 'model'}, sha256 {digest}" in _notes(run)
    digest = hashlib.sha256((reward / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert f"reward: on the policy's base, the frozen adapter {reward / 'model'}, sha256 {digest}" in _notes(ppo)

    first_row = json.loads((ppo / "metrics.jsonl").read_text().splitlines()[0])
    assert first_row["eval/kl"] == pytest.approx(0, abs=1e-4)  # the reference is what the policy starts as
    measured = evaluate(
        [sft, reward, ppo, dpo], prompts=PROMPTS, pairs=PAIRS[:4], num_prompts=2, max_new_tokens=12, reference=sft
    )
    assert measured["ppo"]["kl"]["mean"] != 0
    assert "accuracy" in measured["reward"]


def test_a_stage_that_trains_all_weights_merges_the_adapter_it_starts_from(tmp_path: Path) -> None:
    base = _run("pretrain", tmp_path, **{"model.scratch": SCRATCH, "data.template": "question-answer"})
    sft = _run("sft", tmp_path, **{"model.path": str(base), "model.adapter": ADAPTER})
    merged = _logprobs(sft, {})
    torch.testing.assert_close(_logprobs(sft, {"adapter": ADAPTER}), merged, atol=1e-5, rtol=0)
    dpo = _run("dpo", tmp_path, **{"model.path": str(sft), "optim.learning_rate": 1e-12})
    said = "reference: log-probabilities of the model as it was loaded, taken before the first step"
    assert said in _notes(dpo)
    first, *_ = [json.loads(line) for line in (dpo / "metrics.jsonl").read_text().splitlines()]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)  # the policy is its reference
    torch.testing.assert_close(_logprobs(dpo, {}), merged, atol=1e-5, rtol=0)


def test_a_reward_that_does_not_stand_on_the_base_cannot_start_the_value(tmp_path: Path) -> None:
    base = _run("pretrain", tmp_path, **{"model.scratch": SCRATCH, "data.template": "question-answer"})
    reward = _run("reward", tmp_path, **{"model.path": str(base)})
    more = {"model.path": str(base), "model.adapter": ADAPTER, "ppo.reward": str(reward), "ppo.value": VALUE}
    with pytest.raises(ConfigError, match=r"does not stand on the policy's base: it is a whole model, not an adapter"):
        _run("ppo", tmp_path, **more)
    assert not (tmp_path / "ppo").exists()


def test_an_interrupted_run_with_four_roles_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    base = _run("pretrain", tmp_path, **{"model.scratch": SCRATCH, "data.template": "question-answer"})
    sft = _run("sft", tmp_path, **{"model.path": str(base), "model.adapter": ADAPTER})
    reward = _run("reward", tmp_path, **{"model.path": str(base), "model.adapter": ADAPTER})
    more = {"model.path": str(sft), "model.adapter": ADAPTER, "ppo.reward": str(reward), "ppo.value": VALUE}
    more |= {"train.save_every": 1, "train.keep_checkpoints": 9}
    run = _run("ppo", tmp_path, **more)
    (run / "model").rename(tmp_path / "whole")
    (run / "summary.json").unlink()
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    assert _run("ppo", tmp_path, **more) == run
    for name in ("adapter_model.safetensors", "value/adapter_model.safetensors", "value_head.safetensors"):
        assert (run / "model" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


FORMS: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "layers": ({"ppo.value": {"trunk": "layers", "num_layers": 1}}, "a frozen copy of all weights", {"layers"}),
    "model": ({"ppo.value": {"trunk": "model"}}, "a frozen copy of all weights", {"layers"}),
    "hydra": ({"model.num_layers_unfrozen": 1}, "a frozen copy of the last 1 layers over the shared trunk", set()),
    "four copies": (
        {"ppo.value": {"trunk": "model"}, "model.adapter": ADAPTER, "model.roles": "separate"},
        "a copy of ",
        {"adapter_model", "adapter_config"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_value_and_reference_trains_under_ppo_and_saves_what_is_its_own(form: str, tmp_path: Path) -> None:
    more, reference, files = FORMS[form]
    base = _run("pretrain", tmp_path, **{"model.scratch": SCRATCH, "data.template": "question-answer"})
    given = settings("ppo", tmp_path, **{"data.template": "auto", "model.path": str(base), **more})
    run = fairlead.train({"algorithm": "ppo"}, given, data=ROWS["ppo"], reward=brevity).path
    assert any(note.startswith(f"reference: {reference}") for note in _notes(run))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["eval/kl"] != 0 and all(math.isfinite(row["loss"]) for row in rows[1:])
    assert {path.stem for path in (run / "model" / "value").glob("*")} == files


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_a_value_begins_as_a_reward_of_all_weights(adapter: dict[str, Any] | None, tmp_path: Path) -> None:
    base = _run("pretrain", tmp_path, **{"model.scratch": SCRATCH, "data.template": "question-answer"})
    reward = _run("reward", tmp_path, **{"model.path": str(base), "model.adapter": None})
    value = {"trunk": "model", "start": "reward"}
    ppo = _run(
        "ppo",
        tmp_path,
        **{"model.path": str(base), "model.adapter": adapter, "ppo.reward": str(reward), "ppo.value": value},
    )
    assert f"value: a model of its own that begins as the reward {reward / 'model'}" in _notes(ppo)
    value = {"trunk": "adapter", "start": "reward"}
    more = {"model.path": str(base), "model.adapter": ADAPTER, "run.name": "again", "ppo.reward": str(reward)}
    with pytest.raises(ConfigError, match="does not stand on the policy's base: it is a whole model"):
        _run("ppo", tmp_path, **more, **{"ppo.value": value})
