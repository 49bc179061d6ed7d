"""The tree of modules: every parameter counted once, heads among them; equal neighbours as ranges. Expected figures are
worked out by hand from the shapes."""

from __future__ import annotations

import torch
from tests.tiny import base, models
from torch import nn

from fairlead.config import AdapterSection, ModelSection
from fairlead.models.roles import Models
from fairlead.planning.memory import parameter_sizes
from fairlead.planning.plan import META, meta_base
from fairlead.planning.tree import Node, lines, tree

OPT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def drawn(module: nn.Module) -> dict[str, Node]:
    trained = [p for p in module.parameters() if p.requires_grad]
    return {branches + node.name: node for branches, node in lines(tree(module, trained, parameter_sizes(module), "m"))}


def test_trlxs_own_case_counts_the_head_it_left_out() -> None:
    """OPT-1.3B, rank 8 on the attention of the last two layers, and a value head of two layers beside the model."""
    model = meta_base(ModelSection(path="opt-1.3b"), torch.device("cpu")).model
    model.requires_grad_(False)
    with META:
        for layer in model.model.decoder.layers[22:]:
            for name in OPT_ATTENTION:
                projection = getattr(layer.self_attn, name)
                projection.lora_A = nn.Linear(2048, 8, bias=False)
                projection.lora_B = nn.Linear(8, 2048, bias=False)
        head = nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 1))
    whole = drawn(nn.ModuleDict({"network": model, "value": head}))
    total = whole["m"]
    assert whole["├─ network"].parameters == 1_316_020_224 and whole["├─ network"].trainable == 262_144
    assert whole["└─ value"].trainable == 8_396_801
    assert total.trainable == 8_658_945
    assert f"{262_144 / 1_316_020_224:.2%}" == "0.02%"  # what was printed
    assert f"{total.trainable / total.parameters:.2%}" == "0.65%"  # what is true
    ranges = {name.split()[-1]: node.kind for name, node in whole.items() if "OPTDecoderLayer" in node.kind}
    assert ranges == {"0-21": "OPTDecoderLayer", "22-23": "OPTDecoderLayer"}


def test_adapters_of_the_last_layers_divide_the_range() -> None:
    section = AdapterSection(rank=2, targets=("q_proj",), last=2)
    made = Models(base(num_layers=5), ("policy",), adapter=section)
    whole = drawn(made)
    layers = {node.name: node.trainable for node in whole.values() if node.kind == "LlamaDecoderLayer"}
    assert layers == {"0-2": 0, "3-4": 2 * (2 * 32 + 32 * 2)}
    rank = next(node for node in whole.values() if node.name == "lora_A.policy")
    assert rank.shapes == ("2 x 32",) and rank.trainable == rank.parameters == 2 * 64 and rank.bytes == 4 * 2 * 64


def test_a_tied_head_is_counted_once_and_said_to_be_tied() -> None:
    tied = base().model
    whole = drawn(tied)
    assert whole["m"].parameters == sum(p.numel() for p in tied.parameters())
    assert whole["└─ lm_head"].tied and whole["└─ lm_head"].parameters == 0


def test_what_is_drawn_of_all_roles_is_what_the_models_count() -> None:
    made = models(("policy", "reference", "value"), lora=True)
    node = tree(made, made.trainable.values(), parameter_sizes(made))
    assert node.parameters == made.parameter_counts()["total"]
    assert node.trainable == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert any(drawn_node.name == "heads.value.linear" for _, drawn_node in lines(node))


def test_layers_that_another_model_shares_are_drawn_once() -> None:
    """As a frozen copy of the last layers over a shared trunk."""
    trunk, policy_top, frozen_top = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
    frozen_top.requires_grad_(False)
    whole = drawn(
        nn.ModuleDict({"policy": nn.Sequential(trunk, policy_top), "reference": nn.Sequential(trunk, frozen_top)})
    )
    assert whole["m"].parameters == 3 * 2 * 20 and whole["m"].trainable == 2 * 2 * 20
    shared = whole["   ├─ 0"]
    assert (shared.parameters, shared.tied, shared.children) == (0, True, ())
    assert whole["└─ reference"].parameters == 2 * 20
