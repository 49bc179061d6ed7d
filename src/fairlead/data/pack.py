"""Trees to batches: chooses which share a row, lays runs side by side, packed without padding or one tree a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairlead.data.render import Tree
from fairlead.ops.scores import attribute_pairs
from fairlead.types import LabelledBatch, PreferenceBatch, RankingBatch, RolloutBatch, Support, TokenBatch

PADDED_TOGETHER = 32
"""Records padded to the longest of them, in the report: `train.batch_size` where it is not given."""


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the items of each bin, at most ``capacity`` together; an item larger than that stands alone.

    Best-fit decreasing (Johnson 1974; for packing text: Ding et al. 2024, "Fewer Truncations Improve Language
    Modeling"): each item, the largest first, goes where the least room is left. At most 11/9 of the fewest bins, and
    4. O(n log n). Items of a bin, and bins by their first item, stand in the order given.
    """
    bins: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(rooms, sizes[index])
        if at < len(rooms):
            room = rooms[at]
            number = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        else:
            room, number = max(capacity, sizes[index]), len(bins)
            bins.append([])
        bins[number].append(index)
        left = room - sizes[index]
        if left and not by_room[left]:
            insort(rooms, left)
        if left:
            by_room[left].append(number)
    return sorted(map(sorted, bins))


