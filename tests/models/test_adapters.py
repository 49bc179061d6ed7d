"""Which modules get an adapter, in each family; what peft makes of the same settings; what is saved and continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead.config import AdapterSection, ModelSection
from fairlead.data.pack import by_response, token_batch
from fairlead.errors import ConfigError, ModelError
from fairlead.models.adapters import StartAdapter, targets
from fairlead.models.export import save_model
from fairlead.models.load import Base, load_base, prepare
from fairlead.models.roles import Models
from tests.tiny import CPU, TREES, base, scatter, separate, tokenizer

LOGPROBS = frozenset({"logprobs"})
ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mistral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "gpt2": {"c_attn", "attn.c_proj"},
    "gpt_neo": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense"},
}
MLP = {
    "llama": {"gate_proj", "up_proj", "down_proj"},
    "qwen3": {"gate_proj", "up_proj", "down_proj"},
    "mistral": {"gate_proj", "up_proj", "down_proj"},
    "opt": {"fc1", "fc2"},
    "gpt2": {"c_fc", "mlp.c_proj"},
    "gpt_neo": {"c_fc", "mlp.c_proj"},
    "gpt_neox": {"dense_h_to_4h", "dense_4h_to_h"},
    "phi": {"fc1", "fc2"},
}
"""By the names in transformers' modelling files; with the module above where the last part alone is not clear."""


def _tiny(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if family != "gpt_neo":
        return base(family).model
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 320, "max_position_embeddings": 64}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt_neo", **sizes, attention_types=[[["global", "local"], 1]], window_size=16)
    )


@pytest.mark.parametrize("family", ATTENTION)
def test_attention_and_mlp_name_the_linear_layers_of_each_family(family: str) -> None:
    model = _tiny(family)
    found = {wanted: targets(model, AdapterSection(targets=wanted)) for wanted in ("attention", "mlp", "all-linear")}
    for wanted, names in (("attention", ATTENTION[family]), ("mlp", MLP[family])):
        assert len(found[wanted]) == 2 * len(names), found[wanted]
        assert all(any(full.endswith(f".{name}") for full in found[wanted]) for name in names)
    assert set(found["all-linear"]) == {*found["attention"], *found["mlp"]}


def test_opt_1_3b_has_262_144_parameters_in_the_attention_of_its_last_two_layers_and_a_value_head_beside() -> None:
    from transformers import AutoModelForCausalLM, OPTConfig

    with torch.device("meta"):
        config = OPTConfig(hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32)
        model = AutoModelForCausalLM.from_config(config)
        section = AdapterSection(rank=8, targets="attention", last=2)
        made = Models(Base(model, None, None, True), ("policy", "reference", "value"), adapter=section)
    counts = made.parameter_counts()
    assert counts["heads"] == {"value": 2049}
    assert counts["trainable"] - 2049 == 262_144
    assert counts["total"] == 1_315_758_080 + 262_144 + 2049  # 1,316,020,224 as the sources print, and the head
    assert {name.split("layers.")[1].split(".")[0] for name in made.trainable if "lora_" in name} == {"22", "23"}


def test_layers_last_names_and_expressions_choose_the_same_layers() -> None:
    model = base(num_layers=4).model
    wanted = [f"model.layers.{i}.self_attn.{name}" for i in (2, 3) for name in ("q_proj", "v_proj")]
    for section in (
        AdapterSection(targets=("q_proj", "v_proj"), last=2),
        AdapterSection(targets=("self_attn.q_proj", "v_proj"), layers=(2, 3)),
        AdapterSection(targets=r"re:.*\.[23]\.self_attn\.[qv]_proj"),
        AdapterSection(targets=tuple(wanted)),
    ):
        assert targets(model, section) == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("wq", "q_proj")}, r"no layer is named wq\n.*down_proj, gate_proj, k_proj"),
        ({"targets": "re:.*wq"}, r"matches no linear layer of layers 0 to 1\n.*q_proj"),
        ({"targets": "re:("}, "is no regular expression"),
        ({"targets": "self-attention"}, "is none of all-linear, attention, mlp"),
        ({"layers": (1, 2)}, r"layers=\[1, 2\], but the model has 2 layers"),
        ({"last": 3}, "last=3, but the model has 2 layers"),
        ({"train_also": ("embeddings",)}, r"no module is named embeddings\n.*embed_tokens"),
    ],
)
def test_what_matches_nothing_is_an_error_that_lists_what_there_is(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=rf"(?s){message}"):
        targets(base().model, AdapterSection(**settings))


def test_a_model_whose_weights_were_all_frozen_is_refused() -> None:
    start = base()
    start.model.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter is trainable"):
        Models(start, ("policy",))


# --- beside plain peft ---------------------------------------------------------------------------------------------


def saved_base(folder: Path, **sizes: Any) -> Base:
    """A tiny base on disk, and loaded from there."""
    start = base(**sizes)
    start.model.config._attn_implementation = "sdpa"
    start.model.save_pretrained(folder)
    start.tokenizer.save_pretrained(folder)
    return load(folder)


