"""Writes measures and drawings for people: on a terminal, or as one self-contained page. Knows no records.

Both media show the same sections. Text that came from data has been made harmless where it was drawn, or is made so
here; it is never read as markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairlead.data.inspect.measure import KINDS, Bar, Measures, Rate
from fairlead.data.inspect.rows import Drawing, Piece, Run, visible
from fairlead.data.records import statement
from fairlead.data.sources import Counts, atomic_write

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WIDTH = 100
"""Columns where stdout is no terminal."""
BAR = 40


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    lines: Sequence[str] = ()
    head: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    bars: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the manifest of a prepared folder says."""

    files: Mapping[str, int]
    """Rows of each file."""
    counts: Mapping[str, int]
    """What preparation counted, by the keys that lead to it."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """All there is to show."""

    target: str
    counts: Counts
    measures: Measures
    drawings: Sequence[Drawing] = ()
    prepared: Prepared | None = None

    def as_dict(self) -> dict[str, Any]:
        """The measures for a program to read."""
        measures = asdict(replace(self.measures, trees=[], kept=[]))
        del measures["trees"], measures["kept"]
        prepared = None if self.prepared is None else asdict(self.prepared)
        return {"target": self.target, "prepared": prepared, "counts": self.counts.as_dict(), **measures}


def sections(inspection: Inspection) -> Iterator[Section]:
    """What is shown, in words and figures, but for the drawn records."""
    measures, counts = inspection.measures, inspection.counts
    if prepared := inspection.prepared:
        for title, head, numbers in (("Files", "file", prepared.files), ("What preparation did", "", prepared.counts)):
            yield Section(title, head=(head, "rows"), table=[(name, f"{n:,}") for name, n in numbers.items()])
    yield Section(
        f"Records: {measures.kind}",
        [statement(replace(counts, dropped=Counter()), KINDS[measures.kind])],
        ("dropped because", "rows"),
        [(reason, f"{number:,}") for reason, number in counts.dropped.most_common() if number],
    )
    for unit, columns in measures.lengths.items():
        table = [
            (name, f"{c.number:,}", f"{c.mean:,.1f}", *(f"{v:,}" for v in (c.p5, c.p50, c.p95, c.max)))
            for name, c in columns.items()
        ]
        lines = list(_limits(measures)) if unit == "tokens" else []
        if unit == "words":
            lines = ["no tokenizer: give model.path=... or tokenizer=... for lengths in tokens and for masks"]
        yield Section(f"Lengths in {unit}", lines, ("", "number", "mean", "p5", "p50", "p95", "max"), table)
    if lines := list(_facts(measures)):
        yield Section("What a model would learn from", lines)
    for name, bars in measures.histograms.items():
        yield Section(f"Histogram of {name}", bars=[(_interval(bar), bar.number) for bar in bars])


def _limits(measures: Measures) -> Iterator[str]:
    yield f"tokenizer {measures.tokenizer}, template {measures.template}"
    if limits := measures.limits:
        yield (
            f"data.max_length={limits.max_length}, data.max_prompt_length={limits.max_prompt_length}: "
            f"{limits.kept:,} kept, {limits.cut:,} of them cut, {sum(limits.dropped.values()):,} dropped"
        )
        yield from (f"dropped because {reason}: {number:,}" for reason, number in limits.dropped.items())


def _facts(measures: Measures) -> Iterator[str]:
    if bias := measures.length_bias:
        what = "the best is longer than the worst" if measures.kind == "ranking" else "chosen is longer than rejected"
        yield (
            f"{what} in {_share(bias.longer)} of the pairs of unequal length, in {bias.unit}; {bias.equal:,} are "
            "equally long"
        )
    if measures.labels:
        yield f"labelled good: {_share(measures.labels)}"
    if shared := measures.shared_prompts:
        yield f"{shared.prompts:,} different prompts; {shared.records:,} records share theirs with another one"
        if shared.saved:
            yield f"tokens saved because the responses of a record share its prompt: {shared.saved:.1%}"
    if packing := measures.packing:
        yield (
            f"tokens that are no padding: {packing['packed']:.1%} packed best-fit into {packing['rows']:,.0f} rows of "
            f"{packing['length']:,}, {packing['padded']:.1%} padded to the longest of 32 records"
        )
    found = measures.duplicates
    near = "not looked for (pip install 'fairlead[data]')" if found.near is None else f"{found.near:,}"
    among = "" if found.near is None or found.searched >= measures.records else f" among the first {found.searched:,}"
    yield f"duplicates: {found.exact:,} exact, near{among}: {near}"
    if heldout := measures.heldout:
        yield (
            f"held-out: {heldout['records']:,} records; of {heldout['near']:,} of their {heldout['prompts']:,} prompts "
            "a training record repeats 13 words in a row, or all"
        )


def _share(rate: Rate) -> str:
    return f"{rate.share:.1%} [{rate.low:.1%}, {rate.high:.1%}] ({rate.hits:,} of {rate.number:,})"


def _interval(bar: Bar) -> str:
    return f"{bar.low:g}" if bar.low == bar.high else f"{bar.low:.3g} to {bar.high:.3g}"


# --- terminal ------------------------------------------------------------------------------------------------------


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """On stdout. Where it is no terminal, learned stretches of a partly learned run stand between « and »."""
    from rich.text import Text

    console = print_sections(inspection.target, sections(inspection), console)
    for drawing in inspection.drawings:
        console.print()
        console.print(Text(f"Record {drawing.record:,} as the model sees it", "bold"))
        if drawing is inspection.drawings[0]:
            console.print(_legend(console, with_tokens=inspection.measures.tokenizer is not None))
        for run in drawing.runs:
            _print_run(console, run, is_last=run is drawing.runs[-1])


def print_sections(title: str, sections: Iterable[Section], console: Console | None = None) -> Console:
    """On stdout, in WIDTH columns where it is no terminal; returns the console."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(Text(visible(title), "bold"))
    for section in sections:
        console.print()
        console.print(Text(section.title, "bold"))
        for line in section.lines:
            console.print(Text(visible(line)))
        if section.table:
            console.print(_table(section))
        most = max((number for _, number in section.bars), default=0)
        for label, number in section.bars:
            bar = "█" * max(round(BAR * number / most), number > 0)
            console.print(Text(f"{label:>16}  {bar} {number:,}"))
    return console


