"""A scorer behind HTTP, against a server on this machine that answers as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tests.tiny import CPU, tokenizer

from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, TrainingError
from fairlead.rollout.rewards import open_reward
from fairlead.types import Prompt, Rollout, Scores

Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


class Server(ThreadingHTTPServer):
    """``answer`` says what to each request, of which ``seen`` holds the bodies and headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.answer: Answer = lambda body: (200, json.dumps({"scores": list(map(len, body["outputs"]))}).encode())
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((body, dict(self.headers.items())))
        status, content = server.answer(body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.released.set()
        made.shutdown()
        thread.join()


def _rollout(text: str, **columns: object) -> Rollout:
    ids = tuple(tokenizer()(f" {text}").input_ids)
    return Rollout(Prompt("why?", columns), (3,), ids, (-1.0,) * len(ids), True, text)


def _score(server: Server, *rollouts: Rollout, **options: Any) -> Scores:
    source = {"url": server.url, "backoff": 0.0} | options
    renderer = Renderer(tokenizer(), template="question-answer", max_length=128)
    return open_reward(source, renderer, device=CPU)(rollouts)


def _in_turn(*answers: tuple[int, bytes]) -> Answer:
    waiting = iter(answers)
    return lambda _: next(waiting)


GOOD = 200, b'{"scores": [1, 2.5]}'
TWO = _rollout("so"), _rollout("thus")


def test_texts_and_columns_go_out_in_batches_and_scores_come_back_in_order(server: Server) -> None:
    rollouts = [_rollout("x" * size, topic=size) for size in range(1, 6)]
    found = _score(server, *rollouts, batch_size=2, headers={"X-Kind": "test"})
    assert found == Scores((1.0, 2.0, 3.0, 4.0, 5.0))
    assert [body["outputs"] for body, _ in server.seen] == [["x", "xx"], ["xxx", "xxxx"], ["xxxxx"]]
    body, headers = server.seen[0]
    assert body == {
        "samples": ["Question: why?\n\nAnswer: x", "Question: why?\n\nAnswer: xx"],
        "prompts": ["Question: why?\n\nAnswer:"] * 2,
        "outputs": ["x", "xx"],
        "topic": [1, 2],
    }
    assert headers["X-Kind"] == "test" and headers["Content-Type"] == "application/json"


def test_the_short_form_is_a_scorer_too(server: Server) -> None:
    renderer = Renderer(tokenizer(), template="question-answer", max_length=128)
    assert open_reward(server.url, renderer, device=CPU)(TWO).values == (2.0, 4.0)


def test_what_can_pass_is_tried_again(server: Server) -> None:
    server.answer = _in_turn((503, b"busy"), (429, b"slowly"), GOOD)
    assert _score(server, *TWO).values == (1.0, 2.5)
    assert len(server.seen) == 3


def test_what_does_not_pass_names_the_url_the_status_and_the_answer(server: Server) -> None:
    server.answer = lambda _: (503, b"the scorer is out of memory")
    with pytest.raises(TrainingError, match=rf"{server.url} answered 503 .*: 'the scorer is out of memory'"):
        _score(server, *TWO, retries=2)
    assert len(server.seen) == 3


def test_a_request_that_is_refused_is_not_sent_again(server: Server) -> None:
    server.answer = lambda _: (404, b"no such path")
    with pytest.raises(TrainingError, match=rf"{server.url} answered 404 Not Found: 'no such path'"):
        _score(server, *TWO)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"scores": [1.0]}', "answered 1 scores for 2 samples: "),
        (b'{"scores": 1.0}', "answered without a list `scores`: "),
        (b"[1.0, 2.0]", "answered without a list `scores`: "),
        (b"<html>hello", r"answered what is no JSON \(Expecting value.*\): '<html>hello'"),
        (b"\xff\xfe", "answered what is no JSON"),
        (b'{"scores": [1.0, NaN]}', "returned nan for the sample 'thus'"),
        (b'{"scores": [1.0, "2"]}', r"returned '2' \(str\), which is no number, for the sample 'thus'"),
    ],
)
def test_an_answer_that_cannot_be_used_is_shown(server: Server, body: bytes, said: str) -> None:
    server.answer = lambda _: (200, body)
    with pytest.raises(TrainingError, match=rf"the reward (http://)?127\.0\.0\.1:\d+(/score)? {said}"):
        _score(server, *TWO)
    assert len(server.seen) == 1


def test_dense_answers_are_read_as_those_of_a_function(server: Server) -> None:
    server.answer = lambda _: (200, b'{"scores": [[[0, 2, 1.5]], [[0, 4, 1], [0, 1, -3]]]}')
    found = _score(server, *TWO)
    assert found.values == (1.5, -2.0) and found.tokens is not None
    assert list(map(len, found.tokens)) == [len(rollout.response_ids) for rollout in TWO]


def test_a_silent_scorer_is_given_up_after_its_time(server: Server) -> None:
    def silent(_: dict[str, Any]) -> tuple[int, bytes]:
        server.released.wait(20)
        return GOOD

    server.answer = silent
    start = time.monotonic()
    with pytest.raises(TrainingError, match=rf"{server.url} did not answer within 0.2 seconds"):
        _score(server, *TWO, timeout=0.2, retries=1)
    assert 0.4 <= time.monotonic() - start < 15
    assert len(server.seen) == 2


def test_the_waits_between_tries_double(server: Server) -> None:
    server.answer = _in_turn((500, b""), (500, b""), GOOD)
    start = time.monotonic()
    assert _score(server, *TWO, backoff=0.1).values == (1.0, 2.5)
    assert time.monotonic() - start >= 0.3


def test_a_scorer_that_is_not_there_is_named() -> None:
    with Server() as gone:
        url = gone.url
    renderer = Renderer(tokenizer(), template="question-answer", max_length=128)
    with pytest.raises(TrainingError, match=rf"{url} cannot be reached: ConnectionRefusedError"):
        open_reward({"url": url, "retries": 0}, renderer, device=CPU)(TWO)


def test_a_header_takes_secrets_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "abc")
    _score(server, *TWO, headers={"Authorization": "Bearer $SCORER_TOKEN", "X-Price": "$$5"})
    assert server.seen[0][1]["Authorization"] == "Bearer abc"
    assert server.seen[0][1]["X-Price"] == "$5"
    monkeypatch.delenv("SCORER_TOKEN")
    with pytest.raises(ConfigError, match=rf"the header Authorization of the reward {server.url} .*'SCORER_TOKEN'"):
        _score(server, *TWO, headers={"Authorization": "Bearer $SCORER_TOKEN"})
