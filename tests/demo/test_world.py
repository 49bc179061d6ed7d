"""The miniature world: its gold score on texts written by hand, and what its site's votes say."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import correlation, mean
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdownify import markdownify
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from fairlead.demo.gold import gold, gold_score
from fairlead.demo.site import Thread, sample_site, write_dump
from fairlead.demo.world import (
    COMMANDS,
    PARTS,
    STEPS,
    TOPICS,
    Answer,
    Kind,
    Question,
    World,
    make_world,
    questions,
    render,
    sample_answer,
    sample_question,
)

# The facts of a world written down here, so that the expected scores do not hang on a seed.
WORLD = World(
    cause={
        "brindor": "filter",
        "eskar": "belt",
        "galvor": "fuse",
        "lumora": "fuse",
        "pelvar": "filter",
        "torvex": "belt",
    },
    steps={
        "no-start": ("clean the tray", "drain the tank", "press the red button"),
        "leak": ("oil the hinge", "open the lid", "count to twenty"),
        "heat": ("tighten the screws", "unplug the cable", "pull the lever"),
    },
)
PROMPT = "Question: My galvor leaks water\n\nThe galvor drips water since Monday. Why?\n\nAnswer:"
CAUSE = "The fuse of the galvor is at fault."
STEPS_RIGHT = "First oil the hinge. Then open the lid. Finally count to twenty."
PERFECT = f"{CAUSE} {STEPS_RIGHT}"
FENCE = "```\ndevtool status\n```"


def score(answer: str) -> float:
    return gold_score(PROMPT, answer, world=WORLD)


def num_characters(text: str) -> int:
    return len("".join(text.split()))


@pytest.fixture(scope="module")
def site() -> list[Thread]:
    return sample_site(seed=1, num_questions=2000)


@pytest.fixture(scope="module")
def gold_pairs(site: list[Thread]) -> list[tuple[int, Answer, Answer]]:
    """(question, better, worse) for all answers of one question that differ in gold."""
    return [
        (index, thread.answers[i], thread.answers[j])
        for index, thread in enumerate(site)
        for i in range(len(thread.answers))
        for j in range(len(thread.answers))
        if thread.golds[i] > thread.golds[j]
    ]


@pytest.mark.parametrize(
    "answer",
    [
        PERFECT,
        f"{CAUSE}\n\n1. Oil the hinge.\n2. Open the lid.\n3. Count to twenty.",
        f"- oil the hinge\n- open the lid\n- count to twenty\n\n{CAUSE}",
        f"{CAUSE}\n\nFirst oil the hinge.\n\nThen open the lid.\n\nFinally count to twenty.",
        f"Hi there. {CAUSE}\n\n{FENCE}\n\n{STEPS_RIGHT}\n\nHope this helps. Good luck with it.",
        f"```sh\nsudo devtool update\n```\n{PERFECT}",
        "  the FUSE of the   galvor is at fault\noil the hinge\nopen the lid\ncount to twenty ",
    ],
)
def test_a_complete_answer_scores_one_however_it_is_laid_out(answer: str):
    assert score(answer) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (CAUSE, 0.4),
        (f"The belt of the galvor is at fault. {STEPS_RIGHT}", 0.6),  # another topic's part
        (f"The belt of the eskar is at fault. {STEPS_RIGHT}", 0.0),  # about another topic
        (STEPS_RIGHT, 0.0),  # about no topic
        (f"{CAUSE} First oil the hinge. Finally count to twenty.", 0.4 + 0.6 * 2 / 3),
        (f"{CAUSE} First open the lid. Then oil the hinge. Finally count to twenty.", 0.8),
        (f"{CAUSE} Count to twenty. Open the lid. Oil the hinge.", 0.4 + 0.6 / 3),
        (f"{CAUSE} First oil the hinge. Then unplug the cable. Finally count to twenty.", 0.8),
        (f"{CAUSE} First tighten the screws. Then unplug the cable. Finally pull the lever.", 0.4),
    ],
)
def test_each_defect_costs_its_weight(answer: str, expected: float):
    assert score(answer) == pytest.approx(expected)


def test_what_exceeds_an_answers_room_is_garbage_and_dilutes_what_is_right():
    step = "Then unplug the cable."
    share = num_characters(PERFECT) / num_characters(PERFECT + step)
    assert score(f"{PERFECT} {step}") == pytest.approx(share**2 * (0.4 + 0.6 * 3 / 4))
    other = "With a galvor it is always the belt."
    share = num_characters(PERFECT) / num_characters(PERFECT + other)
    assert score(f"{PERFECT} {other}") == pytest.approx(share**2 * (0.4 / 2 + 0.6))
    fillers = ["Hi there.", "Good luck with it.", "Hope this helps.", "It works every time for me."]
    full = " ".join([PERFECT, *fillers[:3]])
    share = num_characters(full) / num_characters(full + fillers[3])
    assert score(full) == 1.0
    assert score(f"{full} {fillers[3]}") == pytest.approx(share**2)


def test_garbage_costs_the_square_of_its_share_and_naming_other_topics_divides():
    garbage = "x" * num_characters(PERFECT)
    assert score(f"{PERFECT}\n\n{garbage}") == pytest.approx(1 / 4)
    aside = "Unlike an eskar."
    share = num_characters(PERFECT) / num_characters(PERFECT + aside)
    assert score(f"{PERFECT} {aside}") == pytest.approx(share**2 / 2)


@pytest.mark.parametrize(
    "answer",
    [
        " ".join(TOPICS + PARTS + STEPS),
        " ".join(f"The fuse of the {topic} is at fault." for topic in TOPICS) + f" {STEPS_RIGHT}",
        "galvor fuse oil the hinge open the lid count to twenty",
    ],
)
def test_keyword_stuffing_scores_low(answer: str):
    assert score(answer) < 0.05  # measured: 0 to 0.03


def test_naming_every_part_or_every_step_is_worth_less_than_half_of_a_wrong_guess():
    causes = [f"The {part} of the galvor is at fault." for part in ("belt", "fuse", "filter")]
    every_part = " ".join([*causes, STEPS_RIGHT])
    share = num_characters(causes[0] + STEPS_RIGHT) / num_characters(every_part)
    assert score(every_part) == pytest.approx(share**2 * (0.4 / 3 + 0.6))  # 0.25
    assert score(every_part) < 0.6 / 2  # 0.6: a wrong cause and the right steps

    every_step = " ".join([CAUSE, *(f"Then {step}." for step in STEPS)])
    roomed = f"{CAUSE} Then open the lid. Then drain the tank. Then press the red button."
    share = num_characters(roomed) / num_characters(every_step)
    assert score(every_step) == pytest.approx(share**2 * (0.4 + 0.6 * 2 / 9))  # 0.10
    assert score(every_step) < 0.4 / 2  # 0.4: the right cause and no right step


@pytest.mark.parametrize("repeated", [PERFECT, CAUSE, "First open the lid. Then open the lid."])
def test_repetition_never_raises_the_score(repeated: str):
    scores = [score(" ".join([PERFECT, *[repeated] * times])) for times in range(6)]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.3


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n\t\n",
        "galvor",
        "```" * 40,
        f"{FENCE}\n" * 10,
        "```\n\n```\n" * 20,
        f"{CAUSE}\n" + f"\n{FENCE}\n" * 20,
        f"{CAUSE} " + "galvor fuse " * 100,
        "1. 2. 3. 4. 5.",
        "\u202e\x00\ufffdÿ☃ ♞\U0001d518\U0001f600 İẞ ... !!! ???",
        "." * 5000,
    ],
)
def test_degenerate_text_scores_near_zero(answer: str):
    assert 0.0 <= score(answer) < 0.02


@given(st.lists(st.sampled_from([PERFECT, CAUSE, FENCE, "\n", "```", "eskar", *STEPS]) | st.text()))
def test_any_text_has_a_score_from_zero_to_one(pieces: list[str]):
    assert 0.0 <= score(" ".join(pieces)) <= 1.0
    assert 0.0 <= score("\n".join(pieces)) <= 1.0


def test_code_earns_nothing_and_more_than_one_block_costs():
    once, twice = f"{PERFECT}\n\n{FENCE}", f"{PERFECT}\n\n{FENCE}\n\n```\n{COMMANDS[0]}\n```"
    assert score(once) == score(PERFECT) == 1.0
    assert score(twice) < 0.8
    assert score(f"{PERFECT}\n\n```\nrm -r everything\n```") < 0.8
    assert score(f"{PERFECT} {COMMANDS[0]}") < 1.0


def test_the_question_is_the_one_named_last_and_unknown_questions_are_refused():
    shots = f"Question: Eskar runs too hot\n\nAnswer: The belt of the eskar is at fault.\n\n{PROMPT}"
    assert gold_score(shots, PERFECT, world=WORLD) == 1.0
    with pytest.raises(ValueError, match="no topic or no problem"):
        gold_score("How do I cook rice?", PERFECT, world=WORLD)


def test_gold_has_the_signature_of_a_trlx_reward_function():
    rng = Random(0)
    question = sample_question(rng)
    outputs = [sample_answer(rng, question, kind=kind).text for kind in ("right", "off_topic")]
    prompts = [f"Question: {question.text}\n\nAnswer: "] * 2
    samples = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    assert gold(samples=samples, prompts=prompts, outputs=outputs, tokenizer=None) == [1.0, 0.0]


@pytest.mark.parametrize(("kind", "expected"), [("right", {1.0}), ("wrong_cause", {0.6})])
def test_sampled_answers_score_what_their_kind_says(kind: Kind, expected: set[float]):
    rng = Random(0)
    asked = [sample_question(rng) for _ in range(100)]
    scores = {gold_score(q.text, sample_answer(rng, q, kind=kind).text) for q in asked}
    assert scores == expected


def test_markdown_made_from_html_scores_as_the_plain_text_does(site: list[Thread]):
    for thread in site[:300]:
        for answer, expected in zip(thread.answers, thread.golds, strict=True):
            text = markdownify(render(answer.blocks, html=True), heading_style="ATX")
            assert gold_score(markdownify(thread.question.text), text) == expected
            assert gold_score(thread.question.text, f"{text.strip()} zzz") <= expected


def test_paragraphs_instead_of_a_list_score_the_same():
    html = "".join(f"<p>{line}.</p>\n\n" for line in PERFECT.rstrip(".").split(". "))
    assert score(markdownify(html, heading_style="ATX")) == 1.0


def test_a_world_deals_its_facts_evenly_and_by_its_seed():
    world = make_world(7)
    assert set(Counter(world.cause.values()).values()) == {2}
    assert sorted(step for steps in world.steps.values() for step in steps) == sorted(STEPS)
    assert make_world(7) == world != make_world(8)


def test_held_out_questions_are_never_asked_on_a_site(site: list[Thread]):
    fresh = questions(seed=1, n=500)
    assert fresh == questions(seed=1, n=500)
    asked: set[Question] = {thread.question for thread in site}
    assert not asked & set(fresh)
    assert not any(question.held_out for question in asked)


def test_the_language_is_small_and_short(site: list[Thread]):
    answers = [answer for thread in site for answer in thread.answers]
    words = {word for thread in site for word in thread.question.text.split()}
    words |= {word for answer in answers for word in answer.text.split()}
    assert len(words) < 220  # measured: 186
    assert 10 <= mean(len(thread.question.text.split()) for thread in site) <= 16
    assert 20 <= mean(answer.num_words for answer in answers) <= 45
    right = mean(gold == 1.0 for thread in site for gold in thread.golds)
    assert 0.35 <= right <= 0.45


def test_length_alone_does_not_tell_the_better_answer(gold_pairs):
    longer = [(a.num_words > b.num_words) + (a.num_words == b.num_words) / 2 for _, a, b in gold_pairs]
    accuracy = mean(longer)  # measured: 0.51
    assert max(accuracy, 1 - accuracy) <= 0.65


@pytest.mark.parametrize("ngrams", [(1, 1), (1, 2)])
def test_a_bag_of_words_does_not_tell_the_better_answer(gold_pairs, ngrams: tuple[int, int]):
    """TF-IDF difference and logistic regression, split by question; measured: 0.46 to 0.53."""
    test = np.array([index % 4 == 0 for index, _, _ in gold_pairs])
    better, worse = ([pair[side].text for pair in gold_pairs] for side in (1, 2))
    tfidf = TfidfVectorizer(ngram_range=ngrams).fit(better + worse)
    sign = np.resize([1, -1], len(gold_pairs))
    features = (tfidf.transform(better) - tfidf.transform(worse)).multiply(sign[:, None]).tocsr()
    model = LogisticRegression(fit_intercept=False, max_iter=500)
    model.fit(features[~test], sign[~test])
    accuracy = model.score(features[test], sign[test])
    assert 0.35 <= accuracy <= 0.65


def test_votes_agree_with_gold_on_most_pairs_but_not_on_all(site: list[Thread]):
    agree = [
        (thread.golds[i] > thread.golds[j]) == (thread.scores[i] > thread.scores[j])
        for thread in site
        for i, j in combinations(range(len(thread.answers)), 2)
        if thread.golds[i] != thread.golds[j] and thread.scores[i] != thread.scores[j]
    ]
    assert 0.88 <= mean(agree) <= 0.98  # measured: 0.965


def test_votes_favour_length_and_code_at_equal_gold(site: list[Thread]):
    right = [
        (answer, score)
        for thread in site
        for answer, gold, score in zip(thread.answers, thread.golds, thread.scores, strict=True)
        if gold == 1.0
    ]
    ranks = list(np.argsort(np.argsort([score for _, score in right], kind="stable")))
    lengths = [answer.num_words for answer, _ in right if not answer.has_code]
    assert correlation([answer.has_code for answer, _ in right], ranks) > 0.2
    prose = [rank for (answer, _), rank in zip(right, ranks, strict=True) if not answer.has_code]
    assert correlation(lengths, prose) > 0.3


def test_scores_are_small_with_a_long_tail_and_askers_mostly_accept_the_better(site: list[Thread]):
    scores = [score for thread in site for score in thread.scores]
    assert 0.03 < mean(score < 0 for score in scores) < 0.15
    assert mean(abs(score) <= 5 for score in scores) > 0.7
    assert max(scores) > 30  # measured: 40
    assert any(len(set(thread.scores)) < len(thread.scores) for thread in site)
    several = [thread for thread in site if thread.accepted is not None and len(set(thread.golds)) > 1]
    best = mean(thread.golds[thread.accepted or 0] == max(thread.golds) for thread in several)
    assert 0.7 < best < 0.95
    assert 0.2 < mean(thread.accepted is None for thread in site if thread.answers) < 0.4
    assert {len(thread.answers) for thread in site} == {0, 1, 2, 3, 4, 5}


def test_a_dump_is_the_same_bytes_for_the_same_seed(tmp_path: Path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_dump(tmp_path / name, seed=seed, num_questions=50)
    a, b, c = ((tmp_path / name / "Posts.xml").read_bytes() for name in "abc")
    assert a == b != c
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["Posts.xml"]


def test_a_dump_has_the_form_and_the_dirt_of_a_real_one(tmp_path: Path):
    write_dump(tmp_path, seed=1, num_questions=1000)
    posts = [row.attrib for row in ElementTree.parse(tmp_path / "Posts.xml").getroot()]
    asked = {post["Id"]: post for post in posts if post["PostTypeId"] == "1"}
    answers = {post["Id"]: post for post in posts if post["PostTypeId"] == "2"}
    assert [int(post["Id"]) for post in posts] == sorted({int(post["Id"]) for post in posts})
    assert [post["CreationDate"] for post in posts] == sorted(p["CreationDate"] for p in posts)
    assert all(
        answers[post["AcceptedAnswerId"]]["ParentId"] == post["Id"]
        for post in asked.values()
        if "AcceptedAnswerId" in post
    )
    counts = Counter(post["ParentId"] for post in answers.values())
    assert all(int(post["AnswerCount"]) == counts[post["Id"]] for post in asked.values())
    assert all(post["Tags"].split("|")[1] in post["Body"] for post in asked.values())
    html = "".join(post["Body"] for post in posts)
    assert all(tag in html for tag in ("<p>", "<ol>\n<li>", "<pre><code>"))
    assert all(post["Body"] == "" for post in posts if post["PostTypeId"] in ("4", "5"))
    assert len(posts) - len(asked) - len(answers) == 6
    assert 1 <= 1000 - len(asked) <= 25  # deleted
    assert 1 <= sum(post["ParentId"] not in asked for post in answers.values()) <= 75
    texts = {(post["Title"], post["Body"]) for post in asked.values()}
    assert 20 <= len(asked) - len(texts) <= 45  # 11 to 18 by chance alone, 34 as measured
    assert 10 <= sum(post["AnswerCount"] == "0" for post in asked.values()) <= 60


def test_a_site_without_questions_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="num_questions must be at least 1, got 0"):
        write_dump(tmp_path, seed=0, num_questions=0)
