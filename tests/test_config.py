import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from fairlead import config_file
from fairlead.config import Section, parse_interval
from fairlead.config_file import find_file, parse_override, parse_yaml, shipped
from fairlead.config_resolve import ResolvedRecipe, flatten, load_recipe
from fairlead.errors import ConfigError

NO_INTEGER = "input should be a valid integer, unable to parse string as an integer"


class Nested(Section):
    depth: int = Field(default=1, ge=1)


class Own(Section):
    beta: float = Field(default=0.1, gt=0)
    interval: int = 3
    strength: str = "weak"
    watch: dict[str, str] = Field(default_factory=dict[str, str])
    nested: Nested = Nested()
    mixed: int | tuple[str, ...] | Nested | None = None


def settings_of(name: str) -> tuple[str, type[BaseModel]]:
    assert name == "mine"
    return "mine", Own


def load(tmp_path: Path, text: str, *overrides: str) -> ResolvedRecipe:
    """A recipe of two lines more than ``text``: its first line is line 2."""
    path = tmp_path / "r.yaml"
    path.write_text("algorithm: mine\n" + text, "utf-8")
    return load_recipe(path, overrides, settings_of=settings_of)


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, the folder taken out."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


# --- YAML as people write it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5e-3", 0.0005),
        ("+1e3", 1000.0),
        ("-2E-2", -0.02),
        ("1.5e3", 1500.0),
        ("1.e2", 100.0),
        ("1_000e1", 1e4),
        ("0.1", 0.1),
        ("3", 3),
    ],
)
def test_numbers_are_numbers_in_every_spelling(text: str, number: float) -> None:
    value = parse_yaml(f"x: {text}", "here")["x"]
    assert (value, type(value)) == (number, type(number))


@pytest.mark.parametrize(
    "text", ["on", "off", "yes", "no", "On", "OFF", "Yes", "NO", "y", "n", "e5", "1e", "hh", "TRUE"]
)
def test_words_stay_words(text: str) -> None:
    assert parse_yaml(f"x: {text}\n{text}: 1", "here") == {"x": text, text: 1}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("null", None), ("~", None), ("", None)])
def test_true_false_and_null_are_no_words(text: str, value: Any) -> None:
    assert parse_yaml(f"x: {text}", "here")["x"] is value


def test_a_section_takes_the_values_of_the_file(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, "optim: {learning_rate: 1e-5, eps: .5e-3}\ntracking: {console: off}\nrun:\n  name: on\n"
    ).recipe
    assert (recipe.optim.learning_rate, recipe.optim.eps) == (0.00001, 0.0005)
    assert (recipe.tracking.console, recipe.run.name) == (False, "on")


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("seed: 1\nseed: 2\n", 3, "seed"),
        ("run:\n  name: a\n  # twice\n  name: a\n", 5, "name"),
        ("mine: [{a: 1, a: 2}]\n", 2, "a"),
    ],
)
def test_a_repeated_key_is_an_error_with_its_line(tmp_path: Path, text: str, line: int, key: str) -> None:
    assert mistakes(tmp_path, text) == [f"r.yaml:{line}: not valid YAML: the key {key!r} stands twice"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("run: {name: 'a\n", 3),
        ("run:\n  name: {{name}}\n", 3),
        ("? [a, b]\n: 1\n", 2),
        ("run: [\n", 3),
        ("seed: 1\n---\nseed: 2\n", 3),
        ("run: {name: !!python/name:os.system }\n", 2),
    ],
)
def test_what_is_no_plain_yaml_is_an_error_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    (message,) = mistakes(tmp_path, text)
    assert message.startswith(f"r.yaml:{line}: not valid YAML: ")


@pytest.mark.parametrize("text", ["seed: &a [*a]\n", "run: {name: 2026-02-30}\n", "run: {name: \x07}\n"])
def test_what_no_line_is_known_of_is_still_an_error_of_the_file(tmp_path: Path, text: str) -> None:
    assert mistakes(tmp_path, text)[0].startswith("r.yaml: not valid YAML: ")


