"""A miniature world of invented devices: its facts, and samplers of questions and answers.

There are two kinds of fact: every topic (a device) has one part that causes its faults, and every
problem is mended by three steps in order. What a good answer says follows from its question alone.
Knows nothing of gold scores, votes or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from random import Random
from typing import Final, Literal
from zlib import crc32

TOPICS: Final = ("brindor", "eskar", "galvor", "lumora", "pelvar", "torvex")
PARTS: Final = ("belt", "fuse", "filter")
STEPS: Final = (
    "open the lid", "drain the tank", "press the red button", "clean the tray",
    "unplug the cable", "tighten the screws", "pull the lever", "oil the hinge", "count to twenty",
)  # fmt: skip
PROBLEMS: Final[Mapping[str, tuple[str, ...]]] = {
    "no-start": ("will not start", "refuses to start"),
    "leak": ("leaks water", "drips water"),
    "heat": ("runs too hot", "gets too hot"),
}

TITLES: Final = (
    "{topic} {problem}",
    "My {topic} {problem}",
    "Help, the {topic} {problem}",
    "A {topic} that {problem}",
)
BODIES: Final = (
    "Since {time} my {topic} {problem}.",
    "My {topic} {problem} since {time}.",
    "The {topic} {problem} since {time}.",
)
TIMES: Final = (
    "yesterday", "today", "Monday", "Sunday", "this morning", "last night", "last week",
    "last month",
)  # fmt: skip
ASKS: Final = ("Any ideas?", "What now?", "Why?", "What can I do?", "Please help.")

CAUSES: Final = (
    "The usual cause on a {topic} is the {part}.",
    "On the {topic} this comes from the {part}.",
    "The {part} of the {topic} is at fault.",
    "With a {topic} it is always the {part}.",
)
LEADS: Final = ("First", "Then", "Finally")
OPENERS: Final = (
    "Hi there.",
    "Welcome to the site.",
    "This is a common question.",
    "I had the same trouble last year.",
    "We see this one quite often here.",
    "Do not worry, it is easy to mend.",
)
CLOSERS: Final = (
    "Hope this helps.",
    "Good luck with it.",
    "Let us know how it goes.",
    "You need no special tools for this.",
    "It works every time for me.",
    "Take your time and stay calm.",
    "Please ask again if it fails.",
)
COMMANDS: Final = (
    "devtool scan --all",
    "devtool reset --soft",
    "devtool log --last 5",
    "devtool status",
    "sudo devtool update",
    "devtool test --port 3",
)

NUM_STEPS: Final = 3
MAX_FILLERS: Final = 3
CODE_RATE: Final = 0.3  # share of answers with a block of code
HELD_OUT: Final = 8  # one question text in so many is never asked on a site

Kind = Literal["right", "wrong_steps", "wrong_cause", "off_topic"]
KIND_WEIGHTS: Final[Mapping[Kind, float]] = {
    "right": 0.40,
    "wrong_steps": 0.26,
    "wrong_cause": 0.19,
    "off_topic": 0.15,
}

Meaning = tuple[str, ...]  # ("cause", topic, part), ("step", step) or ("filler", sentence)


@dataclass(frozen=True)
class World:
    """`cause[topic]` is the part at fault; `steps[problem]` are the three steps, in order."""

    cause: Mapping[str, str]
    steps: Mapping[str, tuple[str, ...]]

    @cached_property
    def meanings(self) -> Mapping[str, Meaning]:
        """What each well-formed sentence of an answer says; keys are in lower case, unstopped."""
        causes = {
            form.format(topic=topic, part=part): ("cause", topic, part)
            for form in CAUSES
            for topic in self.cause
            for part in PARTS
        }
        leads = ("", *(f"{lead} " for lead in LEADS))
        steps = {lead + step: ("step", step) for lead in leads for step in STEPS}
        fillers = {filler: ("filler", filler) for filler in (*OPENERS, *CLOSERS)}
        sentences = causes | steps | fillers
        return {text.lower().removesuffix("."): says for text, says in sentences.items()}


def make_world(seed: int = 0) -> World:
    """Deal out the facts: each part is the cause of two topics, each step is of one problem."""
    rng = Random(f"world/{seed}")
    topics, steps = rng.sample(TOPICS, len(TOPICS)), rng.sample(STEPS, len(STEPS))
    return World(
        cause={topic: PARTS[index % len(PARTS)] for index, topic in enumerate(topics)},
        steps={tag: tuple(steps[index :: len(PROBLEMS)]) for index, tag in enumerate(PROBLEMS)},
    )


WORLD: Final = make_world()


@dataclass(frozen=True)
class Question:
    """Title and body, in plain text, each name the topic and the problem (a key of PROBLEMS)."""

    topic: str
    problem: str
    title: str
    body: str

    @property
    def text(self) -> str:
        return f"{self.title}\n\n{self.body}"

    @property
    def held_out(self) -> bool:
        """Whether no site asks it in these words: decided by the text alone, for every seed."""
        return crc32(self.text.encode()) % HELD_OUT == 0


@dataclass(frozen=True)
class Block:
    """A paragraph, an ordered list or code; `lines` are its sentences, items or commands."""

    form: Literal["p", "ol", "pre"]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """An answer as the site shows it; `kind` says in what it was made right or wrong."""

    kind: Kind
    blocks: tuple[Block, ...]

    @property
    def text(self) -> str:
        return render(self.blocks)

    @property
    def num_words(self) -> int:
        """Words of prose and code, without list numbers and fences."""
        return sum(len(line.split()) for block in self.blocks for line in block.lines)

    @property
    def has_code(self) -> bool:
        return any(block.form == "pre" for block in self.blocks)


def render(blocks: Sequence[Block], *, html: bool = False) -> str:
    """Blocks as Markdown, or as the HTML of a post's body."""
    return ("\n" if html else "\n\n").join(map(_html if html else _markdown, blocks))