def packing_report(sizes: Sequence[int], length: int) -> dict[str, float]:
    """The share of tokens that are real: ``padded`` to the longest of 32 neighbours, ``packed`` best-fit into ``rows``
    of ``length``, ``wrapped`` end to end. An item longer than a row is a row of its own size."""
    total = sum(sizes)
    groups = [sizes[at : at + PADDED_TOGETHER] for at in range(0, len(sizes), PADDED_TOGETHER)]
    rows = best_fit(sizes, length)
    packed = sum(max(length, sum(sizes[i] for i in row)) for row in rows)
    return {
        "padded": total / sum(len(group) * max(group) for group in groups),
        "packed": total / packed,
        "rows": len(rows),
        "wrapped": total / (-(-total // length) * length),
    }


def text_pieces(trees: Sequence[Tree], length: int) -> list[Tree]:
    """Texts, cut into pieces of ``length`` tokens where they are longer. A piece of one token is left out: it is
    predicted from nothing and predicts nothing."""
    return [
        Tree((), (ids[at : at + length],))
        for tree in trees
        for ids in tree.responses
        for at in range(0, len(ids), length)
        if len(ids) - at > 1
    ]


def pack_whole(trees: Sequence[Tree], length: int) -> list[list[Tree]]:
    """Texts laid best-fit into rows of at most ``length`` tokens, none cut but what is longer than a row."""
    pieces = text_pieces(trees, length)
    return [[pieces[i] for i in row] for row in best_fit([piece.num_tokens for piece in pieces], length)]


def pack_text(trees: Sequence[Tree], length: int) -> list[list[Tree]]:
    """Texts, end to end, cut into rows of exactly ``length`` tokens; each row a list of pieces, none lost but the
    remainder of the last row. A piece attends to itself alone."""
    rows: list[list[Tree]] = [[]]
    room = length
    for tree in trees:
        ids = tree.responses[0]
        while ids:
            piece, ids = ids[:room], ids[room:]
            rows[-1].append(Tree((), (piece,)))
            room -= len(piece)
            if not room:
                rows.append([])
                room = length
    return rows[:-1]


def micro_batches(sizes: Sequence[int], budget: int, *, packed: bool) -> list[list[int]]:
    """Indices of the items of each micro-batch, in order. Packed: at most ``budget`` tokens together; padded: rows
    times the longest row. An item larger than the budget stands alone. Where the order does not matter and rows are
    packed, `best_fit` needs fewer."""
    groups: list[list[int]] = []
    used, longest = 0, 0
    for index, size in enumerate(sizes):
        longest = max(longest, size)
        cost = used + size if packed else (len(groups[-1]) + 1 if groups else 1) * longest
        if not groups or cost > budget:
            groups.append([])
            used, longest = 0, size
        groups[-1].append(index)
        used += size
    return groups


def step_groups(
    sizes: Sequence[int], budget: int, *, packed: bool, share: Callable[[Sequence[int]], list[int]]
) -> list[list[int]]:
    """Indices of the items of each micro-batch of an optimizer step, of those that ``share`` leaves to this process:
    few forwards, so in an order of their own where rows are packed."""
    own = share(sizes)
    kept = [sizes[i] for i in own]
    groups = best_fit(kept, budget) if packed else micro_batches(kept, budget, packed=False)
    return [[own[i] for i in group] for group in groups]


def token_fields(trees: Sequence[Tree], *, packed: bool, pad_id: int) -> dict[str, Any]:
    """The fields of a TokenBatch. Packed: all trees in one row; else a row for each response, with a prompt of its own,
    padded to the longest: what any attention takes."""
    rows = [list(trees)] if packed else [[tree] for tree in one_response_each(trees)]
    width = max(sum(tree.num_tokens for tree in row) for row in rows)
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id)
    position_ids, subtree_end = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    previous, sequence_ids = np.full(shape, -1), np.full(shape, -1)
    loss_mask = np.zeros(shape, bool)
    ends: list[int] = []
    for b, row in enumerate(rows):
        start = 0
        for tree in row:
            end, shared = start + tree.num_tokens, len(tree.prompt)
            root = slice(start, start + shared)
            assert not tree.prompt_mask or len(tree.responses) == 1, "a shared prompt belongs to no sequence"
            input_ids[b, root] = tree.prompt
            position_ids[b, root] = np.arange(shared)
            subtree_end[b, root] = end
            previous[b, root] = np.arange(start - 1, start + shared - 1)
            if shared:
                previous[b, start] = -1
                loss_mask[b, root] = tree.prompt_mask or False
                loss_mask[b, start] = False
                sequence_ids[b, root] = len(ends) if len(tree.responses) == 1 else -1
            at = start + shared
            for response in tree.responses:
                run = slice(at, at + len(response))
                input_ids[b, run] = response
                position_ids[b, run] = np.arange(shared, shared + len(response))
                subtree_end[b, run] = run.stop
                previous[b, run] = np.arange(at - 1, run.stop - 1)
                previous[b, at] = start + shared - 1 if shared else -1
                loss_mask[b, run] = True
                loss_mask[b, at] = shared > 0
                sequence_ids[b, run] = len(ends)
                ends.append(b * width + run.stop - 1)
                at = run.stop
            start = end
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "subtree_end": torch.from_numpy(subtree_end),
        "previous": torch.from_numpy(previous),
        "loss_mask": torch.from_numpy(loss_mask),
        "sequence_ids": torch.from_numpy(sequence_ids),
        "sequence_ends": torch.tensor(ends),
        "counts": {"token": float(loss_mask.sum()), "sequence": float(len(ends))},
    }


def one_response_each(trees: Sequence[Tree]) -> list[Tree]:
    """Every response with a prompt of its own."""
    return [
        tree if len(tree.responses) == 1 else Tree(tree.prompt, (response,))
        for tree in trees
        for response in tree.responses
    ]


def token_batch(trees: Sequence[Tree], *, packed: bool, pad_id: int) -> TokenBatch:
    return TokenBatch(**token_fields(trees, packed=packed, pad_id=pad_id))


def preference_batch(
    trees: Sequence[Tree],
    *,
    packed: bool,
    pad_id: int,
    margins: Sequence[float | None] | None = None,
    reference_logprobs: Sequence[Tensor] | None = None,
) -> PreferenceBatch:
    """Pairs: each tree's first response is the chosen one. ``reference_logprobs``: [counted tokens] a response."""
    fields = token_fields(trees, packed=packed, pad_id=pad_id)
    chosen = torch.arange(0, 2 * len(trees), 2)
    fields["counts"] |= {
        "pair": float(len(trees)),
        "chosen_token": float(sum(len(tree.responses[0]) for tree in trees)),
    }
    margin = None
    if margins is not None and any(m is not None for m in margins):
        margin = torch.tensor([0.0 if m is None else m for m in margins])
    return PreferenceBatch(
        **fields,
        chosen=chosen,
        rejected=chosen + 1,
        margin=margin,
        reference_logprobs=None if reference_logprobs is None else spread(reference_logprobs, fields["loss_mask"]),
    )


