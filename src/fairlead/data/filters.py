"""Leaves out records before training: duplicates, lengths, margins, languages, what is evaluated on; each is counted by
its reason. Also refuses what nothing could be learned from. Knows no files but those of an evaluation, no algorithm."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from fairlead.config import FilterSection
from fairlead.data.formats import RecordType, recognise
from fairlead.data.records import has_heldout, load_records, prompt_key
from fairlead.data.sources import Counts, read_source
from fairlead.errors import ConfigError, DataError
from fairlead.types import Conversation, Demonstration, Labelled, Message, Preference, Prompt, Ranking, Record, Text

if TYPE_CHECKING:
    from fairlead.data.render import Renderer, Tree

SHINGLE = 5
"""Words of a shingle, as for C4 (Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better")."""
GRAM, SHORTEST_GRAM = 13, 8
"""Words in a row that show contamination (Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C)."""
COMMON_GRAM = 10
"""What stands in more prompts than this is a common phrase, and shows nothing."""
PERMUTATIONS = 128
CANDIDATE = 0.75
"""Share of the similarity from which two records are compared exactly: few are missed at the similarity itself."""
SAMPLE = 256
"""Records that are rendered first where one sound record is enough to know."""

R = TypeVar("R", bound=Record)

# A word is a run of letters, digits and underscores; a Han or kana character is one by itself.
_HAN = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+")


def apply_filters(records: Sequence[R], settings: FilterSection, counts: Counts) -> list[R]:
    """The records that pass, in their order; of equal ones the first. ``counts`` moves the others from kept to dropped.

    A record that stands in the list several times as one object was repeated on purpose and is no duplicate. Raises
    DataError when none is left, or when a filter needs a library that is missing.
    """
    faults = [fault for make in (_length, _margin, _language, _contamination) if (fault := make(settings, counts))]
    dropped: dict[int, str] = {}
    for index, record in enumerate(records):
        if reason := next((reason for fault in faults if (reason := fault(record))), None):
            dropped[index] = reason
    if settings.dedupe != "none":
        kept = [index for index in range(len(records)) if index not in dropped]
        similarity = settings.near_similarity if settings.dedupe == "near" else None
        found = duplicates([records[index] for index in kept], similarity)
        dropped |= {kept[position]: reason for position, reason in found.items()}
    counts.kept -= len(dropped)
    counts.dropped.update(dropped.values())
    if records and len(dropped) == len(records):
        raise DataError(
            f"no record is left after data.filter: dropped {dict(Counter(dropped.values()))}",
            hint="loosen the filter, or look at the records with `fairlead inspect`",
        )
    return [record for index, record in enumerate(records) if index not in dropped]


# --- what a record says --------------------------------------------------------------------------------------------


def parts(record: Record) -> tuple[str, ...]:
    """The texts of a record, prompt first: two records are near duplicates when each part is."""
    if isinstance(record, Text):
        return (record.text,)
    label = (str(record.label),) if isinstance(record, Labelled) else ()
    return ("\n\n".join(turn_texts(record.prompt)), *responses(record), *label)


def responses(record: Record) -> tuple[str, ...]:
    """The texts that a record offers to learn from or to judge; a plain text is one."""
    match record:
        case Text():
            return (record.text,)
        case Demonstration():
            return (record.response if isinstance(record.response, str) else _message_text(record.response),)
        case Preference():
            return (record.chosen, record.rejected)
        case Ranking():
            return record.responses
        case Labelled():
            return (record.response,)
        case Prompt():
            return ()


def turn_texts(prompt: Conversation, roles: Iterable[str] | None = None) -> list[str]:
    """The turns of a prompt as texts, those of ``roles`` alone where they are given; plain text is a user's turn."""
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    return [_message_text(turn) for turn in turns if roles is None or turn["role"] in roles]


def _message_text(message: Message) -> str:
    calls = [json.dumps(call, ensure_ascii=False, sort_keys=True) for call in message.get("tool_calls", ())]
    pieces = [message.get("reasoning_content", ""), message["content"], *calls]
    return "\n".join(piece for piece in pieces if piece)


def words(text: str) -> list[str]:
    """Lower case, without punctuation; a Han or kana character is a word."""
    return _WORD.findall(text.lower())


# --- one record at a time ------------------------------------------------------------------------------------------

Fault = Callable[[Record], str | None]
"""The reason to leave a record out, or none."""


def _length(settings: FilterSection, counts: Counts) -> Fault | None:
    shortest, longest = settings.min_response_length or 0, settings.max_response_length
    if not shortest and longest is None:
        return None
    if longest is not None and longest < shortest:
        raise ConfigError(f"data.filter: max_response_length={longest} is below min_response_length={shortest}")

    def fault(record: Record) -> str | None:
        lengths = [len(text) for text in responses(record)]
        if any(length < shortest for length in lengths):
            return f"response shorter than {shortest} characters"
        if longest is not None and any(length > longest for length in lengths):
            return f"response longer than {longest} characters"
        return None

    return fault


def _margin(settings: FilterSection, counts: Counts) -> Fault | None:
    least = settings.min_margin
    if least is None:
        return None

    def fault(record: Record) -> str | None:
        if not isinstance(record, Preference | Ranking):
            counts.notes["data.filter.min_margin left this alone: it is neither pair nor ranking"] += 1
            return None
        margin = score_margin(record)
        if margin is None:
            return "margin unknown"
        return f"margin below {least:g}" if margin < least else None

    return fault


def score_margin(record: Preference | Ranking) -> float | None:
    """By how much the best response is better than the worst; none where the data set does not say."""
    if isinstance(record, Preference):
        return record.margin
    return None if record.scores is None else record.scores[0] - record.scores[-1]


def _language(settings: FilterSection, counts: Counts) -> Fault | None:
    wanted = settings.language
    if wanted is None:
        return None
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise _missing("data.filter.language", "py3langid") from error
    # Below even odds the text is too short or too mixed to say; leaving it out would be a guess.
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=0.5)
    if wanted not in identifier.labels:
        raise ConfigError(
            f"data.filter.language={wanted!r} is not known",
            hint=f"ISO 639-1 codes: {', '.join(sorted(identifier.labels))}",
        )

    def fault(record: Record) -> str | None:
        language, _ = identifier.classify("\n".join(parts(record)))
        if language == "und":
            counts.notes["language undecided, kept"] += 1
            return None
        return None if language == wanted else f"language is not {wanted}"

    return fault


