"""The preference algorithms on real models: coupled losses however a step is split, extra outputs, references on
disk."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.end_to_end.rows import LABELLED, PAIRS, ROWS, SCRATCH, settings
from tests.tiny import gradients, models, relative_error, scatter

import fairlead
from fairlead.algorithms import bco, dpo, kto, reference, reward, sft
from fairlead.algorithms.reference import measure
from fairlead.data.pack import labelled_batch, preference_batch, ranking_batch, token_batch
from fairlead.data.render import Tree
from fairlead.errors import ConfigError, DataError
from fairlead.models.roles import Models
from fairlead.training.loop import backward

TREES = [
    Tree((5, 6, 7), ((8, 9, 1), (8, 4, 5, 6, 1))),
    Tree(tuple(range(3, 14)), ((20, 21, 22, 1), tuple(range(30, 41)))),
    Tree((9, 9), ((4, 1), (7, 7, 7, 1))),
    Tree((10, 11, 12, 13), ((14, 15, 1), (16, 1))),
]
LOSSES: dict[str, Any] = {
    "aot": dpo.passes(dpo.Settings(loss="aot", label_smoothing=0.1)),
    "aot_unpaired": dpo.passes(dpo.Settings(loss={"aot_unpaired": 0.7, "sft": 0.3})),
    "wpo": dpo.passes(dpo.Settings(weighting="wpo", measure=("entropy", "logits"))),
    "ld": dpo.passes(dpo.Settings(ld_alpha=0.3, length="mean")),
}


def made_of(dtype: torch.dtype = torch.float64) -> Models:
    return models(("policy", "reference"), dtype=dtype, architecture="opt")


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_couples_pairs_has_the_same_gradient_however_a_step_is_split(
    name: str, packed: bool, parts: int
) -> None:
    def run(groups: list[list[int]], packed: bool) -> tuple[Any, dict[str, float]]:
        made = made_of()
        plain = preference_batch(TREES, packed=True, pad_id=0)
        fixed = list(measure(made, iter([plain]), TREES))
        scatter(made, 0.05)
        batches = [
            preference_batch(
                [TREES[i] for i in group],
                packed=packed,
                pad_id=0,
                reference_logprobs=[row for i in group for row in fixed[i]],
            )
            for group in groups
        ]
        metrics = backward(made, LOSSES[name], batches)
        return gradients(made), metrics

    wanted, whole = run([[0, 1, 2, 3]], True)
    got, split = run([[0, 1, 2, 3][i::parts] for i in range(parts)], packed)
    assert relative_error(got, wanted) < 1e-12
    assert split == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("algorithm", [kto, bco])
def test_the_reference_point_is_that_of_the_whole_step(algorithm: Any, parts: int) -> None:
    trees = [Tree(tree.prompt, tree.responses[:1]) for tree in TREES]
    others = [Tree(tree.prompt, TREES[i - 1].responses[:1]) for i, tree in enumerate(TREES)]
    labels = [True, False, False, True]

    def run(groups: list[list[int]]) -> tuple[Any, dict[str, float]]:
        made = made_of()
        fixed, apart = (
            list(measure(made, iter([token_batch(each, packed=True, pad_id=0)]), each)) for each in (trees, others)
        )
        scatter(made, 0.05)

        def batch(group: list[int], rows: list[Tree], logps: list[list[torch.Tensor]], other: Any = None) -> Any:
            return labelled_batch(
                [rows[i] for i in group],
                [labels[i] for i in group],
                packed=True,
                pad_id=0,
                reference_logprobs=[row for i in group for row in logps[i]],
                mismatched=other,
            )

        batches = [batch(group, trees, fixed, batch(group, others, apart)) for group in groups]
        metrics = backward(made, algorithm.passes(algorithm.Settings()), batches)
        return gradients(made), metrics

    wanted, whole = run([[0, 1, 2, 3]])
    got, split = run([[0, 1, 2, 3][i::parts] for i in range(parts)])
    assert relative_error(got, wanted) < 1e-12
    assert split == pytest.approx(whole, abs=1e-12)


def test_rankings_of_two_are_pairs_and_weigh_alike() -> None:
    def run(batches: list[Any], passes: Any) -> tuple[Any, float]:
        made = models(("reward",), dtype=torch.float64, architecture="opt")
        scatter(made, 0.05)
        loss = backward(made, passes, batches)["loss"]
        return gradients(made), loss

    pairs = preference_batch(TREES, packed=True, pad_id=0)
    wanted, loss = run([pairs], reward.passes(reward.Settings()))
    ranked = partial(ranking_batch, packed=True, pad_id=0)
    for form in (reward.Settings(rankings=True), reward.Settings(loss="plackett_luce")):
        got, same = run([ranked(TREES[:1], [[0, 1]]), ranked(TREES[1:], [[0, 1]] * 3)], reward.passes(form))
        assert same == pytest.approx(loss, rel=1e-12)
        seen = [name for name in wanted if float(wanted[name].norm()) > 1e-12]  # the last bias cancels in a pair
        assert relative_error({n: got[n] for n in seen}, {n: wanted[n] for n in seen}) < 1e-12


def test_extra_outputs_are_those_of_the_models_logits() -> None:
    made = made_of()
    tree = Tree((5, 6, 7), ((8, 9, 1),))
    batch = token_batch([tree], packed=True, pad_id=0)
    with torch.no_grad(), made.use("policy"):
        found = made(batch, frozenset({"logprobs", "collision", "mean_logit"}), 0.7)
        made.causal.set_attn_implementation("eager")
        logits = made.causal(torch.tensor([[5, 6, 7, 8, 9, 1]])).logits[0, 2:5] / 0.7
    probs = logits.softmax(-1)
    torch.testing.assert_close(found.collision[batch.loss_mask], probs.square().sum(-1).log())
    torch.testing.assert_close(found.mean_logit[batch.loss_mask], logits.mean(-1))


def test_neftune_moves_embeddings_within_its_bound_and_evaluation_not_at_all() -> None:
    made = models(("policy",))
    batch = token_batch([Tree((5, 6), ((7, 8, 1),)), Tree((9,), ((4, 1),))], packed=True, pad_id=0)
    plain = made.causal.get_input_embeddings()(batch.input_ids)
    made.embedding_noise = 5.0
    torch.manual_seed(0)
    moved = (made._noisy(plain, batch) - plain).detach().abs()[0]
    width = plain.shape[-1]
    for span, tokens in ((slice(0, 5), 5), (slice(5, 8), 3)):
        bound = 5.0 / (tokens * width) ** 0.5
        assert 0.9 * bound < float(moved[span].max()) <= bound
    needs = frozenset({"logprobs"})
    with torch.no_grad(), made.use("policy"):
        noisy = made(batch, needs).logprobs
        made.eval()
        still = made(batch, needs).logprobs
        made.embedding_noise = 0.0
        torch.testing.assert_close(made(batch, needs).logprobs, still)
    assert float((noisy - still).abs().max()) > 1e-3


# --- data ------------------------------------------------------------------------------------------------------------


def test_labels_of_one_kind_are_refused(tmp_path: Path) -> None:
    rows = [row for row in LABELLED if row["label"]]
    with pytest.raises(DataError, match=r"all \d+ responses are labelled good: there is nothing to tell apart"):
        fairlead.train({"algorithm": "kto"}, settings("kto", tmp_path, **{"model.scratch": SCRATCH}), data=rows)


def test_the_batch_kl_needs_two_prompts(tmp_path: Path) -> None:
    rows = [{**row, "prompt": "why?"} for row in LABELLED]
    given = settings("kto", tmp_path, **{"model.scratch": SCRATCH, "data.eval_fraction": 0})
    with pytest.raises(DataError, match="all prompts are the same"):
        fairlead.train({"algorithm": "kto"}, given, data=rows)


def test_ties_of_rankings_are_counted_and_rankings_without_scores_have_no_ratings(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"why does {topic} stop?", "responses": ["a", "b", "c"], "scores": scores}
        for topic, scores in (("one", [2, 2, 1]), ("two", [1, 1, 1]), ("three", [3, 2, 1]), ("four", [3, 1, 1]))
    ]
    more = {"model.scratch": SCRATCH, "data.eval_fraction": 0, "reward.rankings": True}
    run = fairlead.train({"algorithm": "reward"}, settings("reward", tmp_path, **more), data=rows)
    counts = json.loads((run.path / "manifest.json").read_text())["data"]["train"]
    assert (counts["kept"], counts["dropped"]) == (3, {"tie": 1})
    more = {**more, "reward.loss": "regression", "run.name": "other"}
    with pytest.raises(DataError, match=r"have no scores, which reward\.loss=regression learns"):
        fairlead.train({"algorithm": "reward"}, settings("reward", tmp_path, **more), data=PAIRS)


# --- the reference on disk -------------------------------------------------------------------------------------------


def test_reference_log_probabilities_are_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SHARD", 10)
    base = fairlead.train({"algorithm": "pretrain"}, settings("pretrain", tmp_path, **{"model.scratch": SCRATCH}),
                          data=ROWS["pretrain"]).path  # fmt: skip
    more: dict[str, Any] = {"model.path": str(base), "data.cache": str(tmp_path / "cache"), "data.template": "auto"}

    def run(name: str, **others: Any) -> tuple[bytes, int]:
        measured: list[int] = []
        plain = reference.measure
        monkeypatch.setattr(reference, "measure", lambda *given: measured.append(1) or plain(*given))
        made = fairlead.train({"algorithm": "dpo"}, settings("dpo", tmp_path, **more, **others, **{"run.name": name}),
                              data=ROWS["dpo"])  # fmt: skip
        monkeypatch.setattr(reference, "measure", plain)
        return (made.path / "model" / "model.safetensors").read_bytes(), len(measured)

    first, shards = run("first")
    assert shards > 1
    again, none = run("again")
    assert (again, none) == (first, 0)
    _, anew = run("float64", **{"model.dtype": "float64"})
    assert anew == shards
    folders = [path for path in (tmp_path / "cache" / "reference").iterdir() if len(list(path.glob("*"))) > 1]
    damaged = sorted(folders[0].glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert run("damaged")[1] + run("float64 again", **{"model.dtype": "float64"})[1] == 1
    for folder in folders:
        facts = json.loads((folder / "facts.json").read_text())
        (folder / "facts.json").write_text(json.dumps({**facts, "weights": "0"}))
    with pytest.raises(DataError, match="log-probabilities of another reference: weights differ"):
        run("other")


@pytest.mark.parametrize(("algorithm", "each"), [("dpo", 1), ("kto", 2)])
def test_the_reference_is_asked_for_what_the_steps_read_alone(
    algorithm: str, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KTO reads a prompt with a mismatched response beside each of its own."""
    measured: list[int] = []
    plain = reference.measure
    monkeypatch.setattr(reference, "measure", lambda *given: measured.append(len(given[2])) or plain(*given))
    base = fairlead.train({"algorithm": "pretrain"}, settings("pretrain", tmp_path, **{"model.scratch": SCRATCH}),
                          data=ROWS["pretrain"]).path  # fmt: skip
    more = {"model.path": str(base), "train.steps": 2, "train.batch_size": 3, "data.eval_fraction": 0}
    fairlead.train({"algorithm": algorithm}, settings(algorithm, tmp_path, **more), data=ROWS[algorithm])
    assert len(ROWS[algorithm]) > 6
    assert sum(measured) == 6 * each


