from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest
from tests.data.prepare.raw import data_folder, every_row_loads, outputs, rows

from fairlead.data.prepare import prepare

HELDOUT = ("heldout_sft", "heldout_preference", "heldout_prompts")


def site(folder: Path, num_questions: int = 1) -> Path:
    """Each question has a negative, an accepted and two tied answers; one more has none."""
    posts: list[dict[str, object]] = []
    for number in range(10, 10 * num_questions + 10, 10):
        for id, kind, score in ((number, 1, 5), (number + 5, 1, 0)):
            posts.append({"Id": id, "PostTypeId": kind, "Score": score, "Title": f"T{id}"})
            posts[-1] |= {"Body": f"<p>Q{id}</p>", "AcceptedAnswerId": number + 2}
        for offset, score in ((1, -3), (2, 1), (3, 3), (4, 3)):
            posts.append({"Id": number + offset, "PostTypeId": 2, "ParentId": number, "Score": score})
            posts[-1] |= {"Body": f"<p>A{number + offset}</p>", "ContentLicense": "CC BY-SA 4.0"}
    lines = (" ".join(f"{k}={quoteattr(str(v))}" for k, v in post.items()) for post in posts)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"<row {line} />\n" for line in lines)
    (folder / "Posts.xml").write_text(f"<posts>\n{text}</posts>")
    return folder


def only(split: str) -> dict[str, Any]:
    return {name: float(name == split) for name in ("finetune", "reward", "rl", "evaluation")}


def pick(row: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in names}


PROMPT = "T10\n\nQ10"
ANSWERS = [{"prompt": PROMPT, "response": f"A{id}"} for id in (11, 12, 13, 14)]
# Scores: A11 -1, A12 round(log2(2)) + 1 = 2, A13 and A14 log2(4) = 2, so A12, A13 and A14 tie.
PAIRS = [
    {
        "prompt": PROMPT,
        "chosen": f"A{id}",
        "rejected": "A11",
        "chosen_score": 2,
        "rejected_score": -1,
        "site": "beer",
        "question_id": 10,
        "chosen_id": id,
        "rejected_id": 11,
        "question_licence": None,
        "chosen_licence": "CC BY-SA 4.0",
        "rejected_licence": "CC BY-SA 4.0",
    }
    for id in (12, 13, 14)
]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (
            "finetune",
            {
                "sft": ANSWERS,
                "pretrain": [{"text": f"Question: {PROMPT}\n\nAnswer: A{id}"} for id in (11, 12, 13, 14)],
            },
        ),
        ("reward", {"preference": PAIRS}),
        ("rl", {"prompts": [{"prompt": PROMPT}]}),
        (
            "evaluation",
            {
                "heldout_sft": ANSWERS,
                "heldout_preference": PAIRS,
                "heldout_prompts": [{"prompt": PROMPT}],
            },
        ),
    ],
)
def test_each_stack_exchange_split_feeds_its_files(
    tmp_path: Path, split: str, expected: dict[str, list[dict[str, Any]]]
) -> None:
    out = tmp_path / "out"
    manifest = prepare("stack-exchange", site(tmp_path / "beer"), out, **only(split))
    found = {name: rows(out, name) for name in outputs(out)}  # with attribution besides
    assert {name: [pick(row, expected[name][0]) for row in found[name]] for name in found} == expected
    counts = manifest["counts"]
    assert (counts["read"], counts["kept"]) == (6, 5)
    assert counts["dropped"] == {"question with fewer than two answers": 1}
    assert counts["splits"] == {split: 1}
    pairs = {"read": 6, "kept": 3, "dropped": {"equal scores": 3}, "notes": {}}
    assert counts["pairs"] == (
        pairs if split in ("reward", "evaluation") else {"read": 0, "kept": 0, "dropped": {}, "notes": {}}
    )


def test_one_demonstration_is_the_accepted_answer_or_the_best(tmp_path: Path) -> None:
    folder = site(tmp_path / "beer", 2)
    posts = (folder / "Posts.xml").read_text().replace('AcceptedAnswerId="22"', "")
    (folder / "Posts.xml").write_text(posts)
    prepare("stack-exchange", folder, tmp_path / "out", sft="accepted_or_best", **only("finetune"))
    responses = [row["response"] for row in rows(tmp_path / "out", "sft")]
    assert responses == ["A12", "A23"]
    assert len(rows(tmp_path / "out", "pretrain")) == 8


def test_no_question_is_in_two_splits(tmp_path: Path) -> None:
    site(tmp_path / "dumps" / "beer", 150)
    site(tmp_path / "dumps" / "wine", 200)  # the same questions and fifty more
    out = tmp_path / "out"
    manifest = prepare("stack-exchange", tmp_path / "dumps", out, max_pairs=2)
    counts = manifest["counts"]
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) == 6 * 350
    assert counts["dropped"]["duplicate question"] == 150
    assert {output["sha256"] for output in manifest["inputs"]} and len(manifest["inputs"]) == 2

    prompts = {name: {row["prompt"] for row in rows(out, name)} for name in outputs(out) if name != "pretrain"}
    groups = [prompts[name] for name in ("sft", "preference", "prompts")]
    groups.append(prompts["heldout_prompts"])
    assert all(not one & other for one, other in combinations(groups, 2))
    assert sum(map(len, groups)) == sum(counts["splits"].values()) == 200
    assert prompts["heldout_sft"] == prompts["heldout_preference"] == groups[-1]
    texts = [row["text"] for row in rows(out, "pretrain")]
    assert {text.removeprefix("Question: ").split("\n\nAnswer")[0] for text in texts} == groups[0]
    assert max(Counter(row["prompt"] for row in rows(out, "preference")).values()) == 2


def test_the_published_dumps_are_prepared_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare("stack-exchange", data_folder("stackexchange"), out)
    counts = manifest["counts"]
    assert (counts["read"], counts["kept"]) == (2354 + 592 + 624 + 1986, 875 + 2550)
    assert counts["dropped"] == {
        "answer of a dropped question": 750,
        "neither question nor answer": 499,
        "question with fewer than two answers": 882,
    }
    assert sum(counts["splits"].values()) == 875
    prompts = {name: {row["prompt"] for row in rows(out, name)} for name in outputs(out) if name != "pretrain"}
    groups = [prompts[n] for n in ("sft", "preference", "prompts", HELDOUT[2])]
    assert all(not one & other for one, other in combinations(groups, 2))
    assert every_row_loads(out)
    newer = [row for row in rows(out, "preference") if row["site"].startswith("datascience")]
    assert {row["chosen_licence"] for row in newer} == {"CC BY-SA 3.0", "CC BY-SA 4.0"}
