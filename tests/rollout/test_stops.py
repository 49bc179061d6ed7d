"""Stop strings, on a byte-level tokenizer whose tokens cut words and characters anywhere."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import models, scatter, tokenizer

from fairlead.data.render import Renderer
from fairlead.errors import ConfigError
from fairlead.rollout.native import NativeSampler
from fairlead.rollout.stops import Stops, stop_length, text_before
from fairlead.types import Prompt, Sampling

PROMPTS = [Prompt(text) for text in ("why?", "the lamp", "Question: why does the lamp flicker?", "a", "loose fuse is")]


def _renderer() -> Renderer:
    return Renderer(tokenizer(), template="question-answer", max_length=200)


def _ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("text", "stop", "before"),
    [
        ("the lamp is loose. Question: no", "Question:", "the lamp is loose."),
        ("the lamp is loose", "s lo", "the lamp i"),  # begins and ends inside of tokens
        ("one\n\ntwo", "\n\n", "one"),
        ("naïve 漢字 text", "字 t", "naïve 漢"),
        ("a b", "a", ""),
        (" why", " w", ""),
        ("fuse fuse", "fuse f", ""),
    ],
)
def test_the_token_that_completes_a_stop_string_is_the_last(text: str, stop: str, before: str) -> None:
    ids = _ids(text)
    prefixes = [tokenizer().decode(ids[: n + 1]) for n in range(len(ids))]
    wanted = next(n + 1 for n, prefix in enumerate(prefixes) if stop in prefix)
    length = stop_length(_renderer(), ["never there", stop], ids)
    assert length == wanted
    assert text_before(_renderer(), ["never there", stop], ids[:length]) == before


def test_special_tokens_are_no_text_and_do_not_break_a_stop_string() -> None:
    pad = tokenizer().pad_token_id
    ids = [token for each in _ids("the lamp flicker") for token in (each, *[pad] * 40)]
    length = stop_length(_renderer(), ["lamp fl"], ids)
    assert length is not None and text_before(_renderer(), ["lamp fl"], ids[:length]) == "the"
    assert stop_length(_renderer(), ["lamp is"], ids) is None


def test_rows_are_watched_apart() -> None:
    stops, (first, second) = (
        Stops(_renderer(), ["no"], 2),
        _ids("no")[:2] if len(_ids("no")) > 1 else (_ids("n")[0], _ids("o")[0]),
    )
    assert stops.add([0, 1], [first, second]) == [False, False]
    assert stops.add([1, 0], [first, second]) == [False, True]
    assert stops.add([1], [second]) == [True]
    assert stops.stopped == {0, 1}


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty string"):
        Stops(_renderer(), ["x", ""], 1)


def test_sampling_stops_where_the_same_text_first_holds_a_stop_string() -> None:
    """In fp64, where draws do not depend on who else is still there."""
    made = models(("policy",), dtype=torch.float64)
    scatter(made, 0.2)
    renderer = _renderer()
    sampler = NativeSampler(made, renderer)
    whole = sampler.generate(PROMPTS, sampling=Sampling(40, min_new_tokens=40), key=(0,), num_samples=4)
    stop = (whole[0].text[6:9], whole[5].text[11:13], "漢")
    assert all(stop)
    sampling = Sampling(40, min_new_tokens=40, stop=stop)
    rollouts = sampler.generate(PROMPTS, sampling=sampling, key=(0,), num_samples=4)
    assert sum(a.response_ids != b.response_ids for a, b in zip(rollouts, whole, strict=True)) >= 2
    for rollout, full in zip(rollouts, whole, strict=True):
        texts = [tokenizer().decode(full.response_ids[: n + 1], skip_special_tokens=True) for n in range(40)]
        length = next((n + 1 for n, text in enumerate(texts) if any(s in text for s in stop)), 40)
        assert rollout.response_ids == full.response_ids[:length]
        assert rollout.finished == any(s in texts[length - 1] for s in stop)
        cut = min([texts[length - 1].find(s) for s in stop if s in texts[length - 1]], default=None)
        assert rollout.text == texts[length - 1][:cut].strip()
