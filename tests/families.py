"""A tiny random model of each family, with what is special about it made strong enough to matter: windows shorter than
the rows, caps near the scores, key heads shared, projections narrower than the layers."""

from __future__ import annotations

from typing import Any

import torch

from fairlead.models.load import Base, prepare
from tests.tiny import CPU, tokenizer

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, **HEADS}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "cohere": {**LLAMA, "logit_scale": 0.25},
    "gemma": LLAMA,
    "gemma2": {**LLAMA, **WINDOWS, **CAPS},
    "gemma3_text": {**LLAMA, **WINDOWS, "query_pre_attn_scalar": 8, "final_logit_softcapping": 1.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "granite": {**LLAMA, "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 4},
    "olmo2": LLAMA,
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
            "ffn_dim": 48, "do_layer_norm_before": False},
    "phi": {**LLAMA, "partial_rotary_factor": 0.5},
    "phi3": {**LLAMA, "sliding_window": 4},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, **WINDOWS, "use_sliding_window": True},
    "smollm3": {**LLAMA, "no_rope_layers": [1, 0]},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "window_size": 4,
                "attention_types": [[["global", "local"], 1]]},
}  # fmt: skip
"""By `model_type`. Heads are tied where the family ties them."""
DRAWN = 0.3
"""Standard deviation of the random weights: logits and scores of about one, which a cap bends."""


def plain(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The model as transformers makes it, weights random, its own attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    dropouts = {"attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0}
    known = AutoConfig.for_model(family).to_dict()
    off = {name: value for name, value in dropouts.items() if name in known}
    config = AutoConfig.for_model(family, vocab_size=320, max_position_embeddings=256, **ids, **off, **CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * (DRAWN if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
    return model


def prepared(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Base:
    return prepare(plain(family, dtype), tokenizer(), None, CPU, **options)
