"""The reward of trlX's random walks, importable by name: `ppo.reward=fairlead.demo.walks:optimality`."""

from __future__ import annotations

from collections.abc import Sequence

from fairlead.data.prepare.walks import SEED, graph_of, walk_of


def optimality(samples: Sequence[str], *, graph: int = SEED, **_: object) -> list[float]:
    """How near each walk comes to the shortest from its start, in [0, 1]: 1 for the shortest, 0 for one that takes a
    step that is no edge, or never reaches the goal. ``graph`` is the seed of `fairlead prepare random-walks`."""
    return [graph_of(graph).optimality(walk_of(sample)) for sample in samples]