# --- unknown keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 3\n", "unknown key 'sed' (r.yaml:2); did you mean 'seed'?"),
        ("modle:\n  path: x\n", "unknown key 'modle' (r.yaml:2); did you mean 'model'?"),
        ("optim:\n  learning_rat: 1\n", "unknown key 'optim.learning_rat' (r.yaml:3); did you mean 'learning_rate'?"),
        ("model: {adapter: {rnak: 3}}\n", "unknown key 'model.adapter.rnak' (r.yaml:2); did you mean 'rank'?"),
        ("mine:\n\n  bta: 3\n", "unknown key 'mine.bta' (r.yaml:4); did you mean 'beta'?"),
        ("mine:\n  nested: {dpth: 3}\n", "unknown key 'mine.nested.dpth' (r.yaml:3); did you mean 'depth'?"),
        ("run:\n  integer: 3\n", "unknown key 'run.integer' (r.yaml:3); there are: directory, name"),
        ("run:\n  string: 3\n", "unknown key 'run.string' (r.yaml:3); there are: directory, name"),
        (
            "ppo:\n  x: 3\n",
            "unknown key 'ppo' (r.yaml:2); there are: algorithm, data, mine, model, optim, run, seed, threads, "
            "tracking, train",
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest_known_one(
    tmp_path: Path, text: str, message: str
) -> None:
    assert mistakes(tmp_path, text) == [message]


def test_an_unknown_key_of_an_override_came_from_the_command_line(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "seed: 1\n", "optim.learning_rat=1", "modle.path=x") == [
        "unknown key 'optim.learning_rat' (command line); did you mean 'learning_rate'?",
        "unknown key 'modle' (command line); did you mean 'model'?",
    ]


def test_the_field_that_holds_the_algorithms_section_is_no_key(tmp_path: Path) -> None:
    (message,) = mistakes(tmp_path, "settings: {beta: 1}\n")
    assert message.startswith("settings: not a key of the file")


# --- wrong values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("seed: -1\n", ["seed (r.yaml:2): input should be greater than or equal to 0, got -1"]),
        ("optim: {learning_rate: 0}\n", ["optim.learning_rate (r.yaml:2): input should be greater than 0, got 0"]),
        ("optim:\n  eps: .nan\n", ["optim.eps (r.yaml:3): input should be a finite number, got nan"]),
        (
            "model:\n  scratch:\n    intermediate_size: 0\n",
            ["model.scratch.intermediate_size (r.yaml:4): input should be greater than or equal to 1, got 0"],
        ),
        (
            "optim: {schedule: cosin}\n",
            ["optim.schedule (r.yaml:2): input should be 'constant', 'linear' or 'cosine', got 'cosin'"],
        ),
        (
            "train:\n  steps: many\n",
            [f"train.steps (r.yaml:3): {NO_INTEGER}, got 'many'"],
        ),
        ("run: {name: 3}\n", ["run.name (r.yaml:2): input should be a valid string, got 3"]),
        ("seed: null\n", ["seed (r.yaml:2): input should be a valid integer, got None"]),
        ("model: 3\n", ["model (r.yaml:2): a section of settings was expected, got 3"]),
        ("mine: 3\n", ["mine (r.yaml:2): a section of settings was expected, got 3"]),
        (
            "optim:\n  betas: [0.9, x]\n",
            ["optim.betas.1 (r.yaml:3): input should be a valid number, unable to parse string as a number, got 'x'"],
        ),
        ("optim:\n  betas: [0.9]\n", ["optim.betas.1 (r.yaml:3): field required"]),
        ("1: 3\n", ["1 (r.yaml:2): keys should be strings, got 1"]),
        (
            "model:\n  path: a\n  scratch: {}\n",
            [
                "model (r.yaml:2): model.path and model.scratch are both given; a model has one origin, "
                "got {'path': 'a', 'scratch': {}}"
            ],
        ),
        (
            "train:\n  save_every: 10 parsecs\n",
            [
                "train.save_every (r.yaml:3): '10 parsecs' is no interval; write 500 (steps), 30s, 10min, 2h or never, "
                "got '10 parsecs'"
            ],
        ),
        (
            "mine:\n  beta: -1\n  interval: x\n  watch: {a: 3}\n  nested: {depth: 0}\nseed: -1\n",
            [
                "mine.beta (r.yaml:3): input should be greater than 0, got -1",
                f"mine.interval (r.yaml:4): {NO_INTEGER}, got 'x'",
                "mine.watch.a (r.yaml:5): input should be a valid string, got 3",
                "mine.nested.depth (r.yaml:6): input should be greater than or equal to 1, got 0",
                "seed (r.yaml:7): input should be greater than or equal to 0, got -1",
            ],
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_place_and_what_it_is(tmp_path: Path, text: str, messages: list[str]) -> None:
    assert mistakes(tmp_path, text) == messages


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("data:\n  path: 3\n", {"data.path"}),
        ("data:\n  path: [a, 3]\n", {"data.path", "data.path.1"}),
        ("model:\n  adapter: {targets: [q, 3]}\n", {"model.adapter.targets", "model.adapter.targets.1"}),
        ("train:\n  save_every: 2.5\n", {"train.save_every"}),
        ("mine:\n  mixed: 1.5\n", {"mine.mixed"}),
        ("mine:\n  mixed: {depth: 0}\n", {"mine.mixed", "mine.mixed.depth"}),
    ],
)
def test_a_value_that_fits_no_member_of_a_union_is_named_by_the_users_key_alone(
    tmp_path: Path, text: str, keys: set[str]
) -> None:
    found = mistakes(tmp_path, text)
    assert {message.partition(" ")[0] for message in found} == keys
    assert all(f" (r.yaml:{2 + text.count(chr(10), 0, -1)}): " in message for message in found)
    for word in ("Nested", "Section", "tuple[", "literal[", "constrained", "function-"):
        assert word not in "".join(found)


