from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from fairlead.data.loader import DatasetSource
from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.types import TokenBatch

SIZES = [3, 5, 2, 7, 4, 6, 2, 3, 8, 5]


def collate(chosen: Sequence[int]) -> TokenBatch:
    """Example i is a text of SIZES[i] tokens i."""
    return token_batch([Tree((), ((i,) * SIZES[i],)) for i in chosen], packed=True, pad_id=0)


def source(**options: Any) -> DatasetSource:
    settings = {"batch_size": 4, "micro_batch_tokens": 10, "packed": True, "seed": 0, "epochs": 1.0} | options
    settings["micro_batch_tokens"] = partial(int, settings["micro_batch_tokens"])
    return DatasetSource(SIZES, collate, **settings)


def examples(micro_batches: Sequence[TokenBatch]) -> list[int]:
    """The examples of one optimizer step, in order."""
    return [i for batch in micro_batches for i in batch.input_ids[0, batch.sequence_ends].tolist()]


def walk(given: DatasetSource) -> list[list[int]]:
    return [examples(step) for step in given]


def test_an_epoch_holds_every_example_once_and_its_last_batch_may_be_smaller() -> None:
    steps = walk(source())
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(i for step in steps for i in step) == list(range(10))


def test_every_epoch_has_an_order_of_its_own() -> None:
    steps = walk(source(epochs=4))
    epochs = [[i for step in steps[at : at + 3] for i in step] for at in range(0, 12, 3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(10)) not in epochs


def test_the_order_depends_on_the_seed_alone() -> None:
    assert walk(source(epochs=2)) == walk(source(epochs=2))
    assert walk(source(epochs=2)) != walk(source(epochs=2, seed=1))
    order = [i for step in walk(source(packed=False)) for i in step]
    assert order == [i for step in walk(source(packed=False, batch_size=3, micro_batch_tokens=100)) for i in step]
    packed = [sorted(step) for step in walk(source())]
    assert packed == [sorted(order[at : at + 4]) for at in (0, 4, 8)]


@pytest.mark.parametrize("stop", range(10))
def test_a_source_continued_after_any_step_goes_on_as_the_uninterrupted_one(stop: int) -> None:
    whole = walk(source(epochs=3))
    first, second = source(epochs=3), source(epochs=3)
    steps = iter(first)
    before = [examples(next(steps)) for _ in range(stop)]
    second.load_state_dict(first.state_dict())
    assert before + walk(second) == whole


def test_the_state_after_a_step_counts_that_step() -> None:
    given = source(epochs=3)
    assert given.state_dict() == {"step": 0}
    steps = iter(given)
    for number in (1, 2, 3, 4):
        next(steps)
        assert given.state_dict() == {"step": number}


@pytest.mark.parametrize(
    ("epochs", "steps", "num_steps"),
    [
        (1.0, None, 3),
        (2.0, None, 6),
        (0.34, None, 1),
        (0.01, None, 1),  # never none
        (1.7, None, 5),
        (2.4, None, 7),
        (1.0, 7, 7),  # steps win
        (9.0, 1, 1),
    ],
)
def test_the_number_of_steps(epochs: float, steps: int | None, num_steps: int) -> None:
    given = source(epochs=epochs, steps=steps)
    assert given.num_steps == num_steps
    assert walk(given) == walk(source(epochs=99))[:num_steps]


def test_a_batch_is_cut_into_micro_batches_within_the_token_budget() -> None:
    steps = list(source())
    assert max(map(len, steps)) > 1
    assert all(batch.num_tokens <= 10 for step in steps for batch in step)


def test_a_packed_batch_needs_as_few_micro_batches_as_fit() -> None:
    """All ten examples, 45 tokens, in five of ten: 8+2, 7+3, 6+4, 5+5, 3+2."""
    (step,) = source(batch_size=10)
    assert sorted(batch.num_tokens for batch in step) == [5, 10, 10, 10, 10]


def test_for_evaluation_every_example_comes_once_in_the_order_given() -> None:
    batches = list(source().in_order())
    assert examples(batches) == list(range(10))
    assert all(batch.num_tokens <= 10 for batch in batches)


def test_a_data_set_measures_nothing_itself() -> None:
    assert source().after_step({}) == {}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_what_is_read_is_what_the_steps_yield(steps: int) -> None:
    given = source(steps=steps)
    assert given.read() == sorted({index for step in walk(given) for index in step})
