"""Recipes and pipelines of any content: a recipe, or an error that names what is wrong; no name leads elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from fairlead.config_file import parse_override, parse_yaml, shipped
from fairlead.config_resolve import flatten
from fairlead.errors import ConfigError
from fairlead.pipeline_file import read_pipeline, require_inputs
from fairlead.runner import resolve
from tests.fuzz.hostile import bytes_near, markup, nothing_outside, paths, told, tried, values

RECIPES = [path.read_bytes() for path in shipped().values()]
PIPELINES = [path.read_bytes() for path in shipped("pipeline").values()]
KEYS = sorted({key for text in RECIPES for key in flatten(yaml.safe_load(text))})
"""Those that shipped recipes set."""


def test_any_bytes_are_a_recipe_or_an_error_with_a_message(times: int, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"

    @tried(100 * times, bytes_near(*RECIPES))
    def holds(content: bytes) -> None:
        file.write_bytes(content)
        with told():
            resolve(file)


def test_any_value_of_a_known_key_is_taken_or_refused(times: int) -> None:
    @tried(150 * times, st.sampled_from(sorted(shipped())), st.sampled_from(KEYS), values | paths)
    def holds(recipe: str, key: str, value: object) -> None:
        with told():
            resolve(recipe, {key: value})


def test_any_mapping_is_a_recipe_or_an_error(times: int) -> None:
    names = st.sampled_from(["algorithm", "run", "model", "data", "train", "optim", "dpo", "settings", "", "a.b"])

    @tried(100 * times, st.dictionaries(names | markup, values | st.just("dpo"), max_size=5))
    def holds(given: dict) -> None:
        with told():
            resolve(given)


def test_any_text_is_an_override_or_an_error(times: int) -> None:
    @tried(150 * times, st.text(max_size=30) | st.tuples(st.sampled_from(KEYS), st.text(max_size=20)).map("=".join))
    def holds(text: str) -> None:
        with told():
            parse_override(text)
            resolve("dpo", [text])


def test_any_bytes_are_a_pipeline_or_an_error_with_a_message(times: int, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"

    @tried(100 * times, bytes_near(*PIPELINES))
    def holds(content: bytes) -> None:
        file.write_bytes(content)
        with told():
            for stage in read_pipeline(file).stages:
                require_inputs(stage.settings, tmp_path)


def test_any_values_of_a_pipeline_are_taken_or_refused(times: int) -> None:
    verbs = st.sampled_from(
        ["train", "prepare", "evaluate", "report", "merge", "generate", "repeat", "start", "stages"]
    )
    references = st.sampled_from(["${a}", "${b.c}", "${name}", "x ${seed} ${", "${stages}", "${previous}"])
    stage = st.dictionaries(verbs | st.just("a.b"), values | references, max_size=4)
    stages = st.dictionaries(st.sampled_from(["a", "b", "..", "a/b", "seed"]) | paths, stage | values, max_size=3)
    top = {"stages": stages | values, "name": values | references | paths, "seed": values, "b": values | references}

    @tried(150 * times, st.fixed_dictionaries({}, optional=top))
    def holds(given: dict) -> None:
        with told():
            read_pipeline(given)


# --- places --------------------------------------------------------------------------------------------------------


def test_no_name_of_a_run_leads_out_of_its_directory(times: int, tmp_path: Path) -> None:
    @tried(150 * times, paths)
    def holds(name: str) -> None:
        with told():
            run = resolve("sft", {"run.name": name, "run.directory": str(tmp_path)}).recipe.run
            place = tmp_path / (run.name or "sft")
            assert place != tmp_path and ".." not in place.parts and place.is_relative_to(tmp_path)
            assert "\0" not in str(place)


def test_no_name_of_a_stage_or_pipeline_leads_out_of_its_folder(times: int, tmp_path: Path) -> None:
    @tried(150 * times, paths, paths)
    def holds(name: str, stage: str) -> None:
        with told():
            given = {"name": name, "directory": str(tmp_path), "stages": {stage: {"train": "sft"}}}
            for made in read_pipeline(given).stages:
                assert made.folder.parent.parent == tmp_path and made.result.parent == made.folder.parent


@pytest.mark.parametrize("name", ["../../x", "/x", "a/../../x", "..", ".", "a\0b", ""])
def test_a_run_that_would_lie_elsewhere_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    from fairlead import train

    folder = tmp_path / "runs" / "here"
    with nothing_outside(folder), pytest.raises(ConfigError, match=r"run\.name"):
        train("sft", {"run.name": name, "run.directory": str(folder), "data.path": "x.jsonl", "model.path": "m"})


# --- hangs ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("read", [resolve, read_pipeline, lambda file: parse_yaml(file.read_text(), "file")])
@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 60)),
        "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
        "a: &a\n  b: *a\n",
        "a: &a [*a]\n",
        "[" * 100_000,
        "a: " * 5_000 + "1",
        "a: " + "9" * 10_000,
        "a: 1e" + "9" * 400,
        "a: !!python/object/apply:os.system [true]",
        "? [a]\n: 1",
        "<<: {algorithm: dpo}",
        "1: 2\nnull: 3\ntrue: 4\n2020-01-01: 5",
        "a: 2020-13-45",
        "a: !!binary '*'",
        "a: !!set {b, c}",
        "a: !!timestamp x",
        "--- 1\n--- 2",
        "%YAML 9.9\n---\na: 1",
        "a: \x07",
    ],
    ids=lambda text: text[:24] if isinstance(text, str) else "",
)
def test_yaml_that_grows_loops_or_acts_is_refused(read, text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with told():
        read(file)
