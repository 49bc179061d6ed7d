"""trlX's TRLConfig (v0.3 to main, with the `delta_kwargs` that v0.7 removed) as a recipe for PPO or SFT: what several
keys say together. The keys that speak for themselves are in `trlx_keys`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fairlead.errors import ConfigError
from fairlead.migration.draft import NOTHING, Draft, Imported, Rule
from fairlead.migration.trlx_keys import (
    COMMON,
    INSTEAD,
    LEFT,
    METHODS,
    PEFT,
    PPO,
    RFT,
    RFT_SAMPLING,
    SAMPLING,
    SFT,
)


def import_trlx(source: Mapping[str, Any], name: str = "trlX") -> Imported:
    """The recipe of a configuration (nested, flat with dotted keys, or both). Raises ConfigError for ILQL and
    seq2seq models, and for values that no recipe can hold."""
    draft = Draft(source)
    method = _method(draft)
    draft.put("algorithm", method, "train.trainer and method.name")
    draft.put("data.template", "plain", "trlX's prompts and samples are plain text")
    draft.apply(COMMON)
    if (tokenizer := draft.take("tokenizer.tokenizer_path")) not in (None, draft.given.get("model.model_path")):
        draft.put("model.tokenizer", tokenizer, "tokenizer.tokenizer_path")
    _adapter(draft, method)
    _schedule(draft, {"ppo": _ppo_steps, "rft": _rft_steps, "sft": _sft_steps}[method](draft))
    _passes(draft)
    if method == "ppo":
        draft.apply(PPO)
        _kl(draft)
        _rewards(draft)
        _sampling(draft)
        _words_for_ppo(draft)
    elif method == "rft":
        draft.apply(RFT)
        _first_values(draft, "method.gen_kwargs.")
        draft.apply(RFT_SAMPLING, "method.gen_kwargs.")
        _words_for_rft(draft)
    else:
        draft.apply(SFT)
        _words_for_sft(draft)
    header = (
        f"Made by `fairlead import trlx` of {name}. Behind each setting stands the key it comes from; all others are\n"
        "Fairlead's defaults, which `fairlead train FILE --dry-run` shows."
    )
    return draft.finish(header, LEFT if method == "ppo" else {**LEFT, "method.": "it belongs to another method"})


def _method(draft: Draft) -> str:
    """As in trlX the trainer decides, where it is named."""
    trainer, name = draft.take("train.trainer"), draft.take("method.name")
    said = [str(each or "").lower() for each in (trainer, name)]
    found = next((method for each in said for method in METHODS if method in each), None)
    if found is None and any(key in draft.given for key in ("method.ppo_epochs", "method.init_kl_coef")):
        found = "ppo"
    if found is None:
        raise ConfigError(
            f"the file names no method of trlX (method.name={name!r}, train.trainer={trainer!r})",
            hint="add `method.name: PPOConfig`, `RFTConfig` or `SFTConfig`; print(config) in trlX shows it whole",
        )
    if found in INSTEAD:
        raise ConfigError(*INSTEAD[found])
    if draft.given.get("model.model_arch_type") == "seq2seq":
        raise ConfigError("model.model_arch_type=seq2seq: Fairlead trains decoders alone", "a causal language model")
    if "nemo" in said[0]:
        draft.leave("train.trainer", "Megatron's tensor and pipeline parallelism; the method itself is the same")
    return found


def _words_for_ppo(draft: Draft) -> None:
    draft.wanted("data.path", "prompts, an argument of trlx.train: a file, a folder or a hub id")
    draft.wanted("ppo.reward", "reward_fn, an argument of trlx.train: module:function")
    draft.wanted("ppo.eval_prompts, ppo.watch, ppo.stop", "where you had eval_prompts, metric_fn, stop_sequences")
    draft.differs("the value head", "one linear layer on the trunk; trlX's are two, twice as wide between them")
    draft.differs("bounds", "on gradients (optim.max_grad_norm=1), ratios (ppo.ratio_guard=10); null, as trlX: none")


def _words_for_rft(draft: Draft) -> None:
    draft.wanted("data.path", "prompts, an argument of trlx.train: a file, a folder or a hub id")
    draft.wanted("rft.reward", "reward_fn, an argument of trlx.train: module:function")
    draft.wanted("rft.eval_prompts, rft.watch, rft.stop", "where you had eval_prompts, metric_fn, stop_sequences")
    draft.differs("what is learned", "responses and their end; there prompts and padding too")
    draft.differs("a batch", "train.batch_size prompts with all their kept responses; there so many responses")
    draft.differs("bounds", "on gradients (optim.max_grad_norm=1); null, as trlX: none")


def _words_for_sft(draft: Draft) -> None:
    kept = draft.under("method.gen_kwargs.")
    for key in kept:
        draft.take(f"method.gen_kwargs.{key}")
    if kept:
        draft.leave("method.gen_kwargs", "samples are shown at temperature 1, with at most 64 tokens")
    draft.wanted("data.path", "samples, an argument of trlx.train; where each is one text: algorithm=pretrain")
    draft.differs("bounds", "on gradients (optim.max_grad_norm=1); null, as trlX: none")


# --- models --------------------------------------------------------------------------------------------------------


def _adapter(draft: Draft, method: str) -> None:
    """`delta_kwargs` (OpenDelta, to v0.6) or `peft_config`, else which layers are trained."""
    unfrozen = draft.number("model.num_layers_unfrozen", -1)
    delta, peft = draft.under("model.delta_kwargs."), draft.under("model.peft_config.")
    for section in ("delta_kwargs", "peft_config"):
        if method != "sft" and draft.number(place := f"model.{section}.lora_dropout", 0):
            draft.leave(place, "dropout is off in what samples and is compared")
    if delta:
        _delta(draft, unfrozen)
    elif peft:
        _peft(draft)
        if unfrozen >= 0:
            draft.leave("model.num_layers_unfrozen", "trlX does not read it beside peft_config")
    elif unfrozen > 0:
        draft.put("model.num_layers_unfrozen", unfrozen, "model.num_layers_unfrozen")
        draft.differs("model.num_layers_unfrozen", "embeddings, the last norm and the head are frozen too")
    elif unfrozen == 0:
        draft.leave("model.num_layers_unfrozen", "a policy of which nothing is trained; here all layers are")
    own = draft.number("method.num_value_layers_unfrozen", 0) if method == "ppo" else 0
    if own and (delta or peft):
        draft.leave(
            "method.num_value_layers_unfrozen",
            "layers of its own need a policy whose weights are trained; ppo.value.trunk=adapter gives it an adapter",
        )
    elif own:
        draft.put("ppo.value.trunk", "layers", "method.num_value_layers_unfrozen")
        draft.put("ppo.value.num_layers", own, "method.num_value_layers_unfrozen")


def _delta(draft: Draft, unfrozen: float) -> None:
    prefix = "model.delta_kwargs."
    if (kind := draft.take(f"{prefix}delta_type")) != "lora":
        raise ConfigError(f"{prefix}delta_type={kind!r}: of OpenDelta's methods trlX had lora alone", "lora")
    _rank_and_alpha(draft, prefix, "OpenDelta", lora_r=("rank", 8), lora_alpha=("alpha", 16))
    draft.apply({"lora_dropout": Rule("model.adapter.dropout")}, prefix)
    modules = draft.take(f"{prefix}modified_modules", "all")
    draft.put("model.adapter.targets", "all-linear" if modules == "all" else modules, f"{prefix}modified_modules")
    if unfrozen > 0:
        draft.put("model.adapter.last", unfrozen, "model.num_layers_unfrozen")
    if modules == "attention":
        draft.differs(
            f"{prefix}modified_modules", "with the output projection, which trlX left out for GPT-J and GPT-NeoX"
        )


def _peft(draft: Draft) -> None:
    prefix = "model.peft_config."
    if (kind := draft.take(f"{prefix}peft_type", "LORA")) != "LORA":
        raise ConfigError(f"{prefix}peft_type={kind!r}: Fairlead's adapters are LoRA, rsLoRA and DoRA", "LORA")
    _rank_and_alpha(draft, prefix, "peft", r=("rank", 8), lora_alpha=("alpha", 8))
    modules = draft.take(f"{prefix}target_modules")
    if modules is None:
        draft.differs(f"{prefix}target_modules", "not given: all linear layers; peft's choice depends on the family")
    else:
        named = f"re:{modules}" if isinstance(modules, str) and modules != "all-linear" else modules
        draft.put("model.adapter.targets", named, f"{prefix}target_modules")
    draft.apply(PEFT, prefix)


def _rank_and_alpha(draft: Draft, prefix: str, library: str, **keys: tuple[str, int]) -> None:
    """Written out where the library's default is not ours."""
    for theirs, (ours, default) in keys.items():
        origin = prefix + theirs if prefix + theirs in draft.left else f"{library}'s default"
        draft.put(f"model.adapter.{ours}", draft.take(prefix + theirs, default), origin)


