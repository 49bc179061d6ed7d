"""What is kept of a dump, and where it goes."""

import os
from collections import Counter
from itertools import chain, combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.data.stack_exchange.dumps import (
    answered,
    asked,
    dump,
    only,
    prepared,
    rows,
    thread,
)

from fairlead.data.stack_exchange import answer_score, run
from fairlead.data.stack_exchange.scatter import licence_of


def test_a_question_gathers_its_answers_wherever_they_stand(tmp_path: Path) -> None:
    folder = dump(
        tmp_path / "beer.example",
        answered(9, 2, 3, ContentLicense="CC BY-SA 4.0", OwnerUserId=5),
        answered(4, 2, -2, Body="<pre><code>a\n\nb</code></pre>", CreationDate="2011-04-08T00:00:00.000"),
        asked(
            2,
            AcceptedAnswerId=9,
            Title=" Is 1 < 2 & é\u0085? ",
            Body='<p>See <a href="http://x.y">this</a></p>\n',
            ContentLicense="CC BY-SA 3.0",
            Tags="<c++><ale>",
            OwnerDisplayName="user7",
        ),
        answered(7, 2, 0),
    )
    counts = prepared(folder, tmp_path / "out", **only("reward"))
    question = {
        "prompt": "Is 1 < 2 & é\u0085?\n\nSee [this](http://x.y)",
        "site": "beer.example",
        "question_id": 2,
        "question_author": "user7",
        "question_licence": "CC BY-SA 3.0",
        "tags": ["c++", "ale"],
    }
    best = {
        "chosen": "A9",
        "chosen_score": 3,
        "chosen_id": 9,
        "chosen_author": "user 5",
        "chosen_licence": "CC BY-SA 4.0",
    }
    middle = {"score": 0, "id": 7, "author": None, "licence": None}
    worst = {
        "rejected": "```\na\n\nb\n```",
        "rejected_score": -1,
        "rejected_id": 4,
        "rejected_author": None,
        "rejected_licence": "CC BY-SA 3.0 (by date)",
    }
    assert rows(tmp_path / "out", "preference") == [
        question | {"chosen": "A7"} | {f"chosen_{name}": value for name, value in middle.items()} | worst,
        question | best | worst,
        question | best | {"rejected": "A7"} | {f"rejected_{name}": value for name, value in middle.items()},
    ]
    assert counts == {
        "read": 4,
        "kept": 4,
        "dropped": {},
        "notes": {"author unknown": 2, "licence by date": 1},
        "splits": {"reward": 1},
        "pairs": {"read": 3, "kept": 3, "dropped": {}, "notes": {}},
        "scores": {"-1": 1, "0": 1, "3": 1},
        "equal_rows_merged": {},
        "moved_to_the_split_of_a_duplicate": 0,
    }


@pytest.mark.parametrize(
    ("post", "licence"),
    [
        ({"CreationDate": "2011-04-07T23:59:59.999"}, "CC BY-SA 2.5 (by date)"),
        ({"CreationDate": "2011-04-08T00:00:00.000"}, "CC BY-SA 3.0 (by date)"),
        ({"CreationDate": "2018-05-01T23:59:59.999"}, "CC BY-SA 3.0 (by date)"),
        ({"CreationDate": "2018-05-02T00:00:00.000"}, "CC BY-SA 4.0 (by date)"),
        ({"CreationDate": "2018-05-02T00:00:00.000", "ContentLicense": "CC BY-SA 3.0"}, "CC BY-SA 3.0"),
        ({"CreationDate": "yesterday"}, None),
        ({}, None),
    ],
)
def test_a_licence_that_is_not_stated_follows_from_the_date(
    tmp_path: Path, post: dict[str, object], licence: str | None
) -> None:
    # the dates: https://meta.stackexchange.com/questions/347758
    dump(tmp_path / "site", asked(1, **post), *thread(1, 0, 1)[1:])
    prepared(tmp_path / "site", tmp_path / "out", **only("rl"))
    assert [row["question_licence"] for row in rows(tmp_path / "out", "prompts")] == [licence]


