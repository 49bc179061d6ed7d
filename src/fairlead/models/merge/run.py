"""The verb: merges tensor by tensor, proves that the result answers as the adapters did, and only then gives it its
name. A folder is whole or absent."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from fairlead.errors import ConfigError, ModelError, RunError
from fairlead.models.card import write_card
from fairlead.models.identity import weights_sha256
from fairlead.models.load import META, load_tokenizer, pick_device, read_meta
from fairlead.models.merge.layout import Layout
from fairlead.models.merge.source import Source
from fairlead.models.merge.tensors import Tensors, write
from fairlead.models.merge.verify import BOUNDS, adapted, answers, difference, load, texts
from fairlead.models.merge.weights import Dequantised, Weights

MANIFEST = "merge.json"
FORMAT_VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")
SHARD_SIZE = 2 << 30
Into = Literal["quantised", "original"]


def merge(
    run: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    into: Into | str = "quantised",
    shard_size: int = SHARD_SIZE,
) -> dict[str, Any]:
    """Merge the adapters of ``run`` into their base as the folder ``out``, and return its merge.json.

    Args:
        run: a run directory, an adapter folder, or the hub id of an adapter; a whole model is written anew.
        dtype: float32, float16 or bfloat16; none: that of the base.
        device: where the products and the comparison are computed.
        into: of a base that the run had quantised: the weights as the adapter saw them, or the original ones.
        shard_size: bytes of a file of weights; about so much is held in memory.

    Raises ModelError where the merged model answers differently than the adapters did (and leaves no folder), RunError
    where ``out`` cannot be written or holds something else. A finished merge of the same inputs is left as it is.
    """
    out, place = Path(out), str(pick_device(device))
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype {dtype} is not known", hint=f"one of {', '.join(DTYPES)}")
    if into not in ("quantised", "original"):
        raise ConfigError(f"--into {into} is not known", hint="quantised or original")
    source = Source.find(str(run))
    if into == "original" and source.quantised is not None and source.quantised.section is None:
        raise ConfigError(f"{source.base_name} is stored quantised: there are no original weights", "--into quantised")
    tensors = Tensors(source.base)
    written: torch.dtype = getattr(torch, dtype) if dtype else _stored_dtype(tensors)
    request = _request(source, written, into)
    if (finished := _finished(out, request)) is not None:
        return finished
    with _building(out) as folder:
        layout = write_model(source, tensors, folder, dtype=written, device=place, into=into, shard_size=shard_size)
        verification = _verify(source, layout, folder, dtype=written, device=place, into=into)
        manifest = {
            **request,
            "device": place,
            "verification": verification,
            "versions": _versions(),
            "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        write_card(folder, source.run, merged=manifest)
    return manifest


def describe(manifest: Mapping[str, Any]) -> str:
    """What a merge.json says, in words."""
    check = manifest["verification"]
    number, base = len(manifest["adapters"]), manifest["base"]["path"]
    lines = [
        f"{number} adapter{'s' * (number > 1)} merged into {base}" if number else f"{base}, which has no adapter",
        f"written in {manifest['dtype']}; {check['quantity']} differ by at most {check['largest']:.2g}, on average by "
        f"{check['mean']:.2g}; the bound is {check['bound']:g}",
    ]
    for other in ("original", "quantised"):
        if gap := check.get(f"against_{other}"):
            lines.append(
                f"from the adapters on the {other} base by {gap['largest']:.2g}, on average by {gap['mean']:.2g}"
            )
    return "\n  ".join(lines)


# --- writing -------------------------------------------------------------------------------------------------------


def write_model(
    source: Source,
    tensors: Tensors,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    into: Into = "quantised",
    shard_size: int = SHARD_SIZE,
) -> Layout:
    """The merged model in ``folder``, not yet verified: weights, configuration, tokenizer, and what a later stage must
    know of it."""
    from transformers import AutoConfig

    has_tokenizer = (source.folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(source.folder if has_tokenizer else source.base))
    layout = Layout.of(source, AutoConfig.from_pretrained(source.base, trust_remote_code=False), tensors)
    sizes = layout.sizes(dtype)
    _refuse_full_disk(folder, sum(sizes.values()))
    weights: Weights = layout.stored
    if source.quantised is not None and into == "quantised":
        weights = Dequantised(load(source.base, scores=False, device=device, quantised=source.quantised))
    make = partial(layout.make, weights=weights, base=source.base, device=device)
    write(folder, sizes, make, names=layout.stored.files, shard_size=shard_size, dtype=dtype)
    config = layout.config
    config.dtype, config.use_cache = dtype, True
    config.architectures = [layout.architecture]
    if source.scores:
        config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in () if source.scores else ("generation_config.json", "value_head.safetensors"):
        found = next((place / name for place in (source.folder, source.base) if (place / name).is_file()), None)
        if found is not None:
            shutil.copy(found, folder / name)
    if meta := read_meta(source.folder):
        meta.pop("base", None)
        (folder / META).write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
    return layout


def _stored_dtype(tensors: Tensors) -> torch.dtype:
    """Of the largest floating tensor of the base."""
    names = sorted(tensors.shapes, key=lambda name: torch.Size(tensors.shapes[name]).numel(), reverse=True)
    return next((dtype for name in names if (dtype := tensors.read(name).dtype).is_floating_point), torch.float32)


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"the merged model takes {needed / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB left",
            hint="make room, name another place, or write bfloat16",
        )


# --- proof ---------------------------------------------------------------------------------------------------------


def _verify(
    source: Source, layout: Layout, folder: Path, *, dtype: torch.dtype, device: str, into: Into
) -> dict[str, Any]:
    """Differences between the adapters and the merged model; raises ModelError above the bound."""
    tokenizer = load_tokenizer(str(folder))
    scores = source.scores
    merged = answers(load(folder, scores=scores, device=device), tokenizer, scores=scores)

    def with_adapters(base: Into) -> Any:
        quantised = source.quantised if base == "quantised" else None
        model = adapted(source.base, source.deltas, layout.config, scores=scores, quantised=quantised, device=device)
        return difference(answers(model, tokenizer, scores=scores), merged)

    quantity = "scores" if scores else "log-probabilities"
    bound = BOUNDS[dtype]
    found = with_adapters(into)
    if not found.largest <= bound:
        raise ModelError(
            f"the merged model differs from its adapters by up to {found.largest:.3g} in {quantity} (on average "
            f"{found.mean:.3g}); the bound for {str(dtype).removeprefix('torch.')} is {bound:g}. Nothing was written",
            hint="try --dtype float32; if that differs too, the adapter belongs to another base",
        )
    result: dict[str, Any] = {
        "quantity": quantity,
        "texts": hashlib.sha256("\n\n".join(texts()).encode()).hexdigest(),
        "bound": bound,
        **found.as_dict(),
    }
    if source.quantised is not None:
        result["against"] = into
    if source.quantised is not None and source.quantised.section is not None:
        other: Into = "original" if into == "quantised" else "quantised"
        result[f"against_{other}"] = with_adapters(other).as_dict()
    return result


# --- the folder ----------------------------------------------------------------------------------------------------


def _request(source: Source, dtype: torch.dtype, into: Into) -> dict[str, Any]:
    """What the result depends on."""
    quantised = source.quantised
    return {
        "format_version": FORMAT_VERSION,
        "adapters": [{"path": str(d.folder), "sha256": weights_sha256(d.folder)} for d in source.deltas],
        "base": {"path": source.base_name, "sha256": weights_sha256(source.base)},
        "quantised": None if quantised is None else dict(quantised.settings),
        "into": None if quantised is None else into,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _finished(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """merge.json of a folder that answers this request and whose files are as it says; raises RunError for another."""
    if not out.exists():
        return None
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text("utf-8"))
        same = {name: manifest[name] for name in request} == request
        if same and all(_sha256(out / name) == digest for name, digest in manifest["files"].items()):
            return manifest
    what = "another merge, or one that was changed" if (out / MANIFEST).is_file() else "files that are no merge"
    raise RunError(f"{out} holds {what}", hint=f"choose another folder, or remove {out}")


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when the block ends without an error, and is removed otherwise."""
    from safetensors import SafetensorError

    partial_folder = out.with_name(f".{out.name}.partial")
    try:
        partial_folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial_folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                for path in partial_folder.iterdir():  # of a process that was killed
                    path.unlink()
                yield partial_folder
                for path in partial_folder.iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                partial_folder.rename(out)
            except BaseException:
                shutil.rmtree(partial_folder, ignore_errors=True)
                raise
        finally:
            os.close(handle)
    except BlockingIOError as error:
        raise RunError(f"another process merges into {out}", hint="wait until it ends") from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # transformers' own, of what is read
            raise
        raise RunError(f"{out} cannot be written: {error}", hint="make room, or name another place") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("fairlead", "torch", "transformers", "peft", "safetensors", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
