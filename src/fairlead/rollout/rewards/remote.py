"""A scorer behind HTTP, through the standard library: batches of texts out as JSON, scores back. What can pass is tried
again; what cannot is an error that shows the answer."""

from __future__ import annotations

import itertools
import json
import os
import time
from http.client import HTTPException
from string import Template
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fairlead.errors import ConfigError, TrainingError
from fairlead.rollout.rewards.functions import Asked
from fairlead.rollout.rewards.settings import UrlSource

PASSING = (408, 429)
"""Statuses that another try may not meet again, besides those from 500."""


class UrlJudge:
    """Raises ConfigError, when it is made, for a header whose variable the environment lacks."""

    def __init__(self, source: UrlSource) -> None:
        self._source = source
        self._headers = {"Content-Type": "application/json"}
        for name, value in source.headers.items():
            try:
                self._headers[name] = Template(value).substitute(os.environ)
            except (KeyError, ValueError) as error:
                raise ConfigError(
                    f"the header {name} of the reward {source.url} cannot be filled in: {error}",
                    hint="set the variable of the environment that it names; $$ writes a dollar",
                ) from error

    def __call__(self, asked: Asked) -> list[Any]:
        return [score for part in asked.parts(self._source.batch_size) for score in self._scores(part)]

    def _scores(self, asked: Asked) -> list[Any]:
        body = self._answer(json.dumps(asked.texts(), default=str).encode())
        try:
            found: Any = json.loads(body)
        except ValueError as error:
            raise self._failed(f"answered what is no JSON ({error})", body) from error
        scores = found.get("scores") if isinstance(found, dict) else None
        if not isinstance(scores, list):
            raise self._failed("answered without a list `scores`", body)
        if len(scores) != len(asked.outputs):
            raise self._failed(f"answered {len(scores)} scores for {len(asked.outputs)} samples", body)
        return scores

    def _answer(self, content: bytes) -> bytes:
        """The body of a good answer. Raises TrainingError, after the last try, with what the last one met."""
        source = self._source
        for attempt in itertools.count():
            try:
                request = Request(source.url, content, self._headers, method="POST")
                with urlopen(request, timeout=source.timeout) as answer:
                    return answer.read()
            except HTTPError as error:
                failure = self._failed(f"answered {error.code} {error.reason}", error.read())
                if error.code < 500 and error.code not in PASSING:
                    raise failure from error
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error)
                late = f"did not answer within {source.timeout:g} seconds"
                failure = self._failed(late if isinstance(reason, TimeoutError) else f"cannot be reached: {reason!r}")
            if attempt == source.retries:
                raise failure
            time.sleep(source.backoff * 2**attempt)
        raise AssertionError("unreachable")

    def _failed(self, what: str, body: bytes | None = None) -> TrainingError:
        begin = "" if body is None else f": {body[:200].decode('utf-8', 'replace')!r}"
        return TrainingError(
            f"the reward {self._source.url} {what}{begin}",
            hint="look at the scorer's own log; the same command continues the run",
        )