@pytest.mark.parametrize(
    ("tags", "expected"), [("<a-b><c#>", ["a-b", "c#"]), ("|a-b|c#|", ["a-b", "c#"]), ("", []), (None, [])]
)
def test_tags_are_read_in_the_old_form_and_the_new(tmp_path: Path, tags: str | None, expected: list[str]) -> None:
    more = {} if tags is None else {"Tags": tags}
    dump(tmp_path / "site", asked(1, **more), *thread(1, 0, 1)[1:])
    prepared(tmp_path / "site", tmp_path / "out", **only("rl"))
    assert [row["tags"] for row in rows(tmp_path / "out", "prompts")] == [expected]


DIRT = [
    asked(1), answered(2, 1), answered(3, 1),
    answered(4, 1, Body=" "), answered(5, 1, Body="<p></p>"),
    asked(10), answered(11, 10),
    asked(20), answered(21, 20), answered(22, 20, Body=""),
    asked(30, Body=""), answered(31, 30), answered(32, 30),
    asked(40, Title=" "), answered(41, 40), answered(42, 40),
    asked(50, Title="T1", Body="Q1"), answered(51, 50), answered(52, 50), answered(53, 50),
    asked(60),
    answered(70, 99), answered(71, 99),
    answered(2, 1),
    {"Id": 80, "PostTypeId": 5, "Score": 0, "Body": ""}, {"Id": 81, "PostTypeId": 7},
    {"Id": 82},
    answered(90, 1) | {"Score": "many"}, {"Id": 91, "PostTypeId": 2, "Score": 1, "Body": "x"},
    asked(100, AcceptedAnswerId=2), answered(101, 100, Body="same"), answered(102, 100, 1, Body="same"),
]  # fmt: skip


@pytest.mark.parametrize("small", [False, True])
def test_every_post_is_kept_or_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    if small:
        monkeypatch.setattr(run, "PART_BYTES", (500, 500))
    counts = prepared(dump(tmp_path / "site", *DIRT), tmp_path / "out", **only("finetune"))
    sft = rows(tmp_path / "out", "sft")
    assert sorted((row["question_id"], row["answer_id"]) for row in sft) == [(1, 2), (1, 3), (100, 101)]
    assert counts == {
        "read": 32,
        "kept": 6,
        "dropped": {
            "answer of a dropped question": 1 + 1 + 2 + 2 + 3,
            "answer without body": 2 + 1,
            "answer without its question": 2,
            "duplicate question": 1,
            "neither question nor answer": 3,
            "post without id, score or parent": 2,
            "question with fewer than two answers": 3,
            "question without title or body": 2,
            "repeated post id": 1,
        },
        "notes": {"accepted answer is not among the answers": 1, "author unknown": 6},
        "splits": {"finetune": 2},
        "pairs": {"read": 0, "kept": 0, "dropped": {}, "notes": {}},
        "scores": {"0": 3, "1": 1},
        "equal_rows_merged": {"pretrain": 1, "sft": 1},
        "moved_to_the_split_of_a_duplicate": 0,
    }


