"""Turns HTML into Markdown a language model can learn from. Knows nothing of where it stands."""

from __future__ import annotations

import re
from functools import cache
from html import unescape
from typing import Any

from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]  (lxml ships no types)

_DEEPEST = 1000
"""Elements inside one another; the parser would leave out what is deeper than 2,048."""
_MARKS = {
    **dict.fromkeys(("b", "strong"), ("**", "**")),
    **dict.fromkeys(("i", "em"), ("*", "*")),
    **dict.fromkeys(("s", "strike", "del"), ("~~", "~~")),
    "sup": ("<sup>", "</sup>"),
    "sub": ("<sub>", "</sub>"),
}
_HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
_CODE = {"code", "kbd", "samp", "tt"}
_LISTS = {"ul", "ol", "dl"}
_CELLS = {"td", "th"}
_TABLES = {"table", "tbody", "tfoot", "thead"}
_BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dt"),
    *("fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "html", "li", "main", "nav", "p", "pre"),
    *("section", "summary", "tr"),
    *_CELLS,
    *_TABLES,
    *_HEADINGS,
    *_LISTS,
}
_UNSEEN = {"script", "style", "head", "template"}
_LANGUAGE = re.compile(r"(?:lang|language)-([\w+#-]+)")
_SPACE = re.compile(r"[ \t\f\n]{2,}|[\t\f\n]")  # all but a single space
_FORMULA_OR_SPACE = re.compile(rf"(\$\$.+?\$\$|\$[^$\n]+\$)|{_SPACE.pattern}", re.DOTALL)
_BREAK = "\x00"
"""Stands for a <br> until its run of text ends; HTML cannot hold it."""
_BREAKS = re.compile(rf"[ \n]*{_BREAK}[ \n{_BREAK}]*")
_content = etree.XPath("string()")
_ADDRESS = re.compile(r"(?:https?|ftp)://\S+|mailto:\S+")


def html_to_markdown(html: str) -> str:
    """Markdown of an HTML fragment: fenced code, lists, tables, links, one blank line between blocks.

    Code and formulas ($...$, $$...$$) keep every character. Characters that Markdown would read as emphasis are not
    escaped: the text is for training, and ``\\_`` inside a formula is worse than an accidental italic. Superscripts
    stay tags: 10<sup>6</sup> must not become 106. Takes any string; HTML nested too deep loses its tags, not its text.
    """
    html = html.replace(_BREAK, "").replace("\r\n", "\n").replace("\r", "\n")
    root = _parse(html)
    return (_flow(unescape(re.sub(r"<[^<>]*>", " ", html))) if root is None else _convert(root)).strip()


def _parse(html: str) -> Any:
    """The root element; none for HTML that is nested too deep."""
    # Inside a body, leading text is not taken for something else.
    root = etree.fromstring(f"<body>{html}</body>".encode("utf-8", "replace"), _parser())
    if html.count("<") > _DEEPEST:
        depth = 0
        for event, _ in etree.iterwalk(root, events=("start", "end")):
            depth += 1 if event == "start" else -1
            if depth > _DEEPEST:
                return None
    return root


@cache
def _parser() -> Any:
    return etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)


class _Open:
    """An element that is being read."""

    __slots__ = ("blocks", "element", "inline", "kinds", "num_items", "rows", "tag")

    def __init__(self, element: Any) -> None:
        self.element, self.tag = element, element.tag
        self.inline: list[str] = []
        self.blocks: list[str] = []
        self.kinds: list[str] = []
        """Of each block: run (text that stood bare), list or block."""
        self.rows: list[Any] = []
        """Of a row its cells, of a table its rows."""
        self.num_items = 0

    def write(self, text: str) -> None:
        if text.startswith(" ") and self.inline and self.inline[-1].endswith((" ", "\n")):
            text = text[1:]
        if text:
            self.inline.append(text)

    def add(self, text: str, kind: str) -> None:
        self.flush()
        if text:
            self.blocks.append(text)
            self.kinds.append(kind)

    def flush(self) -> None:
        """Ends the run of bare text."""
        if self.inline:
            text = _BREAKS.sub(
                lambda match: "\n\n" if match[0].count(_BREAK) > 1 else "\n", "".join(self.inline)
            ).strip()
            self.inline = []
            if text:
                self.blocks.append(text)
                self.kinds.append("run")

    def text(self) -> str:
        self.flush()
        if len(self.blocks) < 2:
            return self.blocks[0] if self.blocks else ""
        if self.tag in _LISTS:
            return "\n".join(self.blocks)
        text = self.blocks[0]
        for block, kind, before in zip(self.blocks[1:], self.kinds[1:], self.kinds, strict=False):
            is_tight = kind == "list" and before == "run" and self.tag == "li"
            text += f"\n{block}" if is_tight else f"\n\n{block}"
        return text


