"""The weights of a base, one tensor at a time and by the names of its model: as they are stored, or as bitsandbytes had
made them. Knows no adapter."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fairlead.models.merge.tensors import Tensors
from fairlead.models.quantize import CLASSES


class Weights(Protocol):
    """The tensors of a base by the names that its model has for them."""

    def __contains__(self, name: object, /) -> bool: ...
    def read(self, name: str) -> Tensor: ...


class Stored:
    """The weights in the files of a base, whose names may be others: older, or without the trunk's prefix."""

    def __init__(self, tensors: Tensors, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        state = model.state_dict()
        self._tensors = tensors
        self.files: dict[str, str] = {}
        """Name in the model -> in the files. What is stacked or split on loading has none."""
        for key in tensors.shapes:
            name, stacked = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if stacked is None:
                self.files[name if name in state or key not in state else key] = key

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def read(self, name: str) -> Tensor:
        return self._tensors.read(self.files[name])


class Dequantised:
    """The weights of a model that bitsandbytes holds, each as its layer computes with it."""

    def __init__(self, model: Any) -> None:
        self._model, self._names = model, {*model.state_dict()}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def read(self, name: str) -> Tensor:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight
        from transformers.pytorch_utils import Conv1D

        inner, _, last = name.rpartition(".")
        module: Any = self._model.get_submodule(inner)
        tensor: Tensor = getattr(module, last)
        if last != "weight" or type(module).__name__ not in CLASSES:
            return tensor.detach()
        tensor = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).detach()
        return tensor.T if getattr(module, "source_cls", None) is Conv1D else tensor
