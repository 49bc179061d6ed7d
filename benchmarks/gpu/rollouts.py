"""Stages that sample or judge: rounds of PPO, decoding, scoring."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu import device as machine
from benchmarks.gpu.formulas import FORWARD, FULL, LORA, causal_pairs, decode_bytes, key_value_bytes, operations
from benchmarks.gpu.results import Case, bandwidth, rates
from benchmarks.gpu.sizes import SIZES, Rows, Size, write_rows
from benchmarks.gpu.training import ADAPTER, Trained, recipe, train

Call = tuple[float, Any]
"""Seconds, and what came back."""
Ask = Callable[[], Case]
"""A case that is measured when it is called, and whose failure stops no other."""

ROUNDS = 4
"""Of PPO, at most; the first is not timed."""
EPOCHS = 2
"""Of each round."""


def ppo(job: Mapping[str, Any]) -> Iterator[Case]:
    """Policy, reference, value and a trained reward: with adapters, on one base."""
    from fairlead.rollout.experience import Collector
    from fairlead.rollout.native import NativeSampler

    size, mode = SIZES[job["size"]], job["mode"]
    load, judge = size.load, trained_reward(job)
    rows = write_rows(Path(job["work"]) / "prompts.jsonl", Rows(size).prompts(ROUNDS * load.prompts))
    unit = EPOCHS * -(-load.prompts // load.minibatch)
    settings = {
        "reward": str(judge),
        "rollout_size": load.prompts,
        "rollout_rows": load.prompts,
        "epochs": EPOCHS,
        "max_new_tokens": load.new_tokens,
    }
    made = recipe("ppo", job, rows, ppo=settings, train={"steps": ROUNDS * unit, "batch_size": load.minibatch})
    with (
        machine.clocked(NativeSampler, "generate", job["device"]) as sampled,
        machine.clocked(Collector, "measure", job["device"]) as measured,
    ):
        found = train(made, size, mode, job["seconds"], most=ROUNDS * unit, unit=unit, warmup=unit)
    yield rounds_case(job, found, unit, sampled, measured)


def rounds_case(
    job: Mapping[str, Any], found: Trained, unit: int, sampled: Sequence[Call], measured: Sequence[Call]
) -> Case:
    """The figures of whole rounds of ``unit`` steps, the first left out, from the calls of sampler and measurement."""
    size, mode = SIZES[job["size"]], job["mode"]
    load, steps, limit = size.load, found.watched.timed, job["limits"]["operations"]
    rounds = len(steps) // unit
    sampling, measuring = (sum(seconds for seconds, _ in calls[-rounds:]) for calls in (sampled, measured))
    rollouts = [rollout for _, result in sampled[-rounds:] for rollout in result]
    source = sum(step.source for step in steps)
    updating = sum(step.seconds for step in steps) - source
    new_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    needed = sum(step.operations for step in steps)
    shapes = [(len(rollout.prompt_ids), len(rollout.response_ids)) for rollout in rollouts]
    reading = 3 * reading_operations(size, shapes) + reading_operations(size, shapes, has_head=False)
    case = Case(
        f"ppo, {mode}, {load.prompts} prompts of {load.prompt[1]} and {load.new_tokens} new",
        notes={"rounds": rounds, "epochs": EPOCHS, "micro_batch_tokens": found.micro_batch_tokens},
    )
    case.add("new tokens a second, whole round", "1/s", new_tokens / (source + updating))
    case.add("seconds a round", "s", (source + updating) / rounds)
    case.add("seconds a round, sampling", "s", sampling / rounds)
    case.add("seconds a round, log-probabilities", "s", measuring / rounds)
    case.add("seconds a round, rewards and the rest", "s", (source - sampling - measuring) / rounds)
    case.add("seconds a round, update", "s", updating / rounds)
    case.add("new tokens a second, sampling", "1/s", new_tokens / sampling)
    case.add("tokens a second, update", "1/s", sum(step.tokens for step in steps) / updating)
    rates(case, limit, (needed + reading) / (source + updating), ", whole round")
    rates(case, limit, needed / updating, ", update")
    case.add("peak memory", "GB", found.peak / 1e9)
    return case


def reading_operations(size: Size, rows: Sequence[tuple[int, int]], *, has_head: bool = True) -> float:
    """Of one forward pass over rows of (prompt, response) tokens, the head asked for the responses. Sampling is one,
    with the steps of its decoding added up; policy and reference take one each, and a reward one without a head."""
    return operations(
        size.shape,
        tokens=sum(prompt + response for prompt, response in rows),
        counted=sum(response for _, response in rows) if has_head else 0,
        pairs=sum(causal_pairs(prompt + response) for prompt, response in rows),
        mode=FORWARD,
    )


def trained_reward(job: Mapping[str, Any]) -> Path:
    """The run of a reward adapter on the base, by the real stage, one step long."""
    import fairlead

    size = SIZES[job["size"]]
    work = Path(job["work"])
    path = work / "runs" / "judge"
    if not (path / "model").is_dir():
        rows = write_rows(work / "judge.jsonl", Rows(size).pairs()[: size.load.pairs])
        settings = recipe("reward", dict(job) | {"mode": LORA}, rows, train={"steps": 1, "batch_size": 2})
        settings["run"]["name"] = "judge"
        fairlead.train(settings)
    return path


# --- decoding ------------------------------------------------------------------------------------------------------


def decode(job: Mapping[str, Any]) -> Iterator[Ask]:
    """The sampler on the bf16 base, and on the base under an adapter, which is what a policy of PPO is."""
    size = SIZES[job["size"]]
    load = size.load
    plain, middle = opened(job, None), load.batches[len(load.batches) // 2]
    for batch in load.batches:
        yield partial(decoding, job, size, plain, batch, "bf16" if on_gpu(job) else "fp32", asks=batch == middle)
    yield partial(decoding, job, size, opened(job, ADAPTER), middle, "under an adapter")


def on_gpu(job: Mapping[str, Any]) -> bool:
    return job["device"].startswith("cuda")


def opened(
    job: Mapping[str, Any], adapter: Mapping[str, Any] | None, roles: tuple[str, ...] = ("policy",)
) -> tuple[Any, Any]:
    """Roles on the base, and what renders their prompts."""
    from fairlead.config import ModelSection
    from fairlead.data.render import Renderer
    from fairlead.models.load import load_base, load_tokenizer, pick_device
    from fairlead.models.precision import autocast_of
    from fairlead.models.roles import Models

    size, path = SIZES[job["size"]], str(Path(job["work"]) / "base")
    dtype = "bfloat16" if on_gpu(job) else "float32"
    section = ModelSection.model_validate({"path": path, "adapter": adapter, "dtype": dtype, "device": job["device"]})
    device, tokenizer = pick_device(section.device), load_tokenizer(path)
    base = load_base(section, tokenizer, None, seed=0, device=device)
    models = Models(base, roles, adapter=section.adapter, autocast=autocast_of(section, device))
    return models, Renderer(tokenizer, template="plain", max_length=size.load.longest)


def decoding(
    job: Mapping[str, Any], size: Size, made: tuple[Any, Any], batch: int, what: str, *, asks: bool = False
) -> Case:
    from fairlead.rollout.native import NativeSampler
    from fairlead.types import Prompt, Sampling

    load, device, (models, renderer) = size.load, job["device"], made
    sampler = NativeSampler(models, renderer, rows=batch)
    rows = Rows(size).prompts(batch)
    prompts = [Prompt(" ".join(f"w{i}" for i in row["prompt"])) for row in rows]
    machine.forget_peak(device)

    def sample(new_tokens: int, number: int) -> tuple[float, list[Any]]:
        began = machine.now(device)
        rollouts = sampler.generate(prompts, sampling=Sampling(new_tokens), key=(0, "decode", number))
        return machine.now(device) - began, rollouts

    sample(4, 0)
    first = statistics.median(sample(1, number)[0] for number in range(3))
    found = [sample(load.new_tokens, 0)]
    while sum(seconds for seconds, _ in found) < job["seconds"] / 4 and len(found) < 5:
        found.append(sample(load.new_tokens, len(found)))
    seconds, rollouts = sorted(found, key=lambda each: each[0])[len(found) // 2]
    network = models.causal
    read = sum(p.numel() * p.element_size() for p in network.parameters())
    if not size.shape.tied:
        embeddings = network.get_input_embeddings().weight
        read -= embeddings.numel() * embeddings.element_size()
    needed = decode_bytes(
        weights=read,
        key_value=key_value_bytes(size.shape, network.dtype.itemsize),
        prompts=[len(rollout.prompt_ids) for rollout in rollouts],
        responses=[len(rollout.response_ids) for rollout in rollouts],
    )
    case = Case(f"decode, {what}, batch {batch}, {load.prompt[1]} + {load.new_tokens} tokens")
    case.add("new tokens a second", "1/s", sum(len(rollout.response_ids) for rollout in rollouts) / seconds)
    case.add("milliseconds a token after the first", "ms", 1e3 * (seconds - first) / max(1, load.new_tokens - 1))
    bandwidth(case, job["limits"]["bytes"], needed / max(1e-9, seconds - first))
    case.add("peak memory", "GB", machine.peak(device) / 1e9)
    if asks:
        case.job = {
            "kind": "decode",
            "model": str(Path(job["work"]) / "base"),
            "device": device,
            "rows": [row["prompt"] for row in rows],
            "new_tokens": load.new_tokens,
        }
    return case


# --- scoring -------------------------------------------------------------------------------------------------------


def score(job: Mapping[str, Any]) -> Iterator[Ask]:
    """Rewards of responses by an adapter and by a model of its own, and log-probabilities as a reference gives them."""
    from fairlead.algorithms.reference import measure
    from fairlead.data.pack import micro_batches, token_batch
    from fairlead.data.render import Tree
    from fairlead.models.load import pick_device
    from fairlead.rollout.rewards import open_model

    size, device = SIZES[job["size"]], pick_device(job["device"])
    load, draw = size.load, Rows(size, seed=1)
    rows = [(load.prompt[1], load.response[1])] * load.scored
    ids = [tuple(draw.ids(prompt + response)) for prompt, response in rows]
    name = f"score, {{}}, {load.scored} rows of {sum(rows[0])}"
    needed = reading_operations(size, rows, has_head=False)
    judges = {"reward adapter": trained_reward}
    if FULL in size.modes:
        judges["reward model of its own"] = classifier
    for what, make in judges.items():
        judge = open_model(str(make(job)), device=device)
        yield partial(passing, job, name.format(what), ids, needed, partial(judge.score_ids, ids))
    models, renderer = opened(job, ADAPTER, ("policy", "reference"))
    trees = [Tree(row[: load.prompt[1]], (row[load.prompt[1] :],)) for row in ids]
    groups = micro_batches([tree.num_tokens for tree in trees], size.micro_batch_tokens, packed=models.forest)
    batches = [token_batch([trees[i] for i in g], packed=models.forest, pad_id=renderer.eos) for g in groups]
    needed = reading_operations(size, rows)
    yield partial(
        passing, job, name.format("log-probabilities"), ids, needed, lambda: list(measure(models, iter(batches), trees))
    )


def classifier(job: Mapping[str, Any]) -> Path:
    """The base as a reward model of its own, as a stage that trains all weights saves it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base, folder = Path(job["work"]) / "base", Path(job["work"]) / "classifier"
    if not folder.is_dir():
        made = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16, num_labels=1)
        made.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def passing(
    job: Mapping[str, Any], name: str, rows: Sequence[Sequence[int]], needed: float, work: Callable[[], object]
) -> Case:
    machine.forget_peak(job["device"])
    spent = statistics.median(machine.seconds(job["device"], work, repeats=5, warmup=1, at_most=job["seconds"]))
    case = Case(name)
    case.add("tokens a second", "1/s", sum(map(len, rows)) / spent)
    rates(case, job["limits"]["operations"], needed / spent)
    case.add("peak memory", "GB", machine.peak(job["device"]) / 1e9)
    return case


STAGES = {"ppo": ppo, "decode": decode, "score": score}