# --- length and learning rate --------------------------------------------------------------------------------------


def _sft_steps(draft: Draft, passes: float | None = None) -> float | None:
    """``passes``: so many epochs of trlX's are one of ours."""
    total, epochs = draft.number("train.total_steps"), draft.number("train.epochs")
    if total is not None:
        draft.put("train.steps", total, "train.total_steps")
        if epochs is not None:
            draft.leave("train.epochs", "train.steps wins; trlX ends after the fewer of both")
    elif epochs is not None and passes is None:
        draft.put("train.epochs", epochs, "train.epochs")
    elif epochs is not None and passes is not None:
        draft.put("train.epochs", math.ceil(epochs / passes), "train.epochs / method.n_improve_steps")
    return total


def _rft_steps(draft: Draft) -> float | None:
    """An epoch of trlX is one improve step; ours is a round of them."""
    return _sft_steps(draft, draft.seen_number("method.n_improve_steps") or 4)


def _ppo_steps(draft: Draft) -> float | None:
    """Optimizer steps; an epoch of trlX is a round, and it takes no more steps than its epochs hold."""
    total, epochs, rollouts = draft.number("train.total_steps"), draft.number("train.epochs"), _rollouts(draft)
    batch, passes = draft.seen_number("train.batch_size"), draft.seen_number("method.ppo_epochs")
    steps, origin = total, "train.total_steps"
    if rollouts and batch and passes and epochs:
        held = epochs * passes * math.ceil(rollouts / batch)
        if total is None or total > held:
            steps, origin = held, f"train.epochs={epochs} rounds"
    elif epochs is not None:
        draft.leave("train.epochs", "rounds; train.steps counts optimizer steps")
    if steps is not None:
        draft.put("train.steps", steps, origin)
    return steps


