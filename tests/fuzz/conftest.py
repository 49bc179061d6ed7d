"""How many examples a property is tried on: few in every run of the tests, many by `make fuzz`."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[pytest.param(1, id="few"), pytest.param(40, id="many", marks=pytest.mark.slow)])
def times(request: pytest.FixtureRequest) -> int:
    return request.param
