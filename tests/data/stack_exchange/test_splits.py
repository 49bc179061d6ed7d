"""No question and no duplicate of one is in two splits."""

from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.stack_exchange.dumps import (
    asked,
    dump,
    duplicates,
    many,
    prepared,
    rows,
    table,
    thread,
)

from fairlead.data.stack_exchange import run
from fairlead.data.stack_exchange.resolve import union


def by_split(out: Path) -> dict[str, set[tuple[str, int, str]]]:
    names = {"finetune": "sft", "reward": "preference", "rl": "prompts", "evaluation": "heldout_prompts"}
    return {
        split: {(row["site"], row["question_id"], row["prompt"]) for row in rows(out, name)}
        for split, name in names.items()
    }


def test_duplicates_share_a_split_through_any_number_of_others(tmp_path: Path, in_small_parts: None) -> None:
    folder = many(tmp_path / "site")
    prepared(folder, tmp_path / "before")
    before = {id: split for split, found in by_split(tmp_path / "before").items() for _, id, _ in found}
    assert len({before[id] for id in (7, 10, 13, 100, 160)}) > 1
    duplicates(folder, (160, 9999), (9999, 13), (13, 100), (10, 7), (8888, 7777))
    duplicates(folder.parent / "other", (7, 13))  # a table without posts
    table(
        folder / "PostLinks.xml",
        "postlinks",
        *(
            {"Id": n, "PostId": one, "RelatedPostId": other, "LinkTypeId": kind}
            for n, (one, other, kind) in enumerate(
                [(160, 9999, 3), (9999, 13, 3), (13, 100, 3), (10, 7, 3), (8888, 7777, 3), (22, 7, 1), ("x", 7, 3)]
            )
        ),
    )
    counts = prepared(folder, tmp_path / "after")
    after = {id: split for split, found in by_split(tmp_path / "after").items() for _, id, _ in found}
    expected = before | {160: before[13], 100: before[13], 10: before[7]}
    assert after == expected
    assert counts["moved_to_the_split_of_a_duplicate"] == sum(before[id] != expected[id] for id in before)
    assert counts["notes"]["link without posts"] == 1


def test_a_duplicate_of_a_question_that_repeats_another_goes_where_that_one_is(tmp_path: Path) -> None:
    more = [*thread(500, 1, 2), asked(600, Title="T1", Body="Q1"), *thread(600, 1, 2)[1:]]
    folder = dump(tmp_path / "site", *thread(1, 0, 5), *more)
    duplicates(folder, (500, 600))
    for seed in range(12):
        prepared(folder, tmp_path / str(seed), seed=seed)
        found = [ids for ids in by_split(tmp_path / str(seed)).values() if ids]
        assert [{id for _, id, _ in ids} for ids in found] == [{1, 500}]


@settings(deadline=None)
@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_union_joins_what_a_search_reaches(graph: tuple[int, list[tuple[int, int]]]) -> None:
    number, edges = graph
    groups = union(number, edges)
    for start in range(number):
        reached, waiting = {start}, [start]
        while waiting:
            node = waiting.pop()
            near = {b for a, b in edges if a == node} | {a for a, b in edges if b == node}
            waiting += near - reached
            reached |= near
        assert reached == {node for node in range(number) if groups[node] == groups[start]}


@settings(max_examples=25, deadline=None)
@given(
    titles=st.lists(st.integers(0, 12), min_size=1, max_size=16),
    links=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=8),
    seed=st.integers(0, 1000),
    size=st.sampled_from([500, 10**6]),
)
def test_no_prompt_and_no_duplicate_is_in_two_splits(
    titles: list[int], links: list[tuple[int, int]], seed: int, size: int
) -> None:
    posts = [
        post | ({"Title": f"T{title}", "Body": "same"} if post["PostTypeId"] == 1 else {})
        for number, title in enumerate(titles)
        for post in thread(10 * number, 0, 5)
    ]
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "PART_BYTES", (size, size))
        folder = dump(Path(name) / "site", *posts)
        duplicates(folder, *((10 * one, 10 * other) for one, other in links))
        prepared(folder, Path(name) / "out", seed=seed)
        splits = by_split(Path(name) / "out")
    assert sum(map(len, splits.values())) == len(set(titles))
    prompts = [{prompt for _, _, prompt in found} for found in splits.values()]
    assert all(not one & other for one, other in combinations(prompts, 2))
    split_of = {prompt: split for split, found in splits.items() for _, _, prompt in found}
    for one, other in links:
        if max(one, other) < len(titles):
            assert split_of[f"T{titles[one]}\n\nsame"] == split_of[f"T{titles[other]}\n\nsame"]
