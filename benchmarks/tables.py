"""The tables of the documentation from the figures that are committed.

python benchmarks/tables.py quality
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAMES = {
    "sft": "SFT, the start of all",
    "best_of_4": "best of 4 of SFT",
    "raft": "RAFT",
    "ppo": "PPO",
    "online_dpo": "online DPO",
    "iterative_dpo": "iterative DPO",
    "dpo": "offline DPO",
    "pretrain": "before",
}

RESULTS = Path(__file__).parent / "results"
Result = Mapping[str, Any]


def quality(result: Result) -> str:
    """Accuracy on held-out pairs: ours, TRL's and the baselines', a row a case."""
    lines = ["| case | ours | TRL | length only | TF-IDF |", "|---|---|---|---|---|"]
    cases = dict.fromkeys(line["case"] for line in result["cases"])
    for case in cases:
        by = {line["peer_name"]: line for line in result["cases"] if line["case"] == case}
        own = interval(next(iter(by.values())), "ours")
        others = [interval(by[name], "peer") if name in by else "" for name in ("TRL", "length only", "TF-IDF")]
        lines.append(f"| {case} | {own} | {' | '.join(others)} |")
    return "\n".join(lines)


def relatives(result: Result) -> str:
    """Means over the seeds, the lowest and the highest of them, a row a method."""
    columns = {
        "gold": ("gold", 3),
        "score": ("score", 2),
        "kl": ("KL", 2),
        "distinct_2": ("distinct-2", 3),
        "sampled_tokens": ("tokens sampled", 0),
        "seconds": ("seconds", 0),
    }
    lines = [f"| method | {' | '.join(title for title, _ in columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(line["case"] for line in result["cases"]):
        by = {line["metric"]: line for line in result["cases"] if line["case"] == name}
        cells = [spread(by[metric], places) if metric in by else "" for metric, (_, places) in columns.items()]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def relatives_by_seed(result: Result) -> str:
    """Gold of each seed with its interval over prompts."""
    gold = [line for line in result["cases"] if line["metric"] == "gold"]
    seeds = [each["seed"] for each in gold[0]["by_seed"]]
    lines = [f"| gold | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---" * (len(seeds) + 1) + "|"]
    for line in gold:
        cells = [f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in line["by_seed"]]
        lines.append(f"| {NAMES[line['case']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(line: Result, places: int) -> str:
    if line["highest"] == 0:
        return "0"
    ends = f" ({line['lowest']:,.{places}f} to {line['highest']:,.{places}f})" if line["repeats"] > 1 else ""
    return f"{line['ours']:,.{places}f}{ends if line['lowest'] < line['highest'] else ''}"


def hh_raft(result: Result) -> str:
    """What each round of RAFT found on held-out prompts."""
    lines = ["| round | reward model | second reward model | KL | distinct-2 | length | ended |", "|---" * 7 + "|"]
    for row in result["rounds"]:
        scores = [f"{row[name]:.3f} ± {row[f'{name}_margin']:.3f}" for name in ("score", "second")]
        rest = (f"{row['kl']:.2f}", f"{row['distinct_2']:.3f}", f"{row['length']:.1f}", f"{row['finished']:.2f}")
        lines.append(f"| {row['round']} | {' | '.join([*scores, *rest])} |")
    return "\n".join(lines)


def hh_exploit(result: Result) -> str:
    """The planted bonus for '#', with and without the rule that discards it."""
    titles = ("run", "reward with the bonus", "share with '#'", "distinct-2", "first alarm")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case in result["exploit"]:
        moved = [f"{case[name][0]:.3f} → {case[name][1]:.3f}" for name in ("score", "hashes", "distinct_2")]
        alarm = f"round {case['alarm_round']}" if case["alarm_round"] is not None else "none"
        lines.append(f"| {case['case']} | {' | '.join(moved)} | {alarm} |")
    return "\n".join(lines)


def imdb(result: Result) -> str:
    """Figures of held-out prompts, before and after each algorithm that was run."""
    held = [line for line in result["cases"] if line["case"] == "held-out prompts"]
    after = list(dict.fromkeys(line.get("algorithm", "ppo") for line in held))
    lines = [f"| | before | {' | '.join(NAMES[name] for name in after)} |", "|---" * (len(after) + 2) + "|"]
    for metric in dict.fromkeys(line["metric"] for line in held):
        by = {line.get("algorithm", "ppo"): line for line in held if line["metric"] == metric}
        first = next(iter(by.values()))["before"]
        cells = [estimate(by[name]["ours"] if name in by else None) for name in after]
        lines.append(f"| {metric} | {estimate(first)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def estimate(found: Result | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.3f}" + ("" if found.get("low") is None else f" [{found['low']:.3f}, {found['high']:.3f}]")


def interval(line: Result, side: str) -> str:
    return f"{line[side]:.3f} [{line[f'{side}_low']:.3f}, {line[f'{side}_high']:.3f}]"


def convergence(result: Result) -> str:
    """How far from its optimum each case ends, ours and TRL's."""
    theirs = {row["case"]: row for row in result["peer"]}
    titles = ("case", "algorithm", "task", "reaches", "measure", "bound", "steps", "Fairlead", "TRL")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in result["convergence"]:
        own, other = (_distance(each) for each in (row, theirs.get(row["case"])))
        told = (row["case"], row["algorithm"], row["task"], row["reaches"], row["measure"], f"{row['bound']:.0e}")
        lines.append(f"| {' | '.join(told)} | {row['steps']} | {own} | {other} |")
    return "\n".join(lines)


