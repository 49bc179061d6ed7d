import re
from html import escape
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.data.clean import html_to_markdown


def test_code_is_fenced_and_keeps_its_blank_lines_and_spaces() -> None:
    html = "<p>Try:</p>\n\n<pre><code>def f():\n    a_b = 1  \n\n\nf()\n</code></pre>\n<p>ok</p>"
    assert html_to_markdown(html) == ("Try:\n\n```\ndef f():\n    a_b = 1  \n\n\nf()\n```\n\nok")


def test_the_language_of_code_is_kept() -> None:
    html = '<pre class="lang-c++ prettyprint-override"><code>x</code></pre>'
    assert html_to_markdown(html) == "```c++\nx\n```"
    assert html_to_markdown('<pre><code class="language-py">x</code></pre>') == "```py\nx\n```"


def test_a_fence_is_longer_than_any_in_the_code() -> None:
    assert html_to_markdown("<pre><code>a\n```\nb</code></pre>") == "````\na\n```\nb\n````"


def test_code_inside_lists_and_quotes_stays_inside() -> None:
    html = "<ul><li><p>do</p><pre><code>a\n\n\nb</code></pre></li><li>more</li></ul>"
    assert html_to_markdown(html) == "- do\n\n  ```\n  a\n\n\n  b\n  ```\n- more"
    assert html_to_markdown("<blockquote><pre><code>a\nb</code></pre></blockquote>") == ("> ```\n> a\n> b\n> ```")


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("", ""),
        (" \n", ""),
        ("<p> </p><pre><code>\n</code></pre>", ""),
        ("just text", "just text"),
        ("https://example.org/a_b", "https://example.org/a_b"),
        ("notes.txt", "notes.txt"),
        ('see <a href="http://x.y/a_b">a_b</a>', "see [a_b](http://x.y/a_b)"),
        ("<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>", "1. a\n   - b\n2. c"),
        ("<p>a</p>\n\n\n\n<p>b</p>", "a\n\nb"),
        ("a<br><br><br><br>b", "a\n\nb"),
        ("<h2>Why</h2><p>so</p>", "## Why\n\nso"),
        ("<p>*x* and $a_1 * b_2$, <code>a_b</code></p>", "*x* and $a_1 * b_2$, `a_b`"),
        ("10<sup>6</sup> H<sub>2</sub>O", "10<sup>6</sup> H<sub>2</sub>O"),
        ("1 &lt; 2 &amp; é\u2028\u0085", "1 < 2 & é"),
        ("<p>unclosed <b>bold", "unclosed **bold**"),
        ("stray</div> end", "stray end"),
        ("a\x00b", "ab"),
        ("<p>a <b> bold </b>c<br>\n<i>d</i></p>", "a **bold** c\n*d*"),
        ("<strike>a</strike> <s>b</s> <del>c</del>", "~~a~~ ~~b~~ ~~c~~"),
        ("<p><strong>Note<br></strong>x</p>", "**Note**\nx"),
        ("<ol start=3><li>a<li><p>b</p><p>c</p></ol>", "3. a\n4. b\n\n   c"),
        ("<ul><li>a</li><ul><li>b</li></ul></ul>", "- a\n  - b"),
        ("<dl><dt>t</dt><dd><p>a</p><p>b</p></dd></dl>", "t\n:   a\n\n    b"),
        ("<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>", "> a\n>\n> > b"),
        ("<p>a<hr>b</p>", "a\n\n---\n\nb"),
        ("<code>a`b</code>, <code>``</code>, <kbd>K</kbd>, <code>a\nb</code>", "`` a`b ``, ``` `` ```, `K`, `a b`"),
        ("<a href='http://x/y'>http://x/y</a>", "<http://x/y>"),
        ("<a href='/q/1' title='a \"b\"'>q</a> <a>n</a><a href='z'></a>", '[q](/q/1 "a \\"b\\"") n'),
        ("<a href='a b'>x</a>", "[x](<a b>)"),
        ("<a href='u'><img src='s' alt='a\nb'></a>", "[![a b](s)](u)"),
        ("<sub><p>a</p><p>b</p></sub>", "<sub>a\n\nb</sub>"),
        ("<a href='u'><p>a</p></a><p>b</p>", "[a](u)\n\nb"),
        ("<p>&nbsp;</p><p>&nbsp; x&nbsp;y</p>", "x\xa0y"),
        ("<pre>a<b>b</b> <span>c</span>d<br>e</pre>", "```\nab cd\ne\n```"),
        ("<pre class='lang-none'><code>x\r\ny</code></pre>", "```\nx\ny\n```"),
        ("<!-- language: lang-c --><script>x()</script><style>p {}</style>a", "a"),
        ("<details><summary>s</summary><p>a</p></details>", "s\n\na"),
    ],
)
def test_html_becomes_plain_markdown(html: str, markdown: str) -> None:
    assert html_to_markdown(html) == markdown


