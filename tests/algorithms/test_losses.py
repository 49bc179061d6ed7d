"""The table of the DPO family, and the settings that go with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fairlead.algorithms.dpo import Settings
from fairlead.algorithms.losses import LOSSES, settings_of

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_table_as_it_is() -> None:
    found = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert found is not None and found.loader is not None
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    page = made.PAGE.read_text("utf-8")
    assert made.written(page) == page, "run: python scripts/reference.py"
    assert all(f"| `{name}` |" in page for name in LOSSES)


def test_every_setting_that_a_loss_reads_is_a_setting() -> None:
    for loss in LOSSES.values():
        assert set(settings_of(loss)) <= Settings.model_fields.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "sigmiod"}, "there is no loss 'sigmiod'.*sigmoid"),
        ({"loss": {}}, "loss names none"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing has no effect on hinge"),
        ({"loss": "exo"}, "exo needs label_smoothing > 0"),
        ({"loss": {"sigmoid": 1, "nca": 1}, "divergence": "js"}, "divergence: .* which nca is not"),
        ({"loss": "apo_zero", "length_penalty": 0.1, "margin_coef": 1}, "margin_coef, length_penalty: .* apo_zero"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings(**given)
