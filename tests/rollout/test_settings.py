"""What settings of sampling are refused for."""

from __future__ import annotations

from typing import Any

import pytest

from fairlead.rollout.settings import DrawSettings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_new_tokens": 8, "shortest_limit": 9}, "shortest_limit=9 is above max_new_tokens=8"),
        ({"max_new_tokens": 8, "min_new_tokens": 9}, "min_new_tokens=9 is above the shortest limit, 8"),
        (
            {"max_new_tokens": 8, "shortest_limit": 4, "min_new_tokens": 5},
            "min_new_tokens=5 is above the shortest limit, 4",
        ),
        (
            {"engine": "vllm", "top_p": 0.9},
            r"top_p=0\.9 with top_k=0: vLLM says what a token was drawn from only",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DrawSettings(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"max_new_tokens": 8, "shortest_limit": 8, "min_new_tokens": 8},
        {"engine": "vllm", "top_p": 0.9, "top_k": 1000},
        {"engine": "vllm", "top_k": 1000},
        {"top_p": 0.9},
    ],
)
def test_what_goes_together_is_taken(given: dict[str, Any]) -> None:
    assert DrawSettings(**given).sampling.top_p == given.get("top_p", 1.0)
