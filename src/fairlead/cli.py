"""The command line: verbs only. Each verb hands its arguments to one function; stdout is data, stderr is messages."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from fairlead.cli_print import AsJson, Settings, indented, kind_lines, print_resolved
from fairlead.cli_print import print_result as _print
from fairlead.cli_samples import generate, score, select
from fairlead.errors import ConfigError, FairleadError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Takes a language model and preferences and returns an aligned model.",
    epilog="Ctrl-C and SIGTERM end a run after saving at the next step's end, with exit code 130 or 143; the same "
    "command continues it.",
)
for verb in (generate, score, select):
    app.command()(verb)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a recipe file or the name of a shipped recipe")],
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved recipe and stop")] = False,
    as_json: AsJson = False,
) -> None:
    """Train one stage; an unfinished run of the same recipe is continued."""
    from fairlead.runner import resolve, run_stage

    resolved = resolve(recipe, settings or [])
    if dry_run:
        print_resolved(resolved, as_json)
        return
    _print_run(run_stage(resolved), as_json)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="the directory of a run")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="at=STEP goes back to that checkpoint; what came after it is removed")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue an unfinished run from its last checkpoint, or any run from an earlier one."""
    from fairlead import continuation

    _print_run(continuation.resume(run, settings or []), as_json)


