"""The verbs that make files of samples and work on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fairlead.cli_print import AsJson, Settings, print_result


def generate(
    run: Annotated[str, typer.Argument(help="a finished run, a folder of a causal language model, or a hub id")],
    prompts: Annotated[str, typer.Argument(help="a file of any format that gives prompts, or a prepared folder")],
    out: Annotated[Path, typer.Option(help="file to write, .jsonl")],
    settings: Settings = None,
    samples: Annotated[int | None, typer.Option(help="responses to each prompt")] = None,
    best_of: Annotated[int | None, typer.Option(help="sample so many, and write the best by --reward")] = None,
    reward: Annotated[str | None, typer.Option(help="a reward run, rule:NAME, module:function ...")] = None,
    as_json: AsJson = False,
) -> None:
    """Sample responses to prompts and write them, a row each; an interrupted command continues."""
    from fairlead.config_file import parse_override
    from fairlead.evaluation.generate import describe
    from fairlead.evaluation.generate import generate as run_generate

    options = {"num_samples": samples, "best_of": best_of, "reward": reward}
    given = dict(map(parse_override, settings or [])) | {k: v for k, v in options.items() if v is not None}
    result = run_generate(run, prompts, given, out=out)
    print_result(result, as_json, f"{out}: {describe(result)}")


def score(
    run: Annotated[str, typer.Argument(help="a finished run that scores; for samples, any reward")],
    file: Annotated[str, typer.Argument(help="samples, demonstrations, pairs, labelled answers or rankings")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="data.format, .columns, .limit, model.device; of samples clean, discard"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file to write, .jsonl; without one the rows go to stdout")] = None,
    min_score: Annotated[float | None, typer.Option(help="keep rows that score at least this")] = None,
    top_share: Annotated[float | None, typer.Option(help="keep the best rows: this share of them, above 0")] = None,
    as_json: AsJson = False,
) -> None:
    """Score the answers of a data file and write its rows out with their scores, all of them or the best."""
    from fairlead.evaluation.score import describe, score_file

    result = score_file(run, file, settings or [], out=out, min_score=min_score, top_share=top_share)
    if as_json or out is not None:
        print_result(result, as_json, f"{out}: {describe(result)}")
        return
    for row in result["rows"]:
        print(json.dumps(row, default=str))
    print(describe(result), file=sys.stderr)


def select(
    scored: Annotated[Path, typer.Argument(help="samples that `fairlead score` scored")],
    out: Annotated[Path, typer.Option(help="file to write, .jsonl")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="collect, keep, share, pairs, kl_coef, discard, max_empty"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Keep the best of scored samples as demonstrations; what is discarded goes to a file beside, with its reason."""
    from fairlead.evaluation.select import describe, select_file

    result = select_file(scored, settings or [], out=out)
    print_result(result, as_json, f"{out}: {describe(result)}")
