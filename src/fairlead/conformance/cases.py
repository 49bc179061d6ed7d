"""The table of convergence."""

from __future__ import annotations

from fairlead.conformance.case import Case
from fairlead.conformance.pairs import pair_cases
from fairlead.conformance.policies import policy_cases

CASES: dict[str, Case] = {case.name: case for case in (*pair_cases(), *policy_cases())}
