"""Speed and memory of `fairlead prepare stack-exchange` beside a plain version, on real dumps repeated to a size.

    make bench-stack-exchange                       100 MB and 2 GB
    make bench-stack-exchange ARGS="--sizes 20"     in MB

The dumps are those of FAIRLEAD_DATA/stackexchange, repeated with fresh ids and titles. Memory is the largest sum of the
resident memory of all processes of a run, sampled every 20 ms; pages shared between processes are counted in each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
IDS = re.compile(rb' (Id|ParentId|AcceptedAnswerId|PostId|RelatedPostId)="(\d+)"')
TITLE = re.compile(rb' Title="([^"]*)"')
COPY = 10_000_000
PAIR = ("site", "question_id", "chosen_id", "rejected_id", "chosen_score", "rejected_score")


def repeat(source: Path, target: Path, size: int) -> int:
    """Writes the dump repeated to about ``size`` bytes; returns its number of posts."""
    times = max(1, round(size / sum(file.stat().st_size for file in source.rglob("Posts.xml"))))
    posts = 0
    for file in sorted((*source.rglob("Posts.xml"), *source.rglob("PostLinks.xml"))):
        head, *rows = file.read_bytes().split(b"<row ")
        rows[-1], end = rows[-1].rsplit(b"</", 1)
        rows[-1] = rows[-1].rstrip() + b"\r\n  "
        (target / file.parent.name).mkdir(parents=True, exist_ok=True)
        with (target / file.parent.name / file.name).open("wb") as out:
            out.write(head)
            for copy in range(times):
                for row in rows:
                    out.write(b"<row" + renumbered(b" " + row, copy))
            out.write(b"</" + end)
        posts += times * len(rows) * (file.name == "Posts.xml")
    return posts


def renumbered(row: bytes, copy: int) -> bytes:
    row = IDS.sub(lambda match: b' %b="%d"' % (match[1], int(match[2]) + copy * COPY), row)
    return TITLE.sub(lambda match: b' Title="%b (copy %d)"' % (match[1], copy), row)


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak megabytes of a command and all its processes."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, peak / 1e6


def resident(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def ours(dump: Path, out: Path) -> list[str]:
    shares = ["reward=1", "finetune=0", "rl=0", "evaluation=0"]
    fairlead = str(Path(sys.executable).with_name("fairlead"))
    return [fairlead, "prepare", "stack-exchange", str(dump), *shares, "--out", str(out)]


def plain(dump: Path, out: Path) -> list[str]:
    return [sys.executable, str(HERE / "stack_exchange_plain.py"), str(dump), str(out)]


def same_pairs(one: Path, other: Path) -> bool:
    from pyarrow import parquet

    order = [(name, "ascending") for name in PAIR]
    tables = [parquet.read_table(path, columns=list(PAIR)).sort_by(order) for path in (one, other)]
    return tables[0].cast(tables[1].schema).equals(tables[1])


def run(source: Path, size: int, repeats: int, with_plain: bool, folder: Path) -> list[dict[str, Any]]:
    dump = folder / "dump"
    posts = repeat(source, dump, size * 1_000_000)
    mine, others, agree = list[tuple[float, float]](), list[tuple[float, float]](), None
    for number in range(repeats):
        out = folder / f"ours-{number}"
        mine.append(measure(ours(dump, out)))
        print(f"{size} MB: ours {posts / mine[-1][0]:,.0f} posts/s, {mine[-1][1]:,.0f} MB", file=sys.stderr)
        if with_plain:
            other = folder / f"plain-{number}.parquet"
            others.append(measure(plain(dump, other)))
            agree = same_pairs(out / "preference.parquet", other) and agree is not False
            print(f"{size} MB: plain {posts / others[-1][0]:,.0f} posts/s, {others[-1][1]:,.0f} MB", file=sys.stderr)
    speeds, plain_speeds = [posts / seconds for seconds, _ in mine], [posts / seconds for seconds, _ in others]
    peaks, plain_peaks = [peak for _, peak in mine], [peak for _, peak in others]
    common = {"case": f"{size} MB", "posts": posts, "peer_name": "ElementTree, pandas, markdownify", "repeats": repeats}
    return [
        {**common, "metric": "posts per second", "unit": "1/s", **compared(speeds, plain_speeds), "agree": agree},
        {**common, "metric": "peak memory", "unit": "MB", **compared(peaks, plain_peaks), "agree": agree},
    ]


def compared(mine: list[float], others: list[float]) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(mine, others, strict=bool(others))]
    return {
        "ours": round(statistics.median(mine), 1),
        "peer": round(statistics.median(others), 1) if others else None,
        "ratio": round(statistics.median(ratios), 3) if ratios else None,
        "ratio_low": round(min(ratios), 3) if ratios else None,
        "ratio_high": round(max(ratios), 3) if ratios else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 2000], help="of Posts.xml, in MB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain-up-to", type=int, default=100, help="largest size for the plain version, in MB")
    parser.add_argument("--data", default=os.environ.get("FAIRLEAD_DATA"), help="folder with stackexchange/")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "stack_exchange.json")
    settings = parser.parse_args()
    if not settings.data:
        parser.error("name the folder that holds stackexchange/ by --data or FAIRLEAD_DATA")
    cases: list[dict[str, Any]] = []
    for size in settings.sizes:
        with tempfile.TemporaryDirectory() as folder:
            source, with_plain = Path(settings.data) / "stackexchange", size <= settings.plain_up_to
            cases += run(source, size, settings.repeats, with_plain, Path(folder))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    result = {
        "command": "make bench-stack-exchange ARGS=" + repr(" ".join(sys.argv[1:])),
        "commit": commit.strip(),
        "date": date.today().isoformat(),
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}",
        "versions": {name: version(name) for name in ("lxml", "markdownify", "pandas", "pyarrow")},
        "remark": "The plain version holds everything in memory and is measured up to --plain-up-to MB.",
        "cases": cases,
    }
    settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
