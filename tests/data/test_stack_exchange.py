import os
from collections import Counter
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import pytest

from fairlead.data.sources import Counts
from fairlead.data.stack_exchange import (
    Answer,
    Question,
    answer_score,
    posts_files,
    read_questions,
    sample_pairs,
)
from fairlead.errors import DataError


def dump(folder: Path, *posts: dict[str, object]) -> Path:
    """A site folder with a Posts.xml as Stack Exchange writes it."""
    rows = (" ".join(f"{k}={quoteattr(str(v))}" for k, v in post.items()) for post in posts)
    text = "".join(f"  <row {row} />\n" for row in rows)
    text = f'\ufeff<?xml version="1.0" encoding="utf-8"?>\n<posts>\n{text}</posts>'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Posts.xml").write_bytes(text.replace("\n", "\r\n").encode())
    return folder


def asked(id: int, **more: object) -> dict[str, object]:
    post = {"Id": id, "PostTypeId": 1, "Score": 1, "Title": f"T{id}", "Body": f"<p>Q{id}</p>"}
    return post | more


def answered(id: int, parent: int, score: int = 0, **more: object) -> dict[str, object]:
    post = {"Id": id, "PostTypeId": 2, "ParentId": parent, "Score": score}
    return post | {"Body": f"<p>A{id}</p>"} | more


def read(path: Path) -> tuple[list[Question], Counts]:
    counts = Counts()
    questions = list(read_questions(posts_files(path), counts))
    assert counts.read == counts.kept + counts.dropped.total()
    return questions, counts


@pytest.mark.parametrize(
    ("votes", "is_accepted", "score"),
    [
        (-1, False, -1),
        (-1, True, -1),
        (-40, False, -1),
        (0, False, 0),
        (0, True, 1),
        (1, False, 1),
        (2, False, 2),
        (3, True, 3),
        (10, False, 3),
        (100, True, 8),
    ],
)
def test_scores_are_those_of_askell_et_al(votes: int, is_accepted: bool, score: int) -> None:
    assert answer_score(votes, is_accepted=is_accepted) == score


def test_a_question_gathers_its_answers_wherever_they_stand(tmp_path: Path) -> None:
    folder = dump(
        tmp_path / "beer.example",
        answered(9, 2, 3, ContentLicense="CC BY-SA 4.0"),
        answered(4, 2, -2, Body="<pre><code>a\n\nb</code></pre>"),
        asked(
            2,
            AcceptedAnswerId=9,
            Title=" Is 1 < 2 & é\u0085? ",
            Body='<p>See <a href="http://x.y">this</a></p>\n',
            ContentLicense="CC BY-SA 3.0",
        ),
        answered(7, 2, 0),
    )
    questions, counts = read(folder)
    assert questions == [
        Question(
            site="beer.example",
            id=2,
            prompt="Is 1 < 2 & é\u0085?\n\nSee [this](http://x.y)",
            answers=(
                Answer(id=4, text="```\na\n\nb\n```", score=-1, is_accepted=False, licence=None),
                Answer(id=7, text="A7", score=0, is_accepted=False, licence=None),
                Answer(id=9, text="A9", score=3, is_accepted=True, licence="CC BY-SA 4.0"),
            ),
            licence="CC BY-SA 3.0",
        )
    ]
    assert counts.as_dict() == {"read": 4, "kept": 4, "dropped": {}, "notes": {}}


def test_every_post_is_kept_or_counted(tmp_path: Path) -> None:
    folder = dump(
        tmp_path / "site",
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
    )  # fmt: skip
    questions, counts = read(folder)
    assert [(q.id, [a.id for a in q.answers]) for q in questions] == [(1, [2, 3])]
    assert counts.as_dict() == {
        "read": 29,
        "kept": 3,
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
        "notes": {},
    }


def test_sites_are_read_by_name_and_a_question_asked_on_two_is_kept_once(tmp_path: Path) -> None:
    for site in ("wine", "beer"):
        dump(tmp_path / site, asked(1), answered(2, 1), answered(3, 1))
    questions, counts = read(tmp_path)
    assert [question.site for question in questions] == ["beer"]
    assert counts.as_dict()["dropped"] == {
        "answer of a dropped question": 2,
        "duplicate question": 1,
    }
    for path in (tmp_path / "wine", tmp_path / "wine" / "Posts.xml"):
        assert [question.site for question in read(path)[0]] == ["wine"]


def of_scores(*scores: int, id: int = 1) -> Question:
    answers = tuple(Answer(number, f"text {number}", score, False, None) for number, score in enumerate(scores))
    return Question("site", id, "prompt", answers, None)


def pair_ids(question: Question, *, seed: int = 0, limit: int = 10) -> list[tuple[int, int]]:
    pairs = sample_pairs(question, seed=seed, limit=limit, counts=Counts())
    return [(better.id, worse.id) for better, worse in pairs]