def test_tables_are_rows_of_pipes() -> None:
    head = "<table><thead><tr><th>a</th><th>b|c</th></tr></thead>"
    html = head + "<tbody><tr><td>1<br>2</td><td><p>x</p><p><b>y</b></p></td></tr><tr><td>3</td></tr></tbody></table>"
    assert html_to_markdown(html) == "| a | b\\|c |\n| --- | --- |\n| 1 2 | x **y** |\n| 3 |  |"
    assert html_to_markdown("<table><tr><td>1</td></tr></table>") == "|  |\n| --- |\n| 1 |"


def test_a_table_that_holds_code_becomes_its_cells() -> None:
    html = "<table><tr><td><pre>a\nb</pre></td><td>c</td></tr></table>"
    assert html_to_markdown(html) == "```\na\nb\n```\n\nc"


@pytest.mark.parametrize(
    "formula",
    ["$a_1 * b_2$", r"$$\begin{align} a &= b_c \\ " + "\n   d_e &< f \\\n\\end{align}$$", r"$\{x\_y\}$", "$a  \\ b$"],
)
def test_formulas_keep_every_character(formula: str) -> None:
    assert html_to_markdown(f"<p>Let <em>x</em>  be {escape(formula)},\n so.</p>") == f"Let *x* be {formula},\nso."


@pytest.mark.parametrize("tag", ["div", "blockquote", "b", "ul><li", "sub", "table><tr><td"])
@pytest.mark.parametrize("depth", [400, 3000, 20_000])
def test_html_nested_to_any_depth_keeps_its_text(tag: str, depth: int) -> None:
    assert "inner text" in html_to_markdown(f"<p>outer</p>{f'<{tag}>' * depth}inner text")


class Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data


inlines = ["a", "b", "br", "code", "em", "i", "kbd", "s", "span", "sub", "sup"]
blocks = ["blockquote", "dd", "div", "h2", "hr", "li", "ol", "p", "pre", "table", "td", "th", "tr", "ul"]
tags = st.sampled_from(inlines + blocks)
words = st.sampled_from(["alpha", " beta ", "\n", "x_i*y", "$a$", "|", "`", "&amp;", "&lt;", "  ", "#"])
nodes = st.recursive(
    words,
    lambda inner: st.tuples(tags, st.lists(inner, max_size=4)).map(
        lambda node: f"<{node[0]}>{''.join(node[1])}</{node[0]}>" if node[0] not in ("br", "hr") else f"<{node[0]}>"
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.lists(nodes, max_size=5).map("".join))
def test_no_word_is_lost_and_none_is_moved(html: str) -> None:
    reader = Texts()
    reader.feed(html)
    reader.close()
    found = re.sub("</?su[bp]>", "", html_to_markdown(html))
    kept, expected = ("".join(filter(str.isalpha, text)) for text in (found, reader.text))
    if "<t" in html:  # what stands beside the cells of a table comes before it, as in a browser
        kept, expected = "".join(sorted(kept)), "".join(sorted(expected))
    assert kept == expected


@settings(deadline=None)
@given(st.one_of(st.text(), st.text("<>/=\"' abpretdlih&;#x0\n", max_size=60)))
def test_any_string_is_taken(html: str) -> None:
    markdown = html_to_markdown(html)
    assert markdown == markdown.strip()
    assert "\x00" not in markdown
