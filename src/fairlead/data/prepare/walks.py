"""trlX's random walks: a directed graph, walks on it that may reach its goal, and how near one comes to the shortest.
Knows no models.

A walk is text, one letter a node: ``b f q a``. The prompt is where it starts, the response all that follows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fairlead.data.prepare.kind import Say
from fairlead.data.prepare.rows import writing
from fairlead.errors import DataError

NUM_NODES, MAX_LENGTH, EDGE_SHARE, GOAL = 21, 10, 0.1, 0
SEED = 1000
"""Of the graph of trlX's own runs."""

Walk = list[int]


@dataclass(frozen=True, slots=True)
class Graph:
    edges: NDArray[np.bool_]
    """[from, to]; the goal leads to itself alone."""
    shortest: tuple[int, ...]
    """Nodes on the shortest path from each node to the goal, both counted."""

    def optimality(self, walk: Sequence[int]) -> float:
        """(10 - length) / (10 - shortest), in [0, 1]: length counts the nodes to the goal and is 10 where a step is no
        edge or the goal is not among the nodes. What follows the goal does not count. Raises ValueError for a walk
        that starts at no node."""
        if not walk or not 0 <= walk[0] < NUM_NODES:
            raise ValueError(f"a walk starts at one of the nodes 0 to {NUM_NODES - 1}, got {list(walk[:1])}")
        length = MAX_LENGTH
        for at, node in enumerate(walk):
            if not 0 <= node < NUM_NODES or (at and not self.edges[walk[at - 1], node]):
                break
            if node == GOAL:
                length = min(at + 1, MAX_LENGTH)
                break
        return (MAX_LENGTH - length) / (MAX_LENGTH - self.shortest[walk[0]])


def sample(seed: int, num_walks: int) -> tuple[Graph, list[Walk]]:
    """The graph of a seed and walks on it, drawn in trlX's order. Raises DataError for a seed whose graph has a node
    from which no walk reaches the goal."""
    rng = np.random.RandomState(seed)
    edges = _draw_edges(rng)
    shortest = tuple(_shortest(edges, node) for node in range(NUM_NODES))
    if lost := [letter(node) for node, length in enumerate(shortest) if length >= MAX_LENGTH]:
        raise DataError(
            f"graph={seed}: no walk of fewer than {MAX_LENGTH} nodes leads from {', '.join(lost)} to the goal",
            f"choose another graph; trlX's is {SEED}",
        )
    return Graph(edges, shortest), [_draw_walk(edges, rng) for _ in range(num_walks)]


@cache
def graph_of(seed: int) -> Graph:
    return sample(seed, 0)[0]


def _draw_edges(rng: np.random.RandomState) -> NDArray[np.bool_]:
    while True:
        edges = rng.rand(NUM_NODES, NUM_NODES) > 1 - EDGE_SHARE
        np.fill_diagonal(edges, False)
        if edges.any(1).all():
            break
    edges[GOAL] = False
    edges[GOAL, GOAL] = True
    return edges


def _draw_walk(edges: NDArray[np.bool_], rng: np.random.RandomState) -> Walk:
    while (node := int(rng.randint(NUM_NODES))) == GOAL:
        pass
    walk = [node]
    while walk[-1] != GOAL and len(walk) < MAX_LENGTH:
        walk.append(int(rng.choice(np.nonzero(edges[walk[-1]])[0])))
    return walk


def _shortest(edges: NDArray[np.bool_], start: int) -> int:
    """Nodes of the shortest path to the goal, at most MAX_LENGTH."""
    reached, length = np.arange(NUM_NODES) == start, 1
    while not reached[GOAL] and length < MAX_LENGTH:
        reached, length = reached | edges[reached].any(0), length + 1
    return length


# --- as text -------------------------------------------------------------------------------------------------------


def letter(node: int) -> str:
    return chr(ord("a") + node)


def text_of(walk: Sequence[int]) -> str:
    return " ".join(map(letter, walk))


def walk_of(text: str) -> Walk:
    """Spaces aside each character is a node; what is no letter of the graph is none of its nodes."""
    return [ord(character) - ord("a") for character in text if not character.isspace()]


# --- as data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WalkOptions:
    graph: Annotated[int, Field(ge=0, lt=2**32)] = SEED
    """Seed of trlX's generator of graph and walks; 1000 is that of its runs."""
    num_walks: Annotated[int, Field(ge=1)] = 1000


def write_walks(_: Sequence[Path], folder: Path, options: WalkOptions, seed: int, say: Say) -> dict[str, Any]:
    """Walks to pretrain on, each with its number, so that equal ones stay; their starts as prompts; and each walk with
    another one from its start, drawn by ``seed``, as a pair where one is nearer to the shortest."""
    graph, walks = sample(options.graph, options.num_walks)
    by_start, rng = defaultdict[int, list[Walk]](list), Random(f"walks/{seed}")
    for walk in walks:
        by_start[walk[0]].append(walk)
    with writing(folder) as outputs:
        for number, walk in enumerate(walks):
            outputs.add("pretrain", {"text": text_of(walk), "walk": number})
            pair = sorted((walk, rng.choice(by_start[walk[0]])), key=graph.optimality)
            margin = graph.optimality(pair[1]) - graph.optimality(pair[0])
            if margin:
                start, rejected, chosen = letter(walk[0]), *(f" {text_of(each[1:])}" for each in pair)
                outputs.add("preference", {"prompt": start, "chosen": chosen, "rejected": rejected, "margin": margin})
        for start in sorted(by_start):
            outputs.add("prompts", {"prompt": letter(start)})
    values = [graph.optimality(walk) for walk in walks]
    return {
        "read": len(walks),
        "kept": len(walks),
        "dropped": {},
        "optimality": sum(values) / len(values),
        "equal_rows_merged": dict(outputs.merged),
    }
