"""Pages show the figures that are committed."""

from __future__ import annotations

import json

from benchmarks.tables import RESULTS, TABLES

DOCS = RESULTS.parents[1] / "docs"
PAGES = {
    "quality": DOCS / "concepts" / "reward-accuracy.md",
    "hh-raft": DOCS / "concepts" / "raft-on-hh.md",
    "imdb-sentiment": DOCS / "concepts" / "imdb-sentiment.md",
    "conformance": DOCS / "concepts" / "proof.md",
    "chaos": DOCS / "guides" / "resume.md",
    "parity": DOCS / "guides" / "many-processes.md",
    "mutants": DOCS / "concepts" / "mutants.md",
    "relatives": DOCS / "concepts" / "raft-ppo-dpo.md",
}


def test_every_table_stands_in_its_page() -> None:
    assert PAGES.keys() == TABLES.keys()
    for name, page in PAGES.items():
        result = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        for table in TABLES[name]:
            assert table(result) in page.read_text("utf-8")
        assert result["commit"] in page.read_text("utf-8")
