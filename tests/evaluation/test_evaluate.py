import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluation.conftest import DEMONSTRATIONS, PAIRS, PROMPTS, Runs
from transformers import AutoModelForCausalLM, AutoTokenizer

from fairlead.errors import ConfigError, ModelError, RunError
from fairlead.evaluation import evaluate
from fairlead.models import precision
from fairlead.rollout.native import NativeSampler
from fairlead.types import Prompt, Rollout

SHORT: dict[str, Any] = {"max_new_tokens": 6, "num_prompts": 5, "draws": 2}


def letters(outputs: Sequence[str], **_: Any) -> list[float]:
    return [float(len(output)) for output in outputs]


def names_the_word(outputs: Sequence[str], word: Sequence[str], **_: Any) -> list[float]:
    return [float(each in output) for output, each in zip(outputs, word, strict=True)]


def written(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = run / "evaluation"
    lines = (folder / "responses.jsonl").read_text("utf-8").split("\n")
    return json.loads((folder / "metrics.json").read_text("utf-8")), [json.loads(line) for line in lines if line]


@torch.no_grad()
def sum_of_logprobs(model: Any, rollout: Rollout, temperature: float) -> float:
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
    logprobs = (model(ids).logits[0, :-1] / temperature).log_softmax(-1).gather(1, ids[0, 1:, None])
    return float(logprobs[-len(rollout.response_ids) :].sum())


def test_a_run_against_itself_has_no_kl_and_wins_half(runs: Runs):
    found = evaluate([runs.reference], prompts=PROMPTS, scores={"letters": letters}, reference=runs.reference, **SHORT)
    metrics = found["reference"]
    assert metrics["kl"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 5}


@pytest.mark.parametrize("kind", ["policy", "adapted"])
def test_kl_is_the_log_ratio_that_transformers_gives(kind: str, runs: Runs, monkeypatch: pytest.MonkeyPatch):
    run = getattr(runs, kind)
    drawn: list[Rollout] = []
    generate = NativeSampler.generate

    def keep(*args: Any, **options: Any) -> list[Rollout]:
        drawn[:] = generate(*args, **options)
        return drawn

    monkeypatch.setattr(NativeSampler, "generate", keep)
    evaluate([run], prompts=PROMPTS, reference=runs.reference, temperature=0.7, num_prompts=5, max_new_tokens=6)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(each / "model") for each in (run, runs.reference))
    for row, rollout in zip(written(run)[1], drawn, strict=True):
        ratio = sum_of_logprobs(ours, rollout, 0.7) - sum_of_logprobs(theirs, rollout, 0.7)
        assert row["kl"] == pytest.approx(ratio, abs=1e-4)
        assert abs(ratio) > 1e-3


def test_files_are_written_as_documented(runs: Runs):
    found = evaluate(
        [runs.policy],
        prompts=PROMPTS,
        demonstrations=DEMONSTRATIONS,
        scores={"letters": letters, "word": names_the_word, "score": str(runs.reward)},
        reference=runs.reference,
        **SHORT,
    )
    metrics, responses = written(runs.policy)
    assert metrics["run"] == "policy"
    assert metrics["reference"] == "reference"
    assert (metrics["prompts"], metrics["draws"]) == (5, 2)
    sampling = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    sampling |= {"min_new_tokens": 0, "shortest_limit": None, "stop": []}
    assert metrics["sampling"] == sampling
    assert metrics["metrics"] == found["policy"]
    names = {
        "letters",
        "word",
        "score",
        "length",
        "finished",
        "distinct_1",
        "distinct_2",
        "kl",
        "win_rate",
        "perplexity",
    }
    assert set(found["policy"]) == names
    for name, estimate in found["policy"].items():
        assert set(estimate) == {"mean", "low", "high", "n"}
        assert estimate["low"] <= estimate["mean"] <= estimate["high"], name
        assert estimate["n"] == (len(DEMONSTRATIONS) if name == "perplexity" else 5)
    assert [(row["prompt"], row["draw"]) for row in responses] == [
        (row["prompt"], draw) for row in PROMPTS[:5] for draw in (0, 1)
    ]
    for row in responses:
        assert set(row) == {"prompt", "draw", "response", "length", "finished", "kl", "scores"}
        assert row["scores"]["letters"] == len(row["response"])
    for name in ("letters", "word", "score"):
        mean = sum(row["scores"][name] for row in responses) / len(responses)
        assert found["policy"][name]["mean"] == pytest.approx(mean)
    assert found["policy"]["kl"]["mean"] == pytest.approx(sum(row["kl"] for row in responses) / len(responses))