def _distance(row: Result | None) -> str:
    return "" if row is None else f"{row['distance']:.1e}" + ("" if row["pass"] else ", **fails**")


def bias(result: Result) -> str:
    lines = ["| case | estimator | known to be | relative bias [99.9 %] |", "|---" * 4 + "|"]
    for row in result["bias"]:
        ends = f"{row['bias']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        lines.append(f"| {row['case']} | {row['estimator']} | {row['known']} | {ends} |")
    return "\n".join(lines)


def invariance(result: Result) -> str:
    lines = ["| step of | layouts | float64 | float32 |", "|---" * 4 + "|"]
    lines += [
        f"| {r['case']} | {r['layouts']} | {r['float64']:.1e} | {r['float32']:.1e} |" for r in result["invariance"]
    ]
    return "\n".join(lines)


def mutants(result: Result) -> str:
    """Seeded defects by the part of the package they were put into."""
    rows = [(case["file"].split("/")[0], case) for case in result["cases"]]
    lines = ["| in | by hand | drawn | of both, change nothing | caught |", "|---" * 5 + "|"]
    for part in [*dict.fromkeys(part for part, _ in rows), "all"]:
        own = [case for at, case in rows if part in (at, "all")]
        drawn, same = (sum(bool(case[name]) for case in own) for name in ("drawn", "equivalent"))
        caught = sum(case["caught"] for case in own)
        name = part if part == "all" else f"`{part}`"
        lines.append(f"| {name} | {len(own) - drawn} | {drawn} | {same} | {caught} of {len(own) - same} |")
    return "\n".join(lines)


def chaos(result: Result) -> str:
    """Runs that were killed, by algorithm."""
    groups = {
        "in a rollout": ("sampling", "scoring", "measuring", "round write"),
        "in a checkpoint": ("checkpoint write",),
    }
    titles = ["algorithm", "kills", "twice in a row", *groups, "elsewhere", "runs", "files that differ"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case in result["cases"]:
        inside = [sum(case["phases"].get(phase, 0) for phase in phases) for phases in groups.values()]
        told = (case["kills"], case["in_a_row"], *inside, case["kills"] - sum(inside), case["runs"])
        lines.append(f"| {case['case']} | {' | '.join(map(str, told))} | {len(case['mismatches'])} |")
    return "\n".join(lines)


def parity(result: Result) -> str:
    """Of each algorithm the worst figure over the numbers of ranks."""
    metrics = list(dict.fromkeys(case["metric"] for case in result["cases"]))
    lines = [f"| | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    bounds = [next(c["peer"] for c in result["cases"] if c["metric"] == metric) for metric in metrics]
    for name in dict.fromkeys(case["case"] for case in result["cases"]):
        found = [[c["ours"] for c in result["cases"] if (c["case"], c["metric"]) == (name, m)] for m in metrics]
        lines.append(f"| {name} | {' | '.join(f'{max(each):.1e}' if each else '' for each in found)} |")
    return "\n".join([*lines, f"| bound | {' | '.join(f'{bound:.0e}' for bound in bounds)} |"])


TABLES: dict[str, tuple[Callable[[Result], str], ...]] = {
    "quality": (quality,),
    "hh-raft": (hh_raft, hh_exploit),
    "imdb-sentiment": (imdb,),
    "conformance": (convergence, bias, invariance),
    "relatives": (relatives, relatives_by_seed),
    "mutants": (mutants,),
    "chaos": (chaos,),
    "parity": (parity,),
}
"""By the name of the result: the tables that its page shows."""

if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        result = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        print("\n\n".join(table(result) for table in TABLES[name]))
