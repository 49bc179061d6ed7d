"""The reward of random walks in trlX's signature, on walks along paths that scipy finds."""

import numpy as np
import pytest
from scipy.sparse import csgraph

from fairlead.data.prepare.walks import graph_of, text_of
from fairlead.demo.walks import optimality


@pytest.mark.parametrize("seed", [1000, 1002])
def test_a_shortest_path_scores_one_and_a_step_that_is_no_edge_zero(seed: int) -> None:
    edges = graph_of(seed).edges
    previous = csgraph.shortest_path(edges.T.astype(float), unweighted=True, indices=0, return_predecessors=True)[1]
    paths: list[list[int]] = []
    for start in range(1, 21):
        path = [start]
        while path[-1]:
            path.append(int(previous[path[-1]]))
        paths.append(path)
    columns = {"prompts": ["?"] * 20, "outputs": ["?"] * 20, "other": [None] * 20}
    assert optimality(samples=list(map(text_of, paths)), graph=seed, **columns) == [1.0] * 20
    broken = [[start, int(np.nonzero(~edges[start])[0][-1]), 0] for start in range(1, 21)]
    assert optimality(samples=list(map(text_of, broken)), graph=seed, **columns) == [0.0] * 20


def test_without_a_graph_it_is_that_of_trlxs_runs() -> None:
    assert optimality(samples=["s d a", "f d a", "f i d a", "e b j n b d t k n a"]) == [1.0, 1.0, 6 / 7, 0.0]
    assert optimality(samples=["s d a"], graph=1002) == [0.0]