@app.command()
def fork(
    run: Annotated[Path, typer.Argument(help="the directory of a run")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="at=STEP and the settings to change, as section.key=value")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Begin a new run from a checkpoint of another, with other settings."""
    from fairlead import continuation

    _print_run(continuation.fork(run, settings or []), as_json)


def _print_run(result: Any, as_json: bool) -> None:
    if _rank() == 0:
        _print(result.summary, as_json, f"{result.path}: finished after {result.summary['steps']} steps")


def _rank() -> int:
    """Of the processes that torchrun or accelerate has started."""
    return int(os.environ.get("RANK", "0"))


@app.command()
def prepare(
    kind: Annotated[str | None, typer.Argument(help="a kind of data; --list names them")] = None,
    source: Annotated[str | None, typer.Argument(help="the published file or folder, as --from")] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="folder to write")] = None,
    path: Annotated[Path | None, typer.Option("--from", help="a local copy; without one the data are fetched")] = None,
    text: Annotated[Path | None, typer.Option(help="plain text for pretraining: a file or folder")] = None,
    seed: int = 0,
    as_list: Annotated[bool, typer.Option("--list", help="print the kinds with source, licence and options")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn raw data as its owners publish it into records, split by prompt, with every dropped row counted."""
    from fairlead.config_file import parse_override
    from fairlead.data.prepare import check_options, describe_kinds
    from fairlead.data.prepare import prepare as run

    if as_list:
        kinds = describe_kinds()
        _print(kinds, as_json, "\n".join(map(kind_lines, kinds)))
        return
    if kind is None or out is None:
        missing = "a kind of data" if kind is None else "--out DIR"
        raise ConfigError(f"{missing} is not given", "fairlead prepare KIND --out DIR; --list names the kinds")
    if source is not None and "=" in source and not Path(source).exists():  # no source, but the first setting
        settings, source = [source, *(settings or [])], None
    if source is not None and path is not None:
        raise ConfigError(f"the data are given twice: {source} and --from {path}", "give one of them")
    options = dict(parse_override(setting) for setting in settings or [])
    own = {"seed": options.pop("seed", seed), "text": options.pop("text", text)}
    check_options(kind, options)
    manifest = run(kind, path or source, out, **own, **options)
    counts = manifest["counts"]
    dropped = ", ".join(f"{number} {reason}" for reason, number in counts["dropped"].items())
    _print(manifest, as_json, f"{out}: {counts['read']} read, {counts['kept']} kept; dropped: {dropped or 'none'}")


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="a recipe, a model or data: a name, a file, a folder or a hub id")],
    settings: Settings = None,
    kind: Annotated[str | None, typer.Option("--as", help="kind of record: text, preference, ranking ...")] = None,
    html: Annotated[Path | None, typer.Option(help="write what is in the data as a page too")] = None,
    rows: Annotated[int, typer.Option(min=0, help="records to draw as the model sees them")] = 3,
    model_only: Annotated[bool, typer.Option("--model-only", help="leave the data aside")] = False,
    data_only: Annotated[bool, typer.Option("--data-only", help="leave the model aside")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would be: the model's tree and the memory it takes, and what is in the data."""
    from fairlead.data.inspect.show import print_inspection, print_sections, write_page
    from fairlead.inspection import inspect as run
    from fairlead.planning.show import sections

    if model_only and data_only:
        raise ConfigError("--model-only and --data-only leave nothing to inspect", "give one of them")
    found = run(target, settings or [], kind=kind, rows=rows, with_model=not data_only, with_data=not model_only)
    if html is not None:
        if found.data is None:
            raise ConfigError(f"--html writes what is in data, and none are inspected in {target}")
        write_page(found.data, html)
    if as_json:
        _print(found.as_dict(), True, "")
        return
    if found.plan is not None:
        print_sections(target, sections(found.plan))
    if found.data is not None:
        print_inspection(found.data)


@app.command()
def pipeline(
    file: Annotated[str, typer.Argument(help="a pipeline file or the name of a shipped one")],
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved stages and stop")] = False,
    as_json: AsJson = False,
) -> None:
    """Run stages in order; a finished stage whose inputs are unchanged is skipped."""
    from fairlead import pipeline as room

    if dry_run:
        stages = [
            {"stage": name, "verb": verb, "settings": given} for name, verb, given in room.plan(file, settings or [])
        ]
        text = "\n".join(f"{s['stage']}: {s['verb']}\n" + indented(s["settings"]) for s in stages)
        _print({"stages": stages}, as_json, text)
        return
    summary = room.run_pipeline(file, settings or [])
    _print(summary, as_json, f"finished in {summary['seconds']:.0f} s")


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="a recipe file or the name of a shipped recipe")],
    space: Annotated[Path, typer.Argument(help="a YAML file: the metric, and which keys take what values")],
    settings: Settings = None,
    jobs: Annotated[int, typer.Option(min=1, help="trials that run side by side")] = 1,
    out: Annotated[Path | None, typer.Option(help="folder of the sweep; NAME-sweep beside the recipe's runs")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check the space, print the plan and stop")] = False,
    as_json: AsJson = False,
) -> None:
    """Search settings of a recipe, a run a trial; the same command continues, and shares trials with others."""
    from fairlead.sweep import make_plan, plan_text, print_sweep
    from fairlead.sweep import sweep as run

    if dry_run:
        plan = make_plan(recipe, space, settings or [], out).as_dict()
        _print(plan, as_json, plan_text(plan))
        return
    result = run(recipe, space, settings or [], jobs=jobs, out=out)
    if as_json:
        _print(result, True, "")
    else:
        print_sweep(result)


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="finished runs")],
    prompts: Annotated[str | None, typer.Option(help="prompts: a file or a prepared folder")] = None,
    pairs: Annotated[
        list[str] | None, typer.Option(help="preference pairs for runs that score; may be repeated")
    ] = None,
    demonstrations: Annotated[str | None, typer.Option(help="demonstrations for perplexity")] = None,
    score: Annotated[list[str] | None, typer.Option(help="NAME=RUN or NAME=module:function; may be repeated")] = None,
    reference: Annotated[Path | None, typer.Option(help="the run that KL and win rate are taken against")] = None,
    draws: int = 1,
    num_prompts: int = 64,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    best_of: Annotated[
        int | None, typer.Option(help="measure the reference's best of so many, by the first score")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure runs on held-out data, with bootstrap intervals; written into each run's evaluation/."""
    from fairlead.evaluation import evaluate as run
    from fairlead.evaluation.show import print_evaluation

    result = run(
        runs,
        prompts=prompts,
        pairs=pairs or None,
        demonstrations=demonstrations,
        scores=dict(_named(text) for text in score or []),
        reference=reference,
        draws=draws,
        num_prompts=num_prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        best_of=best_of,
    )
    if as_json:
        _print(result, True, "")
    else:
        print_evaluation(result)


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="a finished run, or an adapter: a folder or a hub id")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; the base's when not given")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda: where it is computed and compared")] = "cpu",
    into: Annotated[
        str, typer.Option(help="of a base the run quantised: quantised (as the adapter saw it) or original")
    ] = "quantised",
    as_json: AsJson = False,
) -> None:
    """Merge a run's adapter into its base; written only if the result answers as the adapter does."""
    from fairlead.models.merge import describe
    from fairlead.models.merge import merge as run_merge

    result = run_merge(run, out, dtype=dtype, device=device, into=into)
    _print(result, as_json, f"{out}: {describe(result)}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="a folder saved by merge, or a finished run")],
    repo_id: Annotated[str, typer.Argument(help="the repository on the hub: owner/name")],
    private: Annotated[bool, typer.Option("--private", help="a repository made now is private")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a model to the hub. Nothing else uploads anything."""
    from fairlead.models.push import push as run_push

    address = run_push(folder, repo_id, private=private)
    _print({"address": address}, as_json, address)


@app.command("import")
def import_(
    toolkit: Annotated[str, typer.Argument(help="whose configuration it is: trlx")],
    file: Annotated[Path, typer.Argument(help="the configuration, YAML or JSON")],
    out: Annotated[Path | None, typer.Option(help="recipe to write; without one it goes to stdout")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a configuration of another toolkit into a recipe; what a recipe cannot hold is said on stderr."""
    from fairlead.migration import import_config

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists already", "choose another --out, or remove it")
    imported = import_config(toolkit, file)
    if out is not None:
        out.write_text(imported.text, "utf-8")
    for note in imported.notes:
        print(note, file=sys.stderr)
    text = imported.text.rstrip() if out is None else f"{out}: try `fairlead train {out} --dry-run`"
    _print(imported.as_dict(), as_json, text)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or the folder of a pipeline")],
    out: Annotated[Path | None, typer.Option(help="the file to write")] = None,
    before: Annotated[str | None, typer.Option(help="the run on the left of the before/after table")] = None,
) -> None:
    """Write one self-contained report.html about runs."""
    from fairlead.report import build_report

    print(build_report(runs, out or runs[0] / "report.html", before=before))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder to work in")] = Path("runs/demo"),
    seed: int = 0,
    seeds: Annotated[int, typer.Option(help="repeat over this many seeds, from --seed on, and test the gain")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run the whole chain offline on a miniature question-and-answer site whose true quality is known."""
    from fairlead.demo.run import run_demo, run_seeds

    summary = run_demo(out, seed=seed) if seeds == 1 else run_seeds(out, seeds=range(seed, seed + seeds))
    if as_json:
        _print(summary, True, "")


@app.command()
def prove(
    case: Annotated[
        list[str] | None, typer.Option(help="a case, or a kind: convergence, bias, invariance; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder that keeps the runs and conformance.json")] = None,
    processes: Annotated[int, typer.Option(min=1, help="cases that run side by side, on one thread each")] = 2,
    as_json: AsJson = False,
) -> None:
    """Hold the trainers against exact optima on tasks that can be enumerated; exit code 1 where one fails."""
    from fairlead.conformance.prove import prove as run
    from fairlead.conformance.prove import show

    result = run(case or (), out=out, processes=processes)
    if as_json:
        _print(result, True, "")
    else:
        show(result)
    if not result["pass"]:
        raise typer.Exit(1)


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}: write NAME=RUN or NAME=module:function")
    return name, value


def _refuse_ranks() -> None:
    verb = next(iter(sys.argv[1:]), "")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (
        verb not in ("train", "resume") or any(a.startswith("at=") for a in sys.argv)
    ):
        raise ConfigError(
            f"`fairlead {verb}` runs in one process, and was started in {os.environ['WORLD_SIZE']}",
            hint="torchrun and accelerate are for `fairlead train` and `fairlead resume`",
        )


def main() -> None:
    """Run the command line; a user's mistake ends in one message and an exit code of its own, never a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if sys.argv[1:2] != ["prepare"]:  # which may fetch gigabytes
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if os.getcwd() not in sys.path:  # `module:function` names a file that stands here; a console script does not look
        sys.path.append(os.getcwd())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels it would fetch from a hub
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it
    try:
        _refuse_ranks()
        app()
    except FairleadError as error:
        who = f"rank {_rank()}: " if _rank() else ""
        print(f"{who}error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("error: stopped at once; the run continues from its last checkpoint by the same command", file=sys.stderr)
        raise SystemExit(130) from None