def test_the_mistakes_of_an_override_name_the_command_line(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "seed: 3\n", "seed=-1", "optim=3", "mine.beta=x") == [
        "mine.beta (command line): input should be a valid number, unable to parse string as a number, got 'x'",
        "seed (command line): input should be greater than or equal to 0, got -1",
        "optim (command line): a section of settings was expected, got 3",
    ]


def test_a_long_value_is_shortened_in_the_message(tmp_path: Path) -> None:
    (message,) = mistakes(tmp_path, f"seed: {'x' * 500}\n")
    assert len(message) < 200


# --- precedence and origins ----------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_the_file_over_defaults_and_each_origin_is_kept(tmp_path: Path) -> None:
    text = "seed: 5\noptim:\n  learning_rate: 1e-3\n  betas: [0.8, 0.9]\nmine:\n  beta: 2\n  watch: {a: b}\n"
    resolved = load(tmp_path, text, "optim.learning_rate=1e-2", "mine.nested.depth=7", "mine.watch.c=d")
    recipe, place = resolved.recipe, tmp_path / "r.yaml"
    assert (recipe.seed, recipe.optim.learning_rate, recipe.optim.eps) == (5, 0.01, 1e-8)
    assert (recipe.settings.beta, recipe.settings.nested.depth) == (2.0, 7)
    assert recipe.settings.watch == {"a": "b", "c": "d"}
    wanted = {
        "algorithm": f"{place}:1",
        "seed": f"{place}:2",
        "optim.learning_rate": "command line",
        "optim.betas": f"{place}:5",
        "optim.eps": "default",
        "mine.beta": f"{place}:7",
        "mine.watch.a": f"{place}:8",
        "mine.watch.c": "command line",
        "mine.nested.depth": "command line",
        "mine.interval": "default",
    }
    assert {key: resolved.origins[key] for key in wanted} == wanted
    assert set(resolved.origins) == set(flatten(resolved.as_dict()))