def test_each_split_feeds_its_files(tmp_path: Path) -> None:
    folder = dump(tmp_path / "beer", asked(10, AcceptedAnswerId=12), *thread(10, -3, 1, 3, 3)[1:])
    # Scores: A11 -1, A12 round(log2(2)) + 1 = 2, A13 and A14 log2(4) = 2, so A12, A13 and A14 tie.
    texts = [f"Question: T10\n\nQ10\n\nAnswer: A{id}" for id in (11, 12, 13, 14)]
    expected: dict[str, dict[str, list[Any]]] = {
        "finetune": {"pretrain": texts, "sft": ["A11", "A12", "A13", "A14"]},
        "reward": {"preference": [("A12", "A11"), ("A13", "A11"), ("A14", "A11")]},
        "rl": {"prompts": ["T10\n\nQ10"]},
    }
    expected["evaluation"] = {
        f"heldout_{name}": found for split in expected.values() for name, found in split.items() if name != "pretrain"
    }
    for split, files in expected.items():
        out = tmp_path / split
        counts = prepared(folder, out, **only(split))
        assert {path.name for path in out.iterdir()} == {f"{name}.parquet" for name in files}
        for name, found in files.items():
            assert found == [
                row.get("text") or row.get("response") or (row["chosen"], row["rejected"])
                if "prompts" not in name
                else row["prompt"]
                for row in rows(out, name)
            ]
            assert all(row["site"] == "beer" and row["question_id"] == 10 for row in rows(out, name))
        assert counts["splits"] == {split: 1}
        num_pairs = 6 if split in ("reward", "evaluation") else 0
        assert counts["pairs"]["read"] == num_pairs
        assert counts["pairs"]["dropped"] == ({"equal scores": 3} if num_pairs else {})


def test_one_demonstration_is_the_accepted_answer_or_the_best(tmp_path: Path) -> None:
    folder = dump(
        tmp_path / "beer", asked(10, AcceptedAnswerId=12), *thread(10, 3, 1, 3)[1:], asked(20), *thread(20, 1, 3, 3)[1:]
    )
    prepared(folder, tmp_path / "out", sft="accepted_or_best", **only("finetune"))
    assert [row["response"] for row in rows(tmp_path / "out", "sft")] == ["A12", "A22"]
    assert len(rows(tmp_path / "out", "pretrain")) == 6


def test_sites_are_read_by_name_and_a_question_asked_on_two_is_kept_once(tmp_path: Path) -> None:
    for site in ("wine", "beer"):
        dump(tmp_path / "dumps" / site, *thread(1, 0, 1))
    counts = prepared(tmp_path / "dumps", tmp_path / "out", **only("rl"))
    assert [row["site"] for row in rows(tmp_path / "out", "prompts")] == ["beer"]
    assert counts["dropped"] == {"answer of a dropped question": 2, "duplicate question": 1}
    for number, path in enumerate((tmp_path / "dumps" / "wine", tmp_path / "dumps" / "wine" / "Posts.xml")):
        prepared(path, tmp_path / str(number), **only("rl"))
        assert [row["site"] for row in rows(tmp_path / str(number), "prompts")] == ["wine"]


