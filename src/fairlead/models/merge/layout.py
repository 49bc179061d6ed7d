"""The model that a merge writes: its configuration, the names and shapes of its tensors, and how each comes about from
the base and the adapters. Holds one tensor at a time; the model itself stands on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairlead.errors import ModelError
from fairlead.models.heads import RewardHeads, labels_of
from fairlead.models.load import read_meta
from fairlead.models.merge.deltas import Delta
from fairlead.models.merge.source import Source
from fairlead.models.merge.tensors import Tensors
from fairlead.models.merge.weights import Stored, Weights


@dataclass(frozen=True, slots=True)
class Layout:
    """What is written, and from what."""

    config: Any
    architecture: str
    """Class of transformers."""
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, in the order of the model's modules; tied ones once."""
    integers: dict[str, int]
    """Bytes of the tensors that hold no floating numbers, which keep their type."""
    transposed: frozenset[str]
    """Tensors that lie as [in, out]."""
    tied: dict[str, str]
    """Of the base's embedding and head, where they are one tensor: the other's name."""
    stored: Stored
    """The base's own files, whose names the result keeps."""
    deltas: tuple[Delta, ...]

    @classmethod
    def of(cls, source: Source, config: Any, files: Tensors) -> Layout:
        """``config`` is the base's; it is made that of the result. Raises ModelError for an adapter of another base."""
        scores = source.scores
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if scores and source.deltas and (head := source.deltas[-1].shape("score.weight")) is not None:
            config.num_labels, meta = head[0], read_meta(source.folder)
            if head[0] == 1 or "heads" in meta:
                for name, value in labels_of(RewardHeads.read(meta, head[0], source.folder)).items():
                    setattr(config, name, value)
        model = _skeleton(config, scores)
        embedding, head = _embedding_and_head(model)
        tied = {embedding: head, head: embedding} if head and head not in dict(model.named_parameters()) else {}
        text = config.get_text_config()
        for delta in source.deltas:
            shape = delta.shape(embedding)
            text.vocab_size = shape[0] if shape else text.vocab_size
        if tied and any(_parts(delta, embedding, head) for delta in source.deltas):
            config.tie_word_embeddings = text.tie_word_embeddings = False
        model = _skeleton(config, scores)
        tensors: dict[str, Tensor] = dict(model.named_parameters())
        tensors |= {name: tensor for name, tensor in model.state_dict().items() if name in dict(model.named_buffers())}
        known = {*tensors, *tied}
        for delta in source.deltas:
            if (unknown := sorted(set(delta.named) - known)) and delta.scores == scores:
                raise ModelError(
                    f"{delta.folder} is an adapter of another base: {source.base_name} has no {unknown[0]}",
                    hint="name the base it was trained on in adapter_config.json",
                )
        return cls(
            config,
            type(model).__name__,
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            {name: tensor.nbytes for name, tensor in tensors.items() if not tensor.is_floating_point()},
            frozenset(
                f"{name}.weight"
                for name, module in model.named_modules()
                if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
            ),
            tied,
            Stored(files, model),
            source.deltas,
        )

    def sizes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of each tensor as it is written."""
        return {
            name: self.integers.get(name, dtype.itemsize * torch.Size(shape).numel())
            for name, shape in self.shapes.items()
        }

    def make(self, name: str, weights: Weights, base: Path, device: str) -> Tensor:
        """One tensor of the result. Raises ModelError where the base lacks it, or it has another shape."""
        other = self.tied.get(name)
        key = next((key for key in (name, other) if key in weights), None)
        tensor = None if key is None else weights.read(key)
        for delta in self.deltas:
            tensor = delta.apply(name, tensor, other, transposed=name in self.transposed, device=device)
        if tensor is None:
            what = "its score head" if name == "score.weight" else f"the tensor {name}"
            raise ModelError(f"{base} lacks {what}", hint="its files must hold the model that config.json describes")
        if tuple(tensor.shape) != self.shapes[name]:
            raise ModelError(f"{name} is {list(tensor.shape)}, the model has {list(self.shapes[name])}")
        return tensor


def _skeleton(config: Any, scores: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except ValueError as error:
        raise ModelError(f"transformers has no such model for {config.model_type}: {error}") from error


def _embedding_and_head(model: Any) -> tuple[str, str]:
    """Names of their weights; no head: an empty one."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {module: f"{name}.weight" for name, module in model.named_modules() if module in modules}
    return names[modules[0]], names.get(modules[1], "")


def _parts(delta: Delta, embedding: str, head: str) -> bool:
    """Whether an adapter makes two of what was one tensor: an adapter on it, or one of the two trained in full."""
    if {f"{module}.weight" for module in delta.modules} & {embedding, head}:
        return True
    keys = [delta.trained.get(name) or delta.replaced.get(name) for name in (embedding, head)]
    if keys[0] is None or keys[1] is None:
        return bool({embedding, head} & delta.trained.keys())
    return not torch.equal(*(delta.tensors.read(key) for key in keys if key))
