"""vLLM as an engine, on the GPU that trains: written against the source of vLLM 0.33, not yet run on hardware.

It samples from a copy of the policy, adapters merged in, that is saved and loaded again whenever the policy was
trained; its log-probabilities differ from the trainer's, as those of another implementation in half precision do. Every
response has a request and a seed of its own; a prompt's are read once by vLLM's prefix cache.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fairlead.data.render import Renderer
from fairlead.errors import ConfigError
from fairlead.models.roles import Models
from fairlead.ops.sampling import stream_key
from fairlead.rollout.draws import Response, cuts, ended, limits, rollout
from fairlead.types import Prompt, Rollout, Sampling

GPU_SHARE = 0.4
"""Of the GPU's memory that vLLM takes for weights and cache; training has the rest."""


class VllmSampler:
    """Samples from the policy; ``rows`` responses are decoded together. Samplers of the same models share an engine.
    Raises ConfigError where vLLM is not installed, and for a quantised base."""

    def __init__(self, models: Models, renderer: Renderer, *, rows: int = 64) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "engine=vllm: vLLM is not installed", hint="pip install 'fairlead[vllm]', or engine=native"
            )
        if models.quantize is not None:
            raise ConfigError("engine=vllm samples from a merged copy, which a quantised base has not", "engine=native")
        self._models, self._renderer, self._rows = models, renderer, rows

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling,
        key: tuple[int | str, ...],
        first_item: int = 0,
        num_samples: int = 1,
    ) -> list[Rollout]:
        from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

        ids = self._renderer.prompt_ids(prompts)
        items = torch.arange(len(prompts) * num_samples) + first_item * num_samples
        ends = limits(stream_key(*key), items, sampling).tolist()
        wanted = [
            SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_tokens=end,
                min_tokens=min(sampling.min_new_tokens, end),
                seed=stream_key(*key, "vllm", item) % 2**31,
                stop=list(sampling.stop),
                stop_token_ids=[self._renderer.eos],
                ignore_eos=True,
                logprobs=0,
            )
            for item, end in zip(items.tolist(), ends, strict=True)
        ]
        owners = [i for i in range(len(prompts)) for _ in range(num_samples)]
        asked = [TokensPrompt(prompt_token_ids=list(ids[i])) for i in owners]
        outputs = self._engine(sampling).ask(self._models, asked, wanted)
        return [
            rollout(self._renderer, sampling, prompts[i], ids[i], self._response(output.outputs[0], sampling))
            for i, output in zip(owners, outputs, strict=True)
        ]

    def _engine(self, sampling: Sampling) -> _Engine:
        engine, length = _ENGINES.pop(self._models, None), self._length(sampling)
        if engine is None or engine.length < length or engine.cuts != cuts(sampling):
            engine = None  # gives its memory back
            engine = _Engine(self._models, self._rows, length, cuts(sampling))
        _ENGINES[self._models] = engine
        return engine

    def _length(self, sampling: Sampling) -> int:
        most = getattr(self._models.causal.config, "max_position_embeddings", None)
        length = self._renderer.max_prompt_length + sampling.max_new_tokens
        return length if most is None else min(length, most)

    def _response(self, output: Any, sampling: Sampling) -> Response:
        drawn = ended(self._renderer, sampling, list(output.token_ids), sampling.max_new_tokens)
        pairs = zip(drawn.ids, output.logprobs, strict=False)
        drawn.logprobs = [found[token].logprob for token, found in pairs]
        if cuts(sampling):
            drawn.kept = [tuple(kept) for kept in output.sampling_mask.token_ids[: len(drawn.ids)]]
        return drawn


class _Engine:
    """vLLM with the policy's weights as they were when it was last asked."""

    def __init__(self, models: Models, rows: int, length: int, cuts: bool) -> None:
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self.length, self.cuts = length, cuts
        self._folder = tempfile.TemporaryDirectory(prefix="fairlead-vllm-")
        self._loaded = _version(models)
        save_merged(models, Path(self._folder.name))
        self._llm = LLM(
            model=self._folder.name,
            dtype=str(models._autocast or models.causal.dtype).removeprefix("torch."),
            max_model_len=length,
            max_num_seqs=rows,
            gpu_memory_utilization=GPU_SHARE,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            return_sampling_mask=cuts,
        )

    def ask(self, models: Models, prompts: Sequence[Any], wanted: Sequence[Any]) -> Sequence[Any]:
        if self._loaded != _version(models):
            self._loaded = _version(models)
            save_merged(models, Path(self._folder.name))
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": self._folder.name})
            self._llm.reset_prefix_cache()
        return self._llm.generate(list(prompts), list(wanted), use_tqdm=False)


_ENGINES: WeakKeyDictionary[Models, _Engine] = WeakKeyDictionary()


def _version(models: Models) -> int:
    """Grows whenever a trained weight is written to."""
    return sum(parameter._version for parameter in models.trainable.values())


@torch.no_grad()
def save_merged(models: Models, folder: Path) -> None:
    """The policy with its adapters merged in, as transformers saves a model, and the tokenizer."""
    with models.use("policy"):
        network = models.active_network()
        weights = network.state_dict()
        for name, module in network.named_modules():
            if hasattr(module, "modules_to_save") or hasattr(module, "lora_A"):
                weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
                weights |= {f"{name}.{key}": value for key, value in _plain(module).items()}
        network.save_pretrained(folder, state_dict=weights)
        if hasattr(network.get_output_embeddings(), "lora_A"):  # no longer tied to the embeddings
            saved = folder / "config.json"
            saved.write_text(json.dumps(json.loads(saved.read_text("utf-8")) | {"tie_word_embeddings": False}), "utf-8")
    models.tokenizer.save_pretrained(folder)


def _plain(module: Any) -> dict[str, Tensor]:
    """The state of the layer that peft's wrapper with its active adapters is as good as."""
    if hasattr(module, "modules_to_save"):
        return module.modules_to_save[module.active_adapters[0]].state_dict()
    state = module.base_layer.state_dict()
    for name in module.active_adapters:
        if name in module.lora_variant:
            state["weight"] = module.lora_variant[name].merge_safe(module, name, state["weight"].clone())
        elif name in module.lora_A:
            state["weight"] = state["weight"] + module.get_delta_weight(name).to(state["weight"].dtype)
    return state
