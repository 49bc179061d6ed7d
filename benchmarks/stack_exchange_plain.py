"""The preparation of Stack Exchange pairs as one would write it plainly: ElementTree, pandas, markdownify, one process.

    python benchmarks/stack_exchange_plain.py DUMP OUT.parquet

Everything stands in memory. Questions with two answers or more, scores, at most ten pairs a question drawn by the same
keyed hash: the pairs are those of `fairlead prepare stack-exchange DUMP reward=1 finetune=0 rl=0 evaluation=0`.
"""

from __future__ import annotations

import math
import sys
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas
from markdownify import markdownify

from fairlead.data.splits import keyed_hash

COLUMNS = ("Id", "PostTypeId", "ParentId", "AcceptedAnswerId", "Score", "Title", "Body", "OwnerUserId")


def read(path: Path) -> Any:
    rows: list[dict[str, Any]] = []
    for _, element in ElementTree.iterparse(path):
        if element.tag == "row" and element.get("PostTypeId") in ("1", "2"):
            rows.append({name: element.get(name) for name in COLUMNS})
        element.clear()
    posts: Any = pandas.DataFrame(rows)
    for name in ("Id", "ParentId", "AcceptedAnswerId", "Score"):
        numbers: Any = pandas.to_numeric(posts[name])
        posts[name] = numbers.fillna(-1).astype("int64")
    return posts


def text(html: str) -> str:
    return markdownify(html, heading_style="ATX", escape_asterisks=False, escape_underscores=False).strip()


def pairs(site: str, posts: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    questions = posts[posts.PostTypeId == "1"].set_index("Id")
    answers = posts[posts.PostTypeId == "2"].sort_values("Id")
    seen: set[str] = set()
    for number, group in answers.groupby("ParentId"):
        if len(group) < 2 or number not in questions.index:
            continue
        question = questions.loc[number]
        prompt = f"{question.Title.strip()}\n\n{text(question.Body)}"
        texts = {answer.Id: text(answer.Body) for answer in group.itertuples()}
        if prompt in seen:
            continue
        seen.add(prompt)
        scores = {
            answer.Id: -1
            if answer.Score < 0
            else round(math.log2(1 + answer.Score)) + (answer.Id == question.AcceptedAnswerId)
            for answer in group.itertuples()
            if texts[answer.Id]
        }
        found = [
            (one, other) if scores[one] > scores[other] else (other, one)
            for one, other in combinations(scores, 2)
            if scores[one] != scores[other] and texts[one] != texts[other]
        ]
        found.sort(key=lambda pair: keyed_hash(0, "pairs", site, int(number), int(pair[0]), int(pair[1])))
        rows += (
            {
                "prompt": prompt,
                "chosen": texts[chosen],
                "rejected": texts[rejected],
                "chosen_score": scores[chosen],
                "rejected_score": scores[rejected],
                "site": site,
                "question_id": number,
                "question_author": question.OwnerUserId,
                "chosen_id": chosen,
                "rejected_id": rejected,
            }
            for chosen, rejected in sorted(found[:10])
        )
    return rows


def main(dump: str, out: str) -> None:
    rows = [row for path in sorted(Path(dump).rglob("Posts.xml")) for row in pairs(path.parent.name, read(path))]
    pandas.DataFrame(rows).to_parquet(out, compression="zstd")


if __name__ == "__main__":
    main(*sys.argv[1:])