def _html(block: Block) -> str:
    lines = [escape(line, quote=False) for line in block.lines]
    match block.form:
        case "p":
            return f"<p>{' '.join(lines)}</p>\n"
        case "ol":
            return "\n".join(("<ol>", *(f"<li>{line}</li>" for line in lines), "</ol>\n"))
        case "pre":
            return "<pre><code>" + "".join(f"{line}\n" for line in lines) + "</code></pre>\n"


def _markdown(block: Block) -> str:
    match block.form:
        case "p":
            return " ".join(block.lines)
        case "ol":
            return "\n".join(f"{n}. {line}" for n, line in enumerate(block.lines, start=1))
        case "pre":
            return "\n".join(("```", *block.lines, "```"))


def sample_question(rng: Random, *, held_out: bool = False, world: World = WORLD) -> Question:
    """Draw a question from the texts that no site asks (`held_out`) or from the others."""
    while True:
        topic, problem = rng.choice(list(world.cause)), rng.choice(list(world.steps))
        title = rng.choice(TITLES).format(topic=topic, problem=rng.choice(PROBLEMS[problem]))
        body = rng.choice(BODIES).format(topic=topic, problem=rng.choice(PROBLEMS[problem]), time=rng.choice(TIMES))
        question = Question(topic, problem, _sentence(title), f"{body} {rng.choice(ASKS)}")
        if question.held_out == held_out:
            return question


def questions(seed: int, n: int, *, world: World = WORLD) -> list[Question]:
    """`n` questions in words that no site of this world uses, whatever the site's seed."""
    rng = Random(f"questions/{seed}")
    return [sample_question(rng, held_out=True, world=world) for _ in range(n)]


def sample_answer(rng: Random, question: Question, *, kind: Kind | None = None, world: World = WORLD) -> Answer:
    """Draw an answer of `kind` (drawn by KIND_WEIGHTS if None).

    Greetings, filler, code and layout are drawn without regard to the kind, and what is wrong here
    is right for another question: neither length nor any word tells good answers from bad.
    """
    kind = kind or rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    topic, problem = question.topic, question.problem
    if kind == "off_topic":
        topic, problem = _other(rng, world.cause, topic), rng.choice(list(world.steps))
    part = _other(rng, PARTS, world.cause[topic]) if kind == "wrong_cause" else world.cause[topic]
    steps = _wrong_steps(rng, problem, world) if kind == "wrong_steps" else world.steps[problem]
    return Answer(kind, _compose(rng, rng.choice(CAUSES).format(topic=topic, part=part), steps))


def _wrong_steps(rng: Random, problem: str, world: World) -> tuple[str, ...]:
    """Another problem's steps, the right ones mixed with those, or the right ones less one."""
    right, other = world.steps[problem], world.steps[_other(rng, world.steps, problem)]
    match rng.choices(("other", "mixed", "missing"), (0.5, 0.3, 0.2))[0]:
        case "mixed":
            wrong = rng.sample(range(NUM_STEPS), rng.randint(1, NUM_STEPS - 1))
            return tuple(other[i] if i in wrong else right[i] for i in range(NUM_STEPS))
        case "missing":
            missing = rng.randrange(NUM_STEPS)
            return right[:missing] + right[missing + 1 :]
        case _:
            return other


def _compose(rng: Random, cause: str, steps: Sequence[str]) -> tuple[Block, ...]:
    """Lay out a cause and its steps among filler; one more filler stands in for a missing step."""
    num_fillers = min(rng.randint(0, MAX_FILLERS) + NUM_STEPS - len(steps), MAX_FILLERS)
    fillers = rng.sample((*OPENERS, *CLOSERS), num_fillers)
    openers, closers = (tuple(f for f in fillers if f in group) for group in (OPENERS, CLOSERS))
    if rng.random() < 0.5:
        procedure = Block("ol", tuple(f"{_sentence(step)}." for step in steps))
    else:
        leads = (*LEADS[: len(steps) - 1], LEADS[-1])
        sentences = (f"{lead} {step}." for lead, step in zip(leads, steps, strict=True))
        procedure = Block("p", tuple(sentences))
    blocks = [Block("p", (*openers, cause)), procedure]
    if rng.random() < CODE_RATE:
        blocks.insert(rng.randint(1, 2), Block("pre", (rng.choice(COMMANDS),)))
    return (*blocks, Block("p", closers)) if closers else tuple(blocks)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _other(rng: Random, choices: Sequence[str] | Mapping[str, object], excluded: str) -> str:
    return rng.choice([choice for choice in choices if choice != excluded])
