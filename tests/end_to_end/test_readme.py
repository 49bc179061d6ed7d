"""What README.md and docs/ tell a reader to type exists: verbs, options, settings, make targets, files."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

import fairlead
from fairlead import pipeline
from fairlead.algorithms import REGISTRY
from fairlead.cli import app
from fairlead.config_file import parse_override
from fairlead.data.prepare import check_options
from fairlead.runner import resolve

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TREE: Any = typer.main.get_command(app)
SHELL = ("", "sh", "bash", "shell", "console")


@dataclass(frozen=True, slots=True)
class Block:
    place: str
    """Page:line of its first line."""
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    language, start, inside = None, 0, list[str]()
    for number, line in enumerate(page.read_text("utf-8").splitlines(), start=1):
        fence = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", line)
        if fence and language is None:
            language, start, inside = fence[2], number + 1, []
        elif fence and not fence[2]:
            found.append(Block(f"{page.relative_to(ROOT)}:{start}", language or "", "\n".join(inside)))
            language = None
        elif language is not None:
            inside.append(line)
    assert language is None, f"{page}: a fence is not closed"
    return found


def commands(text: str) -> list[list[str]]:
    """The words of every `fairlead` and `make` command in shell text: prompts, comments and redirections left out."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^\s*\$ ", "", line)
        if not re.search(r"(^|[;&|]) *(\w+=\S* +)*(\S*/)?(fairlead|make)( |$)", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        is_redirected = False
        for word in [*lexer, ";"]:
            if word[0] not in "();<>|&":
                words += [] if is_redirected else [word]
                is_redirected = False
                continue
            is_redirected = word[0] in "<>"
            if is_redirected:
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words and Path(words[0]).name in ("fairlead", "make"):
                found.append([Path(words[0]).name, *words[1:]])
            words = []
    return found


def in_blocks() -> list[tuple[str, list[str]]]:
    return [
        (f"{block.place} {' '.join(words)[:60]}", words)
        for page in PAGES
        for block in blocks(page)
        if block.language in SHELL
        for words in commands(block.text)
    ]


def in_sentences() -> list[tuple[str, list[str]]]:
    """Commands between single backquotes: they may hold placeholders."""
    found: list[tuple[str, list[str]]] = []
    for page in PAGES:
        text = re.sub(r"^\s*(```|~~~).*?^\s*\1\s*$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`]+)`", text):
            found += [(f"{page.relative_to(ROOT)} {code[:60]}", words) for words in commands(code.replace("\n", " "))]
    return found


def verb_and_parameters(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Parsed as the command line would; its error is the failure."""
    verb, *arguments = words[1:]
    assert verb in TREE.commands, f"there is no verb {verb!r}"
    return verb, TREE.commands[verb].make_context(verb, arguments).params


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        if equals:
            assert re.search(rf"\b{name}\b", makefile), f"the Makefile reads no {name}"
        else:
            assert word in make_targets(), f"there is no target {word!r}"


IN_BLOCKS, IN_SENTENCES = in_blocks(), in_sentences()


@pytest.mark.parametrize("words", [w for _, w in IN_BLOCKS], ids=[place for place, _ in IN_BLOCKS])
def test_a_command_in_a_code_block_parses_with_known_settings(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "make":
        check_make(words)
        return
    if words[1:] in ([], ["--help"]):
        return
    verb, given = verb_and_parameters(words)
    monkeypatch.chdir(ROOT)
    if verb in ("train", "sweep") and not (given["recipe"].endswith(".yaml") and not Path(given["recipe"]).is_file()):
        resolve(given["recipe"], given["settings"] or [])
    if verb == "prepare" and given["kind"]:
        settings = [word for word in [given["source"], *(given["settings"] or [])] if word and "=" in word]
        check_options(given["kind"], dict(map(parse_override, settings)))
    if verb == "pipeline" and not (given["file"].endswith(".yaml") and not Path(given["file"]).is_file()):
        monkeypatch.setattr(pipeline, "require_inputs", lambda settings, folder: None)
        assert pipeline.plan(given["file"], given["settings"] or [])


@pytest.mark.parametrize("words", [w for _, w in IN_SENTENCES], ids=[place for place, _ in IN_SENTENCES])
def test_a_command_in_a_sentence_names_a_verb_or_target_and_options_that_exist(words: list[str]) -> None:
    if words[0] == "make":
        check_make(words)
        return
    known = {option for parameter in TREE.commands[words[1]].params for option in parameter.opts}
    assert [word for word in words[2:] if word.startswith("-") and word not in {*known, "--help"}] == []


def test_the_commands_of_the_readme_were_found() -> None:
    """Else the two tests above would hold of nothing."""
    words = [words for place, words in IN_BLOCKS if place.startswith("README.md")]
    assert {"train", "evaluate", "report", "pipeline"} <= {w[1] for w in words if w[0] == "fairlead"}
    assert {"demo", "test"} <= {w[1] for w in words if w[0] == "make"}
    trained = {w[2].replace("-", "_") for w in words if w[:2] == ["fairlead", "train"]}
    assert trained >= set(REGISTRY) - {"pretrain"}


def test_a_wrong_command_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "$ SEED=0 fairlead train dpo \\\n  seed=1 > out && make demo # make x\n.venv/bin/fairlead report a"
    assert commands(text) == [["fairlead", "train", "dpo", "seed=1"], ["make", "demo"], ["fairlead", "report", "a"]]
    assert commands("cd x; fairlead report a | make lint") == [["fairlead", "report", "a"], ["make", "lint"]]
    with pytest.raises(Exception, match="No such option"):
        verb_and_parameters(["fairlead", "train", "dpo", "--seed"])
    with pytest.raises(fairlead.FairleadError, match=r"unknown key 'dpo\.betta'"):
        test_a_command_in_a_code_block_parses_with_known_settings(
            ["fairlead", "train", "dpo", "dpo.betta=1"], monkeypatch
        )
    with pytest.raises(AssertionError, match="no target 'demoo'"):
        check_make(["make", "demoo"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_point_to_files_and_headings_that_exist(page: Path) -> None:
    text = re.sub(r"^\s*(```|~~~).*?^\s*\1\s*$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    broken: list[str] = []
    for link in re.findall(r"\]\(\s*<?([^)\s>]+)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = page if not name else page.parent / name
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(link)
    assert broken == []


def headings(page: Path) -> set[str]:
    """The anchors GitHub gives a page's headings."""
    found = re.findall(r"^#+ +(.+?) *$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_every_file_of_the_readmes_tree_exists() -> None:
    block = next(block for block in blocks(ROOT / "README.md") if block.text.startswith("src/fairlead/"))
    root, *lines = block.text.splitlines()
    named: set[str] = set()
    for line in lines:
        first, _, _ = line.strip().partition("  ")
        named |= {word for word in first.split() if word.endswith(("/", ".py"))}
        named |= set(re.findall(r"[\w/]+\.py\b", line))
    assert {"cli.py", "config.py", "ops/", "recipes/"} <= named
    assert [name for name in sorted(named) if not (ROOT / root / name).exists()] == []


def test_the_readmes_table_lists_the_registry() -> None:
    section = (ROOT / "README.md").read_text("utf-8").partition("## Algorithms")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(REGISTRY)


PYTHON = [block for page in PAGES for block in blocks(page) if block.language in ("python", "py")]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_compiles_imports_what_exists_and_names_parameters_that_exist(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fairlead":
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "fairlead":
            function = getattr(fairlead, node.func.attr)
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
            inspect.signature(function).bind(*[None for _ in node.args], **keywords)


def test_the_readme_shows_training_from_python() -> None:
    assert any(block.place.startswith("README.md") and "fairlead.train(" in block.text for block in PYTHON)
