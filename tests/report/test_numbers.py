"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from fairlead.report.numbers import compact, duration, interval, number
from fairlead.report.read import Estimate


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.71234, "0.712"),
        (0.5, "0.5"),
        (12.345, "12.3"),
        (-3.14159, "\u22123.14"),
        (1234.56, "1,235"),
        (123456.7, "123,500"),
        (1234567, "1,234,567"),
        (3e-4, "0.0003"),
        (1.5e-7, "1.5e\u22127"),
        (2.5e12, "2.5e12"),
        (0, "0"),
        (None, "\u2013"),
        (math.nan, "\u2013"),
    ],
)
def test_numbers_have_few_digits_and_thousands_are_separated(value: float | None, text: str):
    assert number(value) == text


def test_a_rounded_zero_has_no_sign():
    assert number(-0.0001, 2) == "0.00"


def test_intervals_have_the_digits_of_their_mean():
    assert interval(Estimate(0.71, 0.68, 0.7444)) == "[0.680, 0.744]"
    assert interval(Estimate(31.44, 30.1, 32.06)) == "[30.1, 32.1]"
    assert interval(Estimate(0.71, None, 0.74)) == ""


def test_durations_are_in_units_a_person_uses():
    assert [duration(s) for s in (12.34, 90, 7325, None)] == ["12.3 s", "2 min", "2 h 2 min", "\u2013"]


def test_ticks_are_short():
    assert [compact(v) for v in (0.25, 20000.0, 1.5e6, -2e9, 3e-4)] == ["0.25", "20k", "1.5M", "\u22122e9", "3e\u22124"]