def _rollouts(draft: Draft) -> float | None:
    """trlX samples whole chunks until it has enough."""
    number, chunk = draft.number("method.num_rollouts"), draft.number("method.chunk_size")
    if chunk is not None:
        draft.put("ppo.rollout_rows", chunk, "method.chunk_size")
    if number is None:
        return None
    whole = math.ceil(number / chunk) * chunk if chunk else number
    draft.put("ppo.rollout_size", whole, "method.num_rollouts" + (", in whole chunks" if whole != number else ""))
    return whole


def _passes(draft: Draft) -> None:
    rows, length = draft.number("train.minibatch_size"), draft.seen_number("train.seq_length")
    if rows is not None:
        origin = "train.minibatch_size x train.seq_length"
        draft.put("train.micro_batch_tokens", rows * (512 if length is None else length), origin)


def _schedule(draft: Draft, steps: float | None) -> None:
    name = draft.take("scheduler.name")
    if name == "cosine_annealing":
        _cosine(draft, steps)
    elif name == "linear":
        _linear(draft, steps)
    elif name is not None:
        raise ConfigError(f"scheduler.name={name!r}: trlX has cosine_annealing and linear", "one of them")


def _cosine(draft: Draft, steps: float | None) -> None:
    """torch's CosineAnnealingLR: from lr down to eta_min (0) at step T_max, and up again."""
    rate, lowest = draft.seen_number("optimizer.kwargs.lr"), draft.number("scheduler.kwargs.eta_min", 0)
    period = draft.number("scheduler.kwargs.T_max")
    if rate and lowest >= rate:
        draft.put("optim.schedule", "constant", "scheduler: down to eta_min, which is the rate itself")
    elif steps and period and period >= 100 * steps:
        draft.put("optim.schedule", "constant", "scheduler: T_max is far beyond the last step")
    else:
        draft.put("optim.schedule", "cosine", "scheduler.name")
        if rate and lowest:
            draft.put("optim.min_learning_rate_ratio", _rounded(lowest / rate), "scheduler.kwargs.eta_min / lr")
        if period != steps:
            draft.differs("scheduler.kwargs.T_max", "the lowest rate is reached at the last step")


