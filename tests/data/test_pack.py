from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairlead.data.pack import (
    best_fit,
    by_response,
    micro_batches,
    pack_text,
    pack_whole,
    packing_report,
    preference_batch,
    ranking_batch,
    rollout_batch,
    token_batch,
)
from fairlead.data.render import Tree
from fairlead.types import TokenBatch

FOREST = [
    Tree((10, 11), ((20, 21), (30,))),  # a prompt shared by two responses
    Tree((), ((40, 41, 42),)),  # a text
    Tree((50,), ((60,),)),  # a prompt and its one response
]
PAD = 99
FIELDS = ("input_ids", "position_ids", "subtree_end", "previous", "loss_mask", "sequence_ids", "sequence_ends")


def columns(batch: TokenBatch) -> dict[str, Any]:
    return {name: getattr(batch, name).tolist() for name in FIELDS}


def test_a_packed_forest_by_hand() -> None:
    batch = token_batch(FOREST, packed=True, pad_id=PAD)
    assert columns(batch) == {
        # index            0   1   2   3   4   5   6   7   8   9
        "input_ids": [[10, 11, 20, 21, 30, 40, 41, 42, 50, 60]],
        "position_ids": [[0, 1, 2, 3, 2, 0, 1, 2, 0, 1]],
        "subtree_end": [[5, 5, 4, 4, 5, 8, 8, 8, 10, 10]],
        "previous": [[-1, 0, 1, 2, 1, -1, 5, 6, -1, 8]],
        "loss_mask": [[False, False, True, True, True, False, True, True, False, True]],
        "sequence_ids": [[-1, -1, 0, 0, 1, 2, 2, 2, 3, 3]],
        "sequence_ends": [3, 4, 7, 9],
    }
    assert batch.counts == {"token": 6.0, "sequence": 4.0}
    assert (batch.num_sequences, batch.num_tokens) == (4, 10)


def test_a_padded_forest_by_hand() -> None:
    batch = token_batch(FOREST, packed=False, pad_id=PAD)
    assert columns(batch) == {
        "input_ids": [[10, 11, 20, 21], [10, 11, 30, PAD], [40, 41, 42, PAD], [50, 60, PAD, PAD]],
        "position_ids": [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 0, 0]],
        "subtree_end": [[4, 4, 4, 4], [3, 3, 3, 0], [3, 3, 3, 0], [2, 2, 0, 0]],
        "previous": [[-1, 0, 1, 2], [-1, 0, 1, -1], [-1, 0, 1, -1], [-1, 0, -1, -1]],
        "loss_mask": [
            [False, False, True, True],
            [False, False, True, False],
            [False, True, True, False],
            [False, True, False, False],
        ],
        "sequence_ids": [[0, 0, 0, 0], [1, 1, 1, -1], [2, 2, 2, -1], [3, 3, -1, -1]],
        "sequence_ends": [3, 6, 10, 13],
    }
    assert batch.counts == {"token": 6.0, "sequence": 4.0}
    assert (batch.num_sequences, batch.num_tokens) == (4, 12)


def test_the_types_are_those_a_model_takes() -> None:
    batch = token_batch(FOREST, packed=True, pad_id=PAD)
    dtypes = {name: getattr(batch, name).dtype for name in FIELDS}
    assert dtypes.pop("loss_mask") == torch.bool
    assert set(dtypes.values()) == {torch.int64}


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_of_a_prompt_that_count_are_those_its_mask_names_but_never_the_first_of_a_row(packed: bool) -> None:
    forest = [Tree((10, 11, 12), ((20,),), (True, False, True)), Tree((30, 31), ((40,),), (False, True))]
    batch = token_batch(forest, packed=packed, pad_id=PAD)
    assert batch.input_ids[batch.loss_mask].tolist() == [12, 20, 31, 40]
    assert batch.sequence_ids[batch.loss_mask].tolist() == [0, 0, 1, 1]
    assert batch.counts["token"] == 4.0


def test_of_a_shared_prompt_no_token_can_count() -> None:
    with pytest.raises(AssertionError, match="a shared prompt belongs to no sequence"):
        token_batch([Tree((1, 2), ((3,), (4,)), (False, True))], packed=True, pad_id=PAD)


tokens = st.integers(1, 50)
runs = st.lists(tokens, min_size=1, max_size=4).map(tuple)
trees = st.builds(Tree, st.lists(tokens, max_size=3).map(tuple), st.lists(runs, min_size=1, max_size=3).map(tuple))


