"""Turns HTML into Markdown a language model can learn from. Knows nothing of where it stands."""

from __future__ import annotations

import re
from typing import Any

from markdownify import ATX, MarkdownConverter

# Ends the lines of a code block until the blank lines around it are gone; HTML cannot hold it.
_CODE_LINE = "\x00"
_BLANK_CODE_LINE = re.compile(rf"^([> ]*?)[ \t]*{_CODE_LINE}$", re.MULTILINE)
_LANGUAGE = re.compile(r"(?:lang|language)-([\w+#-]+)")


class _Converter(MarkdownConverter):
    def convert_pre(self, el: Any, text: str, parent_tags: set[str]) -> str:
        if not text.strip():
            return ""
        runs = [len(run) for run in re.findall(r"`{3,}", text)]
        fence = "`" * (max(runs, default=2) + 1)
        code = text.strip("\n").replace("\n", f"{_CODE_LINE}\n")
        return f"\n\n{fence}{_language(el)}\n{code}{_CODE_LINE}\n{fence}\n\n"


def _language(el: Any) -> str:
    for element in (el, el.code):
        for name in element.get("class", []) if element else []:
            if match := _LANGUAGE.fullmatch(name):
                return match[1]
    return ""


def html_to_markdown(html: str) -> str:
    """Markdown of an HTML fragment: fenced code, lists, links, one blank line between blocks.

    Code keeps its blank lines. Characters that Markdown would read as emphasis are not escaped: the
    text is for training, and ``\\_`` inside a formula is worse than an accidental italic.
    Superscripts stay tags: 10<sup>6</sup> must not become 106.
    """
    converter = _Converter(
        heading_style=ATX,
        bullets="-",
        escape_asterisks=False,
        escape_underscores=False,
        sup_symbol="<sup>",
        sub_symbol="<sub>",
    )
    # The empty tag keeps the parser from taking a bare address or file name for a mistake.
    markdown: str = converter.convert(html.replace(_CODE_LINE, "") + "<p></p>")
    markdown = re.sub(r"[ \t]+$", "", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"\n{3,}", "\n\n", markdown)
    markdown = _BLANK_CODE_LINE.sub(r"\1", markdown)
    return markdown.replace(_CODE_LINE, "").strip()
