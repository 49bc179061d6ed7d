"""A plan in words and tables: lines for the start of a run, sections for `fairlead inspect`. A GB is 1e9 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fairlead.config import Recipe
from fairlead.data.inspect.show import Section
from fairlead.planning.memory import total
from fairlead.planning.plan import BuildModels, Plan, plan_run
from fairlead.planning.tree import Node, lines
from fairlead.types import Algorithm

RULE_FROM = 10**9
"""Parameters from which the rule of thumb is shown."""


def summary(plan: Plan) -> list[str]:
    """What is trained on what, and whether it will fit."""
    first = plan.parts[0]
    kinds = [f"{part.role} {part.trainable:,}" for part in plan.parts if part.trainable]
    found = [
        f"{plan.architecture}, {plan.layers} layers, {first.parameters:,} parameters in {size(first.weights)}",
        f"trained: {plan.trainable:,} of {plan.parameters:,} parameters ({plan.share:.4%}): {', '.join(kinds)}",
        f"memory: {size(plan.held)} held, {size(plan.worst)} at the worst moment; "
        f"{size(plan.free)} of {size(plan.size)} are free on {plan.device}",
    ]
    if plan.micro_batch_tokens and plan.step is not None:
        found[-1] += f"; {plan.step.tokens:,} tokens in a forward pass"
    if plan.untraced:
        found.append(f"the working memory of a step is not in this figure: {plan.untraced}")
    if plan.worst > plan.free:
        found.append(
            f"warning: this will not fit: {size(plan.worst - plan.free)} are missing; see `fairlead inspect`, and try "
            "model.adapter=lora, model.quantize=4bit, model.gradient_checkpointing=true or fewer "
            "train.micro_batch_tokens"
        )
    return found


def announce(
    recipe: Recipe, algorithm: Algorithm[Any], build_models: BuildModels, **known: Any
) -> tuple[list[str], int]:
    """The summary for the start of a run, and the tokens of a forward pass. Where no plan can be made, training says
    why, or does without."""
    try:
        plan = plan_run(recipe, algorithm, build_models, **known)
    except Exception as error:  # whatever a family does without weights, a plan stops no run
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [f"no memory plan: {why}"], recipe.train.tokens_or_default
    return summary(plan), plan.micro_batch_tokens


def sections(plan: Plan) -> Iterator[Section]:
    yield Section("Model", summary(plan))
    yield Section(
        "Tree",
        head=("module", "shape", "parameters", "trained", "bytes"),
        table=[_branch(branches, node) for branches, node in lines(plan.modules)],
    )
    yield _held(plan)
    yield _moments(plan)
    if plan.parts[0].parameters >= RULE_FROM:
        yield _rule(plan.parts[0].parameters)


def size(number: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}" if number < 1000 * unit else f"{number / unit:,.0f} {name}"
    return f"{number} B"


def _branch(branches: str, node: Node) -> tuple[str, ...]:
    kind = "" if node.shapes else f" ({node.kind})"
    shape = "counted above" if node.tied else ", ".join(node.shapes)
    trained = f"{node.trainable:,}" if node.trainable else ""
    return branches + node.name + kind, shape, f"{node.parameters:,}", trained, size(node.bytes)


def _held(plan: Plan) -> Section:
    fields = sorted({field for part in plan.parts for field in part.states})
    rows = [
        (
            part.role,
            f"{part.parameters:,}",
            size(part.weights),
            size(part.gradients),
            *(size(part.states.get(field, 0)) for field in fields),
        )
        for part in plan.parts
    ]
    blank = [""] * (1 + len(fields))
    rows += [(f"other model: {name}", "", size(number), *blank) for name, number in plan.others.items()]
    if plan.buffers:
        rows.append(("buffers", "", size(plan.buffers), *blank))
    return Section("Exact: what each role holds", (), ("role", "parameters", "weights", "gradients", *fields), rows)


def _moments(plan: Plan) -> Section:
    rows: list[tuple[str, str, str]] = []
    gradients = total(plan.parts)["gradients"]
    ends: list[str] = []
    if step := plan.step:
        each = step.peaks.kept / step.tokens / plan.layers
        recomputed = ", recomputed" if plan.checkpointing else ""
        rows += [
            ("activations", size(step.peaks.kept), f"{each:,.0f} bytes a token and layer{recomputed}"),
            ("log-probabilities", size(step.peaks.head), "one chunk of logits at a time, the first ones kept"),
            ("temporaries", size(step.peaks.temporaries), "of the backward pass"),
        ]
        if step.copies:
            rows.append(("copies", size(step.copies), "of weights, in the type of autocast"))
        ends.append(
            f"a step of {step.tokens:,} tokens in {step.rows:,} row{'s' * (step.rows > 1)}, each token counted: "
            f"{size(plan.held)} held + {size(gradients)} of gradients + {size(step.bytes)} = "
            f"{size(plan.held + gradients + step.bytes)}"
        )
    if decoding := plan.decoding:
        rows += [
            ("keys and values", size(decoding.cache), f"exact: {decoding.rows:,} rows of {decoding.length:,} tokens"),
            ("reading prompts", size(decoding.prompts), "before the first new token"),
        ]
        ends.append(f"decoding: {size(plan.held)} held + {size(decoding.bytes)} = {size(plan.held + decoding.bytes)}")
    if plan.rollouts:
        rows.append(("rollouts", size(plan.rollouts), "exact: one round, in main memory"))
    return Section("Working memory", ends, ("", "bytes", ""), rows)


def _rule(parameters: int) -> Section:
    billions = nominal_billions(parameters)
    return Section(
        "Rule of thumb for training all weights",
        [
            f"weights in 16 bits and two Adam states in fp32: (2 + 8) bytes x {billions:g} billion parameters = "
            f"{10 * billions:g} GB",
            f"of all {parameters:,} parameters {size(10 * parameters)}; "
            f"with gradients in 16 bits {size(12 * parameters)}",
        ],
    )


def nominal_billions(parameters: int) -> float:
    """The size a model goes by: 6.74 billion parameters are 7B, 1.32 billion 1.3B."""
    billions = parameters / 1e9
    return round(billions) if billions >= 3 else round(billions, 1)
