"""Weights, gradients and optimizer states in shards, one a rank (FSDP2): for training all weights of a model that one
device cannot hold with its states. Knows no algorithm."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from fairlead.errors import ConfigError
from fairlead.models.adapters import decoder_layers
from fairlead.models.roles import Models
from fairlead.types import Ranks


def shard(models: Models, ranks: Ranks) -> None:
    """Leave each of the ranks its part of every weight. A layer is gathered for its forward and its backward; what is
    no layer (embeddings, norms, heads), with the whole model call. Gradients are sums over the ranks.

    Raises ConfigError for what cannot be sharded.
    """
    if models.is_peft:
        raise ConfigError(
            "train.shard=full shards weights that are all trained, and with model.adapter most are frozen",
            hint="train.shard=none: adapters are small, each rank holds them",
        )
    if models.moving:
        raise ConfigError("train.shard=full, and a reference that follows the policy", hint="train.shard=none")
    if ranks.size == 1:
        return
    mesh = init_device_mesh(models.device.type, (ranks.size,))
    for network in (models.network, models.reference, models.value):
        if network is not None:
            for layer in cast(Iterable[nn.Module], network.get_submodule(decoder_layers(network)[0])):
                if not isinstance(layer, FSDPModule):  # of a trunk that networks share
                    fully_shard(layer, mesh=mesh)
    for head in models.heads.values():  # in fp32, which a model need not be; what is gathered together is of one type
        fully_shard(head, mesh=mesh)
    fully_shard(models, mesh=mesh)
    for module in sharded_modules(models):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    models.exchanged()
    models.whole = Whole(models)
    ranks.is_sharded = True


def sharded_modules(models: Models) -> list[FSDPModule]:
    return [module for module in models.modules() if isinstance(module, FSDPModule)]


class Whole:
    """Lends the modules all weights, and takes them back: inside they are plain modules whose forwards send nothing."""

    def __init__(self, models: Models) -> None:
        self._models, self._depth = models, 0

    @contextmanager
    def __call__(self) -> Generator[None]:
        with ExitStack() as stack:
            if not self._depth:
                stack.enter_context(_lent(self._models))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")


@contextmanager
def _lent(models: Models) -> Generator[None]:
    modules, gathered = list(models.modules()), dict[int, nn.Parameter]()
    held: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in modules:
        parameters = cast("dict[str, Any]", module._parameters)  # pyright: ignore[reportPrivateUsage]
        held.append((module, dict(parameters)))
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in gathered:  # a tied one once
                    whole = cast(Tensor, parameter.full_tensor()).detach()
                    # autocast keeps its copies of what requires gradients, and of nothing else
                    gathered[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                parameters[name] = gathered[id(parameter)]
    hooks = [(module, name, getattr(module, name)) for module in modules for name in HOOKS]
    try:
        for module, name, hook in hooks:
            object.__setattr__(module, name, type(hook)())
        yield
    finally:
        for module, name, hook in hooks:
            object.__setattr__(module, name, hook)
        for module, parameters in held:
            module._parameters.update(parameters)  # pyright: ignore[reportPrivateUsage]
