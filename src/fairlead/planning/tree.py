"""The tree of a model's modules: shapes, which leaves train, parameters and bytes of each node. Equal neighbours stand
as one range. It counts what it is given, heads and adapters included, and knows no role."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True, slots=True)
class Node:
    """A module, or several equal ones in a row; the figures are of all it stands for, children in."""

    name: str
    """`layers.0-23` for a range; a chain of modules that hold nothing else is one name."""
    kind: str
    """Class of the module."""
    shapes: tuple[str, ...]
    """Of the parameters it holds itself."""
    parameters: int
    """A parameter that is shared counts where it comes first."""
    trainable: int
    bytes: int
    children: tuple[Node, ...] = ()
    tied: bool = False
    """All its parameters were counted before; what is in it is not drawn again."""


def tree(
    module: nn.Module, trainable: Collection[nn.Parameter], sizes: Mapping[int, tuple[int, int]], name: str = ""
) -> Node:
    """The tree below a module. ``trainable`` are told apart by identity; ``sizes`` holds for the id of each parameter
    how many there are and their bytes: a quantised one is stored in another shape."""
    return _node(module, name, {id(p) for p in trainable}, sizes, set())


def lines(node: Node) -> Iterator[tuple[str, Node]]:
    """Each node of the tree, top down, and the branches drawn before its name."""
    yield "", node
    yield from _below(node, "")


def _node(
    module: nn.Module, name: str, trainable: set[int], sizes: Mapping[int, tuple[int, int]], seen: set[int]
) -> Node:
    own = list(module.named_parameters(recurse=False))
    if all(id(p) in seen for p in module.parameters()):
        return Node(name, type(module).__name__, tuple(_shape(*each) for each in own), 0, 0, 0, tied=True)
    fresh = [p for _, p in own if id(p) not in seen]
    seen.update(id(p) for p in fresh)
    children = [
        _node(child, child_name, trainable, sizes, seen)
        for child_name, child in module.named_children()
        if next(child.parameters(), None) is not None
    ]
    node = Node(
        name,
        type(module).__name__,
        tuple(_shape(*each) for each in own),
        sum(sizes[id(p)][0] for p in fresh) + sum(child.parameters for child in children),
        sum(sizes[id(p)][0] for p in fresh if id(p) in trainable) + sum(child.trainable for child in children),
        sum(sizes[id(p)][1] for p in fresh) + sum(child.bytes for child in children),
        tuple(_collapse(children)),
    )
    if not own and len(node.children) == 1 and name:
        only = node.children[0]
        return replace(only, name=f"{name}.{only.name}")
    return node


def _shape(name: str, parameter: nn.Parameter) -> str:
    shape = " x ".join(map(str, parameter.shape)) or "1"
    return shape if name == "weight" else f"{name} {shape}"


def _collapse(nodes: list[Node]) -> Iterator[Node]:
    """Neighbours with numbers for names, equal in all but these, become one node of a range."""
    at = 0
    while at < len(nodes):
        first, end = nodes[at], at + 1
        while first.name.isdigit() and end < len(nodes) and replace(nodes[end], name=first.name) == first:
            end += 1
        number = end - at
        yield first if number == 1 else _times(replace(first, name=f"{first.name}-{nodes[end - 1].name}"), number)
        at = end


def _times(node: Node, number: int) -> Node:
    return replace(
        node,
        parameters=node.parameters * number,
        trainable=node.trainable * number,
        bytes=node.bytes * number,
        children=tuple(_times(child, number) for child in node.children),
    )


def _below(node: Node, stem: str) -> Iterator[tuple[str, Node]]:
    for child in node.children:
        is_last = child is node.children[-1]
        yield stem + ("└─ " if is_last else "├─ "), child
        yield from _below(child, stem + ("   " if is_last else "│  "))
