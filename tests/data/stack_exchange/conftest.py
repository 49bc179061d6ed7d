"""Fixtures for dumps."""

import pytest

from fairlead.data.stack_exchange import run


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few posts a part, as if the dump were large."""
    monkeypatch.setattr(run, "PART_BYTES", (700, 700))