@settings(deadline=None)
@given(st.lists(trees, min_size=1, max_size=4), st.booleans())
def test_a_token_sees_itself_and_what_it_continues_and_nothing_else(forest: list[Tree], packed: bool) -> None:
    """What a token continues is found by walking back from token to token."""
    batch = token_batch(forest, packed=packed, pad_id=PAD)
    for previous, subtree_end, position in zip(
        batch.previous.tolist(), batch.subtree_end.tolist(), batch.position_ids.tolist(), strict=True
    ):
        for i in range(len(previous)):
            path, at = [], i
            while at >= 0 and subtree_end[i]:
                path.append(at)
                at = previous[at]
            assert [j for j in range(i + 1) if i < subtree_end[j]] == path[::-1]
            assert position[i] == max(0, len(path) - 1)


@settings(deadline=None)
@given(st.lists(trees, min_size=1, max_size=4), st.booleans())
def test_every_response_can_be_read_back_and_only_a_token_with_a_predecessor_counts(
    forest: list[Tree], packed: bool
) -> None:
    batch = token_batch(forest, packed=packed, pad_id=PAD)
    responses = [(tree.prompt, response) for tree in forest for response in tree.responses]
    assert batch.num_sequences == len(responses)
    read = forest if packed else [Tree(prompt, (response,)) for prompt, response in responses]
    assert batch.num_tokens == sum(tree.num_tokens for tree in read)
    assert not (batch.loss_mask & (batch.previous < 0)).any()
    flat_ids, flat_owner = batch.input_ids.flatten(), batch.sequence_ids.flatten()
    for number, (prompt, response) in enumerate(responses):
        whole = flat_ids[flat_owner == number].tolist()
        assert whole[-len(response) :] == list(response)
        assert whole[: -len(response)] in ([], list(prompt))
        end = int(batch.sequence_ends[number])
        assert (flat_ids[end].item(), flat_owner[end].item()) == (response[-1], number)
    counted = [row.tolist() for row in by_response(batch.input_ids, batch)]
    assert counted == [list(response if prompt else response[1:]) for prompt, response in responses]
    assert batch.counts == {"token": float(sum(map(len, counted))), "sequence": float(len(responses))}


# --- pairs ---------------------------------------------------------------------------------------------------------

PAIRS = [Tree((1,), ((2, 3), (4,))), Tree((5, 6), ((7,), (8, 9, 10)))]


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_response_of_a_pair_is_the_chosen_one(packed: bool) -> None:
    batch = preference_batch(PAIRS, packed=packed, pad_id=PAD)
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 2], [1, 3])
    assert batch.input_ids.flatten()[batch.sequence_ends].tolist() == [3, 4, 7, 10]
    assert batch.counts == {"token": 7.0, "sequence": 4.0, "pair": 2.0, "chosen_token": 3.0}
    assert (batch.margin, batch.reference_logprobs) == (None, None)


@pytest.mark.parametrize(
    ("packed", "wanted"),
    [
        (True, [[0, -1, -2, -3, 0, 0, -4, -5, -6, -7]]),
        (False, [[0, -1, -2, 0, 0], [0, -3, 0, 0, 0], [0, 0, -4, 0, 0], [0, 0, -5, -6, -7]]),
    ],
)
def test_reference_log_probabilities_stand_at_the_tokens_of_their_responses(packed: bool, wanted: list) -> None:
    reference = [torch.tensor(row) for row in ([-1.0, -2.0], [-3.0], [-4.0], [-5.0, -6.0, -7.0])]
    batch = preference_batch(PAIRS, packed=packed, pad_id=PAD, reference_logprobs=reference)
    assert batch.reference_logprobs is not None
    assert batch.reference_logprobs.tolist() == wanted


def test_a_ranking_gives_every_pair_that_is_no_tie() -> None:
    trees = [Tree((1,), ((2,), (3, 4), (5,))), Tree((6,), ((7,), (8,)))]
    batch = ranking_batch(trees, [[0, 1, 1], [0, 1]], packed=True, pad_id=PAD, ratings=[[4, 2, 2], [1.5, 1]])
    assert list(zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)) == [(0, 1), (0, 2), (3, 4)]
    assert batch.margin is not None and batch.margin.tolist() == [2, 2, 0.5]
    assert (batch.group.tolist(), batch.level.tolist()) == ([0, 0, 0, 1, 1], [0, 1, 1, 0, 1])
    assert (batch.counts["pair"], batch.counts["ranking"], batch.counts["sequence"]) == (3, 2, 5)


