"""`fairlead generate`, `score` and `select`: files of samples, what is kept of them, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.end_to_end.rows import DEMONSTRATIONS, PAIRS, PROMPTS, ROWS, SCRATCH, settings, write
from tests.end_to_end.test_score import Done, written

from fairlead.cli import main
from fairlead.runner import train

Command = Callable[..., Done]


@pytest.fixture
def fairlead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command line in this process, run in a folder of its own."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["fairlead", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return Done(int(end.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = settings("sft", tmp_path_factory.mktemp("policy"), **{"model.scratch": SCRATCH, "train.num_samples": 0})
    return train({"algorithm": "sft"}, given, data=ROWS["sft"]).path


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Path:
    given = settings("reward", tmp_path_factory.mktemp("reward"), **{"model.path": str(policy)})
    return train({"algorithm": "reward"}, given, data=PAIRS).path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "prompts.jsonl", PROMPTS)


def done(found: Done) -> Done:
    assert found.code == 0, found.stderr
    return found


def refused(found: Done, code: int, *words: str) -> None:
    assert found.code == code, found.stderr
    for word in words:
        assert word in found.stderr


# --- generate ------------------------------------------------------------------------------------------------------


def test_the_likeliest_tokens_are_those_of_transformers(policy: Path, prompts: Path, fairlead: Command) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done(fairlead("generate", policy, prompts, "top_k=1", "max_new_tokens=8", "--out", "greedy.jsonl"))
    model: Any = AutoModelForCausalLM.from_pretrained(policy / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(policy / "model")
    rows = written(Path("greedy.jsonl"))
    assert [row["columns"] for row in rows] == [{"topic": row["topic"]} for row in PROMPTS]
    for row in rows:
        ids = tokenizer(f"Question: {row['prompt']}\n\nAnswer:", return_tensors="pt").input_ids
        with torch.no_grad():
            found = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert row["response"] == tokenizer.decode(found, skip_special_tokens=True).strip()
        assert row["length"] == len(found)
        assert row["finished"] == (int(found[-1]) == tokenizer.eos_token_id)


def test_the_text_depends_on_the_seed_and_not_on_the_batch(policy: Path, prompts: Path, fairlead: Command) -> None:
    drawn: dict[str, list[Any]] = {}
    for name, given in (("one", ["rollout_rows=1"]), ("all", ["rollout_rows=64"]), ("other", ["seed=1"])):
        out = f"{name}.jsonl"
        done(fairlead("generate", policy, prompts, *given, "max_new_tokens=8", "--samples", 3, "--out", out))
        drawn[name] = written(Path(out))
    assert drawn["one"] == drawn["all"] != drawn["other"]
    assert [row["sample"] for row in drawn["one"]] == [0, 1, 2] * len(PROMPTS)
    assert [row["prompt"] for row in drawn["one"][::3]] == [row["prompt"] for row in PROMPTS]
    assert sorted(path.name for path in Path().iterdir()) == ["all.jsonl", "one.jsonl", "other.jsonl"]


def test_a_folder_of_a_model_is_sampled_as_its_run(policy: Path, prompts: Path, fairlead: Command) -> None:
    done(fairlead("generate", policy, prompts, "max_new_tokens=6", "--out", "run.jsonl"))
    given = ["max_new_tokens=6", "data.max_length=48"]
    done(fairlead("generate", policy / "model", prompts, *given, "--out", "folder.jsonl"))
    assert written(Path("run.jsonl")) == written(Path("folder.jsonl"))


def test_a_killed_command_continues_from_its_chunks_to_the_same_bytes(
    policy: Path, prompts: Path, tmp_path: Path, fairlead: Command
) -> None:
    given = ["generate", policy, prompts, "rollout_rows=1", "max_new_tokens=12", "--samples", "40"]
    done(fairlead(*given, "--out", "whole.jsonl"))
    command = [sys.executable, "-m", "fairlead", *map(str, given), "--out", "killed.jsonl"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "src"}, stderr=subprocess.PIPE)
    chunks: list[Path] = []
    while len(chunks) < 2:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        chunks = sorted(tmp_path.glob(".killed.jsonl.*/000/chunk-*.json"))
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not Path("killed.jsonl").exists()
    times = {path: path.stat().st_mtime_ns for path in chunks}
    rows = chunks[0].read_bytes().partition(b"\n")[2].replace(b'"text": "', b'"text": "kept ', 1)
    chunks[0].write_bytes(hashlib.sha256(rows).hexdigest().encode() + b"\n" + rows)  # each chunk has its checksum
    done(fairlead(*given, "--out", "killed.jsonl"))
    found, wanted = written(Path("killed.jsonl")), written(Path("whole.jsonl"))
    assert found[0]["response"] == f"kept {wanted[0]['response']}"  # read back, not sampled again
    assert [row for row in found if not row["response"].startswith("kept ")] == wanted[1:]
    assert len(times) >= 2 and not list(tmp_path.glob(".killed.jsonl.*"))


def test_the_best_of_n_is_the_best_of_the_same_samples_scored(
    policy: Path, reward: Path, prompts: Path, fairlead: Command
) -> None:
    given = ["generate", policy, prompts, "max_new_tokens=8"]
    told = json.loads(
        done(fairlead(*given, "--best-of", 5, "--reward", reward, "--out", "best.jsonl", "--json")).stdout
    )
    done(fairlead(*given, "--samples", 5, "--out", "samples.jsonl"))
    done(fairlead("score", reward, "samples.jsonl", "discard=[]", "--out", "scored.jsonl"))
    scored = written(Path("scored.jsonl"))
    groups = [scored[at : at + 5] for at in range(0, len(scored), 5)]
    wanted = [max(group, key=lambda row: row["score"]) for group in groups]
    means = [sum(row["score"] for row in group) / 5 for group in groups]
    for row, best, mean in zip(written(Path("best.jsonl")), wanted, means, strict=True):
        assert {key: row[key] for key in best if key != "score"} == {k: v for k, v in best.items() if k != "score"}
        assert row["score"] == pytest.approx(best["score"], abs=1e-5)
        assert row["mean_score"] == pytest.approx(mean, abs=1e-5)
    assert told["scores"]["all"] == pytest.approx(sum(means) / len(means), abs=1e-5)
    assert told["scores"]["best"] == pytest.approx(sum(row["score"] for row in wanted) / len(wanted), abs=1e-5)


def test_a_round_takes_its_share_of_the_prompts(policy: Path, prompts: Path, fairlead: Command) -> None:
    seen: list[str] = []
    for number in range(2):
        given = ["rollout_size=4", f"round={number}", "max_new_tokens=4"]
        done(fairlead("generate", policy, prompts, *given, "--out", f"{number}.jsonl"))
        seen += [row["prompt"] for row in written(Path(f"{number}.jsonl"))]
    assert sorted(seen) == sorted(row["prompt"] for row in PROMPTS)
    found = done(fairlead("generate", policy, prompts, "rollout_size=100", "max_new_tokens=4", "--out", "more.jsonl"))
    assert "there are 8 prompts for rounds of 100: each round takes all of them" in found.stderr
    assert len(written(Path("more.jsonl"))) == 8


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (["--samples", "0"], 2, ["num_samples", "greater than or equal to 1", "got 0"]),
        (["--best-of", "4"], 2, ["best_of and reward go together"]),
        (
            ["--best-of", "4", "--reward", "rule:length", "--samples", "2"],
            2,
            ["best_of=4 writes one response"],
        ),
        (["temprature=1"], 2, ["temprature is no setting of generate", "did you mean 'temperature'?"]),
        (["train.steps=2"], 2, ["train.steps is no setting of generate"]),
        (["max_new_tokens=48"], 2, ["leaves no room for a prompt"]),
        (["max_new_tokens=60", "data.max_length=100"], 2, ["more than the model's 64 positions", "hint: "]),
        (["engine=vlm"], 2, ["engine"]),
    ],
)
def test_what_cannot_be_sampled_is_explained(
    given: list[str], code: int, words: list[str], policy: Path, prompts: Path, fairlead: Command
) -> None:
    refused(fairlead("generate", policy, prompts, *given, "--out", "out.jsonl"), code, *words)
    assert list(Path().iterdir()) == []


def test_places_that_are_taken_and_models_that_write_nothing_are_refused(
    policy: Path, reward: Path, prompts: Path, fairlead: Command
) -> None:
    Path("out.jsonl").write_text("mine")
    refused(fairlead("generate", policy, prompts, "--out", "out.jsonl"), 2, "out.jsonl exists already", "hint: ")
    refused(fairlead("generate", policy, prompts, "--out", "out.csv"), 2, "out.csv is not the name of a file of JSON")
    refused(fairlead("generate", reward, prompts, "--out", "new.jsonl"), 4, "was trained as a reward", "hint: ")
    refused(fairlead("generate", policy, "nowhere.jsonl", "--out", "new.jsonl"), 3, "nowhere.jsonl does not exist")
    assert Path("out.jsonl").read_text() == "mine"


# --- score ---------------------------------------------------------------------------------------------------------

SAMPLES = [
    {"prompt": prompt, "response": response, "sample": number, "finished": True, "length": 3, "columns": {"word": word}}
    for prompt, word, responses in (
        ("why?", "fuse", ["the fuse # is loose", "fuse", ""]),
        ("how?", "belt", ["a belt\n\nHuman: and then?", "so", "so so so so so so"]),
    )
    for number, response in enumerate(responses)
]
HOOKS = """
def named(outputs, word, **_):
    return [float(each in output) for each, output in zip(word, outputs)]