def _table(section: Section) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in section.head:
        table.add_column(name, justify="left" if name is section.head[0] else "right", header_style="dim")
    for row in section.table:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def _legend(console: Console, *, with_tokens: bool) -> Text:
    from rich.text import Text

    if not with_tokens:
        return Text("as text: without a tokenizer neither tokens nor masks are known", "italic")
    if not console.is_terminal:
        return Text("« » hold what is learned where a run is learned in part; ↵ is a line end in the text")
    words = [("dim: not learned", "dim"), (", plain: learned, ", ""), ("special", "reverse"), (", ↵ a line end", "")]
    return Text.assemble(*words)


def _print_run(console: Console, run: Run, *, is_last: bool) -> None:
    from rich.text import Text

    corner, bar = ("└─ ", "   ") if is_last else ("├─ ", "│  ")
    start, indent = (corner, bar) if run.is_branch else ("", "│  " if not is_last else "   ")
    console.print(Text.assemble(start, (run.name, "bold"), f"  {run.size}"))
    is_mixed = len({piece.is_learned for piece in run.pieces if not piece.is_left_out}) > 1
    body = Text()
    for is_learned, pieces in groupby(run.pieces, key=lambda piece: piece.is_learned and not piece.is_left_out):
        is_marked = is_learned and is_mixed and not console.is_terminal
        body.append("«" if is_marked else "")
        for piece in pieces:
            body.append(piece.text.replace("\n", "↵\n"), _style(piece))
        body.append("»" if is_marked else "")
    body.expand_tabs(4)
    for line in body.wrap(console, console.width - len(indent)):
        console.print(Text(indent) + line, soft_wrap=True)


def _style(piece: Piece) -> str:
    if piece.is_left_out:
        return "italic"
    return " ".join(["reverse"] * piece.is_special + ["dim"] * (not piece.is_learned)) or "none"


# --- page ----------------------------------------------------------------------------------------------------------


def page(inspection: Inspection) -> str:
    """The same as one HTML page without scripts or anything from elsewhere; every text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    template = resources.files("fairlead.data.inspect").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        target=inspection.target,
        sections=list(sections(inspection)),
        drawings=inspection.drawings,
        has_tokens=inspection.measures.tokenizer is not None,
    )


def write_page(inspection: Inspection, path: Path) -> None:
    """Raises DataError when the disk is full."""
    with atomic_write(path) as file:
        file.write(page(inspection).encode())