def test_a_section_replaced_by_an_override_keeps_nothing_of_the_file(tmp_path: Path) -> None:
    resolved = load(tmp_path, "train: {batch_size: 7}\n", "train={steps: 3}")
    assert (resolved.recipe.train.batch_size, resolved.recipe.train.steps) == (32, 3)
    assert (resolved.origins["train.batch_size"], resolved.origins["train.steps"]) == ("default", "command line")


def test_a_section_can_be_taken_away_and_made_by_an_override(tmp_path: Path) -> None:
    without = load(tmp_path, "model: {scratch: {hidden_size: 8}}\n", "model.scratch=null", "model.path=x").recipe.model
    assert (without.scratch, without.path) == (None, "x")
    made = load(tmp_path, "model: {scratch: null}\n", "model.scratch.hidden_size=64").recipe.model.scratch
    assert made is not None and (made.hidden_size, made.num_layers) == (64, 4)


def test_the_last_override_of_a_key_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "", "seed=1", "seed=2").recipe.seed == 2


def test_a_mapping_and_overrides_by_python_resolve_as_a_file_does() -> None:
    given: dict[str, Any] = {"algorithm": "mine", "optim": {"name": "sgd"}}
    resolved = load_recipe(given, {"mine.beta": 3, "train": {"steps": 2}}, settings_of=settings_of)
    assert (resolved.recipe.optim.name, resolved.recipe.settings.beta, resolved.recipe.train.steps) == ("sgd", 3.0, 2)
    assert resolved.origins["optim.name"] == "the given settings"
    assert resolved.origins["mine.beta"] == "command line"
    assert given == {"algorithm": "mine", "optim": {"name": "sgd"}}


def test_a_resolved_recipe_resolves_to_itself(tmp_path: Path) -> None:
    """What a run writes as its recipe can be run again."""
    first = load(tmp_path, "optim: {betas: [0.8, 0.9]}\nmodel: {adapter: {targets: [q, v]}}\nmine: {beta: 2}\n")
    again = load_recipe(first.as_dict(), settings_of=settings_of)
    assert again.recipe == first.recipe
    assert again.as_dict() == first.as_dict()


@pytest.mark.parametrize("text", ["steps", "=3", " =3"])
def test_an_override_without_key_or_value_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no setting\nhint: write section\.key=value"):
        parse_override(text)


def test_the_value_of_an_override_may_hold_an_equals_sign() -> None:
    assert parse_override("data.path=a=b.jsonl") == ("data.path", "a=b.jsonl")
    assert parse_override("run.name=") == ("run.name", None)


def test_an_override_inside_a_plain_value_is_an_error(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "seed: 3\n", "seed.x=5") == ["seed.x: 'seed' is a value (3), not a section"]


# --- settings without effect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("train: {epochs: 2, steps: 5}\n", "train.epochs has no effect: train.steps wins"),
        ("optim: {warmup_ratio: .1, warmup_steps: 0}\n", "optim.warmup_ratio has no effect: optim.warmup_steps wins"),
        ("data: {eval_fraction: .1, eval_path: x}\n", "data.eval_fraction has no effect: data.eval_path wins"),
        (
            "optim: {schedule: constant, min_learning_rate_ratio: .1}\n",
            "optim.min_learning_rate_ratio has no effect: the schedule is constant",
        ),
        ("optim: {name: sgd, betas: [.9, .9]}\n", "optim.betas has no effect: sgd has none"),
        ("optim: {name: sgd, eps: 1e-6}\n", "optim.eps has no effect: sgd has none"),
    ],
)
def test_a_setting_that_nothing_reads_in_this_combination_warns(tmp_path: Path, text: str, warning: str) -> None:
    assert load(tmp_path, text).warnings == (warning,)


@pytest.mark.parametrize(
    "text", ["", "train: {steps: 5}\n", "train: {epochs: 2}\n", "optim: {name: sgd}\n", "optim: {schedule: constant}\n"]
)
def test_defaults_that_nothing_reads_do_not_warn(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).warnings == ()


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"), [("", "NoneType"), ("# nothing\n", "NoneType"), ("- a\n", "list"), ("a\n", "str")]
)
def test_a_file_that_holds_no_mapping_is_an_error(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"r.yaml: a mapping of settings was expected, got {kind}"):
        load_recipe(path, settings_of=settings_of)


