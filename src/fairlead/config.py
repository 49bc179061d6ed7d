"""The recipe's schema: every setting with its default and its help. Imports no torch and knows no algorithm: the
section that bears an algorithm's name is validated by that algorithm's own settings class."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A group of settings: frozen, no unknown keys, help text in the docstring under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def parse_interval(value: str | int) -> tuple[Literal["steps", "seconds", "never"], float]:
    """`500` -> steps, `10min` -> seconds, `never`."""
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"an interval in steps must be at least 1, not {value}")
        return "steps", value
    if value == "never":
        return "never", 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", value)
    if match is None:
        raise ValueError(f"{value!r} is no interval; write 500 (steps), 30s, 10min, 2h or never")
    return "seconds", float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


class RunSection(Section):
    name: str | None = None
    """Name of the run; the algorithm's name when not given."""
    directory: str = "runs"
    """Folder that holds the runs."""

    @field_validator("name")
    @classmethod
    def _lies_in_the_directory(cls, name: str | None) -> str | None:
        path = PurePosixPath(name or ".")
        if name is not None and (not path.parts or path.is_absolute() or ".." in path.parts):
            raise ValueError("a run's name is that of a folder in run.directory, which it cannot lead out of")
        return name

    @field_validator("name", "directory")
    @classmethod
    def _can_be_a_folder(cls, name: str | None) -> str | None:
        if name is not None and not name.isprintable():
            raise ValueError("a folder's name with a control character, or half a character")
        return name


class ScratchSection(Section):
    """A model from scratch, and a byte-level BPE tokenizer trained on the data where none is given."""

    architecture: str = "llama"
    """A `model_type` of transformers."""
    hidden_size: int = Field(default=256, ge=1)
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=4, ge=1)
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the MLP; 8/3 of hidden_size, rounded up to a multiple of 8, when not given."""
    vocab_size: int = Field(default=4096, ge=260)
    """Size of the tokenizer trained on the data, special tokens included."""
    context_length: int = Field(default=1024, ge=8)
    """Longest row in tokens the model can take."""
    tie_embeddings: bool = True


class AdapterSection(Section):
    """Low-rank adapters, through peft; `model.adapter=lora` means all defaults. The base stays frozen."""

    method: Literal["lora", "rslora", "dora"] = "lora"
    """lora: scaled by alpha / rank (Hu et al. 2021); rslora: by alpha / sqrt(rank); dora: magnitude learned apart."""
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | str = "all-linear"
    """Linear layers that get an adapter: all-linear (every one but the head), attention, mlp, names (their last part),
    or `re:` and a regular expression over full names."""
    layers: tuple[int, int] | None = None
    """First and last layer that get adapters, from 0, both included."""
    last: int | None = Field(default=None, ge=1)
    """Only so many of the last layers get adapters."""
    train_also: tuple[str, ...] = ()
    """Modules trained in full besides, by the last part of their name: embed_tokens, lm_head ..."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_range(self) -> AdapterSection:
        if self.layers is not None and self.last is not None:
            raise ValueError("layers and last are both given; they choose the same thing")
        return self


class QuantizeSection(Section):
    """A frozen base in 8 or 4 bits, by bitsandbytes; `model.quantize=4bit` and `8bit` mean all defaults."""

    bits: Literal[4, 8] = 4
    type: Literal["nf4", "fp4"] = "nf4"
    """Of 4 bits (Dettmers et al. 2023)."""
    double: bool = True
    """The scales of 4 bits are quantised again: 0.37 bits a parameter less."""
    compute_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Type in which 4-bit layers multiply; auto: bfloat16 where the device is fast at it, else float32."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"bits": {"4bit": 4, "8bit": 8}.get(value, value)} if isinstance(value, str) else value