def _convert(root: Any) -> str:
    walk = etree.iterwalk(root, events=("start", "end"))
    above: list[_Open] = []
    opened = _Open(root)
    for event, element in walk:
        tag = element.tag
        if event == "start":
            above.append(opened)
            opened = _Open(element)
            if tag in _CODE or tag == "pre" or tag in _UNSEEN:
                walk.skip_subtree()
            elif element.text:
                opened.write(_flow(element.text))
            continue
        inner, opened = opened, above.pop()
        if tag in _BLOCKS:
            _close_block(inner, opened)
        elif tag not in _UNSEEN:
            _close_inline(inner, opened)
        if element.tail:
            opened.write(_flow(element.tail))
    return opened.text()


def _flow(text: str) -> str:
    """Text whose spaces mean no more than one space, or one line end, save in formulas."""
    if "\n" not in text and "  " not in text and "\t" not in text and "\f" not in text:
        return text
    pattern = _FORMULA_OR_SPACE if "$" in text else _SPACE
    return pattern.sub(lambda found: found[0] if "$" in found[0] else "\n" if "\n" in found[0] else " ", text)


def _close_block(inner: _Open, outer: _Open) -> None:
    tag = inner.tag
    if tag in _CELLS and outer.tag == "tr":
        outer.rows.append((tag, inner.text()))
    elif tag == "tr" and outer.tag in _TABLES:
        outer.rows.append(inner.rows)
        outer.add(inner.text(), "block")  # what stands beside the cells
    elif tag in _TABLES and outer.tag in _TABLES and tag != "table":
        outer.rows += inner.rows
        outer.add(inner.text(), "block")
    elif tag in _TABLES or tag == "tr":
        outer.add(_table(inner, [inner.rows] if tag == "tr" else inner.rows), "block")
    elif tag == "pre":
        outer.add(_fenced(inner.element), "block")
    elif tag == "hr":
        outer.add("---", "block")
    elif tag == "li":
        _close_item(inner, outer)
    elif tag == "dd":
        outer.add(_indented(inner.text(), ":   ", "    "), "block")
    elif not (text := inner.text()):
        outer.flush()
    elif tag == "blockquote":
        outer.add(_indented(text, "> ", "> "), "block")
    elif tag in _LISTS:
        outer.add(_indented(text, "  ", "  ") if outer.tag in _LISTS else text, "list")
    elif tag in _HEADINGS:
        outer.add(f"{_HEADINGS[tag]} {' '.join(text.split(chr(10)))}", "block")
    elif len(inner.blocks) == 1 and inner.kinds[0] == "list":
        outer.add(text, "list")
    else:
        outer.add(text, "block")


def _close_item(inner: _Open, outer: _Open) -> None:
    outer.num_items += 1
    marker = "- "
    if outer.tag == "ol":
        start = outer.element.get("start", "")
        marker = f"{(int(start) if re.fullmatch('[0-9]{1,9}', start) else 1) + outer.num_items - 1}. "
    outer.add(_indented(inner.text(), marker, " " * len(marker)), "list")