def labelled_batch(
    trees: Sequence[Tree],
    labels: Sequence[bool],
    *,
    packed: bool,
    pad_id: int,
    reference_logprobs: Sequence[Tensor] | None = None,
    mismatched: LabelledBatch | None = None,
) -> LabelledBatch:
    """Responses with their labels, one a tree."""
    fields = token_fields(trees, packed=packed, pad_id=pad_id)
    return LabelledBatch(
        **fields,
        label=torch.tensor(labels),
        reference_logprobs=None if reference_logprobs is None else spread(reference_logprobs, fields["loss_mask"]),
        mismatched=mismatched,
    )


def ranking_batch(
    trees: Sequence[Tree],
    levels: Sequence[Sequence[int]],
    *,
    packed: bool,
    pad_id: int,
    ratings: Sequence[Sequence[float]] | None = None,
    attributes: Sequence[Tensor] | None = None,
) -> RankingBatch:
    """Rankings: the responses of each tree stand best first; those of one level are tied. Every pair that is no tie is
    a pair of the batch; its margin is the difference of the ratings. ``attributes``: [responses, K] a ranking."""
    fields = token_fields(trees, packed=packed, pad_id=pad_id)
    level = [each for ranking in levels for each in ranking]
    group = [g for g, ranking in enumerate(levels) for _ in ranking]
    pairs = [
        (i, j)
        for i in range(len(level))
        for j in range(i + 1, len(level))
        if group[i] == group[j] and level[i] < level[j]
    ]
    chosen, rejected = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    rating = None if ratings is None else torch.tensor([float(each) for ranking in ratings for each in ranking])
    fields["counts"] |= {
        "pair": float(len(pairs)),
        "ranking": float(len(trees)),
        "chosen_token": float(sum(len(tree.responses[0]) for tree in trees)),
    }
    groups, judged = torch.tensor(group), None if attributes is None else torch.cat(list(attributes))
    if judged is not None:
        better, _, attribute = attribute_pairs(judged, groups)
        fields["counts"] |= {
            "attribute_rating": float((~judged.isnan()).sum()),
            "attribute_ranking": float((groups[better] * judged.shape[1] + attribute).unique().numel()),
        }
    return RankingBatch(
        **fields,
        chosen=chosen,
        rejected=rejected,
        margin=None if rating is None else rating[chosen] - rating[rejected],
        group=groups,
        level=torch.tensor(level),
        rating=rating,
        attributes=judged,
    )


def spread(values: Sequence[Tensor], mask: Tensor) -> Tensor:
    """One tensor [counted tokens] a response, in order, at their places in a [B, T] of zeros."""
    flat = torch.cat(list(values))
    whole = flat.new_zeros(mask.shape)
    whole[mask] = flat
    return whole


def rollout_batch(
    trees: Sequence[Tree],
    tokens: Mapping[str, Sequence[Tensor]],
    *,
    packed: bool,
    pad_id: int,
    support: Support | None = None,
) -> RolloutBatch:
    """Responses with their per-token tensors: one [length] tensor a response."""
    fields = token_fields(trees, packed=packed, pad_id=pad_id)
    placed: dict[str, Any] = {name: spread(values, fields["loss_mask"]) for name, values in tokens.items()}
    return RolloutBatch(**fields, **placed, support=support)


def by_response(values: Tensor, batch: TokenBatch) -> list[Tensor]:
    """Per-token ``values`` [B, T] as one tensor of the counted tokens for each sequence, in order."""
    flat, owner = values[batch.loss_mask], batch.sequence_ids[batch.loss_mask]
    lengths = torch.bincount(owner, minlength=batch.num_sequences)
    return list(flat.split(lengths.tolist()))