class ModelSection(Section):
    path: str | None = None
    """A local folder, the run directory of an earlier stage, or a hub id."""
    scratch: ScratchSection | None = None
    """Start from random weights instead of `path`."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; the model's own when not given."""
    add_tokens: tuple[str, ...] = ()
    """Special tokens the tokenizer gets where it has them not, a template's for example; the embeddings grow, the new
    rows begin at the mean of the others."""
    adapter: AdapterSection | None = None
    """Train adapters instead of all weights."""
    quantize: QuantizeSection | None = None
    """Load the frozen base in 8 or 4 bits; needs `adapter` and the extra `quant`."""
    roles: Literal["auto", "shared", "separate"] = "auto"
    """shared: reference and reward are adapters and heads on the policy's base, or the run is refused; separate: they
    are models of their own; auto: shared wherever the adapters are of one base."""
    num_layers_unfrozen: int | None = Field(default=None, ge=1)
    """Full fine-tuning of the last layers alone; the reference is their frozen copy over the shared trunk (trlX's
    hydra)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Type of the weights; auto: float32 for what is trained, bfloat16 for a frozen base on GPUs that are fast at it,
    which then multiply in it throughout. float16 multiplies in it with scaled losses, and trains float32 weights;
    bfloat16 without an adapter trains the weights in it."""
    tf32: bool = False
    """float32 products on GPUs with 10 bits of mantissa instead of 23: faster, but then float32 is no yardstick."""
    attention: Literal["auto", "sdpa", "flex", "flash", "eager"] = "auto"
    """How attention is computed; auto: sdpa on CPUs, on GPUs flash-attn where installed and no prompt is shared, else
    flex. A way that the device cannot take is refused."""
    kernels: Literal["auto", "none", "liger"] = "auto"
    """Faster norms, rotary embeddings and gated MLPs, where they compute the same; auto: our own on CPUs, liger's on
    GPUs where installed; none: the modules of transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    offload_activations: bool = False
    """Keep what the backward pass needs in the CPU's memory until then; for GPUs, and best with checkpointing."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if self.path is not None and self.scratch is not None:
            raise ValueError("model.path and model.scratch are both given; a model has one origin")
        if self.scratch is not None and self.adapter is not None:
            raise ValueError("model.adapter needs a base that is saved somewhere; a model from scratch is not")
        if self.quantize is not None and self.adapter is None:
            raise ValueError("model.quantize needs model.adapter: weights in 8 or 4 bits are frozen (adapter: lora)")
        if self.num_layers_unfrozen is not None and self.adapter is not None:
            raise ValueError("model.num_layers_unfrozen trains layers in full; with model.adapter, set adapter.last")
        return self


class FilterSection(Section):
    """What is left out of the training records, each counted by its reason."""

    dedupe: Literal["none", "exact", "near"] = "none"
    """exact: of records that are equal, the first stays; near: also of those whose words are nearly the same."""
    near_similarity: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of 5-word shingles above which two records are near duplicates."""
    min_response_length: int | None = Field(default=None, ge=1)
    """Characters; records with a shorter response are left out."""
    max_response_length: int | None = Field(default=None, ge=1)
    """Characters; records with a longer response are left out."""
    min_margin: float | None = Field(default=None, ge=0)
    """Pairs whose score margin is smaller, or unknown, are left out."""
    language: str | None = None
    """ISO 639-1 code: records in another language are left out (needs the extra `data`)."""
    contamination: tuple[str, ...] = ()
    """Files of evaluation records; training records that share a prompt with them, or nearly, are left out."""


class DataSection(Section):
    path: str | tuple[str, ...] | None = None
    """A file of records in any format that `fairlead inspect` recognises, a folder written by `fairlead prepare` or by
    `datasets`, a hub id, or several of these."""
    weights: tuple[float, ...] | None = None
    """With several paths, one number each: 2 takes every record of a source twice an epoch, 0.5 half of them."""
    format: str = "auto"
    """The name of a format, where its rows are not recognised as what they are."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Field -> the column that holds it, for files with names of their own: {prompt: instruction, response: output}."""
    eval_path: str | None = None
    """Held-out records; `eval_fraction` of `path` when not given."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts kept for evaluation, chosen by a hash of the prompt."""
    filter: FilterSection = FilterSection()
    template: str = "auto"
    """How turns become text: auto (the model's, else plain), chat (the tokenizer's own), or a named one: plain,
    question-answer, hh, hash, chatml, llama-3, alpaca."""
    loss_on: Literal["response", "assistant", "all"] = "response"
    """Which tokens of a demonstration are learned: the last response, every assistant turn, or all."""
    max_length: int = Field(default=512, ge=2)
    """Longest row in tokens; what is longer is cut at the end, and counted."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Records with a longer prompt are dropped, and counted; max_length - 1 when not given."""
    packing: Literal["none", "best-fit", "wrapped"] = "best-fit"
    """best-fit: runs side by side without padding, none cut; wrapped (plain text only): texts end to end, cut into rows
    of max_length; none: one record a row, padded to the longest."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first records only."""
    workers: int = Field(default=0, ge=0)
    """Processes that tokenise; 0: as many as there are cores."""
    cache: str | None = None
    """Folder of tokenised records, keyed by content; null: in the user's cache folder; none: not cached."""


