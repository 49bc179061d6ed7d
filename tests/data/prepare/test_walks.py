"""trlX's random walks: graphs and walks of known seeds, whose figures another program counted, and walks by hand."""

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csgraph
from tests.data.prepare.raw import contents, every_row_loads, outputs, rows

from fairlead.data.prepare import prepare
from fairlead.data.prepare.walks import GOAL, NUM_NODES, Graph, sample, text_of, walk_of
from fairlead.errors import DataError


def silent(text: str) -> None:
    """Nobody listens."""


def by_hand() -> Graph:
    """b -> c -> a, b -> d -> c, d -> d."""
    edges = np.zeros((NUM_NODES, NUM_NODES), bool)
    for start, end in ("bc", "ca", "bd", "dc", "dd", "aa"):
        edges[walk_of(start)[0], walk_of(end)[0]] = True
    return Graph(edges, (1, 3, 2, 3, *[9] * (NUM_NODES - 4)))


@pytest.mark.parametrize(
    ("seed", "edges", "shortest", "longest", "reach", "optimality", "optimal"),
    [
        (1000, 52, 3.65, 5, 0.560, 0.352, 0.184),
        (1002, 43, 3.55, 5, 0.985, 0.790, 0.539),
        (1, 60, 3.65, 6, 0.336, 0.212, 0.113),
    ],
)
def test_graph_and_walks_are_those_of_trlx(
    seed: int, edges: int, shortest: float, longest: int, reach: float, optimality: float, optimal: float
) -> None:
    graph, walks = sample(seed, 1000)
    lengths = graph.shortest[1:]
    values = [graph.optimality(walk) for walk in walks]
    assert graph.edges.sum() == edges
    assert (np.mean(lengths), min(lengths), max(lengths)) == (shortest, 2, longest)
    assert sum(walk[-1] == GOAL for walk in walks) == reach * 1000
    assert round(float(np.mean(values)), 3) == optimality
    assert values.count(1.0) == optimal * 1000
    assert len({walk[0] for walk in walks}) == 20


def test_the_shortest_paths_are_those_of_another_program() -> None:
    graph, _ = sample(1000, 0)
    steps = csgraph.shortest_path(graph.edges.astype(float), unweighted=True)[:, GOAL]
    assert graph.shortest == tuple(int(number) + 1 for number in steps)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b c a", 1.0),
        ("bca", 1.0),
        ("c a", 1.0),
        ("a", 1.0),
        ("b d c a", (10 - 4) / (10 - 3)),
        ("b d d c a", (10 - 5) / (10 - 3)),
        ("b d d d d d d d c a", 0.0),  # the goal is the tenth node
        ("b c a ? z b", 1.0),  # what follows the goal does not count
        ("b a", 0.0),  # no edge
        ("b c b a", 0.0),
        ("b d d", 0.0),  # the goal is not reached
        ("b", 0.0),
        ("b c z a", 0.0),  # no node of the graph
        ("b C a", 0.0),
    ],
)
def test_a_walk_is_worth_what_its_definition_says(text: str, expected: float) -> None:
    assert by_hand().optimality(walk_of(text)) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "? b c a", "z a"])
def test_a_walk_that_starts_nowhere_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="starts at one of the nodes 0 to 20"):
        by_hand().optimality(walk_of(text))


def test_the_prepared_walks_are_whole_and_their_pairs_are_of_one_start(tmp_path: Path) -> None:
    counts = prepare("random-walks", None, tmp_path / "out", say=silent)["counts"]
    assert every_row_loads(tmp_path / "out")
    assert outputs(tmp_path / "out").keys() == {"pretrain", "preference", "prompts"}
    graph, walks = sample(1000, 1000)
    assert [row["text"] for row in rows(tmp_path / "out", "pretrain")] == list(map(text_of, walks))
    assert [row["prompt"] for row in rows(tmp_path / "out", "prompts")] == list("bcdefghijklmnopqrstu")
    assert round(counts["optimality"], 3) == 0.352
    texts = set(map(text_of, walks))
    for row in rows(tmp_path / "out", "preference"):
        better, worse = row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
        assert {better, worse} <= texts
        gain = graph.optimality(walk_of(better)) - graph.optimality(walk_of(worse))
        assert gain == pytest.approx(row["margin"])
        assert gain > 0


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_pairs_of_the_same_walks(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        prepare("random-walks", None, tmp_path / name, seed=seed, num_walks=50, say=silent)
    assert contents(tmp_path / "one") == contents(tmp_path / "same")
    assert rows(tmp_path / "one", "pretrain") == rows(tmp_path / "other", "pretrain")
    assert rows(tmp_path / "one", "preference") != rows(tmp_path / "other", "preference")


def test_a_graph_with_a_node_that_is_lost_is_refused(tmp_path: Path) -> None:
    lost = next(seed for seed in range(50) if np.isinf(distances(seed)).any())
    with pytest.raises(DataError, match=rf"graph={lost}: no walk of fewer than 10 nodes leads from"):
        prepare("random-walks", None, tmp_path / "out", graph=lost, say=silent)
    assert not (tmp_path / "out").exists()


def distances(seed: int) -> np.ndarray:
    """Steps to the goal from each node of a seed's graph, by another program."""
    rng = np.random.RandomState(seed)
    while not (edges := (rng.rand(21, 21) > 0.9) & ~np.eye(21, dtype=bool)).any(1).all():
        pass
    return csgraph.shortest_path(edges.astype(float), unweighted=True)[:, 0]


def test_what_is_made_here_takes_no_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"random-walks is made of its options and a seed alone, and .* is given"):
        prepare("random-walks", tmp_path, tmp_path / "out", say=silent)
