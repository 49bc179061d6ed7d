"""What an attacker or a broken disk might hand in, and the promise: a result, or an error that says something."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairlead.errors import FairleadError

SMUGGLED = "smuggled"
"""The name that every element, attribute and entity of `markup` bears."""
markup = st.sampled_from(
    [
        f"<script {SMUGGLED}>alert(1)</script>",
        f"</title></style></svg><{SMUGGLED}>",
        f'" {SMUGGLED}="1" onmouseover="alert(1)',
        f"' {SMUGGLED}='1",
        f"--><{SMUGGLED}><!--",
        f"]]><{SMUGGLED}/>",
        f"&lt;{SMUGGLED}&gt;",
        f"<img src=x {SMUGGLED} onerror=alert(1)>",
        f"{{{{ 7 * 7 }}}}<{SMUGGLED}>{{% raw %}}",
        f"$\\frac{{<{SMUGGLED}>$",
        f"javascript:alert(1)//<{SMUGGLED}>",
    ]
)
texts = st.text(max_size=20) | markup | st.sampled_from(["", " ", "\0", "\ud800", "\x85", "nan", "1e999", "..", "/"])
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1 << 63, True, -0.0])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
"""Anything JSON can hold, and more."""
paths = st.lists(
    st.sampled_from(["..", ".", "", "a", "~", "\0", "\n", "a b", "x" * 300, "\ud800", "con", "ü"]),
    min_size=1,
    max_size=4,
).map("/".join) | st.sampled_from(["/", "/etc/x", "//x", "\\..\\x", "../../x", "a/../../x", "./a"])


def bytes_near(*samples: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, and samples with some of theirs replaced, cut out or put in."""

    @st.composite
    def damaged(draw: Any) -> bytes:
        data = bytearray(draw(st.sampled_from(samples)))
        for _ in range(draw(st.integers(1, 4))):
            at, size = draw(st.integers(0, len(data))), draw(st.sampled_from([0, 0, 1, 2, 7, len(data)]))
            data[at : at + size] = draw(st.binary(max_size=4) | st.sampled_from(samples))
        return bytes(data[: 1 << 16])

    return st.binary(max_size=64) | damaged()


def tried(number: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Tries a property at once on so many examples, which are the same every time."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    options = settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)

    def call(function: Callable[..., None]) -> None:
        options(given(*strategies)(function))()

    return call


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Nothing may go wrong inside but with an error of Fairlead's that has a message."""
    try:
        yield
    except FairleadError as error:
        assert error.message.strip()


# --- where is written ----------------------------------------------------------------------------------------------

_WATCHED: list[list[Path]] = []
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PLACES = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.symlink": (1,),
           "os.link": (1,), "os.truncate": (0,), "shutil.rmtree": (0,)}  # fmt: skip


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHED:
        return
    if event == "open":
        path, _, flags = arguments
        found = [path] if isinstance(flags, int) and flags & _WRITING else []
    elif event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return  # relative to a folder that shutil.rmtree has named
    else:
        found = [arguments[i] for i in _PLACES.get(event, ())]
    for place in found:
        if isinstance(place, str | bytes | os.PathLike):
            _WATCHED[-1].append(Path(os.path.abspath(os.fsdecode(place))))


@contextlib.contextmanager
def nothing_outside(*folders: Path) -> Iterator[None]:
    """Inside nothing is written, made, moved or removed but in the folders."""
    if not _HOOKED:
        sys.addaudithook(_note)
        _HOOKED.append(True)
    _WATCHED.append([])
    try:
        yield
    finally:
        written = _WATCHED.pop()
    allowed = [folder.resolve() for folder in (*folders, Path("/dev"))]
    outside = [path for path in written if not any(path.resolve().is_relative_to(folder) for folder in allowed)]
    assert not outside, outside


_HOOKED: list[bool] = []