def _close_inline(inner: _Open, outer: _Open) -> None:
    tag, element = inner.tag, inner.element
    if tag == "br":
        outer.write(_BREAK)
    elif tag == "img":
        alt, source = " ".join(element.get("alt", "").split()), element.get("src", "")
        outer.write(f"![{alt}]({_target(source, element.get('title'))})" if source else alt)
    elif tag in _CODE:
        text = _content(element)
        outer.write(" " if text[:1].isspace() else "")
        outer.write(_code(text))
        outer.write(" " if text[-1:].isspace() else "")
    elif inner.blocks:
        _close_around_blocks(inner, outer)
    else:
        text = "".join(inner.inline)
        core = text.strip(f" \n{_BREAK}")
        before, _, after = text.partition(core) if core else (text, "", "")
        outer.write(before)
        if core:
            outer.write(_marked(core, tag, element))
        outer.write(after)


def _close_around_blocks(inner: _Open, outer: _Open) -> None:
    """An inline element around blocks: its marks go around a single paragraph, those that are tags around any."""
    inner.flush()
    is_paragraph = len(inner.blocks) == 1 and not re.match(r"[#>`|-]|\d+\.", inner.blocks[0])
    if is_paragraph or inner.tag in ("sup", "sub"):
        outer.add(_marked(inner.text(), inner.tag, inner.element), "block")
        return
    for block, kind in zip(inner.blocks, inner.kinds, strict=True):
        outer.add(block, kind)
    if inner.tag == "a" and (target := inner.element.get("href")):
        outer.add(f"<{target}>", "block")


def _marked(text: str, tag: str, element: Any) -> str:
    if tag == "a":
        target, title = element.get("href", "").strip(), element.get("title")
        if not target:
            return text
        return f"<{target}>" if text == target and _ADDRESS.fullmatch(text) else f"[{text}]({_target(target, title)})"
    before, after = _MARKS.get(tag, ("", ""))
    return f"{before}{text}{after}"


def _target(address: str, title: str | None) -> str:
    address = " ".join(address.split())
    address = f"<{address}>" if " " in address else address
    return address if not title else '{} "{}"'.format(address, " ".join(title.split()).replace('"', '\\"'))


def _code(text: str) -> str:
    text = text.replace("\n", " ").strip()
    if not text:
        return ""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    if text[0] == "`" or text[-1] == "`" or len(fence) > 1:
        text = f" {text} "
    return f"{fence}{text}{fence}"


def _fenced(element: Any) -> str:
    for line_end in element.iter("br"):
        line_end.tail = f"\n{line_end.tail or ''}"
    text = _content(element).strip("\n")
    if not text.strip():
        return ""
    fence = "`" * max(3, max(map(len, re.findall("`{3,}", text)), default=0) + 1)
    return f"{fence}{_language(element)}\n{text}\n{fence}"


def _language(element: Any) -> str:
    for found in (element, element.find(".//code")):
        for name in (found.get("class", "") if found is not None else "").split():
            if (match := _LANGUAGE.fullmatch(name)) and match[1] != "none":
                return match[1]
    return ""


def _table(table: _Open, rows: list[list[tuple[str, str]]]) -> str:
    """A table of pipes; where a cell holds code or a table of its own, the cells as blocks."""
    outside = table.text()
    cells = [text for row in rows for _, text in row if text]
    if any("```" in text or "| ---" in text for text in cells):
        return "\n\n".join(filter(None, (outside, *cells)))
    rows = [row for row in rows if row]
    if not cells:
        return outside
    width = max(map(len, rows))
    header = rows.pop(0) if all(tag == "th" for tag, _ in rows[0]) else []
    lines = []
    for row in (header, *rows):
        texts = [" ".join(text.split()).replace("|", "\\|") for _, text in row]
        lines.append(f"| {' | '.join(texts + [''] * (width - len(row)))} |")
    lines.insert(1, f"| {' | '.join(['---'] * width)} |")
    return "\n\n".join(filter(None, (outside, "\n".join(lines))))


def _indented(text: str, first: str, other: str) -> str:
    """Empty for no text. Blank lines keep what is no space of the prefix."""
    if not text:
        return ""
    line, *lines = text.split("\n")
    blank = other.rstrip()
    return "\n".join([f"{first}{line}" if line else first.rstrip(), *(f"{other}{x}" if x else blank for x in lines)])
