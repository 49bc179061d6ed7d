"""Every verb of the command line, in this process where one can: what it prints, and what it leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.end_to_end.rows import ROWS, SCRATCH, settings, write

from fairlead.cli import main
from fairlead.config_file import read_mapping
from fairlead.pipeline_file import nest
from fairlead.training import checkpoint

VERBS = {
    "train",
    "resume",
    "fork",
    "prove",
    "prepare",
    "inspect",
    "pipeline",
    "sweep",
    "evaluate",
    "generate",
    "select",
    "score",
    "merge",
    "push",
    "import",
    "report",
    "demo",
}
Command = Callable[..., tuple[str, str]]


@pytest.fixture
def fairlead_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process: stdout and stderr of a command that ends well."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["fairlead", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert end.value.code == 0, printed.err
        return printed.out, printed.err

    return call


def recipe(folder: Path, algorithm: str = "sft", **more: Any) -> Path:
    """A recipe file of a tiny run in ``folder/runs``, with its data beside it."""
    data = write(folder / f"{algorithm}.jsonl", ROWS[algorithm])
    given = settings(algorithm, folder / "runs", **{"model.scratch": SCRATCH, "data.path": str(data), **more})
    path = folder / f"{algorithm}.yaml"
    path.write_text(yaml.safe_dump(nest({"algorithm": algorithm, **given}), sort_keys=False), "utf-8")
    return path


def test_help_lists_every_verb_and_imports_no_torch() -> None:
    code = (
        "import sys, fairlead.cli\n"
        "sys.argv = ['fairlead', *sys.argv[1:]]\n"
        "try: fairlead.cli.main()\n"
        "finally: print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert set(re.findall(r"^\W* ([a-z]+) +[A-Z]", done.stdout, re.MULTILINE)) == VERBS


def test_the_help_of_each_verb_names_its_options(fairlead_command: Command) -> None:
    for verb in VERBS:
        text, _ = fairlead_command(verb, "--help")
        assert ("--out" in text) == (
            verb in ("prepare", "generate", "score", "select", "merge", "import", "report", "demo", "prove", "sweep")
        )
        assert ("--dry-run" in text) == (verb in ("train", "pipeline", "sweep"))
        assert ("--json" in text) == (verb != "report")


def test_a_dry_run_prints_every_key_with_its_origin_and_trains_nothing(
    tmp_path: Path, fairlead_command: Command
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("algorithm: dpo\nseed: 3\ndata:\n  path: pairs.jsonl\ndpo: {beta: 0.3}\n", "utf-8")
    given = ["train", file, "train.steps=7", "model.scratch.hidden_size=8", f"run.directory={tmp_path}/runs"]
    out, err = fairlead_command(*given, "--dry-run")
    lines = {}
    for line in out.splitlines():
        setting, _, origin = line.partition("  # ")
        key, _, value = setting.rstrip().partition(": ")
        lines[key] = (value, origin.strip())
    assert lines["algorithm"] == ("dpo", f"{file}:1")
    assert lines["data.path"] == ("pairs.jsonl", f"{file}:4")
    assert lines["dpo.beta"] == ("0.3", f"{file}:5")
    assert lines["train.steps"] == ("7", "command line")
    assert lines["model.scratch.hidden_size"] == ("8", "command line")
    assert lines["model.scratch.num_layers"][1] != f"{file}:1"
    assert lines["train.batch_size"] == ("32", "default")
    assert lines["model.path"] == ("null", "default")
    assert lines["data.packing"] == ("best-fit", "default")
    sections = ("algorithm", "seed", "threads", "run.", "model.", "data.", "optim.", "train.", "tracking.", "dpo.")
    assert all(any(key.startswith(section) for key in lines) for section in sections)
    assert all(key.startswith(sections) for key in lines)
    assert err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]

    as_json = json.loads(fairlead_command(*given, "--dry-run", "--json")[0])
    assert as_json.keys() == lines.keys()
    assert {key: entry["from"] for key, entry in as_json.items()} == {key: line[1] for key, line in lines.items()}
    assert (as_json["train.steps"]["value"], as_json["dpo.beta"]["value"]) == (7, 0.3)


def test_what_a_dry_run_prints_can_be_given_back(tmp_path: Path, fairlead_command: Command) -> None:
    given = [
        line.partition("  # ")[0].rstrip() for line in fairlead_command("train", "ppo", "--dry-run")[0].splitlines()
    ]
    again = fairlead_command("train", "ppo", *(line.replace(": ", "=", 1) for line in given), "--dry-run", "--json")[0]
    once = fairlead_command("train", "ppo", "--dry-run", "--json")[0]
    assert {k: v["value"] for k, v in json.loads(again).items()} == {k: v["value"] for k, v in json.loads(once).items()}


def test_a_setting_without_effect_is_told_on_stderr(fairlead_command: Command) -> None:
    out, err = fairlead_command("train", "sft", "train.steps=3", "train.epochs=2", "--dry-run")
    assert err == "warning: train.epochs has no effect: train.steps wins\n"
    assert "warning" not in out


def test_train_prints_the_summary_as_json_and_only_that_on_stdout(tmp_path: Path, fairlead_command: Command) -> None:
    out, _ = fairlead_command("train", recipe(tmp_path, "sft", **{"tracking.console": True}), "--json")
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "runs" / "sft" / "summary.json").read_text())
    assert (summary["stage"], summary["algorithm"], summary["status"], summary["steps"]) == (
        "sft",
        "sft",
        "finished",
        4,
    )
    assert {"loss", "eval/loss", "grad_norm"} <= summary["metrics"].keys()


def test_resume_continues_a_run_from_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fairlead_command: Command
) -> None:
    file, run = recipe(tmp_path, "sft", **{"train.save_every": 1}), tmp_path / "runs" / "sft"
    with monkeypatch.context() as patch:
        real = checkpoint.RunState.save

        def stop(self: checkpoint.RunState, folder: Path, step: int) -> None:
            real(self, folder, step)
            if step == 2:
                raise KeyboardInterrupt

        patch.setattr(checkpoint.RunState, "save", stop)
        patch.setattr(sys, "argv", ["fairlead", "train", str(file)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 130
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    moved = run.rename(tmp_path / "elsewhere")
    out, err = fairlead_command("resume", moved)
    assert out == f"{moved}: finished after 4 steps\n"
    assert f"continuing {moved} after step 2 of 4" in err
    steps = [json.loads(line)["step"] for line in (moved / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]


def test_a_function_in_the_working_directory_serves_the_installed_command(tmp_path: Path) -> None:
    (tmp_path / "my_reward.py").write_text("def score(outputs, **_):\n    return [1.5] * len(outputs)\n", "utf-8")
    file = recipe(tmp_path, "ppo", **{"ppo.reward": "my_reward:score", "train.steps": 1})
    command = Path(sys.executable).with_name("fairlead")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [command, "train", file, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["objective/scores"]["mean"] == 1.5


def test_prepare_turns_transcripts_into_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fairlead_command: Command
) -> None:
    def transcript(question: str, answer: str) -> str:
        return f"\n\nHuman: {question}\n\nAssistant: {answer}"

    pairs = [
        ("why is it dark?", "the fuse is loose", "buy a lamp"),
        ("why is it cold?", "close the door", "wear a coat"),
        ("same?", "yes", "yes"),
    ]
    rows = [{"chosen": transcript(q, good), "rejected": transcript(q, bad)} for q, good, bad in pairs]
    write(tmp_path / "hh.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    command = ("prepare", "hh-rlhf", "hh.jsonl", "--out", "prepared", "heldout=0.5")
    assert fairlead_command(*command)[0] == "prepared: 3 read, 2 kept; dropped: 1 chosen equal to rejected\n"

    def records(*names: str) -> list[Any]:
        lines = [(tmp_path / "prepared" / name).read_text().splitlines() for name in names]
        return sorted((json.loads(line) for part in lines for line in part), key=str)

    def turns(question: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}]

    assert records("preference.jsonl", "heldout_preference.jsonl") == [
        {"prompt": turns("why is it cold?"), "chosen": "close the door", "rejected": "wear a coat"},
        {"prompt": turns("why is it dark?"), "chosen": "the fuse is loose", "rejected": "buy a lamp"},
    ]
    assert records("sft.jsonl", "heldout_sft.jsonl") == [
        {"prompt": turns("why is it cold?"), "response": "close the door"},
        {"prompt": turns("why is it dark?"), "response": "the fuse is loose"},
    ]
    manifest = json.loads(fairlead_command(*command, "--json")[0])
    assert manifest == json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    assert (manifest["counts"]["read"], manifest["counts"]["kept"]) == (3, 2)


def test_a_pipelines_dry_run_prints_its_stages_and_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fairlead_command: Command
) -> None:
    write(tmp_path / "rows.jsonl", ROWS["sft"])
    file = tmp_path / "chain.yaml"
    stages = {
        "sft": {"train": "sft", "model": {"path": None, "scratch": SCRATCH, "adapter": None}, "data.path": "${rows}"},
        "dpo": {"train": "dpo", "model.path": "${sft}", "data.path": "${rows}"},
        "page": {"report": ["sft", "dpo"], "before": "sft"},
    }
    file.write_text(yaml.safe_dump({"seed": 5, "rows": None, "stages": stages}, sort_keys=False), "utf-8")
    monkeypatch.chdir(tmp_path)
    command = ("pipeline", "chain.yaml", "rows=rows.jsonl", "stages.dpo.dpo.beta=0.4", "--dry-run")
    text = fairlead_command(*command)[0]
    assert re.findall(r"^(\w+: \w+)$", text, re.MULTILINE) == ["sft: train", "dpo: train", "page: report"]
    plan = json.loads(fairlead_command(*command, "--json")[0])["stages"]
    assert [(stage["stage"], stage["verb"]) for stage in plan] == [
        ("sft", "train"),
        ("dpo", "train"),
        ("page", "report"),
    ]
    dpo = plan[1]["settings"]
    assert (dpo["model"]["path"], dpo["data"]["path"], dpo["dpo"]["beta"], dpo["seed"]) == (
        "runs/chain/sft",
        "rows.jsonl",
        0.4,
        5,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain.yaml", "rows.jsonl"]


def test_evaluate_and_report_read_what_train_left(tmp_path: Path, fairlead_command: Command) -> None:
    fairlead_command("train", recipe(tmp_path))
    run, prompts = tmp_path / "runs" / "sft", write(tmp_path / "prompts.jsonl", ROWS["ppo"])
    options = ("--prompts", prompts, "--score", "brevity=tests.end_to_end.rows:brevity")
    options += ("--num-prompts", 3, "--max-new-tokens", 5, "--reference", run)
    measured = json.loads(fairlead_command("evaluate", run, *options, "--json")[0])
    assert measured["sft"]["brevity"]["n"] == 3
    assert measured["sft"]["kl"]["mean"] == 0  # its own reference
    table, _ = fairlead_command("evaluate", run, *options)
    assert all(name in table for name in ("sft", "brevity", "length", "distinct_1"))
    out, _ = fairlead_command("report", run, "--out", tmp_path / "page.html")
    assert out == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_the_values_of_metrics_jsonl(tmp_path: Path, fairlead_command: Command) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fairlead_command("train", recipe(tmp_path, "dpo"), "tracking.sinks=[tensorboard]")
    run = tmp_path / "runs" / "dpo"
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    wanted = {
        (row["step"], name): value
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        for name, value in row.items()
        if name not in ("step", "seconds", "tokens")
    }
    assert {(step, "rewards/margins") for step in (1, 2, 3, 4)} <= wanted.keys()
    shared = logged.keys() & wanted.keys()
    assert shared == wanted.keys()
    assert {key: logged[key] for key in shared} == pytest.approx({key: wanted[key] for key in shared}, rel=1e-6)


def test_the_recipe_a_run_leaves_trains_the_same_again(tmp_path: Path, fairlead_command: Command) -> None:
    fairlead_command("train", recipe(tmp_path))
    first = tmp_path / "runs" / "sft"
    fairlead_command("train", first / "recipe.yaml", "run.name=again")
    again = first.with_name("again")
    ours, theirs = (run / "model" / "model.safetensors" for run in (first, again))
    assert ours.read_bytes() == theirs.read_bytes()
    old, new = (read_mapping(run / "recipe.yaml")[0] for run in (first, again))
    assert old | {"run": {**old["run"], "name": "again"}} == new
