"""Writes the pages of docs/reference that are made from the code: the table of the DPO family.

python scripts/reference.py
"""

from __future__ import annotations

from pathlib import Path

from fairlead.algorithms.losses import LOSSES, settings_of

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "preference-losses.md"
BEGIN, END = "<!-- made by scripts/reference.py -->", "<!-- end -->"


def table() -> str:
    """One row a loss, from the registry."""
    rows = [
        "| `dpo.loss` | loss of a pair | settings | paper | when |",
        "|---|---|---|---|---|",
    ]
    for name, loss in LOSSES.items():
        settings = ", ".join(f"`{each}`" for each in settings_of(loss))
        formula = loss.formula.replace("|", "\\|")
        rows.append(f"| `{name}` | {formula} | {settings} | {loss.paper} | {loss.use} |")
    return "\n".join(rows)


def written(page: str) -> str:
    """The page with its table as the registry has it."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