def test_win_rate_compares_the_responses_to_the_same_prompts(runs: Runs):
    both = [runs.policy, runs.reference]
    found = evaluate(both, prompts=PROMPTS, scores={"letters": letters}, reference=runs.reference, **SHORT)
    ours, theirs = ([row["scores"]["letters"] for row in written(run)[1]] for run in both)
    wins = [(a > b) + 0.5 * (a == b) for i in range(0, 10, 2) for a in ours[i : i + 2] for b in theirs[i : i + 2]]
    assert found["policy"]["win_rate"]["mean"] == pytest.approx(sum(wins) / len(wins))


def test_the_best_of_n_is_chosen_by_one_score_and_measured_by_all(runs: Runs):
    """The score of choice cannot be beaten by chance: it lies above the reference's by the spread of four draws."""
    scores = {"letters": letters, "word": names_the_word}
    given = {"prompts": PROMPTS, "scores": scores, "reference": runs.reference, "num_prompts": 12, "max_new_tokens": 6}
    found = evaluate([runs.reference], best_of=4, best_by="letters", draws=4, **given)
    folder = runs.reference / "evaluation"
    rows = [json.loads(line) for line in (folder / "best_of_4.jsonl").read_text("utf-8").splitlines()]
    best, others = found["best_of_4"], [row["scores"]["letters"] for row in written(runs.reference)[1]]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]
    assert best["letters"]["mean"] == pytest.approx(sum(row["scores"]["letters"] for row in rows) / 12)
    expected = sum(max(others[i : i + 4]) for i in range(0, 48, 4)) / 12  # of four draws as independent of these
    assert best["letters"]["mean"] == pytest.approx(expected, rel=0.3)
    assert best["letters"]["mean"] > found["reference"]["letters"]["mean"] and best["win_rate"]["mean"] > 0.6
    assert best["kl"]["mean"] == pytest.approx(math.log(4) - 3 / 4)
    saved = json.loads((folder / "best_of_4.json").read_text("utf-8"))
    assert (saved["metrics"], saved["best_of"], saved["best_by"]) == (best, 4, "letters")


def test_the_best_of_n_needs_a_reference_prompts_and_a_score(runs: Runs):
    given = {"prompts": PROMPTS, "scores": {"letters": letters}, "reference": runs.reference}
    for lacking in ({"best_of": 1}, {"reference": None}, {"scores": {}}):
        with pytest.raises(ConfigError, match="responses of the reference to prompts, by a score"):
            evaluate([runs.policy], **{**given, "best_of": 4, **lacking})
    with pytest.raises(ConfigError, match="best_by='word' is none of the scores"):
        evaluate([runs.policy], best_of=4, best_by="word", **given)


def test_the_seed_alone_decides_what_is_sampled(runs: Runs):
    def responses(seed: int) -> list[str]:
        evaluate([runs.policy], prompts=PROMPTS, seed=seed, **SHORT)
        return [row["response"] for row in written(runs.policy)[1]]

    first = responses(1)
    assert responses(1) == first
    assert responses(2) != first
    assert first[0::2] != first[1::2]  # the draws of a prompt differ


