"""Reads plain text, with or without a label. Knows nothing of conversations."""

from __future__ import annotations

from fairlead.data.formats.base import Data, Notes, Parsed, string, truth
from fairlead.data.sources import Row
from fairlead.types import Labelled, Text


def parse_text(row: Row, notes: Notes) -> Parsed:
    return Text(string(row, "text"))


def parse_sentiment(row: Row, notes: Notes) -> Parsed:
    """A text and whether it is positive; a text whose label is -1 (as for IMDB's unsup part) is not labelled."""
    label = truth(row.data["label"])
    return Text(string(row, "text")) if label is None else Labelled("", string(row, "text"), label)


def is_labelled(data: Data) -> bool:
    return truth(data["label"]) is not None or data["label"] == -1
