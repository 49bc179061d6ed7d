"""A device that any machine has and that is not the CPU, as a GPU is not: tensors there hold their numbers in the CPU's
memory, but meet no tensor of the CPU. What a GPU would let pass is let pass: a number (a tensor without dimensions) of
the CPU beside others, copies from one device to the other, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
"""Torch has no device to try things on: this one holds nothing, so whatever is found there was put there by us."""
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
JOINS = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)
"""Where not even a number may be of another device."""


class Far(Tensor):
    """A tensor elsewhere."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        made: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=ELSEWHERE,
        )
        made.near = near
        return made

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of Elsewhere()")

    def tolist(self) -> Any:
        return self.near.tolist()

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Far({self.near})"


class Made(TorchFunctionMode):
    """What torch makes of numbers it makes on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class Elsewhere(TorchDispatchMode):
    """Inside, there is such a device. Raises RuntimeError as a GPU does for tensors of two devices."""

    def __enter__(self) -> Any:
        self._made = Made()
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        far = [leaf for leaf in given if isinstance(leaf, Far)]
        near = [leaf for leaf in given if not isinstance(leaf, Far)]
        if far and near and func not in MOVES and (func in JOINS or any(leaf.dim() for leaf in near)):
            places = ", ".join(f"{list(leaf.shape)} {_place(leaf)}" for leaf in given)
            raise RuntimeError(f"{func}: tensors of two devices: {places}")
        assert all(leaf.device.type == "cpu" for leaf in near), f"{func}: numbers were lost on the way"
        there = isinstance(args[0], Far) if func is torch.ops.aten.copy_.default else bool(far)
        if (device := kwargs.get("device")) is not None:
            there, kwargs["device"] = torch.device(device) == ELSEWHERE, torch.device("cpu")
        found = func(*tree_map(_near, args), **tree_map(_near, kwargs))
        same = {id(leaf.near): leaf for leaf in far}  # written in place

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return same[id(leaf)] if id(leaf) in same else Far(leaf)

        return tree_map(placed, found) if there else found


def _place(leaf: Tensor) -> str:
    return "elsewhere" if isinstance(leaf, Far) else "cpu"


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, Far) else leaf


def move(module: nn.Module) -> None:
    """Take a module's parameters and buffers elsewhere; what is shared stays shared."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    far: Any = Far(tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(far, tensor.requires_grad) if is_parameter else far
                held[name] = moved[id(tensor)]  # pyright: ignore[reportArgumentType]
