"""`fairlead prove` and TRL on the same tasks, as benchmarks/results/conformance.json.

    make bench-conformance
    make bench-conformance ARGS="--case dpo-sigmoid --case rloo"

TRL's trainers get the same start, rows, steps, rate and clipping of gradients, and whole batches; what they saved is
measured as what ours saved.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.pipelines import RESULTS, ROOT, Row, about, write_result

PYTHON = ROOT / "benchmarks" / "peers" / ".venv" / "bin" / "python"
LOSSES = {
    "sigmoid": "sigmoid",
    "robust": "robust",
    "ipo": "ipo",
    "hinge": "hinge",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "sppo": "sppo_hard",
    "discopop": "discopop",
}
"""TRL's name of a loss of DPO."""
DPO = ("beta", "label_smoothing", "discopop_tau")
ONLINE = {"num_generations": "num_samples", "max_completion_length": "max_new_tokens", "beta": "kl_coef"}
"""TRL's name of a setting, and ours."""
OWN: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward-pairs": {},
    "cpo": {"loss_type": "sigmoid", "cpo_alpha": 0.0, "beta": 0.5},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
    "orpo": {"beta": 0.5},
    "rloo": {},
    "grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "use_bias_correction_kl": True},
}
"""Cases that TRL has a trainer for, beside those of DPO, and what else it is told. Its RLOO sums over a response's
tokens what ours divides by their number; its GRPO charges the KL in the loss."""


def jobs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Of each case TRL's trainer and its settings."""
    from fairlead.conformance.cases import CASES

    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, case in CASES.items():
        own = {key.partition(".")[2]: value for key, value in case.settings.items() if key.startswith(case.algorithm)}
        if case.algorithm == "dpo" and own.get("loss") in LOSSES:
            found[name] = "dpo", {"loss_type": [LOSSES[own["loss"]]], **{key: own[key] for key in DPO if key in own}}
        elif name in OWN:
            told: dict[str, Any] = {}
            if case.reward is not None:
                told = {theirs: own[ours] for theirs, ours in ONLINE.items()} | {"top_k": 0, "shuffle_dataset": False}
            found[name] = "cpo" if name == "simpo" else case.algorithm, told | OWN[name]
    return found


def prepared(name: str, trainer: str, arguments: Mapping[str, Any], folder: Path) -> Path:
    """A folder with the start and the job of a case."""
    from fairlead.conformance.cases import CASES
    from fairlead.conformance.converge import COMMON
    from fairlead.runner import resolve

    case = CASES[name]
    folder.mkdir(parents=True)
    start = case.task.save(folder / "start")
    recipe = resolve({"algorithm": case.algorithm}, {**COMMON, **case.settings}).recipe
    job = {
        "trainer": trainer,
        "model": str(start),
        "rows": case.rows,
        "rewards": {
            prompt: dict(zip(case.task.texts, rewards.tolist(), strict=True))
            for prompt, rewards in zip(case.task.prompts, case.task.rewards, strict=True)
        },
        "steps": recipe.train.steps,
        "learning_rate": recipe.optim.learning_rate,
        "max_grad_norm": recipe.optim.max_grad_norm,
        "arguments": arguments,
        "out": str(folder / "trained"),
    }
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    return folder


def trained(folder: Path) -> Path:
    """The same, with what TRL has made of it."""
    command = [str(PYTHON), str(ROOT / "benchmarks" / "peers" / "conformance.py"), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{folder.name}: TRL's side failed\n{done.stderr[-3000:]}")
    return folder


def measured(folder: Path) -> Row:
    """A row, as ours are measured."""
    from fairlead.conformance.cases import CASES
    from fairlead.conformance.converge import row

    found = row(CASES[folder.name], folder, folder / "trained")
    print(f"{folder.name}: {found['distance']:.1e} of {found['bound']:.0e}", file=sys.stderr, flush=True)
    return found | {"steps": json.loads((folder / "job.json").read_text("utf-8"))["steps"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="of TRL's, and nothing is written; may be repeated")
    given = parser.parse_args()
    if not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is missing: make peers")
    chosen = {name: job for name, job in jobs().items() if name in (given.case or jobs())}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
        folders = [prepared(name, *job, Path(scratch) / name) for name, job in chosen.items()]
        rows = [measured(folder) for folder in pool.map(trained, folders)]
    if given.case:
        return
    from fairlead.conformance.prove import prove

    ours = prove()
    trl = subprocess.run(
        [PYTHON, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True, check=True
    )
    result = about("make bench-conformance", "two cases at a time, one thread each")
    result["versions"]["trl"] = trl.stdout.strip()
    write_result(
        result | {**ours, "versions": ours["versions"] | result["versions"], "peer": rows}, RESULTS / "conformance.json"
    )


if __name__ == "__main__":
    main()