def _linear(draft: Draft, steps: float | None) -> None:
    """torch's LinearLR: from start_factor (a third) to end_factor (1) of lr within total_iters (5) steps."""
    start = draft.number("scheduler.kwargs.start_factor", 1 / 3)
    end, length = draft.number("scheduler.kwargs.end_factor", 1), draft.number("scheduler.kwargs.total_iters", 5)
    there = f"there from {start:.3g} to {end:.3g} of lr in {length} steps"
    if start < end:
        draft.put("optim.schedule", "constant", "scheduler: linear from below, a warm-up")
        draft.put("optim.warmup_steps", length, "scheduler.kwargs.total_iters")
        draft.differs("scheduler.name", f"the rate rises from 0 to lr, {there}")
    elif start == end:
        draft.put("optim.schedule", "constant", "scheduler: linear from and to the same rate")
    else:
        draft.put("optim.schedule", "linear", "scheduler.name")
        draft.put("optim.min_learning_rate_ratio", _rounded(end / start), "end_factor / start_factor")
        if length != steps or start != 1:
            draft.differs("scheduler.name", f"the rate falls from lr until the last step, {there}")


def _rounded(ratio: float) -> float:
    return float(f"{ratio:.6g}")


# --- PPO -----------------------------------------------------------------------------------------------------------


def _rewards(draft: Draft) -> None:
    scale = draft.take("method.scale_reward")
    mean, deviation = draft.number("method.ref_mean"), draft.number("method.ref_std")
    known = {"running": "running", "ref": "first", "ignored": "none", None: "none", False: "none"}
    if scale not in known:
        raise ConfigError(f"method.scale_reward={scale!r}: trlX has running, ref and ignored", "one of them")
    scaling = known[scale]
    if scale == "ref" and mean is not None and deviation:
        scaling = "none"
        source = f"{{function: module:function, weight: {_rounded(1 / deviation)}}}"
        draft.leave("method.ref_std", f"a deviation that is known is a weight of the reward: {source}")
    elif deviation is not None:
        draft.leave("method.ref_std", "trlX reads it with ref_mean and scale_reward=ref alone")
    if mean is not None:
        draft.leave("method.ref_mean", "trlX takes it off nothing; ppo.reward_baseline is taken off every score")
    if "method.scale_reward" in draft.given:
        draft.put("ppo.reward_scaling", scaling, "method.scale_reward")
    if scaling != "none" and draft.given.get("method.cliprange_reward"):
        draft.differs("method.cliprange_reward", "scores are clipped after they are scaled; there before")


def _kl(draft: Draft) -> None:
    coefficient, target = draft.number("method.init_kl_coef"), draft.number("method.target")
    horizon = draft.number("method.horizon")
    if coefficient is not None:
        draft.put("ppo.kl_coef", coefficient, "method.init_kl_coef")
    if target is not None and coefficient == 0:
        draft.leave("method.target", "a coefficient that begins at 0 stays there")
    elif target is not None:
        draft.put("ppo.adaptive_kl.target", target, "method.target")
        draft.differs(
            "method.target",
            "the KL is log policy - log reference summed over a response, once a round; there another estimate, over "
            "the prompt too",
        )
        if horizon is not None:
            draft.put("ppo.adaptive_kl.horizon", horizon, "method.horizon")
            return
    if horizon is not None:
        draft.leave("method.horizon", "of a coefficient that does not move")


def _sampling(draft: Draft) -> None:
    """Rollouts are drawn by `gen_experience_kwargs` where these are given; `gen_kwargs` are then of evaluation."""
    rollout, both = "method.gen_experience_kwargs.", "method.gen_kwargs."
    for prefix in (rollout, both):
        _first_values(draft, prefix)
    if not (own := draft.under(rollout)):
        draft.apply(SAMPLING, both)
        return
    draft.apply(SAMPLING, rollout)
    for key, value in draft.under(both).items():
        draft.take(both + key)
        if key == "temperature" and value != own.get(key, 1):
            draft.put("ppo.eval_temperature", value, both + key)
        elif value not in NOTHING and value != own.get(key) and value not in SAMPLING.get(key, Rule()).silent:
            draft.leave(both + key, "evaluations sample as the rollouts do, but for ppo.eval_temperature")


def _first_values(draft: Draft, prefix: str) -> None:
    """Of a list of values that trlX tries one after the other."""
    for key, value in draft.under(prefix).items():
        if isinstance(value, list) and key in SAMPLING:
            draft.left[prefix + key] = value[0] if value else None
            draft.leave(prefix + key, "evaluations do not try one value after the other; the first one is taken")
