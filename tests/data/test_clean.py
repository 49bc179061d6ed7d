import pytest

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
    ],
)
def test_html_becomes_plain_markdown(html: str, markdown: str) -> None:
    assert html_to_markdown(html) == markdown