def load(folder: Path, adapter: AdapterSection | None = None) -> Base:
    return load_base(ModelSection(path=str(folder), adapter=adapter), tokenizer(), None, seed=0, device=CPU)


def logprobs(made: Models, role: str = "policy") -> list[torch.Tensor]:
    batch = token_batch(TREES, packed=True, pad_id=0)
    with torch.no_grad(), made.use(role):
        return by_response(made(batch, LOGPROBS).logprobs, batch)


def plain_logprobs(model: Any) -> list[torch.Tensor]:
    found = []
    for tree in separate(TREES):
        ids = torch.tensor([[*tree.prompt, *tree.responses[0]]])
        with torch.no_grad():
            every = model(ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        found.append(every[max(len(tree.prompt) - 1, 0) :])
    return found


FORMS = {
    "lora": AdapterSection(rank=4),
    "rslora": AdapterSection(method="rslora", rank=4),
    "dora": AdapterSection(method="dora", rank=4),
    "last layer": AdapterSection(rank=4, targets="attention", last=1),
    "embeddings": AdapterSection(rank=4, targets="mlp", train_also=("embed_tokens",)),
    "head and norm": AdapterSection(rank=4, train_also=("lm_head", "model.norm")),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_saved_adapter_gives_the_same_logprobs_in_plain_peft_and_when_continued(
    form: str, tied: bool, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    section = FORMS[form]
    made = Models(saved_base(tmp_path / "base", tie_embeddings=tied), ("policy", "reference"), adapter=section)
    start = logprobs(made, "reference")
    torch.testing.assert_close(logprobs(made), start, atol=1e-6, rtol=0)
    scatter(made)
    wanted = logprobs(made)
    assert max(float((a - b).abs().max()) for a, b in zip(wanted, start, strict=True)) > 1e-2
    torch.testing.assert_close(logprobs(made, "reference"), start, atol=0, rtol=0)

    save_model(made, tmp_path / "run" / "model", template="plain")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "run" / "model")
    )
    torch.testing.assert_close(plain_logprobs(plain), wanted, atol=1e-5, rtol=0)

    again = load(tmp_path / "run", section)
    continued = Models(again, ("policy", "reference"), adapter=section)
    assert again.start is not None and again.origin == str(tmp_path / "base")
    assert continued.trainable.keys() == made.trainable.keys()
    for role in ("policy", "reference"):
        torch.testing.assert_close(logprobs(continued, role), wanted, atol=0, rtol=0)
    scatter(continued, 0.1, seed=2)
    torch.testing.assert_close(logprobs(continued, "reference"), wanted, atol=0, rtol=0)
    assert any(f"sha256 {again.start.sha256}" in note for note in continued.notes)


def test_an_adapter_made_by_plain_peft_is_continued(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    saved_base(tmp_path / "base")
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], init_lora_weights=False
    )
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    plain.save_pretrained(str(tmp_path / "adapter"))
    section = AdapterSection(rank=4, alpha=16, targets=("q_proj", "v_proj"), last=1)
    made = Models(load(tmp_path / "adapter", section), ("policy", "reference"), adapter=section)
    for role in ("policy", "reference"):
        torch.testing.assert_close(logprobs(made, role), plain_logprobs(plain), atol=1e-5, rtol=0)


# --- what is refused -----------------------------------------------------------------------------------------------


def _run(folder: Path, section: AdapterSection, **sizes: Any) -> Path:
    made = Models(saved_base(folder / "base", **sizes), ("policy",), adapter=section)
    save_model(made, folder / "run" / "model", template="plain")
    return folder / "run"


def test_other_settings_than_the_saved_adapters_are_refused_with_what_differs(tmp_path: Path) -> None:
    run = _run(tmp_path, AdapterSection(rank=4, targets="attention"))
    wanted = AdapterSection(rank=8, targets="mlp")
    with pytest.raises(ConfigError, match=r"(?s)rank 4 there, 8 here; targets 8 modules \(k_proj.*fairlead merge"):
        Models(load(run, wanted), ("policy",), adapter=wanted)


def test_an_adapter_of_another_base_is_refused_by_the_hash_and_by_the_shapes(tmp_path: Path) -> None:
    section = AdapterSection(rank=4)
    run = _run(tmp_path, section)
    saved_base(tmp_path / "base", seed=1)
    with pytest.raises(ModelError, match="an adapter of other weights than those that"):
        load(run, section)
    _run(tmp_path / "wide", section, hidden_size=64)
    other = prepare(base().model, tokenizer(), None, CPU)
    start = StartAdapter.read(tmp_path / "wide" / "run" / "model")
    with pytest.raises(ModelError, match=r"another base: .* is \(4, 176\) there and \(4, 88\) here"):
        Models(Base(other.model, other.tokenizer, None, True, start=start), ("policy",), adapter=section)


def test_an_adapter_of_a_kind_that_cannot_be_continued_says_to_merge_it(tmp_path: Path) -> None:
    run = _run(tmp_path, AdapterSection(rank=4))
    file = run / "model" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": {"q_proj": 8}}))
    with pytest.raises(ModelError, match=r"(?s)not continued: rank_pattern\n.*fairlead merge"):
        StartAdapter.read(run / "model")