def _missing(setting: str, library: str) -> ConfigError:
    return ConfigError(f"{setting} needs {library}, which is not installed", hint="pip install 'fairlead[data]'")


# --- duplicates ----------------------------------------------------------------------------------------------------


def duplicates(records: Sequence[Record], similarity: float | None) -> dict[int, str]:
    """Index -> reason, of the records that repeat an earlier one that is not itself in the answer.

    Exact: every field is equal. Near, where ``similarity`` is given: for each part (prompt, each response) the Jaccard
    similarity of the sets of 5-word shingles is at least that; a part of fewer words must be equal. Candidates come
    from MinHash (128 permutations, a fixed seed; it may miss a pair close to the similarity) and are compared exactly,
    so that nothing is dropped on an estimate.
    """
    found: dict[int, str] = {}
    first: dict[bytes, Record] = {}
    for index, record in enumerate(records):
        if first.setdefault(_identity(record), record) is not record:
            found[index] = "duplicate"
    if similarity is None:
        return found
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise _missing("data.filter.dedupe=near", "datasketch") from error
    index_of_near = MinHashLSH(threshold=CANDIDATE * similarity, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    blank = MinHash(num_perm=PERMUTATIONS, seed=1)
    kept: set[int] = set()
    for index, record in enumerate(records):
        if index in found or id(record) in kept:
            continue
        shingled = [_shingles(part) for part in parts(record)]
        sketch = blank.copy()
        sketch.update_batch([f"{n} {s}".encode(errors="replace") for n, part in enumerate(shingled) for s in part])
        candidates = (records[cast(int, position)] for position in index_of_near.query(sketch))
        if any(_near(shingled, [_shingles(part) for part in parts(other)], similarity) for other in candidates):
            found[index] = "near duplicate"
        else:
            index_of_near.insert(index, sketch)
            kept.add(id(record))
    return found


def _identity(record: Record) -> bytes:
    values = [type(record).__name__, *(getattr(record, field.name) for field in fields(record) if field.compare)]
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).digest()


def _shingles(text: str) -> set[str]:
    found = words(text)
    if len(found) < SHINGLE:
        return {text.strip()}
    return set(_grams(found, SHINGLE))


def _grams(found: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(found[start : start + size]) for start in range(len(found) - size + 1))


def _near(one: Sequence[set[str]], other: Sequence[set[str]], similarity: float) -> bool:
    return len(one) == len(other) and all(
        len(a & b) >= similarity * len(a | b) for a, b in zip(one, other, strict=True)
    )


# --- contamination -------------------------------------------------------------------------------------------------


