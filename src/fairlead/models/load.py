"""Weights and tokenizers: from a folder, a run, a hub id, or from scratch. Knows nothing of roles or data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fairlead.config import ModelSection, QuantizeSection, ScratchSection
from fairlead.errors import ConfigError, ModelError
from fairlead.models import attention, kernels
from fairlead.models.adapters import StartAdapter
from fairlead.models.identity import weights_sha256
from fairlead.models.lm_head import check_logits
from fairlead.models.precision import dtype_of
from fairlead.models.pretrained import NO_CODE, brings_code, no_model, read_config, read_model
from fairlead.models.quantize import is_quantised, prepare_quantised
from fairlead.ops.sampling import stream_key

META = "fairlead.json"
"""Beside the weights: what a later stage must know of them (the template, the role)."""


@dataclass(frozen=True, slots=True)
class Base:
    """A causal language model ready to take roles."""

    model: Any
    tokenizer: Any
    template: str | None
    """The template its stage was trained with, when known."""
    forest: bool
    """Whether its attention takes forests of runs; else rows must be padded."""
    way: str = "auto"
    """How attention over forests is computed: `model.attention`."""
    notes: tuple[str, ...] = ()
    start: StartAdapter | None = None
    """The adapter the weights were saved as, not merged: what a stage that trains adapters continues."""
    origin: str | None = None
    """Where the weights were read; none for a model from scratch, or handed in."""
    quantize: QuantizeSection | None = None
    """How they were quantised."""


def resolve_folder(path: str) -> Path | None:
    """The folder that holds the weights: the path itself, or `model/` of a run; none for a hub id."""
    folder = Path(path)
    if (folder / "model" / "config.json").is_file() or (folder / "model" / "adapter_config.json").is_file():
        return folder / "model"
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{path} holds no model: neither config.json nor adapter_config.json, nor model/",
                hint="give a folder saved by transformers or peft, or a finished run",
            )
        return folder
    if folder.exists():
        raise ModelError(f"{path} is a file; a folder saved by transformers, a run, or a hub id was meant")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(f"{path} does not exist", hint="check model.path; a hub id has the form owner/name")
    return None


def tokenizer_for(section: ModelSection, texts: Iterable[str]) -> tuple[Any, str | None]:
    """The tokenizer a recipe names and the template its model was trained with, when known. Reads no weights, but
    refuses what is no model.

    ``texts`` train the tokenizer of a model from scratch.
    """
    scratch, template = section.scratch, None
    if scratch is not None and not section.tokenizer:
        tokenizer = train_tokenizer(texts, scratch.vocab_size, scratch.context_length)
    elif scratch is not None:
        tokenizer = load_tokenizer(section.tokenizer or "")
    else:
        origin, folder = _origin(section)
        if not (Path(origin) / "adapter_config.json").is_file():
            read_config(origin)
        tokenizer, template = load_tokenizer(section.tokenizer or origin), read_meta(folder).get("template")
    add_tokens(tokenizer, section)
    return tokenizer, template


def add_tokens(tokenizer: Any, section: ModelSection) -> None:
    """Give the tokenizer the special tokens of the recipe that it has not. Raises ConfigError where their embeddings
    would never be trained."""
    known = tokenizer.get_vocab()
    missing = [token for token in section.add_tokens if token not in known]
    if missing and section.adapter is not None:
        raise ConfigError(
            f"model.add_tokens={missing} with model.adapter: adapters leave the embeddings of new tokens untrained",
            hint="add the tokens in a stage that trains all weights (model.adapter=null), and start from that run",
        )
    tokenizer.add_tokens(missing, special_tokens=True)


def load_base(section: ModelSection, tokenizer: Any, template: str | None, *, seed: int, device: torch.device) -> Base:
    """The model a recipe names, with what `tokenizer_for` gave."""
    if section.scratch is not None:
        model = build(section.scratch, tokenizer, seed, dtype_of(section, device))
        return prepare(model, tokenizer, None, device, way=section.attention, kernel=section.kernels)
    origin, _ = _origin(section)
    start = start_of(section)
    if start is not None:
        origin = base_of(start.path)
    model = load_causal(origin, dtype_of(section, device), device, section.quantize)
    base = prepare(
        model,
        tokenizer,
        template,
        device,
        added=section.add_tokens,
        seed=seed,
        way=section.attention,
        kernel=section.kernels,
    )
    return replace(base, start=start, origin=origin, quantize=section.quantize)


def start_of(section: ModelSection) -> StartAdapter | None:
    """The saved adapter a recipe would continue: it names one, and trains adapters itself."""
    folder = None if section.path is None or section.adapter is None else resolve_folder(section.path)
    return StartAdapter.read(folder) if folder and (folder / "adapter_config.json").is_file() else None


def _origin(section: ModelSection) -> tuple[str, Path | None]:
    """What transformers is asked for, and its folder where it is one."""
    if section.path is None:
        raise ConfigError(
            "no model: neither model.path nor model.scratch is given", hint="for example model.path=runs/sft"
        )
    folder = resolve_folder(section.path)
    return section.path if folder is None else str(folder), folder


def prepare(
    model: Any,
    tokenizer: Any,
    template: str | None,
    device: torch.device,
    *,
    added: Sequence[str] = (),
    seed: int = 0,
    way: str = "auto",
    kernel: str = "auto",
) -> Base:
    """Set a model's attention, or say why rows must be padded; refuse what would be computed wrongly.

    ``added`` are tokens the embeddings may grow for; the new rows are drawn from ``seed``. ``way`` is
    `model.attention`, ``kernel`` is `model.kernels`.
    """
    if is_quantised(model):
        prepare_quantised(model)
    check_logits(model)
    notes: list[str] = []
    embeddings = model.get_input_embeddings().weight.shape[0]
    grown = set(range(embeddings, len(tokenizer)))
    if grown and grown <= set(tokenizer.convert_tokens_to_ids(list(added))):
        _grow(model, len(tokenizer), seed)
        notes.append(f"{len(grown)} tokens added: the embeddings grow from {embeddings} to {len(tokenizer)} rows")
    elif grown:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {embeddings}",
            hint="give the tokenizer that belongs to the model",
        )
    forest = attention.install(model, way, device)
    if not forest:
        kind = model.config.model_type
        notes.append(f"{kind}: attention over packed rows is not known to be right; rows are padded")
    kernels.install(model, kernel, device)
    model.config.use_cache = False
    return Base(model.to(device), tokenizer, template, forest, way, tuple(notes))


def _grow(model: Any, rows: int, seed: int) -> None:
    """Embeddings and head with more rows, the new ones about the mean of the others (Hewitt 2021)."""
    state = torch.random.get_rng_state()
    torch.manual_seed(stream_key(seed, "added tokens"))
    try:
        model.resize_token_embeddings(rows, mean_resizing=True)
    finally:
        torch.random.set_rng_state(state)


def pick_device(name: str) -> torch.device:
    """cuda: the GPU of this rank on its machine; auto: the same where there are GPUs."""
    rank = os.environ.get("LOCAL_RANK")
    gpu = "cuda" if rank is None else f"cuda:{rank}"
    if name == "auto":
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(gpu if name == "cuda" else name)
    except RuntimeError as error:
        raise ConfigError(f"model.device={name!r} is no device", hint="auto, cpu, cuda, cuda:1 ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device={name}, but torch sees no CUDA device", hint="model.device=cpu")
    return device


def load_causal(
    origin: str, dtype: torch.dtype, device: torch.device | None = None, section: QuantizeSection | None = None
) -> Any:
    """A causal language model; an adapter folder is loaded with its base and merged into it. Raises ModelError for an
    adapter whose base is quantised, into which nothing can be merged."""
    device = torch.device("cpu") if device is None else device
    folder = Path(origin)
    if not (folder / "adapter_config.json").is_file():
        return read_model(origin, dtype, device, section=section)
    if section is not None or read_meta(folder).get("base", {}).get("quantize"):
        raise ModelError(
            f"{origin} is an adapter on a quantised base, into which it cannot be merged on loading",
            hint=f"merge it into the unquantised base: fairlead merge {origin} --out DIR, and start from DIR",
        )
    from peft import PeftModel

    model = load_causal(base_of(folder), dtype, device)
    try:
        return PeftModel.from_pretrained(model, origin).merge_and_unload().requires_grad_(True)
    except RuntimeError as error:
        raise ModelError(
            f"{origin} is an adapter of another base: {str(error).splitlines()[-1].strip()}",
            hint="give the base it was trained on",
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise no_model(origin, "causal language model", error) from error


def base_origin(path: str) -> str:
    """Where the base of a model is: of an adapter the one it names, else the model itself."""
    folder = resolve_folder(path)
    if folder is None:
        return path
    return base_of(folder) if (folder / "adapter_config.json").is_file() else str(folder)


def base_of(folder: Path) -> str:
    """Where the base of a saved adapter is. Raises ModelError for one that names none, or whose base has changed."""
    name = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
    if name is None:
        raise ModelError(f"{folder} is an adapter that does not name its base", hint="merge it, or name the base in it")
    inner = resolve_folder(name)
    origin = name if inner is None else str(inner)
    recorded = read_meta(folder).get("base", {}).get("sha256")
    if recorded is not None and weights_sha256(origin) not in (recorded, None):
        raise ModelError(
            f"{folder} is an adapter of other weights than those that {origin} holds now",
            hint="bring the base back that it was trained on: its sha256 is " + recorded,
        )
    return origin


def load_tokenizer(origin: str) -> Any:
    from transformers import AutoTokenizer

    is_whole = (Path(origin) / "tokenizer_config.json").is_file()  # a folder that holds a tokenizer alone will do
    folder = resolve_folder(origin) if Path(origin).exists() and not is_whole else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(origin if folder is None else str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        if brings_code(error):
            raise ModelError(f"{origin}: its tokenizer is code of its own, which is not run", hint=NO_CODE) from error
        raise ModelError(f"{origin}: no tokenizer can be loaded: {error}", hint="give model.tokenizer") from error
    for key in ("is_local", "local_files_only"):  # how it was loaded, which would be saved with it
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_meta(folder: Path | None) -> dict[str, Any]:
    path = None if folder is None else folder / META
    if path is None or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}", hint="save or fetch the model again") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int) -> Any:
    """A byte-level BPE tokenizer with <pad> and <eos>: no text is outside its vocabulary, decoding loses nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def build(scratch: ScratchSection, tokenizer: Any, seed: int, dtype: torch.dtype) -> Any:
    """A model of random weights. Raises ModelError for an architecture transformers does not know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    width = scratch.intermediate_size or -(-scratch.hidden_size * 8 // 3 // 8) * 8
    if scratch.hidden_size % scratch.num_heads:
        raise ConfigError(
            f"model.scratch.hidden_size={scratch.hidden_size} is no multiple of num_heads={scratch.num_heads}"
        )
    wanted: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": scratch.hidden_size,
        "num_hidden_layers": scratch.num_layers,
        "num_attention_heads": scratch.num_heads,
        "intermediate_size": width,
        "ffn_dim": width,
        "n_inner": width,
        "word_embed_proj_dim": scratch.hidden_size,
        "max_position_embeddings": scratch.context_length,
        "tie_word_embeddings": scratch.tie_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        known = AutoConfig.for_model(scratch.architecture)
    except ValueError as error:
        raise ModelError(
            f"transformers knows no architecture {scratch.architecture!r}", hint="for example llama"
        ) from error
    names = {*known.to_dict(), *getattr(known, "attribute_map", {})}
    optional = {"ffn_dim", "n_inner", "word_embed_proj_dim", "intermediate_size"}
    fields = {name: value for name, value in wanted.items() if name not in optional or name in names}
    if "num_key_value_heads" in names:
        fields["num_key_value_heads"] = scratch.num_heads
    if "head_dim" in names:
        fields["head_dim"] = scratch.hidden_size // scratch.num_heads
    state = torch.random.get_rng_state()
    torch.manual_seed(stream_key(seed, "weights"))
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(scratch.architecture, **fields))
    finally:
        torch.random.set_rng_state(state)
    return model.to(dtype)
