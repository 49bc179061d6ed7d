"""Draws defects at random, by the usual operators of mutation: python -m tests.mutants.draw --number 30 --seed 0.

Every place in ops, algorithms, training and rollout where an operator applies is as likely as any other, but one a line
at most. Left out: annotations, defaults of settings, constants of a module, messages of errors, and what guards an
invariant (assert, strict=True).
"""

from __future__ import annotations

import argparse
import ast
import random
from collections.abc import Iterator

import yaml

from tests.mutants.defects import HERE, PACKAGE

LAYERS = ("ops", "algorithms", "training", "rollout")
OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">",
    ast.Eq: "!=", ast.NotEq: "==", ast.And: "or", ast.Or: "and",
}  # fmt: skip
LEFT_OUT = (ast.AnnAssign, ast.Raise, ast.Assert, ast.JoinedStr, ast.arg)
Change = tuple[int, int, int, str]
"""Line, first and last column, what stands there instead."""


def changes(tree: ast.Module, lines: list[str]) -> Iterator[Change]:
    def inside(node: ast.AST) -> Iterator[Change]:
        if not isinstance(node, LEFT_OUT) and getattr(node, "arg", None) != "strict":
            yield from of(node, lines)
            for child in ast.iter_child_nodes(node):
                yield from inside(child)

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for statement in node.body:
                yield from inside(statement)


def of(node: ast.AST, lines: list[str]) -> Iterator[Change]:
    match node:
        case ast.BinOp(left, operator, right) if type(operator) in OPERATORS:
            yield from _between(left, right, OPERATORS[type(operator)], lines)
        case ast.Compare(left, [operator], [right]) if type(operator) in OPERATORS:
            yield from _between(left, right, OPERATORS[type(operator)], lines)
        case ast.BoolOp(operator, [left, right, *_]):
            yield from _between(left, right, OPERATORS[type(operator)], lines)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand) if operand.lineno == node.lineno:
            yield node.lineno, node.col_offset, operand.col_offset, ""
        case ast.Constant(bool(value)):
            yield node.lineno, node.col_offset, node.col_offset + len(str(value)), str(not value)
        case ast.Constant(int(value)):
            yield node.lineno, node.col_offset, node.col_offset + len(str(value)), str(value + 1)
        case _:
            return


def _between(left: ast.expr, right: ast.expr, operator: str, lines: list[str]) -> Iterator[Change]:
    """In place of what stands between two operands on one line, without the brackets around them."""
    if left.end_lineno != right.lineno or left.end_col_offset is None:
        return
    gap = lines[right.lineno - 1][left.end_col_offset : right.col_offset]
    word = gap.strip(" ()")
    start = left.end_col_offset + gap.index(word)
    yield right.lineno, start, start + len(word), operator


def drawn(number: int, seed: int) -> list[dict[str, str]]:
    found: dict[tuple[str, int], list[dict[str, str]]] = {}
    for path in sorted(path for layer in LAYERS for path in (PACKAGE / layer).rglob("*.py")):
        text = path.read_text("utf-8")
        lines, name = text.splitlines(), str(path.relative_to(PACKAGE))
        for line, start, end, put in changes(ast.parse(text), lines):
            old = lines[line - 1]
            new, what = old[:start] + put + old[end:], f"{old[start:end].strip()} -> {put or 'nothing'}"
            if text.count(old) > 1:
                old, new = f"{lines[line - 2]}\n{old}", f"{lines[line - 2]}\n{new}"
            if old.isascii() and text.count(old) == 1 and compiles(text.replace(old, new)):
                row = {"name": f"{name}, line {line}: {what}", "file": name, "old": old, "new": new}
                found.setdefault((name, line), []).append(row)
    generator = random.Random(seed)
    return [generator.choice(found[place]) for place in sorted(generator.sample(sorted(found), number))]


def compiles(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = drawn(given.number, given.seed)
    head = f"# Drawn by `python -m tests.mutants.draw --number {given.number} --seed {given.seed}`.\n"
    body = yaml.safe_dump(rows, sort_keys=False, width=10_000)
    (HERE / "drawn.yaml").write_text(head + body, "utf-8")