@pytest.mark.parametrize(
    ("site", "read", "dropped", "questions", "answers", "pairs", "by_date"),
    [
        ("beer.stackexchange.com", 2354, (119, 253, 234), 410, 1338, 1267, 1748),
        ("coffee.stackexchange.com", 592, (40, 143, 130), 82, 197, 129, 279),
        ("datascience.meta.stackexchange.com", 624, (26, 183, 126), 74, 215, 165, 0),
        ("quantumcomputing.stackexchange.com", 1986, (314, 303, 260), 309, 800, 572, 1109),
    ],
)
def test_real_dumps_keep_what_an_independent_count_keeps(
    tmp_path: Path,
    site: str,
    read: int,
    dropped: tuple[int, int, int],
    questions: int,
    answers: int,
    pairs: int,
    by_date: int,
) -> None:
    path = Path(os.environ.get("FAIRLEAD_DATA", "")) / "stackexchange" / site
    if not os.environ.get("FAIRLEAD_DATA") or not path.exists():
        pytest.skip(f"FAIRLEAD_DATA names no folder with stackexchange/{site}")
    counts = prepared(path, tmp_path / "out", **only("reward"))
    assert counts["read"] == read
    reasons = ("neither question nor answer", "question with fewer than two answers", "answer of a dropped question")
    assert counts["dropped"] == dict(zip(reasons, dropped, strict=True))
    assert counts["kept"] == questions + answers

    found = [row.attrib for row in ElementTree.parse(path / "Posts.xml").getroot()]
    parents = Counter(row["ParentId"] for row in found if row["PostTypeId"] == "2")
    answered_twice = {id for id, number in parents.items() if number >= 2}
    assert (read, questions, answers) == (
        len(found), len(answered_twice), sum(parents[id] for id in answered_twice),
    )  # fmt: skip
    accepted = {row.get("AcceptedAnswerId") for row in found}
    scores: dict[str, list[int]] = {}
    for row in found:
        if row.get("ParentId") in answered_twice:
            votes = int(row["Score"])
            score = ((1 + votes) ** 2).bit_length() // 2 + (row["Id"] in accepted)
            scores.setdefault(row["ParentId"], []).append(-1 if votes < 0 else score)
    untied = [sum(a != b for a, b in combinations(of_one, 2)) for of_one in scores.values()]
    assert counts["scores"] == {
        str(score): number for score, number in sorted(Counter(chain.from_iterable(scores.values())).items())
    }
    assert counts["pairs"]["read"] == sum(n * (n - 1) // 2 for n in map(len, scores.values()))
    assert counts["pairs"]["dropped"].get("more pairs than the limit", 0) == sum(max(0, n - 10) for n in untied)
    assert counts["pairs"]["kept"] == sum(min(10, n) for n in untied) == pairs
    assert len(rows(tmp_path / "out", "preference")) == pairs
    guide = (Path(__file__).parents[3] / "docs/guides/stack-exchange.md").read_text()
    histogram = [counts["scores"].get(str(score), 0) for score in range(-1, 7)]
    assert f"| {' | '.join(map(str, (site, read, questions, answers, pairs, *histogram)))} |" in guide
    stated = {row["Id"]: row.get("ContentLicense") for row in found}
    authors = {row["Id"]: row.get("OwnerUserId") for row in found}
    for row in rows(tmp_path / "out", "preference"):
        for name in ("question", "chosen", "rejected"):
            id, licence, author = str(row[f"{name}_id"]), row[f"{name}_licence"], row[f"{name}_author"]
            assert licence == stated[id] if stated[id] else licence.endswith(" (by date)")
            assert author == f"user {authors[id]}" if authors[id] else author
    assert counts["notes"].get("licence by date", 0) == by_date


def real(name: str) -> list[dict[str, str]]:
    path = Path(os.environ.get("FAIRLEAD_DATA", "")) / "stackexchange" / name
    if not os.environ.get("FAIRLEAD_DATA") or not path.exists():
        pytest.skip(f"FAIRLEAD_DATA names no folder with stackexchange/{name}")
    return [dict(row.attrib) for row in ElementTree.parse(path).getroot()]


def test_counted_upvotes_would_change_few_scores() -> None:
    votes = real("quantumcomputing.stackexchange.com/Votes.xml")
    upvotes = Counter(row["PostId"] for row in votes if row["VoteTypeId"] == "2")
    answers = [row for row in real("quantumcomputing.stackexchange.com/Posts.xml") if row["PostTypeId"] == "2"]
    scores = [(int(row["Score"]), upvotes[row["Id"]]) for row in answers]
    changed = sum(
        answer_score(net, is_accepted=False) != answer_score(up, is_accepted=False) for net, up in scores if net >= 0
    )
    assert (len(answers), changed) == (1060, 77)


def test_the_date_of_a_post_gives_the_stated_licence_more_often_than_that_of_its_last_edit() -> None:
    posts = real("datascience.meta.stackexchange.com/Posts.xml")

    def right(date: str) -> int:
        by_date = [licence_of({"CreationDate": post.get(date, post["CreationDate"])}) for post in posts]
        return sum(f"{post['ContentLicense']} (by date)" == found for post, found in zip(posts, by_date, strict=True))

    assert (len(posts), right("CreationDate"), right("LastEditDate")) == (624, 622, 601)
