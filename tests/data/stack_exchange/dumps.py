"""Small dumps, and what becomes of them."""

from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from pyarrow import parquet

from fairlead.data.stack_exchange import StackExchangeOptions, posts_files, write

Attributes = dict[str, object]
SPLITS = ("finetune", "reward", "rl", "evaluation")


def table(path: Path, root: str, *rows: Attributes) -> Path:
    """A table as Stack Exchange writes it: BOM, CRLF, a row a line."""
    lines = (" ".join(f"{k}={quoteattr(str(v))}" for k, v in row.items()) for row in rows)
    text = "".join(f"  <row {line} />\n" for line in lines)
    text = f'\ufeff<?xml version="1.0" encoding="utf-8"?>\n<{root}>\n{text}</{root}>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.replace("\n", "\r\n").encode())
    return path


def dump(folder: Path, *posts: Attributes) -> Path:
    table(folder / "Posts.xml", "posts", *posts)
    return folder


def duplicates(folder: Path, *pairs: tuple[int, int], kind: int = 3) -> Path:
    links: list[Attributes] = [
        {"Id": n, "PostId": a, "RelatedPostId": b, "LinkTypeId": kind} for n, (a, b) in enumerate(pairs)
    ]
    return table(folder / "PostLinks.xml", "postlinks", *links)


def asked(id: int, **more: object) -> Attributes:
    return {"Id": id, "PostTypeId": 1, "Score": 1, "Title": f"T{id}", "Body": f"<p>Q{id}</p>"} | more


def answered(id: int, parent: int, score: int = 0, **more: object) -> Attributes:
    return {"Id": id, "PostTypeId": 2, "ParentId": parent, "Score": score, "Body": f"<p>A{id}</p>"} | more


def thread(id: int, *scores: int) -> list[Attributes]:
    return [asked(id), *(answered(id + number, id, score) for number, score in enumerate(scores, start=1))]


def prepared(dump: Path, out: Path, *, seed: int = 0, workers: int = 1, **options: Any) -> dict[str, Any]:
    """The counts."""
    out.mkdir(parents=True, exist_ok=True)
    counts = write(posts_files(dump), out, StackExchangeOptions(**options), seed, lambda _: None, workers=workers)
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    return counts


def only(split: str) -> dict[str, Any]:
    return {name: float(name == split) for name in SPLITS}


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    path = out / f"{name}.parquet"
    return parquet.read_table(path).to_pylist() if path.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def many(folder: Path, number: int = 60) -> Path:
    return dump(folder, *(post for id in range(1, number * 3, 3) for post in thread(id, 0, 5)))
