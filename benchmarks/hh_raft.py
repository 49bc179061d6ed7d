"""What the pipeline hh-raft-tiny found, as benchmarks/results/hh-raft.json: what each round of RAFT came to on held-out
prompts, the reward models' accuracies, and what a planted bonus for '#' did with and without the rule against it.

    fairlead pipeline hh-raft-tiny data.path=harmless-base/test.jsonl.gz data.text=FOLDER_OF_PLAIN_TEXT
    python -m benchmarks.hh_raft runs/hh-raft-tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.pipelines import RESULTS, Row, about, read_json, read_rows, sampled_tokens, write_result

COMMAND = "fairlead pipeline hh-raft-tiny data.path=harmless-base/test.jsonl.gz data.text=FOLDER_OF_PLAIN_TEXT"
MEASURED = ("score", "score_margin", "second", "second_margin", "kl", "distinct_2", "length", "finished")
EXPLOIT = {"exploit": "nothing discarded", "guarded": "'#' discarded"}


def rounds(run: Path) -> list[Row]:
    """The evaluations of a run, the first of the model it began with."""
    found = [row for row in read_rows(run / "metrics.jsonl") if "eval/score" in row]
    return [
        {"round": number, "step": row["step"], **{name: round(row[f"eval/{name}"], 4) for name in MEASURED}}
        for number, row in enumerate(found)
    ]


def exploit(run: Path, case: str) -> Row:
    """(of the first round, of the last): mean score of the samples that were not discarded, share of all samples that
    hold a '#', distinct-2; and the first alarm about a phrase."""
    learned = [row for row in read_rows(run / "metrics.jsonl") if "objective/scores" in row]
    files = sorted(run.glob("rounds/*/samples.jsonl"))
    held = [["#" in row["response"] for row in read_rows(file)] for file in (files[0], files[-1])]
    raised = run / "alarms.jsonl"  # not there where none was
    phrases = [row for row in (read_rows(raised) if raised.is_file() else []) if row["alarm"] == "phrase"]
    alarms = [row for row in phrases if "#" in row["message"].partition(" has become ")[0]]
    steps = [row["step"] for row in learned]
    return {
        "case": case,
        "score": [round(learned[at]["objective/scores"], 4) for at in (0, -1)],
        "hashes": [round(sum(each) / len(each), 4) for each in held],
        "distinct_2": [round(learned[at]["rollout/distinct_2"], 4) for at in (0, -1)],
        "rounds": len(files),
        "alarm_round": steps.index(alarms[0]["step"]) if alarms else None,
        "alarm": alarms[0]["message"].partition(". For example")[0] if alarms else None,
    }


def accuracies(folder: Path) -> list[Row]:
    """Of the reward models, on held-out pairs, at the end of their training."""
    ends = {name: read_json(folder / name / "summary.json")["metrics"] for name in ("reward", "second")}
    pairs = {name: read_json(folder / name / "manifest.json")["data"]["eval"]["kept"] for name in ends}
    shared = {"metric": "held-out accuracy", "unit": "share", "peer": None}
    return [
        {"case": name, **shared, "ours": round(metrics["eval/rewards/accuracies"]["mean"], 4), "n": pairs[name]}
        for name, metrics in ends.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the finished pipeline")
    parser.add_argument("--out", type=Path, default=RESULTS / "hh-raft.json")
    given = parser.parse_args()
    result = about(COMMAND, "one thread") | {
        "sampled_tokens": sampled_tokens(given.folder / "raft"),
        "cases": accuracies(given.folder),
        "rounds": rounds(given.folder / "raft"),
        "exploit": [exploit(given.folder / run, case) for run, case in EXPLOIT.items()],
    }
    write_result(result, given.out)


if __name__ == "__main__":
    main()
