"""What is saved loads in plain transformers and peft, and gives the same log-probabilities and scores."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from fairlead.config import AdapterSection
from fairlead.data.pack import by_response, token_batch
from fairlead.models.adapters import StartAdapter
from fairlead.models.export import save_model
from fairlead.models.heads import RewardHeads
from fairlead.models.load import load_causal, load_tokenizer, read_meta
from fairlead.models.merge import merge
from fairlead.models.roles import Models
from tests.models.test_adapters import load, saved_base
from tests.tiny import TREES, base, models, scatter, separate


def _logprobs(made) -> list[torch.Tensor]:
    batch = token_batch(TREES, packed=True, pad_id=0)
    with torch.no_grad(), made.use("policy"):
        return by_response(made(batch, frozenset({"logprobs"})).logprobs, batch)


def _plain_logprobs(model, tree) -> torch.Tensor:
    ids = torch.tensor([[*tree.prompt, *tree.responses[0]]])
    with torch.no_grad():
        logprobs = model(ids).logits.float().log_softmax(-1)[0, :-1]
    return logprobs.gather(1, ids[0, 1:, None])[:, 0][max(len(tree.prompt) - 1, 0) :]


def test_a_fully_trained_policy_loads_in_transformers_with_the_same_logprobs(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = models(("policy", "value"))
    scatter(made)
    save_model(made, tmp_path / "model", template="hh")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for tree, got in zip(separate(TREES), _logprobs(made), strict=True):
        torch.testing.assert_close(got, _plain_logprobs(loaded, tree), atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<eos>"
    assert (tmp_path / "model" / "value_head.safetensors").is_file()


def test_an_adapter_loads_in_peft_on_its_base_and_merged_through_our_loader(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start = base()
    start.model.config._attn_implementation = "sdpa"
    start.model.save_pretrained(tmp_path / "base")
    made = models(("policy", "reference"), lora=True)
    made.network.peft_config["policy"].base_model_name_or_path = str(tmp_path / "base")
    save_model(made, tmp_path / "model", template="plain")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "model")
    merged = load_causal(str(tmp_path / "model"), torch.float32)
    for tree, got in zip(separate(TREES), _logprobs(made), strict=True):
        torch.testing.assert_close(got, _plain_logprobs(adapted, tree), atol=1e-5, rtol=0)
        torch.testing.assert_close(got, _plain_logprobs(merged, tree), atol=1e-5, rtol=0)


REWARDED = TREES[:2]


def _scores(made) -> torch.Tensor:
    with torch.no_grad(), made.use("reward"):
        return made(token_batch(REWARDED, packed=True, pad_id=0), frozenset({"scores"})).scores


def _plain_scores(classifier) -> torch.Tensor:
    rows = [[*tree.prompt, *tree.responses[0]] for tree in separate(REWARDED)]
    with torch.no_grad():
        return torch.stack([classifier(torch.tensor([row])).logits[0, 0] for row in rows])


def test_a_reward_model_loads_as_a_sequence_classifier_with_its_head(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    made = models(("reward",))
    scatter(made)
    save_model(made, tmp_path / "model", template="plain")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(_plain_scores(loaded), _scores(made), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox", "qwen3", "phi"])
def test_a_reward_adapter_loads_in_peft_over_a_sequence_classifier_with_its_head(
    architecture: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    start = saved_base(tmp_path / "base", architecture=architecture)
    made = Models(start, ("reward",), adapter=AdapterSection(rank=4))
    scatter(made)
    save_model(made, tmp_path / "model", template="plain")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    loaded = PeftModel.from_pretrained(classifier, str(tmp_path / "model"))
    torch.testing.assert_close(_plain_scores(loaded), _scores(made), atol=1e-5, rtol=0)
    digest = hashlib.sha256((tmp_path / "base" / "model.safetensors").read_bytes()).hexdigest()
    meta = json.loads((tmp_path / "model" / "fairlead.json").read_text())
    assert (meta["template"], meta["role"]) == ("plain", "reward")
    assert meta["base"] == {"path": str(tmp_path / "base"), "sha256": digest, "quantize": None}


HEADS = {
    "one": None,
    "ensemble": RewardHeads("ensemble", ("member_1", "member_2", "member_3"), "mean-minus-disagreement"),
    "attributes": RewardHeads("attributes", ("kind", "right"), weights=(2.0, -1.0)),
}


def _head_scores(made) -> torch.Tensor:
    with torch.no_grad(), made.use("reward"):
        return made(token_batch(REWARDED, packed=True, pad_id=0), frozenset({"scores"})).head_scores


def _plain_head_scores(classifier) -> torch.Tensor:
    rows = [[*tree.prompt, *tree.responses[0]] for tree in separate(REWARDED)]
    with torch.no_grad():
        return torch.stack([classifier.eval()(torch.tensor([row])).logits[0] for row in rows])


@pytest.mark.parametrize("kind", HEADS)
def test_several_heads_load_as_the_labels_of_a_sequence_classifier(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    heads = HEADS[kind]
    made = models(("reward",), reward_heads=heads)
    scatter(made)
    save_model(made, tmp_path / "model", template="plain")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(_plain_head_scores(loaded), _head_scores(made), atol=1e-5, rtol=0)
    names = ["reward"] if heads is None else list(heads.names)
    assert loaded.config.num_labels == len(names)
    assert loaded.config.id2label == dict(enumerate(names))
    meta = json.loads((tmp_path / "model" / "fairlead.json").read_text())
    wanted = {
        "one": {},
        "ensemble": {
            "heads": {
                "kind": "ensemble",
                "names": ["member_1", "member_2", "member_3"],
                "combine": "mean-minus-disagreement",
                "weights": None,
            }
        },
        "attributes": {
            "heads": {"kind": "attributes", "names": ["kind", "right"], "combine": "mean", "weights": [2.0, -1.0]}
        },
    }
    assert meta == {"template": "plain", "role": "reward"} | wanted[kind]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["ensemble", "attributes"])
def test_an_adapter_with_several_heads_loads_in_transformers_in_peft_and_as_a_role(
    kind: str, architecture: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    heads = HEADS[kind]
    assert heads is not None
    start = saved_base(tmp_path / "base", architecture=architecture)
    made = Models(start, ("reward",), adapter=AdapterSection(rank=4), reward_heads=heads)
    scatter(made, 0.2)
    save_model(made, tmp_path / "model", template="plain")
    wanted = _head_scores(made)
    labels = {"num_labels": len(heads.names), "id2label": dict(enumerate(heads.names))}
    direct = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", **labels)
    torch.testing.assert_close(_plain_head_scores(direct), wanted, atol=1e-5, rtol=0)
    assert direct.config.id2label == labels["id2label"]
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **labels)
    by_peft = PeftModel.from_pretrained(classifier, str(tmp_path / "model"))
    torch.testing.assert_close(_plain_head_scores(by_peft), wanted, atol=1e-5, rtol=0)
    role = Models(load(tmp_path / "base"), (), reward=StartAdapter.read(tmp_path / "model"))
    assert role.reward_heads == heads
    torch.testing.assert_close(_scores(role), heads.combined(wanted), atol=1e-5, rtol=0)


def test_a_value_that_starts_as_several_heads_starts_at_their_mean(tmp_path: Path) -> None:
    start = saved_base(tmp_path / "base")
    made = Models(start, ("reward",), adapter=AdapterSection(rank=4), reward_heads=HEADS["attributes"])
    scatter(made, 0.2)
    save_model(made, tmp_path / "model", template="plain")
    role = Models(
        load(tmp_path / "base"),
        ("policy", "value"),
        adapter=AdapterSection(rank=4),
        value_trunk="adapter",
        value_start="reward",
        reward=StartAdapter.read(tmp_path / "model"),
    )
    kind, right = made.heads["reward"].get_parameter("linear.weight").detach()
    torch.testing.assert_close(role.heads["value"].get_parameter("linear.weight").detach()[0], 2 * kind - right)


def test_a_merged_adapter_keeps_the_names_of_its_heads(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    start = saved_base(tmp_path / "base")
    made = Models(start, ("reward",), adapter=AdapterSection(rank=4), reward_heads=HEADS["ensemble"])
    scatter(made, 0.2)
    save_model(made, tmp_path / "model", template="plain")
    merge(str(tmp_path / "model"), tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(_plain_head_scores(merged), _head_scores(made), atol=1e-5, rtol=0)
    assert merged.config.id2label == {0: "member_1", 1: "member_2", 2: "member_3"}
    assert RewardHeads.read(read_meta(tmp_path / "out"), 3, "out") == HEADS["ensemble"]


def test_what_the_value_has_of_its_own_is_saved_beside_the_policy(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = models(("policy", "value"), lora=True, value_trunk="adapter")
    save_model(made, tmp_path / "adapter", template="plain")
    saved = load_file(tmp_path / "adapter" / "value" / "adapter_model.safetensors")
    policy = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == policy.keys()
    for name, tensor in saved.items():
        full = name.replace(".weight", ".value.weight")
        assert torch.equal(tensor, made.trainable[f"network.{full}"])
    made = models(("policy", "value"), value_trunk="layers")
    save_model(made, tmp_path / "layers", template="plain")
    saved = load_file(tmp_path / "layers" / "value" / "layers.safetensors")
    assert saved and all(torch.equal(tensor, made.value.get_parameter(name)) for name, tensor in saved.items())
    assert all(".layers.1." in name for name in saved)


def test_generation_stops_at_the_token_that_ends_a_response(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    for lora in (False, True):
        folder = tmp_path / str(lora)
        save_model(models(("policy",), lora=lora), folder, template="chatml", eos=7)
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [7, 1]
    save_model(models(("policy",)), tmp_path / "plain", template="hh", eos=1)
    assert GenerationConfig.from_pretrained(tmp_path / "plain").eos_token_id == 1


def test_what_is_saved_tells_neither_the_order_of_a_set_nor_how_the_base_was_loaded(tmp_path: Path) -> None:
    """Both differ from process to process, and a run that goes on in another one is to end with the same bytes."""
    save_model(models(("policy", "reference"), lora=True), tmp_path / "first", template="plain")
    told = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert len(told["target_modules"]) == 7 * 2 and told["target_modules"] == sorted(told["target_modules"])
    load_tokenizer(str(tmp_path / "first")).save_pretrained(tmp_path / "second")
    first, second = (
        json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("first", "second")
    )
    assert first == second