@pytest.mark.parametrize("text", ["seed: 1\n", "algorithm: 3\n", "algorithm:\n"])
def test_a_recipe_must_name_its_algorithm(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml: the recipe names no algorithm\nhint: add a line"):
        load_recipe(path, settings_of=settings_of)


def test_a_directory_where_a_recipe_was_meant_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a directory; a recipe file was meant\nhint: .*recipe\.yaml"):
        load_recipe(tmp_path, settings_of=settings_of)


def test_bytes_that_are_not_utf_8_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"algorithm: mine\nrun: {name: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"r\.yaml: not UTF-8 \(byte 31\)\nhint: save the file as UTF-8"):
        load_recipe(path, settings_of=settings_of)


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("\ufeffalgorithm: mine\r\nseed: 3\r\noptim:\r\n  eps: 1e-6\r\n".encode())
    resolved = load_recipe(path, settings_of=settings_of)
    assert (resolved.recipe.seed, resolved.recipe.optim.eps) == (3, 1e-6)
    assert resolved.origins["optim.eps"] == f"{path}:4"


def test_a_missing_file_lists_or_suggests_the_shipped_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {"sft": tmp_path / "sft.yaml", "reward": tmp_path / "reward.yaml"}
    monkeypatch.setattr(config_file, "shipped", lambda kind="recipe": known)
    with pytest.raises(ConfigError, match=r"no recipe 'rewrd': neither .*\nhint: did you mean 'reward'\?"):
        load_recipe("rewrd", settings_of=settings_of)
    with pytest.raises(ConfigError, match=r"no recipe 'missing\.yaml': neither .*\nhint: there are: reward, sft$"):
        load_recipe("missing.yaml", settings_of=settings_of)
    assert find_file("sft") == known["sft"]


def test_a_recipe_in_a_folder_bears_the_folders_name_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "big").mkdir(parents=True)
    for name, text in (("tiny", "algorithm: a"), ("big/one", "algorithm: a"), ("big/chain", "stages: {}")):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(config_file.resources, "files", lambda package: tmp_path)
    assert list(shipped()) == ["big/one", "tiny"] and list(shipped("pipeline")) == ["big/chain"]
    assert find_file("big/one") == tmp_path / "recipes" / "big" / "one.yaml"
    with pytest.raises(ConfigError, match=r"no recipe 'big'.*\nhint: there are: big/one$"):
        find_file("big")
    with pytest.raises(ConfigError, match=r"no recipe 'big/on'.*\nhint: did you mean 'big/one'\?"):
        find_file("big/on")


def test_a_file_wins_over_a_shipped_recipe_of_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file("sft") == shipped()["sft"]
    Path("sft").write_text("algorithm: mine\n")
    assert find_file("sft") == Path("sft")


# --- intervals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "interval"),
    [
        (1, ("steps", 1)),
        (500, ("steps", 500)),
        ("30s", ("seconds", 30)),
        ("10min", ("seconds", 600)),
        ("2h", ("seconds", 7200)),
        ("1.5h", ("seconds", 5400)),
        ("10 min", ("seconds", 600)),
        ("never", ("never", 0)),
    ],
)
def test_intervals(value: str | int, interval: tuple[str, float]) -> None:
    assert parse_interval(value) == interval


@pytest.mark.parametrize("value", [0, -1, "", "10", "10m", "10 minutes", "-10min", "1e3s", "min", "Never"])
def test_what_is_no_interval_is_an_error(value: str | int) -> None:
    with pytest.raises(ValueError, match=r"is no interval|at least 1"):
        parse_interval(value)


def test_reading_a_recipe_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("algorithm: mine\n")
    code = (
        "import sys; from fairlead.config import Section; from fairlead.config_resolve import load_recipe;"
        f"load_recipe({str(tmp_path / 'r.yaml')!r}, settings_of=lambda name: (name, Section));"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