def test_the_better_answer_is_first_and_ties_make_no_pair() -> None:
    assert pair_ids(of_scores(2, 5, 2, -1)) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]


def test_equal_texts_make_no_pair() -> None:
    counts = Counts()
    answers = tuple(Answer(id, "same", id, False, None) for id in range(2))
    question = Question("site", 1, "prompt", answers, None)
    assert sample_pairs(question, seed=0, limit=10, counts=counts) == []
    assert +counts.dropped == {"equal texts": 1}


def test_at_most_ten_pairs_are_drawn_and_the_others_counted() -> None:
    counts = Counts()
    question = of_scores(*range(12), 11)
    pairs = sample_pairs(question, seed=0, limit=10, counts=counts)
    assert len(set(pairs)) == 10
    assert all(better.score > worse.score for better, worse in pairs)
    assert (counts.read, counts.kept) == (78, 10)
    assert counts.dropped == {"equal scores": 1, "more pairs than the limit": 67}


def test_pairs_depend_on_the_seed_and_the_question_not_on_the_order_of_reading() -> None:
    question = of_scores(*range(9))
    turned = Question("site", 1, "prompt", question.answers[::-1], None)
    assert pair_ids(question) == pair_ids(turned)
    assert pair_ids(question) != pair_ids(question, seed=1)
    assert pair_ids(question) != pair_ids(of_scores(*range(9), id=2))
    assert set(pair_ids(question, limit=3)) < set(pair_ids(question))


def test_every_pair_is_about_equally_likely() -> None:
    drawn = Counter(pair for id in range(400) for pair in pair_ids(of_scores(*range(6), id=id), limit=5))
    assert len(drawn) == 15
    # 400 draws at 1/3 each: 133 expected, standard deviation 9.4.
    assert 95 < min(drawn.values()) <= max(drawn.values()) < 172


def test_a_dump_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    file = dump(tmp_path / "site", asked(1), answered(2, 1)) / "Posts.xml"
    whole = file.read_bytes()
    for length in (0, 20, 60, len(whole) - 5):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"Posts\.xml.*not the XML of a data dump"):
            read(file)


def test_a_folder_without_posts_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no Posts\.xml \(unpack the \.7z"):
        posts_files(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        posts_files(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("site", "posts", "questions", "answers", "pairs"),
    [
        ("beer.stackexchange.com", 2354, 410, 1338, 1267),
        ("coffee.stackexchange.com", 592, 82, 197, 129),
        ("datascience.meta.stackexchange.com", 624, 74, 215, 165),
        ("quantumcomputing.stackexchange.com", 1986, 309, 800, 572),
    ],
)
def test_real_dumps_keep_what_an_independent_count_keeps(
    site: str, posts: int, questions: int, answers: int, pairs: int
) -> None:
    path = Path(os.environ.get("FAIRLEAD_DATA", "")) / "stackexchange" / site
    if not os.environ.get("FAIRLEAD_DATA") or not path.exists():
        pytest.skip(f"FAIRLEAD_DATA names no folder with stackexchange/{site}")
    kept, counts = read(path)

    rows = [row.attrib for row in ElementTree.parse(path / "Posts.xml").getroot()]
    parents = Counter(row["ParentId"] for row in rows if row["PostTypeId"] == "2")
    answered_twice = {id for id, number in parents.items() if number >= 2}
    assert {str(question.id) for question in kept} == answered_twice
    assert sum(len(question.answers) for question in kept) == sum(parents[id] for id in answered_twice)
    assert counts.dropped["neither question nor answer"] == sum(row["PostTypeId"] not in "12" for row in rows)
    assert (len(rows), len(kept), sum(len(question.answers) for question in kept)) == (
        posts, questions, answers,
    )  # fmt: skip
    assert counts.read == posts
    assert counts.kept == questions + answers

    accepted = {row.get("AcceptedAnswerId") for row in rows}
    scores: dict[str, list[int]] = {}
    for row in rows:
        if row.get("ParentId") in answered_twice:
            votes = int(row["Score"])
            # bit_length() // 2 of a square is the rounded logarithm: 2^(2k-1) <= n^2 < 2^(2k+1).
            score = ((1 + votes) ** 2).bit_length() // 2 + (row["Id"] in accepted)
            scores.setdefault(row["ParentId"], []).append(-1 if votes < 0 else score)
    untied = [sum(a != b for a, b in combinations(of_one, 2)) for of_one in scores.values()]
    drawn = Counts()
    for question in kept:
        sample_pairs(question, seed=0, limit=10, counts=drawn)
    assert drawn.read == sum(n * (n - 1) // 2 for n in map(len, scores.values()))
    assert drawn.dropped["more pairs than the limit"] == sum(max(0, n - 10) for n in untied)
    assert drawn.kept == sum(min(10, n) for n in untied) == pairs
