"""Measures finished runs: held-out metrics with intervals, comparison, cross-validation; and scores data files."""

from fairlead.evaluation.crossval import cross_validate
from fairlead.evaluation.evaluate import evaluate
from fairlead.evaluation.metrics import Estimate
from fairlead.evaluation.score import score_file

__all__ = ["Estimate", "cross_validate", "evaluate", "score_file"]