def texts(samples, prompts, outputs, **_):
    assert all(sample == f"{prompt} {output}" for sample, prompt, output in zip(samples, prompts, outputs)), samples
    return [float(len(prompt)) for prompt in prompts]
def nan(outputs, **_):
    return [float("nan") if output == "so" else 1.0 for output in outputs]
def constant(outputs, **_):
    return [2.0] * len(outputs)
def shout(text):
    return text.upper()
def broken(text):
    return text.missing if text == "fuse" else text
"""


def test_any_reward_scores_what_rules_leave_and_every_row_stays(fairlead: Command) -> None:
    write(Path("samples.jsonl"), SAMPLES)
    Path("my_hooks.py").write_text(HOOKS)
    given = ["clean=[first_turn]", "discard=[empty,hashes,repeats]", "--out", "scored.jsonl"]
    found = done(fairlead("score", "my_hooks:named", "samples.jsonl", *given))
    rows = written(Path("scored.jsonl"))
    assert [row["score"] for row in rows] == [None, 1.0, None, 1.0, 0.0, None]
    assert [row.get("discarded") for row in rows] == ["hashes", None, "empty", None, None, "repeats"]
    assert [row["response"] for row in rows] == [
        *(row["response"] for row in SAMPLES[:3]), "a belt", *(row["response"] for row in SAMPLES[4:]),
    ]  # fmt: skip
    assert "noted 1: discarded: hashes" in found.stdout
    found = done(fairlead("score", "rule:length", "samples.jsonl"))
    assert [row["score"] for row in found.rows][:3] == [len("the fuse # is loose"), len("fuse"), None]


def test_a_function_sees_prompts_as_the_template_of_a_model_writes_them(policy: Path, fairlead: Command) -> None:
    write(Path("samples.jsonl"), SAMPLES[:2])
    Path("my_hooks.py").write_text(HOOKS)
    found = done(fairlead("score", "my_hooks:texts", "samples.jsonl", f"model.tokenizer={policy}"))
    assert [row["score"] for row in found.rows] == [float(len("Question: why?\n\nAnswer:"))] * 2


@pytest.mark.parametrize(
    ("reward", "given", "words"),
    [
        ("my_hooks:nan", [], ["the reward my_hooks:nan returned nan for the sample 'so'"]),
        ("rule:length", ["clean=[my_hooks:broken]"], ["my_hooks:broken raised AttributeError", "sample 1", "'fuse'"]),
        (
            "rule:length",
            ["discard=[{too_short: {words: 9}}]"],
            ["all responses to 100%", "too_short': '100%'"],
        ),
        ("rule:length", ["discard=[{contains: {part: s}}, empty]", "max_empty=0.4"], ["all responses to 50%"]),
    ],
)
def test_a_reward_or_a_rule_that_fails_names_the_sample_and_leaves_no_file(
    reward: str, given: list[str], words: list[str], fairlead: Command
) -> None:
    write(Path("samples.jsonl"), SAMPLES)
    Path("my_hooks.py").write_text(HOOKS)
    found = fairlead("score", reward, "samples.jsonl", *given, "--out", "scored.jsonl")
    refused(found, 5, *words)
    assert not Path("scored.jsonl").exists()


def test_a_reward_that_sees_no_difference_is_noted_and_selects_nothing(fairlead: Command) -> None:
    many = [{**row, "response": f"{row['response']} so"} for row in SAMPLES] * 2
    write(Path("samples.jsonl"), many)
    Path("my_hooks.py").write_text(HOOKS)
    found = done(fairlead("score", "my_hooks:constant", "samples.jsonl", "--out", "scored.jsonl"))
    assert "noted 4: prompts whose responses all score alike" in found.stdout
    refused(fairlead("select", "scored.jsonl", "--out", "selected.jsonl"), 3, "all 12 scores are 2", "hint: ")
    assert not Path("selected.jsonl").exists()


# --- select --------------------------------------------------------------------------------------------------------


def _scored(scores: list[list[float | None]]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i}", "response": f"r{i}{k}", "sample": k, "finished": True, "length": 2, "score": score}
        | ({} if score is not None else {"discarded": "hashes"})
        for i, row in enumerate(scores)
        for k, score in enumerate(row)
    ]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], ["r01", "r10"]),
        (["keep=2"], ["r00", "r01", "r10", "r12"]),
        (["collect=top", "share=0.5"], ["r10", "r11", "r12"]),
        (["collect=top"], ["r10", "r12"]),
        (["discard=[{contains: {part: '10'}}]"], ["r01", "r12"]),
    ],
)
def test_the_best_of_each_prompt_or_of_all_are_kept(given: list[str], kept: list[str], fairlead: Command) -> None:
    rows = _scored([[0.1, 0.9, None], [3.0, 1.5, 2.0]])
    write(Path("scored.jsonl"), rows)
    done(fairlead("select", "scored.jsonl", *given, "--out", "selected.jsonl"))
    found = written(Path("selected.jsonl"))
    assert [row["response"] for row in found] == kept
    assert all(row in rows for row in found)
    discarded = written(Path("selected.discarded.jsonl"))
    assert [row["discarded"] for row in discarded] == ["hashes", *(["contains"] if "discard" in str(given) else [])]


def test_what_is_selected_is_learned_as_demonstrations(fairlead: Command, tmp_path: Path) -> None:
    write(Path("scored.jsonl"), _scored([[0.1, 0.9], [3.0, 1.5], [None, None]]))
    done(fairlead("select", "scored.jsonl", "--out", "selected.jsonl"))
    given = settings("sft", tmp_path, **{"model.scratch": SCRATCH, "data.path": "selected.jsonl", "train.steps": 1})
    path = train({"algorithm": "sft"}, given | {"data.eval_fraction": 0, "train.num_samples": 0}).path
    counts = json.loads((path / "manifest.json").read_text())["data"]["train"]
    assert (counts["read"], counts["kept"]) == (2, 2)


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (
            ["max_empty=0.2"],
            5,
            ["all responses to 33% of the round's prompts were", "hashes': '33%'"],
        ),
        (["clean=[strip]"], 2, ["clean changes texts", "hint: give clean to fairlead score"]),
        (["keep=0"], 2, ["keep", "got 0"]),
        (["share=0.5"], 2, ["share is for collect=top"]),
        (["kep=2"], 2, ["kep is no setting of select", "did you mean 'keep'?"]),
    ],
)
def test_what_cannot_be_selected_is_explained(given: list[str], code: int, words: list[str], fairlead: Command) -> None:
    write(Path("scored.jsonl"), _scored([[0.1, 0.9], [3.0, 1.5], [None, None]]))
    refused(fairlead("select", "scored.jsonl", *given, "--out", "selected.jsonl"), code, *words)
    write(Path("samples.jsonl"), SAMPLES)
    refused(fairlead("select", "samples.jsonl", "--out", "selected.jsonl"), 3, "row 1 has no score")
    write(Path("rows.jsonl"), DEMONSTRATIONS)
    refused(fairlead("select", "rows.jsonl", "--out", "selected.jsonl"), 3, "rows.jsonl:1: no sample")
    assert not Path("selected.jsonl").exists()


# --- and in one process --------------------------------------------------------------------------------------------


def test_a_round_in_stages_has_the_bytes_of_one_in_one_process(
    policy: Path, reward: Path, prompts: Path, tmp_path: Path, fairlead: Command
) -> None:
    own = {
        "num_samples": 4,
        "rollout_size": 6,
        "max_new_tokens": 12,
        "temperature": 0.85,
        "clean": ["strip"],
        "discard": [{"contains": {"part": "b"}}],
    }
    more = {"model.path": str(policy), "data.path": str(prompts), "data.eval_fraction": 0, "raft.reward": str(reward)}
    given = settings("raft", tmp_path, **more, **{f"raft.{name}": value for name, value in own.items()})
    rounds = train({"algorithm": "raft"}, given).path / "rounds"
    told = [f"{name}={json.dumps(value)}" for name, value in own.items()]
    done(fairlead("generate", policy, prompts, *told[:4], "--out", "samples.jsonl"))
    done(fairlead("score", reward, "samples.jsonl", *told[4:], "--out", "scored.jsonl"))
    done(fairlead("select", "scored.jsonl", "--out", "selected.jsonl"))
    for name in ("samples", "scored", "selected"):
        assert Path(f"{name}.jsonl").read_bytes() == (rounds / "000" / f"{name}.jsonl").read_bytes(), name
    shown = written(rounds / "000" / "prompts.jsonl")
    assert [row["prompt"] for row in shown] == [row["prompt"] for row in written(Path("samples.jsonl"))[::4]]