def test_a_loss_that_is_none_is_an_error_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dpo\.loss|dpo.*there is no loss 'sigmiod'"):
        fairlead.train({"algorithm": "dpo"}, settings("dpo", tmp_path, **{"dpo.loss": "sigmiod"}), data=PAIRS)


def test_dft_pulls_less_at_unlikely_tokens() -> None:
    from fairlead.types import Outputs

    batch = token_batch([Tree((5,), ((6, 7),))], packed=True, pad_id=0)
    logprobs = torch.zeros(1, 3)
    logprobs[batch.loss_mask] = torch.tensor([0.9, 0.1]).log()
    logprobs.requires_grad_()
    sft.dft(Outputs(logprobs=logprobs), batch)[0].backward()
    assert logprobs.grad is not None
    assert logprobs.grad[batch.loss_mask].tolist() == pytest.approx([-0.9, -0.1])


# --- a reference that moves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_a_moving_reference_is_the_policy_after_each_move_and_survives_a_stop(
    mix: float, lora: bool, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"dpo.sync_every": 2, "dpo.sync_mix": mix, "train.steps": 5, "train.save_every": 1}
    more |= {"train.keep_checkpoints": 9, "data.template": "auto"}
    base = fairlead.train({"algorithm": "pretrain"}, settings("pretrain", tmp_path, **{"model.scratch": SCRATCH}),
                          data=ROWS["pretrain"]).path  # fmt: skip
    more |= {"model.path": str(base), **({"model.adapter": {"rank": 2}} if lora else {})}

    def run() -> Path:
        return fairlead.train({"algorithm": "dpo"}, settings("dpo", tmp_path, **more), data=ROWS["dpo"]).path

    if lora and mix < 1:
        with pytest.raises(ConfigError, match="is not the mix of their products"):
            run()
        return
    path = run()
    states = [load_file(path / "checkpoints" / f"step-{step:06d}" / "model.safetensors") for step in (1, 2, 3, 4, 5)]
    moved = [name for name in states[0] if name.startswith("reference: ")]
    assert moved
    for name in moved:
        own = name.removeprefix("reference: ")
        own = next(key for key in states[0] if key.endswith(own) and key != name)
        start = states[0][name]
        assert torch.equal(states[1][name], start)
        wanted = start.lerp(states[1][own], mix)  # before step 3, the policy is what step 2 made of it
        torch.testing.assert_close(states[2][name], wanted, rtol=0, atol=1e-7)
        torch.testing.assert_close(states[4][name], wanted.lerp(states[3][own], mix), rtol=0, atol=1e-7)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[2]["logps/chosen_change"]) > 1e-6
    if mix == 1:
        assert rows[3]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # of step 3, just after the move
    whole = (path / "checkpoints" / "step-000005" / "model.safetensors").read_bytes()
    (path / "summary.json").unlink()
    for step in (3, 4, 5):
        shutil.rmtree(path / "checkpoints" / f"step-{step:06d}")
    assert (run() / "checkpoints" / "step-000005" / "model.safetensors").read_bytes() == whole
