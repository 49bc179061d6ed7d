"""What flows through Fairlead: records, batches, outputs, metrics, and the protocols between the rooms.

Shape legend, used in every docstring:

    B rows   T tokens of a row   S sequences of a batch   P pairs (S = 2P)   V vocabulary   H hidden

Token alignment. Index ``t`` always speaks about ``input_ids[:, t]``: ``logprobs[:, t]`` is its log-probability given
what precedes it and ``values[:, t]`` the value *before* emitting it. Every per-token tensor is [B, T].

A row is a forest of runs. A run is a stretch of tokens; its parent is the run it continues; runs stand in depth-first
order. A packed row holds many runs without parents; a preference pair is a prompt run with two children.
"""

from __future__ import annotations

from fairlead.types.algorithm import (
    Algorithm,
    Call,
    LossFn,
    Pace,
    Pass,
    Prepare,
    ReferenceUse,
    Rounds,
    Source,
    Term,
)
from fairlead.types.batches import (
    LabelledBatch,
    MixedBatch,
    PreferenceBatch,
    RankingBatch,
    RolloutBatch,
    Support,
    TokenBatch,
)
from fairlead.types.observers import Observer, Progress, Sink
from fairlead.types.outputs import Mean, Metrics, Outputs
from fairlead.types.ranks import Ranks
from fairlead.types.records import (
    Conversation,
    Demonstration,
    Labelled,
    Message,
    Preference,
    Prompt,
    Ranking,
    Record,
    Text,
    Tools,
)
from fairlead.types.rollouts import Reward, Rollout, Sampler, Sampling, Scores

__all__ = [
    "Algorithm",
    "Call",
    "Conversation",
    "Demonstration",
    "Labelled",
    "LabelledBatch",
    "LossFn",
    "Mean",
    "Message",
    "Metrics",
    "MixedBatch",
    "Observer",
    "Outputs",
    "Pace",
    "Pass",
    "Preference",
    "PreferenceBatch",
    "Prepare",
    "Progress",
    "Prompt",
    "Ranking",
    "RankingBatch",
    "Ranks",
    "Record",
    "ReferenceUse",
    "Reward",
    "Rollout",
    "RolloutBatch",
    "Rounds",
    "Sampler",
    "Sampling",
    "Scores",
    "Sink",
    "Source",
    "Support",
    "Term",
    "Text",
    "TokenBatch",
    "Tools",
]