@pytest.mark.parametrize(
    ("margins", "wanted"),
    [
        (None, None),
        ([None, None], None),
        ([0.5, None], [0.5, 0.0]),
        ([1.0, -2.0], [1.0, -2.0]),
        ([0.0, None], [0.0, 0.0]),
    ],
)
def test_a_pair_without_a_margin_beside_one_with_it_has_margin_zero(
    margins: Sequence[float | None] | None, wanted: list[float] | None
) -> None:
    batch = preference_batch(PAIRS, packed=True, pad_id=PAD, margins=margins)
    assert (None if batch.margin is None else batch.margin.tolist()) == wanted


# --- rollouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_per_token_tensors_of_rollouts_stand_at_their_tokens_and_come_back(packed: bool) -> None:
    forest = [Tree((1, 2), ((3, 4, 5),)), Tree((6,), ((7,),)), Tree((8,), ((9, 10),))]
    names = ("behaviour_logprobs", "reference_logprobs", "values", "advantages", "returns")
    given_tokens: dict[str, Sequence[Tensor]] = {
        name: [torch.tensor([float(t * 10**k) for t in tree.responses[0]]) for tree in forest]
        for k, name in enumerate(names)
    }
    batch = rollout_batch(forest, given_tokens, packed=packed, pad_id=PAD)
    for k, name in enumerate(names):
        spread: Tensor = getattr(batch, name)
        assert torch.equal(spread, batch.input_ids * batch.loss_mask * 10.0**k)
        for given_row, row in zip(given_tokens[name], by_response(spread, batch), strict=True):
            assert torch.equal(given_row, row)


# --- rows of text --------------------------------------------------------------------------------------------------


def text(*ids: int) -> Tree:
    return Tree((), (ids,))


def test_texts_are_laid_end_to_end_and_cut_into_full_rows() -> None:
    rows = pack_text([text(1, 2), text(3, 4, 5, 6, 7, 8, 9), text(10), text(11, 12, 13)], 4)
    assert rows == [
        [text(1, 2), text(3, 4)],
        [text(5, 6, 7, 8)],
        [text(9), text(10), text(11, 12)],
    ]


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=8), st.integers(1, 7))
def test_rows_of_text_are_exactly_full_and_lose_the_remainder_alone(lengths: list[int], length: int) -> None:
    numbers = iter(range(1000))
    texts = [text(*(next(numbers) for _ in range(size))) for size in lengths]
    rows = pack_text(texts, length)
    assert len(rows) == sum(lengths) // length
    flat = [[token for piece in row for token in piece.responses[0]] for row in rows]
    assert all(len(row) == length for row in flat)
    assert [token for row in flat for token in row] == list(range(len(rows) * length))
    assert all(piece.num_tokens > 0 for row in rows for piece in row)


def test_pieces_of_different_texts_do_not_see_each_other() -> None:
    (row,) = pack_text([text(1, 2), text(3, 4)], 4)
    batch = token_batch(row, packed=True, pad_id=PAD)
    assert batch.subtree_end.tolist() == [[2, 2, 4, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1]]
    assert batch.loss_mask.tolist() == [[False, True, False, True]]


def test_whole_texts_share_a_row_where_they_fit_and_longer_ones_are_cut_first() -> None:
    """Pieces of 4, 2, 3, 1 and 2 tokens; the one token alone is left out."""
    rows = pack_whole([text(1, 2, 3, 4, 5, 6), text(7, 8, 9), text(10), text(11, 12)], 4)
    assert rows == [[text(1, 2, 3, 4)], [text(5, 6), text(11, 12)], [text(7, 8, 9)]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=10), st.integers(2, 7))
def test_rows_of_whole_texts_hold_every_token_but_pieces_of_one(lengths: list[int], length: int) -> None:
    texts = [text(*range(100 * i, 100 * i + size)) for i, size in enumerate(lengths)]
    rows = pack_whole(texts, length)
    held = sorted(token for row in rows for piece in row for token in piece.responses[0])
    lost = [100 * i + size - 1 for i, size in enumerate(lengths) if size % length == 1]
    assert held == sorted({token for tree in texts for token in tree.responses[0]} - set(lost))
    assert all(sum(piece.num_tokens for piece in row) <= length for row in rows)


# --- best fit ------------------------------------------------------------------------------------------------------


def test_best_fit_by_hand() -> None:
    """Into bins of 10: 7 and 3, 6 and 4, 2. First-fit in the order given would need 4+2+3, 7, 6."""
    assert best_fit([4, 2, 7, 6, 3], 10) == [[0, 3], [1], [2, 4]]
    assert best_fit([], 10) == []
    assert best_fit([11, 10, 1], 10) == [[0], [1], [2]]  # what is too large stands alone


