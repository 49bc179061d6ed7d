"""What alarms a person: each rule reads the metrics of a step, and where it compares, those of the run's beginning.

A rule looks at the metrics it names, where a step has them, and gives a message or none. Thresholds are meant to be
silent on a sound run: an alarm names a cause, it is no ornament.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

BEGINNING = 3
"""Measurements that a run's beginning is the mean of."""

JUMP = 2.0
"""Standard deviations of a round's scores by which the mean of the next one may be higher."""
LAST = "last/"
"""Before the name of a metric: its value when it was measured the time before."""

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    needs: tuple[str, ...]
    """The metrics it reads; it is silent on a step without one of them."""
    check: Callable[[Values, Values], str | None]
    """(this step's, the means of the beginning's and the last ones) -> what is wrong, and what to do."""
    since: int = 1
    """The first step that it looks at: the metrics of step 1 are of the model as it was."""


def _constant(now: Values, _: Values) -> str | None:
    if now["objective/scores_std"] > 0:
        return None
    return (
        f"every response of the round scores {now['objective/scores']:.4g}, so nothing can be learned: the reward does "
        "not tell them apart"
    )


def _jump(now: Values, start: Values) -> str | None:
    before, spread = (start.get(f"{LAST}objective/{name}", 0.0) for name in ("scores", "scores_std"))
    after = now["objective/scores"]
    if not spread or after - before <= JUMP * spread:
        return None
    return (
        f"the mean score rose from {before:.4g} to {after:.4g} in one round, {(after - before) / spread:.1f} times the "
        "spread of the scores before it: see what is paid for (marks, code fences, one phrase), and discard it or "
        "raise kl_coef"
    )


def _kl_negative(now: Values, _: Values) -> str | None:
    if now["objective/kl"] >= -0.1:
        return None
    return (
        f"the KL to the reference is {now['objective/kl']:.3f} nats a response, and can only be below zero by chance: "
        "the responses are not the policy's own (forced tokens, another engine, a changed adapter)"
    )


def _mismatch(now: Values, _: Values) -> str | None:
    if now["rollout/sampler_difference_mean"] <= 0.02:
        return None
    return (
        f"the sampler's log-probabilities differ from the trainer's by {now['rollout/sampler_difference_mean']:.3f} "
        "nats a token: another engine, precision or adapter sampled. Lower importance_cap, or engine=native"
    )


def _ratio(now: Values, _: Values) -> str | None:
    if 0.5 < now["policy/ratio"] < 2:
        return None
    return (
        f"a token is on average {now['policy/ratio']:.3g} times as likely as when it was sampled: the policy moves too "
        "far in a round. Lower optim.learning_rate or epochs, or set target_kl"
    )


def _variety(now: Values, start: Values) -> str | None:
    before, after = start["rollout/distinct_2"], now["rollout/distinct_2"]
    if after > 0.8 * before:
        return None
    return (
        f"distinct-2 of the responses fell from {before:.2f} to {after:.2f}: they repeat themselves or each other. "
        "Read the newest rollouts, and raise kl_coef"
    )


def _length(now: Values, start: Values) -> str | None:
    before, after = start["rollout/length"], now["rollout/length"]
    if 0.5 * before < after < 1.5 * before:
        return None
    word = "grew" if after > before else "shrank"
    return (
        f"responses {word} from {before:.0f} to {after:.0f} tokens: see whether the reward pays for length alone "
        "(`fairlead evaluate` on the reward run measures it)"
    )


def _entropy(now: Values, start: Values) -> str | None:
    before, after = start["policy/entropy"], now["policy/entropy"]
    if after > 0.1 * before:
        return None
    return (
        f"the policy's entropy fell from {before:.2f} to {after:.3f} nats a token: it always says the same. Raise "
        "kl_coef or entropy_coef"
    )


def _unfinished(now: Values, start: Values) -> str | None:
    before, after = start["rollout/finished"], now["rollout/finished"]
    if before < 0.5 or after > 0.2:
        return None
    return (
        f"{after:.0%} of the responses end by themselves, {before:.0%} did: raise missing_eos_penalty or max_new_tokens"
    )


def _stuck(now: Values, _: Values) -> str | None:
    if now["rewards/chosen"] != 0 or now["rewards/rejected"] != 0 or now.get("rewards/fresh_reference"):
        return None
    return (
        "the rewards are exactly zero after a step: policy and reference are the same, so nothing trains (an adapter "
        "that was loaded frozen, a learning rate of zero)"
    )


def _chosen_falls(now: Values, _: Values) -> str | None:
    if now["logps/chosen_change"] >= -10:
        return None
    return (
        f"the chosen responses are {-now['logps/chosen_change']:.1f} nats less likely than at the start: the policy "
        "unlearns what it should prefer. Mix in an sft loss, raise beta, or lower the learning rate"
    )


RULES: Sequence[Rule] = (
    Rule("reward_constant", ("objective/scores", "objective/scores_std"), _constant),
    Rule("reward_jump", ("objective/scores",), _jump),
    Rule("kl_negative", ("objective/kl",), _kl_negative),
    Rule("sampler_mismatch", ("rollout/sampler_difference_mean",), _mismatch),
    Rule("ratio", ("policy/ratio",), _ratio),
    Rule("variety", ("rollout/distinct_2",), _variety),
    Rule("length", ("rollout/length",), _length),
    Rule("entropy", ("policy/entropy",), _entropy),
    Rule("unfinished", ("rollout/finished",), _unfinished),
    Rule("rewards_stuck", ("rewards/chosen", "rewards/rejected", "logps/chosen_change"), _stuck, since=2),
    Rule("chosen_falls", ("logps/chosen_change",), _chosen_falls),
)