class Contamination:
    """What is evaluated on, ready to be looked for in training records.

    Exact: the same prompt. Near, after appendix C of the GPT-3 paper: 13 words in a row (lower case, no punctuation) of
    an evaluated user turn stand anywhere in the record; a turn of 8 to 12 words counts as a whole, a shorter one only
    by the exact prompt. Words that stand in more than ten evaluated prompts are a common phrase and count for nothing
    (the paper counts them in the training data; this way a record is judged by itself). System turns and earlier
    answers of the evaluated prompts are left aside, as many of them are alike.
    """

    def __init__(self, evaluated: Iterable[Record]) -> None:
        self._prompts: dict[str, int] = {}
        grams: defaultdict[int, defaultdict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for record in evaluated:
            number = self._prompts.setdefault(prompt_key(record), len(self._prompts))
            turns = [record.text] if isinstance(record, Text) else turn_texts(record.prompt, ("user",))
            for turn in map(words, turns):
                size = min(GRAM, len(turn))
                for gram in _grams(turn, size) if size >= SHORTEST_GRAM else ():
                    grams[size][gram].add(number)
        self._grams = {
            size: {gram: holders for gram, holders in held.items() if len(holders) <= COMMON_GRAM}
            for size, held in grams.items()
        }
        # A gram's first and last word, looked up before the gram is put together: most places are passed by.
        self._ends = {size: {tuple(gram.split()[:: size - 1]) for gram in held} for size, held in self._grams.items()}

    def __len__(self) -> int:
        """Different evaluated prompts."""
        return len(self._prompts)

    def near(self, record: Record) -> set[int]:
        """Numbers of the evaluated prompts that share words with the record."""
        texts = (record.text,) if isinstance(record, Text) else (*turn_texts(record.prompt), *responses(record))
        return {
            number
            for text in map(words, texts)
            for size, held in self._grams.items()
            for at, ends in enumerate(zip(text, text[size - 1 :], strict=False))
            if ends in self._ends[size]
            for number in held.get(" ".join(text[at : at + size]), ())
        }

    def fault(self, record: Record) -> str | None:
        """Why the record must not be trained on, or none."""
        if prompt_key(record) in self._prompts:
            return "prompt is evaluated on"
        return f"repeats {GRAM} words in a row, or all, of a prompt that is evaluated on" if self.near(record) else None


def _contamination(settings: FilterSection, counts: Counts) -> Fault | None:
    if not settings.contamination:
        return None
    return Contamination(record for path in settings.contamination for record in _evaluated(path)).fault


def _evaluated(path: str) -> list[Any]:
    is_text = not has_heldout(path, Prompt) and held_kind(path, heldout=True) is Text
    return load_records(path, Text if is_text else Prompt, heldout=True)[0]


def held_kind(source: str, *, heldout: bool = False, columns: Mapping[str, str] | None = None) -> RecordType:
    """What the first row of a source holds; ``columns`` are fields by the columns that hold them."""
    row = next(read_source(source, heldout=heldout), None)
    if row is None:
        raise DataError(f"{source} holds no rows", "was it written to the end?")
    named = {name: row.data[column] for name, column in (columns or {}).items() if column in row.data}
    return recognise(replace(row, data={**row.data, **named})).record


# --- what cannot be learned from -----------------------------------------------------------------------------------


def refuse_unlearnable(renderer: Renderer, records: Sequence[Any]) -> None:
    """Raises DataError when no token of any record is learned, or when no response ends: before a model is loaded.

    Where the first records are sound, the others need not be rendered.
    """
    try:
        if unlearnable(renderer.trees(records[:SAMPLE])[0], renderer.eos) is None:
            return
    except DataError:  # of these few; all of them together say below whether it is so
        pass
    match unlearnable(renderer.trees(records)[0], renderer.eos):
        case "masked":
            raise DataError(
                f"every token of all {len(records)} records is masked: there is nothing to learn",
                hint="look at them with `fairlead inspect`; data.loss_on and data.template say what is learned",
            )
        case "endless" if any(getattr(record, "finished", True) for record in records):
            raise DataError(
                f"no response of {len(records)} records ends: each is cut at data.max_length={renderer.max_length}, "
                "so the model would never learn to stop",
                hint="raise data.max_length, or leave long ones out with data.filter.max_response_length",
            )
        case None:
            pass


def unlearnable(trees: Iterable[Tree], eos: int) -> Literal["masked", "endless"] | None:
    """What is wrong with all trees together: no token is learned, or no response ends in ``eos``. Plain text, which has
    no prompt, need not end: it may be a piece of a book."""
    is_masked = is_endless = True
    for tree in trees:
        is_masked = is_masked and not any(tree.responses) and not any(tree.prompt_mask)
        is_endless = is_endless and bool(tree.prompt) and not any(ids[-1:] == (eos,) for ids in tree.responses)
        if not is_masked and not is_endless:
            return None
    return "masked" if is_masked else "endless"