def test_an_item_goes_where_the_least_room_is_left() -> None:
    """After 7 and 6 the 3 comes when rooms of 3 and 0 are left: 6 took the 4."""
    assert best_fit([6, 7, 3, 4], 10) == [[0, 3], [1, 2]]
    assert best_fit([5, 6, 4], 10) == [[0], [1, 2]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 25))
def test_best_fit_loses_nothing_and_overfills_nothing_and_no_two_bins_could_be_one(
    sizes: list[int], capacity: int
) -> None:
    bins = best_fit(sizes, capacity)
    assert sorted(index for one in bins for index in one) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in one) <= capacity or len(one) == 1 for one in bins)
    assert all(one == sorted(one) for one in bins)
    assert [one[0] for one in bins] == sorted(one[0] for one in bins)
    loads = sorted(sum(sizes[i] for i in one) for one in bins)
    assert all(a + b > capacity for a, b in pairwise(loads))


@settings(deadline=None)
@given(st.permutations([7, 3, 6, 4, 5, 5, 8, 2, 9, 1, 4, 3, 3]))
def test_best_fit_fills_bins_that_can_be_filled_whatever_the_order(sizes: list[int]) -> None:
    """60 tokens in six bins of 10: 9+1, 8+2, 7+3, 6+4, 5+5, 4+3+3."""
    assert len(best_fit(sizes, 10)) == 6


@pytest.mark.parametrize(
    "sizes",
    [
        [4, 8, 1, 4, 2, 1],
        [5, 7, 5, 2, 4, 2, 5, 1, 6],
        [3, 9, 3, 9, 3, 9, 1, 1, 1, 7, 7],
        [6, 6, 6, 4, 4, 4, 2, 2, 2, 8, 8, 8],
    ],
)
def test_best_fit_needs_no_more_bins_than_first_fit_in_the_order_given(sizes: list[int]) -> None:
    rooms: list[int] = []
    for size in sizes:
        for number, room in enumerate(rooms):
            if size <= room:
                rooms[number] -= size
                break
        else:
            rooms.append(10 - size)
    assert len(best_fit(sizes, 10)) <= len(rooms)


def test_the_report_of_packing_by_hand() -> None:
    """10 tokens: padded to 6 they are 18; best-fit 6 + 3 and 1 in rows of 9 are 18; end to end they are 18 too."""
    assert packing_report([6, 3, 1], 9) == {"padded": 10 / 18, "packed": 10 / 18, "rows": 2, "wrapped": 10 / 18}
    assert packing_report([5, 5, 4, 4], 9) == {"padded": 18 / 20, "packed": 1.0, "rows": 2, "wrapped": 1.0}
    assert packing_report([20, 1], 9) == {"padded": 21 / 40, "packed": 21 / 29, "rows": 2, "wrapped": 21 / 27}


# --- micro-batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "packed", "groups"),
    [
        ([3, 4, 3, 1], True, [[0, 1, 2], [3]]),  # 10 fits
        ([3, 4, 4, 1], True, [[0, 1], [2, 3]]),
        ([3, 4, 3, 1], False, [[0, 1], [2, 3]]),  # three rows of 4 would be 12
        ([2, 2, 2, 2, 2, 2], False, [[0, 1, 2, 3, 4], [5]]),
        ([1, 1, 9, 1], False, [[0, 1], [2], [3]]),  # the long row would widen the others
        ([1, 1, 8, 1], True, [[0, 1, 2], [3]]),
        ([4, 99, 4], True, [[0], [1], [2]]),
        ([4, 99, 4], False, [[0], [1], [2]]),
        ([99], True, [[0]]),
        ([], True, []),
    ],
)
def test_micro_batches_of_ten_tokens(sizes: list[int], packed: bool, groups: list[list[int]]) -> None:
    assert micro_batches(sizes, 10, packed=packed) == groups


@settings(deadline=None)
@given(st.lists(st.integers(1, 15), max_size=12), st.integers(1, 20), st.booleans())
def test_micro_batches_hold_every_item_once_in_order_within_the_budget_and_no_fewer_than_fit(
    sizes: list[int], budget: int, packed: bool
) -> None:
    def cost(group: Sequence[int]) -> int:
        chosen = [sizes[i] for i in group]
        return sum(chosen) if packed else len(chosen) * max(chosen)

    groups = micro_batches(sizes, budget, packed=packed)
    assert [i for group in groups for i in group] == list(range(len(sizes)))
    for group in groups:
        assert cost(group) <= budget or len(group) == 1
        if group[-1] + 1 < len(sizes):
            assert cost([*group, group[-1] + 1]) > budget
