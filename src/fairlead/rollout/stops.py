"""Stop strings: which token completes one, and the text before it. Works on decoded text, since a stop string may begin
and end in the middle of tokens, and tokens in the middle of characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fairlead.data.render import Renderer
from fairlead.errors import ConfigError


class Stops:
    """Watches ``rows`` texts that grow by a token at a time. Raises ConfigError for a stop string without text."""

    def __init__(self, renderer: Renderer, strings: Sequence[str], rows: int) -> None:
        if not all(strings):
            raise ConfigError(
                f"stop={list(strings)} holds an empty string", hint="every text would end before it began"
            )
        self._tokenizer, self._strings = renderer.tokenizer, strings
        self._silent = {*renderer.tokenizer.all_special_ids, renderer.eos}
        # Every other token holds a byte or more; one more, since a text may lose the space it begins with.
        self._window = max((len(text.encode()) for text in strings), default=0) + 1
        self._tails: list[list[int]] = [[] for _ in range(rows)]
        self.stopped: set[int] = set()

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """One more token of each of some rows: whether it completes a stop string."""
        for row, token in zip(rows, tokens, strict=True):
            if token not in self._silent:
                self._tails[row] = [*self._tails[row][1 - self._window :], token]
        texts = self._tokenizer.batch_decode([self._tails[row] for row in rows], skip_special_tokens=True)
        found = [any(text in tail for text in self._strings) for tail in texts]
        self.stopped.update(row for row, hit in zip(rows, found, strict=True) if hit)
        return found


def stop_length(renderer: Renderer, strings: Sequence[str], ids: Sequence[int]) -> int | None:
    """How many of the tokens of a whole response reach to the end of its first stop string; none without one."""
    stops = Stops(renderer, strings, 1)
    return next((at + 1 for at, token in enumerate(ids) if stops.add([0], [token])[0]), None)


def text_before(renderer: Renderer, strings: Iterable[str], ids: Sequence[int]) -> str:
    """The text of a response that a stop string ended, without it."""
    text = renderer.tokenizer.decode(list(ids), skip_special_tokens=True)
    ends = [at for at in map(text.find, strings) if at >= 0]
    return text[: min(ends, default=len(text))].strip()
