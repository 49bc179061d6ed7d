"""How good any text is as an answer, computed from the facts of the world. Knows no votes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Final

from .world import COMMANDS, MAX_FILLERS, NUM_STEPS, PROBLEMS, WORLD, Meaning, World

CAUSE_WEIGHT: Final = 0.4  # the steps weigh the rest
# How many statements of each sort an answer has room for.
ROOM: Final = {"cause": 1, "step": NUM_STEPS, "filler": MAX_FILLERS, "code": 1}

_PIECE: Final = re.compile(
    r"^```\w*\n(?P<code>[^`]*)\n```$"
    r"|(?:^[ \t]*(?:\d+[.)]|[-*])[ \t]+)?(?P<sentence>\S[^\n]*?(?:[.!?](?=\s)|$))",
    re.MULTILINE,
)


def gold_score(question: str, answer: str, *, world: World = WORLD) -> float:
    """How good `answer` (plain text or Markdown) is for `question` (any text), in [0, 1].

        gold = coherence^2 * relevance * (0.4 * correctness + 0.6 * completeness)

    - coherence: the share of the answer's characters (white space aside) that lie in well-formed
      statements: a cause, a step, a filler sentence, a fenced command. A statement made before,
      and one beyond the ROOM that an answer has, is garbage like any other text.
    - relevance: 1 / the number of topics named anywhere; 0 without the question's topic.
    - correctness: 1 / the number of parts named anywhere; 0 unless a well-formed cause gives the
      topic's part.
    - completeness: the number of right steps in the right order (longest common subsequence) /
      max(3, the number of different steps given).

    The question is about the topic and the problem named last in it, so a template or worked
    examples may precede them. Raises ValueError if it names none that this world has.
    """
    topic, problem = _asked(question, world)
    said: list[Meaning] = []
    room, well_formed = dict(ROOM), 0
    for piece in _PIECE.finditer(answer):
        meaning = _meaning(piece, world)
        if meaning is None or meaning in said:
            continue
        said.append(meaning)
        room[meaning[0]] -= 1
        if room[meaning[0]] >= 0:
            well_formed += _num_characters(piece[0])
    words = set(re.findall(r"\w+", answer.lower()))
    topics, parts = words & set(world.cause), words & set(world.cause.values())
    if topic not in topics:
        return 0.0
    correctness = 1 / len(parts) if ("cause", topic, world.cause[topic]) in said else 0.0
    steps = [meaning[1] for meaning in said if meaning[0] == "step"]
    completeness = _num_in_order(steps, world.steps[problem]) / max(NUM_STEPS, len(steps))
    coherence = well_formed / _num_characters(answer)
    content = CAUSE_WEIGHT * correctness + (1 - CAUSE_WEIGHT) * completeness
    return coherence**2 * content / len(topics)


def gold(samples: Sequence[str], prompts: Sequence[str], outputs: Sequence[str], **columns: object) -> list[float]:
    """The gold score of each output for its prompt, in the signature of trlX's reward functions."""
    return [gold_score(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def _asked(question: str, world: World) -> tuple[str, str]:
    text = question.lower()
    topic = max(world.cause, key=text.rfind)
    problem = max(world.steps, key=lambda tag: max(map(text.rfind, PROBLEMS[tag])))
    if topic not in text or not any(wording in text for wording in PROBLEMS[problem]):
        raise ValueError(f"the question names no topic or no problem of this world: {question!r}")
    return topic, problem


def _meaning(piece: re.Match[str], world: World) -> Meaning | None:
    if (code := piece["code"]) is not None:
        return ("code", code.strip()) if code.strip() in COMMANDS else None
    return world.meanings.get(" ".join(piece["sentence"].lower().split()).removesuffix("."))


def _num_in_order(steps: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence; `steps` holds no step twice."""
    places = [right.index(step) for step in steps if step in right]
    runs = (run for size in range(len(places) + 1) for run in combinations(places, size))
    return max(len(run) for run in runs if list(run) == sorted(run))


def _num_characters(text: str) -> int:
    return len("".join(text.split()))
