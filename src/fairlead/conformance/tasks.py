"""Tasks small enough to be enumerated: a handful of words, short responses, every one of which has an exact probability
under a model and a reward known to the task. Knows no algorithm.

A response is a sequence of words; it ends with the end token, or is cut at the task's length. So texts and responses
stand for each other: one of fewer words than the length has ended, one of as many was cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

END = 0
SPREAD = 0.35
"""Standard deviation of the random weights: responses of the start differ in probability by some nats."""


@dataclass(frozen=True)
class Task:
    words: str
    """One letter a word."""
    length: int
    """Tokens of a response at most, its end counted."""
    prompts: tuple[str, ...]
    """All of as many words."""
    levels: tuple[float, ...] = ()
    """The rewards there are; none: they are drawn from a normal distribution."""
    seed: int = 0
    layers: int = 1
    """Of its model: one sees which words stand before a token, two also where they stand."""

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        """Every response as token ids."""
        ids = range(1, len(self.words) + 1)
        ended = [(*words, END) for size in range(self.length) for words in itertools.product(ids, repeat=size)]
        return ended + list(itertools.product(ids, repeat=self.length))

    @cached_property
    def texts(self) -> list[str]:
        """The same as text."""
        return [" ".join(self.words[i - 1] for i in ids if i != END) for ids in self.responses]

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each response [N]."""
        return torch.tensor([len(ids) for ids in self.responses])

    @cached_property
    def rewards(self) -> Tensor:
        """Of each prompt's responses [P, N]."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.prompts), len(self.responses))
        if not self.levels:
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn = torch.randint(len(self.levels), shape, generator=generator)
        return torch.tensor(self.levels, dtype=torch.float64)[drawn]

    @property
    def prompt_length(self) -> int:
        return len(self.prompts[0].split())

    @property
    def max_length(self) -> int:
        return self.prompt_length + self.length

    def at(self, text: str) -> int:
        """The index of a response."""
        return self.texts.index(text)

    def reward(self, prompts: Sequence[str], outputs: Sequence[str], **_: object) -> list[float]:
        """As the trainers ask for it."""
        places = {text: at for at, text in enumerate(self.texts)}
        rows = {prompt: at for at, prompt in enumerate(self.prompts)}
        return [
            float(self.rewards[rows[prompt.strip()], places[output.strip()]])
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    # --- the model -------------------------------------------------------------------------------------------------

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<end>": END} | {word: i for i, word in enumerate(self.words, start=1)}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        return PreTrainedTokenizerFast(
            tokenizer_object=made,
            eos_token="<end>",
            pad_token="<end>",
            model_max_length=self.max_length,
            clean_up_tokenization_spaces=False,
        )

    def model(self, family: str = "llama", seed: int = 0) -> Any:
        """A random causal language model of transformers whose vocabulary is the task's."""
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {
            "llama": {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "initializer_range": SPREAD},
            "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": SPREAD},
        }[family]
        config = AutoConfig.for_model(
            family,
            vocab_size=len(self.words) + 1,
            hidden_size=32,
            num_hidden_layers=self.layers,
            num_attention_heads=2,
            max_position_embeddings=2 * self.max_length,
            tie_word_embeddings=False,
            pad_token_id=END,
            bos_token_id=None,
            eos_token_id=END,
            **sizes,
        )
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config)
        finally:
            torch.random.set_rng_state(state)

    def save(self, folder: Path, **form: Any) -> Path:
        """The start of every run: model and tokenizer as transformers saves them."""
        self.model(**form).save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)
        return folder

    # --- exact figures ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, folder: Path) -> Tensor:
        """Of every response under the model or adapter saved in a folder [P, N], by plain transformers and peft."""
        return self.enumerated(_load(folder))

    def enumerated(self, model: Any) -> Tensor:
        """Of every response under a model of transformers [P, N], with gradients where they are asked for."""
        own = model.config._attn_implementation
        model.set_attn_implementation("eager")
        ids, rows = _padded(self.responses, self.length), list[Tensor]()
        inside = torch.arange(self.length) < self.lengths[:, None]
        for prompt in self._prompt_ids():
            whole = torch.cat([prompt.expand(len(ids), -1), ids], 1)
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits.double()
            chosen = logits[:, len(prompt) - 1 : -1].log_softmax(-1).gather(2, ids[..., None])[..., 0]
            rows.append(torch.where(inside, chosen, 0.0).sum(1))
        model.set_attn_implementation(own)
        return torch.stack(rows)

    @torch.no_grad()
    def scores(self, folder: Path) -> Tensor:
        """What the reward model saved in a folder says of every response, at its last token [P, N]."""
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float64, trust_remote_code=False
        ).eval()
        ids = _padded(self.responses, self.length)
        rows: list[Tensor] = []
        for prompt in self._prompt_ids():
            whole = torch.cat([prompt.expand(len(ids), -1), ids], 1)
            hidden = model.base_model(input_ids=whole, attention_mask=torch.ones_like(whole)).last_hidden_state
            last = hidden[torch.arange(len(ids)), len(prompt) + self.lengths - 1]
            rows.append(model.score(last)[:, 0].double())
        return torch.stack(rows)

    def _prompt_ids(self) -> list[Tensor]:
        return [torch.tensor([self.words.index(word) + 1 for word in prompt.split()]) for prompt in self.prompts]


def _padded(responses: Sequence[tuple[int, ...]], length: int) -> Tensor:
    return torch.tensor([(*ids, *[END] * (length - len(ids))) for ids in responses])


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder, **options, trust_remote_code=False).eval()
    from peft import PeftConfig, PeftModel

    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    base = AutoModelForCausalLM.from_pretrained(str(name), trust_remote_code=False, **options)
    return PeftModel.from_pretrained(base, str(folder)).double().eval()
