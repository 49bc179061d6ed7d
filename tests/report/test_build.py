"""The page as a whole: what must stand on it, what must not, and that it is the same page every time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.run_directories import estimate, responses, write_run

from fairlead.errors import RunError
from fairlead.report import build_report

VOID = {"meta", "br", "link", "img", "input", "hr", "use"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails where tags do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


def build(*runs: Path, before: str | None = None) -> Page:
    return Page(build_report(runs, runs[0].parent / "page.html", before=before))


@pytest.fixture(scope="module")
def page(pipeline: Path) -> Page:
    return build(pipeline)


def test_the_headline_says_what_happened(page: Page):
    assert "ppo raised gold from 0.520 (sft) to 0.710 [0.680, 0.740] at KL 3.14 nats, the best of 3 runs." in page.text
    assert "ppo raft dpo sft gold of each run" in page.text  # the names at the chart's axis, from the top


def test_a_change_that_may_be_chance_is_called_noise(tmp_path: Path):
    scores = {"sft": {"p": [0.5], "q": [0.5]}, "dpo": {"p": [0.9], "q": [0.3]}}  # +0.4 and -0.2
    for name, mean in (("sft", 0.5), ("dpo", 0.6)):
        write_run(
            tmp_path / name,
            evaluation_metrics={"run": name, "reference": "sft", "metrics": {"gold": estimate(mean, 0.2)}},
            evaluation_responses=responses(scores[name]),
        )
    page = build(tmp_path / "sft", tmp_path / "dpo")
    assert "dpo raised gold from 0.500 (sft) to 0.600 [0.400, 0.800]; a change within the noise" in page.text


def test_less_perplexity_is_better_and_the_best_run_leads(tmp_path: Path):
    for name, mean in (("base", 40.0), ("a", 20.0), ("b", 30.0)):
        write_run(
            tmp_path / name,
            evaluation_metrics={"reference": "base", "metrics": {"perplexity": estimate(mean, 1.0)}},
            evaluation_responses=responses({"p": [0.0]}),
        )
    page = build(*(tmp_path / name for name in ("base", "b", "a")))
    assert "a lowered perplexity from 40.0 (base) to 20.0 [19.0, 21.0], the best of 2 runs." in page.text
    assert "a b base perplexity of each run" in page.text  # the names at the chart's axis, from the top
    changes = page.text.partition("answered by base")[2]
    assert changes.index("a gold") < changes.index("b gold")


def test_runs_that_were_only_trained_have_a_headline_too(tmp_path: Path):
    rows = [{"step": 1, "eval/loss": 2.5}, {"step": 9, "loss": 1.0}, {"step": 10, "eval/loss": 1.25}]
    page = build(write_run(tmp_path / "dpo", metrics=rows))
    assert "dpo: held-out loss went from 2.5 to 1.25 at step 10; not evaluated yet." in page.text


def test_the_best_is_marked_only_where_better_has_a_direction(tmp_path: Path):
    for name, mean in (("a", 1.0), ("b", 2.0)):
        metrics = {metric: estimate(mean, 0.1) for metric in ("gold", "perplexity", "length", "kl")}
        write_run(tmp_path / name, evaluation_metrics={"run": name, "metrics": metrics})
    html = build_report([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html").read_text()
    marked = [re.sub(r"<[^>]*>", " ", row).split()[0] for row in html.split("<tr>") if "the best of this" in row]
    assert html.count('title="the best of this column"') == 2
    assert marked == ["a", "b"]  # perplexity 1.0 and gold 2.0


def test_the_best_of_n_has_a_row_below_the_run_whose_responses_they_are(tmp_path: Path):
    for name, mean in (("sft", 0.5), ("dpo", 0.6)):
        write_run(tmp_path / name, evaluation_metrics={"run": name, "metrics": {"gold": estimate(mean, 0.01)}})
    best = {"metrics": {"gold": estimate(0.7, 0.01), "kl": {"mean": 0.636, "low": None, "high": None, "n": 64}}}
    (tmp_path / "sft" / "evaluation" / "best_of_4.json").write_text(json.dumps(best))
    html = build_report([tmp_path / "sft", tmp_path / "dpo"], tmp_path / "page.html").read_text()
    table = html.partition('<table class="comparison">')[2].partition("</table>")[0]
    rows = [" ".join(re.sub(r"<[^>]*>", " ", row).split()) for row in table.split("<tr>")[2:]]
    assert [row[:15] for row in rows] == ["sft 0.500 [0.49", "sft best of 4 0", "dpo 0.600 [0.59"]
    assert "0.700" in rows[1] and table.count("the best of this column") == 1
    assert "the best of this column" in table.split("<tr>")[3]


def test_text_of_models_and_people_stays_text(tmp_path: Path):
    evil = "<script>alert(1)</script>"
    for name in ("a", "b"):
        write_run(
            tmp_path / name,
            recipe={"algorithm": "dpo", "data": {"path": evil}},
            manifest={"algorithm": evil, "notes": [evil], "versions": {evil: evil}},
            metrics=[{"step": 1, evil: 1.0}, {"step": 2, evil: 2.0, "eval/x": evil}],
            samples=[{"step": 1, "prompt": evil, "response": evil, "finished": True}],
            alarms=[{"step": 1, "alarm": evil, "message": evil}],
            summary={"status": evil, "metrics": {evil: {"mean": 1.0}}},
            evaluation_metrics={"reference": evil, "metrics": {evil: estimate(1.0, 0.1), "gold": estimate(1.0, 0.1)}},
            evaluation_responses=responses({evil: [1.0]}, text=evil),
        )
    page = build(tmp_path / "a", tmp_path / "b")
    assert "script" not in page.tags
    assert page.text.count(evil) > 20


def test_the_page_needs_nothing_from_outside(page: Page):
    html = page.html
    assert "http" not in html
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "src" not in dict(page.attributes)
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]{2})", html)) == {"#p"}  # clip paths of the page itself


def test_links_and_drawings_point_to_ids_that_are_there_once(page: Page):
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for name, value in page.attributes if name == "href" and value}
    assert links <= set(ids)


def test_the_same_runs_give_the_same_bytes_in_every_process(pipeline: Path, tmp_path: Path):
    runs = [pipeline / "dpo", pipeline / "sft"]
    first = build_report(runs, tmp_path / "first.html").read_bytes()
    code = "import sys; from fairlead.report import build_report; build_report(sys.argv[2:], sys.argv[1])"
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", code, str(tmp_path / "second.html"), *map(str, runs)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "second.html").read_bytes() == first


def test_every_metric_of_every_run_is_shown(pipeline: Path, page: Page):
    names = {
        name
        for file in pipeline.glob("*/metrics.jsonl")
        for line in file.read_text().splitlines()
        for name in json.loads(line)
    } - {"step", "seconds", "tokens"}
    assert len(names) > 15
    assert [name for name in sorted(names) if name not in page.text] == []


def test_a_metric_seen_once_or_never_finite_is_listed(tmp_path: Path):
    rows = [{"step": 1, "once": 4.5, "never": None}, {"step": 2, "never": float("nan")}]
    page = build(write_run(tmp_path / "a", metrics=rows))
    assert "once 4.5 at step 1" in page.text
    assert "never NaN at step 2" in page.text


def test_the_page_counts_prompts_that_got_better_and_worse(tmp_path: Path):
    # p +0.4, q -0.2, r 0: as in the test of compare, where the interval is computed by hand.
    write_run(tmp_path / "sft", evaluation_responses=responses({"p": [0.1, 0.3], "q": [0.6, 0.2], "r": [0.5]}))
    write_run(tmp_path / "ppo", evaluation_responses=responses({"p": [0.4, 0.8], "q": [0.2], "r": [0.5]}))
    page = build(tmp_path / "sft", tmp_path / "ppo")
    assert "gold +0.067 [\u22120.279, 0.412] over 3 prompts: 1 better, 1 worse, 1 equal" in page.text
    assert [page.html.count(f"fill: var(--{side})") for side in ("good", "bad")] == [1, 1]  # the bars
    assert "+0.400 gold 0.2 \u2192 0.6 2 draws each" in page.text
    assert "\u22120.200 gold 0.4 \u2192 0.2 2 and 1 draws" in page.text


def test_gains_losses_and_the_median_are_shown_of_many_prompts(tmp_path: Path):
    write_run(tmp_path / "sft", evaluation_responses=responses({f"q{i}!": [0.0] for i in range(101)}))
    write_run(tmp_path / "ppo", evaluation_responses=responses({f"q{i}!": [i - 50.0] for i in range(101)}))
    page = build(tmp_path / "sft", tmp_path / "ppo")
    shown = [int(i) for i in re.findall(r"q(\d+)!", page.text)]
    assert shown == [100, 99, 98, 97, 52, 51, 50, 49, 3, 2, 1, 0]


def test_before_names_the_run_to_compare_with(tmp_path: Path):
    runs = [write_run(tmp_path / n, evaluation_responses=responses({"p": [s]})) for n, s in (("a", 1.0), ("b", 3.0))]
    assert "answered by b and by each other run" in build(*runs, before="b").text
    assert "a gold \u22122.00 over 1 prompt:" in build(*runs, before="b").text
    with pytest.raises(RunError, match="no run is called 'rloo'") as error:
        build(*runs, before="rloo")
    assert error.value.hint == "one of: a, b"


def test_the_commonest_reference_is_what_the_others_are_compared_with(tmp_path: Path):
    references = {"dpo": "base", "sft": "runs/sft", "ppo": "sft", "base": None}
    for name, reference in references.items():
        answers = responses({"p": [1.0]})
        write_run(tmp_path / name, evaluation_metrics={"reference": reference}, evaluation_responses=answers)
    assert "answered by sft and by each other run" in build(*(tmp_path / name for name in references)).text


def test_over_optimisation_is_told_from_the_curve(tmp_path: Path):
    # Gold peaks at step 40 with 0.7; from there the proxy goes 1.2 -> 3.0 and gold 0.7 -> 0.5.
    gold, proxy = [0.5, 0.7, 0.6, 0.5], [0.3, 1.2, 2.0, 3.0]
    rows = [
        {"step": 40 * i, "eval/score": p, "eval/gold": g, "eval/kl": 1.5 * i}
        for i, (p, g) in enumerate(zip(proxy, gold, strict=True))
    ]
    page = build(write_run(tmp_path / "ppo", metrics=rows))
    sentence = "the proxy rose by 1.8 while gold fell by 0.2 after its peak of 0.7 at step 40 (KL 1.5 nats)."
    assert page.text.count(sentence) == 2  # among the remarks, and at the figure


def test_gold_that_fell_with_its_proxy_is_no_remark(tmp_path: Path):
    rows = [{"step": i, "eval/score": v, "eval/gold": v} for i, v in enumerate((0.0, 3.0, 1.0))]
    page = build(write_run(tmp_path / "ppo", metrics=rows))
    assert page.text.count("the proxy fell by 2 while gold fell by 2 after its peak of 3 at step 1.") == 1


def test_gold_that_never_fell_is_no_over_optimisation(tmp_path: Path):
    rows = [{"step": i, "eval/score": 2.0 * i, "eval/gold": 0.1 * i} for i in range(4)]
    page = build(write_run(tmp_path / "ppo", metrics=rows))
    assert "gold was highest at the last step, after the proxy had changed by +6: no over-optimisation" in page.text


def test_missing_files_are_named(tmp_path: Path):
    page = build(write_run(tmp_path / "fresh"))
    for words in (
        "Nothing has been logged or evaluated yet.",
        "No evaluation/metrics.json: fresh.",
        "no run has evaluation/responses.jsonl",
        "metrics.jsonl is missing or empty",
        "Not in this run: ",
    ):
        assert words in page.text
    missing = page.text.partition("Not in this run: ")[2].partition(". Data")[0]
    assert set(missing.split(", ")) == {
        "summary.json",
        "metrics.jsonl",
        "samples.jsonl",
        "alarms.jsonl",
        "evaluation/metrics.json",
        "evaluation/responses.jsonl",
    }


def test_what_a_reader_must_know_stands_at_the_top(tmp_path: Path):
    alarms = [{"step": step, "alarm": "kl_negative", "message": "KL fell below zero"} for step in (10, 30)]
    page = build(write_run(tmp_path / "ppo", alarms=alarms, summary={"status": "failed", "steps": 31}))
    head = page.text.partition("Comparison")[0]
    assert "ppo is failed. 2 alarms in ppo." in head
    assert "ppo kl_negative 2 10 to 30 KL fell below zero" in page.text


def test_settings_counts_parameters_and_inputs_are_listed(pipeline: Path):
    page = build(pipeline / "dpo")
    for words in (
        "optim.learning_rate 0.0003",
        "optim.betas [0.9, 0.95]",
        "model.scratch null",
        "train 12,480 12,377 41 prompt longer than max_prompt_length: 62; equal pair: 41",
        "trainable 4,213,760 (100 %)",
        "heads.value 257",
        "torch 2.13.0",
        "processor x86-64, 2 cores",
        f"data.path.sha256 {'9f2c' * 16}",
    ):
        assert words in page.text


def test_samples_of_the_first_and_the_last_step_stand_side_by_side(tmp_path: Path):
    rows = [{"step": s, "prompt": "p", "response": f"at {s}", "finished": s > 0, "score": s / 4} for s in (0, 5, 10)]
    page = build(write_run(tmp_path / "ppo", samples=rows))
    assert "step 0 and step 10" in page.text
    assert "p at 0 not finished: cut at the length limit score 0 at 10 score 2.5" in page.text
    assert "at 5" not in page.text


def test_watched_prompts_stand_side_by_side_with_their_mean_scores(tmp_path: Path):
    rows = [
        {"step": step, "prompt": "The film was", "score": score, "scores": [score], "response": f"at {step}"}
        for step, score in ((0, 0.84), (40, 0.22), (80, 0.95))
    ]
    page = build(write_run(tmp_path / "ppo", eval_prompts=rows))
    assert "Prompts that were watched, each with its mean score: step 0 and step 80" in page.text
    assert "The film was at 0 score 0.84 at 80 score 0.95" in page.text


def test_evaluations_that_differ_are_pointed_out(tmp_path: Path):
    for name, draws in (("a", 1), ("b", 2)):
        metrics = {"gold": estimate(0.5, 0.1)}
        write_run(tmp_path / name, evaluation_metrics={"prompts": 8, "draws": draws, "metrics": metrics})
    page = build(tmp_path / "a", tmp_path / "b")
    assert "The runs were evaluated in different ways; compare with care." in page.text
    assert "a: 8 prompts, 1 draws" in page.text


def test_odd_values_do_not_break_the_page(tmp_path: Path):
    rows = [
        {"step": s, "loss": 1e38 if s == 7 else float("nan") if s % 50 == 0 else 0.1, "big": 10**400, "flag": True}
        for s in range(3000)
    ]
    manifest = {"data": [1], "notes": "x", "parameters": 3, "versions": None, "inputs": [], "created": None}
    evaluation = {"metrics": {"gold": {"mean": 1e38, "low": None, "high": 1e99}, "x": {}, "y": 3}}
    answers = [{"prompt": [{"role": "user", "content": "hi"}], "response": None, "scores": None}]
    for name in ("\u6f22 $x$", "<b>"):
        write_run(
            tmp_path / name,
            manifest=manifest,
            metrics=rows,
            alarms=[{}],
            samples=[{"step": 1, "response": "\ud800"}],
            evaluation_metrics=evaluation,
            evaluation_responses=answers,
            summary={"status": None, "metrics": [1]},
        )
    page = build(tmp_path / "<b>", tmp_path / "\u6f22 $x$")
    assert "60 not finite" in page.text
    assert "user: hi" in page.text


def test_a_folder_gets_report_html_and_no_other_file(tmp_path: Path):
    run = write_run(tmp_path / "dpo")
    before = set(run.iterdir())
    assert build_report([run], run) == run / "report.html"
    assert set(run.iterdir()) - before == {run / "report.html"}


def test_the_report_imports_no_torch():
    code = "import sys, fairlead.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