def test_perplexity_is_that_of_transformers_on_the_responses(runs: Runs):
    found = evaluate([runs.reference], demonstrations=DEMONSTRATIONS)
    model = AutoModelForCausalLM.from_pretrained(runs.reference / "model")
    tokenizer = AutoTokenizer.from_pretrained(runs.reference / "model")
    nats, tokens = 0.0, 0
    for row in DEMONSTRATIONS:
        prompt = tokenizer(f"Question: {row['prompt']}\n\nAnswer:").input_ids
        response = [*tokenizer(f" {row['response']}").input_ids, tokenizer.eos_token_id]
        rollout = Rollout(Prompt(row["prompt"]), tuple(prompt), tuple(response), (), True, row["response"])
        nats, tokens = nats - sum_of_logprobs(model, rollout, 1.0), tokens + len(response)
    assert found["reference"]["perplexity"]["mean"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert set(found["reference"]) == {"perplexity"}


def test_a_policy_multiplies_in_the_type_of_its_training(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """fp32 weights in bfloat16, where a device is fast at it."""
    exact = evaluate([runs.reference], demonstrations=DEMONSTRATIONS)["reference"]["perplexity"]["mean"]
    monkeypatch.setattr(precision, "fast_at_bf16", lambda _: True)
    half = evaluate([runs.reference], demonstrations=DEMONSTRATIONS)["reference"]["perplexity"]["mean"]
    assert half != exact and half == pytest.approx(exact, rel=1e-2)


def test_a_reward_model_is_measured_on_pairs(runs: Runs):
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS[:3]]
    right = evaluate([runs.reward], pairs=PAIRS)["reward"]
    assert right["accuracy"]["mean"] == 1.0  # "No." against "Yes, ...": learned in 20 steps
    assert right["length_accuracy"]["mean"] == 1.0
    wrong = evaluate([runs.reward], pairs=[*PAIRS[3:], *turned])["reward"]
    assert wrong["accuracy"]["mean"] == pytest.approx(9 / 12)
    assert wrong["accuracy"]["n"] == 12
    metrics = json.loads((runs.reward / "evaluation" / "metrics.json").read_text("utf-8"))
    assert metrics["metrics"] == wrong
    assert metrics["pairs"] == 12


def test_a_prepared_folder_gives_its_held_out_part(runs: Runs, tmp_path: Path):
    for name, rows in (("prompts", PROMPTS[:4]), ("heldout_prompts", PROMPTS[4:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    evaluate([runs.policy], prompts=tmp_path, max_new_tokens=2)
    assert [row["prompt"] for row in written(runs.policy)[1]] == [row["prompt"] for row in PROMPTS[4:6]]


def test_a_prompt_too_long_for_one_run_is_asked_of_none_and_counted(runs: Runs):
    rows = [{"prompt": "x " * 60}, *PROMPTS]
    evaluate([runs.policy], prompts=rows, reference=runs.reference, num_prompts=2, max_new_tokens=4)
    metrics, responses = written(runs.policy)
    assert [row["prompt"] for row in responses] == [row["prompt"] for row in PROMPTS[:2]]
    assert metrics["data"]["prompts"] == {
        "read": 13,
        "kept": 12,
        "cut": 0,
        "dropped": {"prompt longer than 44 tokens": 1},
    }


def test_a_conversation_is_written_as_text(runs: Runs):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tea?"}]
    evaluate([runs.policy], prompts=[{"prompt": turns}], max_new_tokens=2)
    assert written(runs.policy)[1][0]["prompt"] == "system: Be kind.\n\nuser: Tea?"


def test_runs_of_one_name_are_told_apart_by_their_path(runs: Runs, tmp_path: Path):
    copy = tmp_path / "policy"
    shutil.copytree(runs.policy, copy)
    found = evaluate([runs.policy, copy, runs.policy], prompts=PROMPTS, **SHORT)
    assert list(found) == [str(runs.policy), str(copy)]
    assert found[str(copy)] == found[str(runs.policy)]


def test_another_vocabulary_than_the_reference_is_refused(runs: Runs):
    with pytest.raises(ModelError, match=r"stranger \(270 tokens\) and its reference reference \(280 tokens\)"):
        evaluate([runs.stranger], prompts=PROMPTS, reference=runs.reference)


def test_a_reward_model_is_no_reference(runs: Runs):
    with pytest.raises(ModelError, match="reward is a reward model; a reference is a policy"):
        evaluate([runs.policy], prompts=PROMPTS, reference=runs.reward)


def test_a_missing_run_is_named(tmp_path: Path):
    with pytest.raises(RunError, match="nowhere is not a run"):
        evaluate([tmp_path / "nowhere"], prompts=PROMPTS)


def test_an_unfinished_run_is_named_with_the_way_to_go_on(runs: Runs, tmp_path: Path):
    shutil.copy(runs.policy / "recipe.yaml", tmp_path)
    with pytest.raises(RunError, match=f"has not finished.*\n.*fairlead resume {tmp_path}"):
        evaluate([tmp_path], prompts=PROMPTS)


def test_nothing_to_measure_is_an_error(runs: Runs):
    with pytest.raises(ConfigError, match="a policy needs prompts or demonstrations"):
        evaluate([runs.policy], pairs=PAIRS)
    with pytest.raises(ConfigError, match="a reward needs pairs"):
        evaluate([runs.reward], prompts=PROMPTS)


def test_a_score_cannot_take_the_name_of_a_metric(runs: Runs):
    with pytest.raises(ConfigError, match="name of a metric: kl"):
        evaluate([runs.policy], prompts=PROMPTS, scores={"kl": letters})


def test_an_unknown_win_score_is_refused_with_the_nearest(runs: Runs):
    with pytest.raises(ConfigError, match="did you mean 'letters'"):
        evaluate([runs.policy], prompts=PROMPTS, scores={"letters": letters}, win_score="leters")


def test_more_new_tokens_than_the_model_has_room_for_are_refused(runs: Runs):
    with pytest.raises(ConfigError, match="leaves no room for a prompt and 48 new tokens"):
        evaluate([runs.policy], prompts=PROMPTS, max_new_tokens=48)