class OptimSection(Section):
    name: Literal[
        "adamw", "adam", "sgd", "lion", "adafactor", "adamw-8bit", "paged-adamw-8bit", "lion-8bit", "paged-lion-8bit"
    ] = "adamw"
    """8bit: states of one byte, by bitsandbytes (extra `quant`); paged: in memory that a GPU moves to the CPU when it
    is full. lion wants a third to a tenth of AdamW's learning rate."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: adamw keeps its two states in half the bytes, rounded at random so that small changes are not lost."""
    learning_rate: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """Applied to matrices only, never to norms and biases."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up: constant, or down to `min_learning_rate_ratio` at the last step."""
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps spent rising linearly from zero."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same in steps; wins over `warmup_ratio`."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm; null: measured, not clipped."""

    @model_validator(mode="after")
    def _states(self) -> OptimSection:
        if self.state_dtype != "float32" and self.name != "adamw":
            raise ValueError(f"state_dtype={self.state_dtype} is for adamw, not for {self.name}")
        return self


DEFAULT_TOKENS = 8192


class TrainSection(Section):
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the records (on-policy: over the prompts); `steps` wins."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Records of one optimizer step (packed text: rows of max_length)."""
    micro_batch_tokens: int | Literal["auto"] = DEFAULT_TOKENS
    """Tokens of one forward pass; a batch is cut into as many micro-batches as it needs. auto: what the memory plan
    says will fit, at most 65536. When memory runs out in a step, they are halved and the step is done again."""
    log_every: int = Field(default=1, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the held-out records; null: before the first step and after the last."""
    sample_every: int | None = Field(default=None, ge=1)
    """Steps between sample generations; null: at the end."""
    num_samples: int = Field(default=4, ge=0)
    """Prompts of the sample generations."""
    save_every: str | int = "10min"
    """A time (30s, 10min, 2h) or a number of steps between checkpoints; never: none but the last."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay; the best one stays besides."""
    best_metric: str | None = None
    """Metric that picks the best checkpoint; `-name` where smaller is better, as for losses it is anyway; null: the
    algorithm's own."""
    save_best: bool = False
    """The final model is the best checkpoint's and not the last one's."""
    shard: Literal["none", "full"] = "none"
    """Of several processes, what each holds of weights that are all trained, with gradients and optimizer states: none:
    all of them; full: its share, and a layer is gathered when it is computed (FSDP2)."""
    timeout: str = "10min"
    """Of several processes, how long the others wait for one before all stop."""
    patience: int | None = Field(default=None, ge=1)
    """The run ends when `best_metric` has not become better for so many evaluations (`eval_every`)."""

    @property
    def tokens_or_default(self) -> int:
        """Where there is no plan to say what fits."""
        return DEFAULT_TOKENS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens

    @property
    def timeout_seconds(self) -> float:
        return parse_interval(self.timeout)[1]

    @field_validator("timeout")
    @classmethod
    def _a_time(cls, value: str) -> str:
        if parse_interval(value)[0] != "seconds":
            raise ValueError(f"{value!r} is no time; write 30s, 10min or 2h")
        return value

    @field_validator("micro_batch_tokens")
    @classmethod
    def _enough(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 16:
            raise ValueError("a forward pass takes at least 16 tokens")
        return value

    @field_validator("save_every")
    @classmethod
    def _parsable(cls, value: str | int) -> str | int:
        parse_interval(value)
        return value


class TrackingSection(Section):
    sinks: tuple[str, ...] = ()
    """Trackers beside metrics.jsonl: tensorboard, wandb, trackio."""
    project: str = "fairlead"
    console: bool = True


class Recipe(Section):
    """Everything a run depends on."""

    algorithm: str
    """A name of the registry, or `module:ATTRIBUTE` of your own."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; resume is bit-exact at the same number only. null: torch's own choice."""
    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    tracking: TrackingSection = TrackingSection()
    settings: Any = Field(default=None, exclude=True)
    """The algorithm's own section; stands in the file under the algorithm's name."""
