"""`fairlead import trlx`: what becomes of a configuration, and that nothing of it goes without a word. Expected values
are those of trlX's documentation and of the write-up of March 2023 on OPT-1.3B, and of torch's own schedulers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fairlead.cli import main
from fairlead.config_resolve import ResolvedRecipe
from fairlead.errors import ConfigError
from fairlead.migration import Imported, import_config
from fairlead.migration.trlx import import_trlx
from fairlead.runner import resolve
from fairlead.training.optim import learning_rate_factor

OPT: dict[str, Any] = {
    "train": {
        "seq_length": 128,
        "epochs": 1000,
        "total_steps": 10000,
        "batch_size": 32,
        "checkpoint_interval": 10000,
        "eval_interval": 100,
        "pipeline": "PromptPipeline",
        "trainer": "AcceleratePPOTrainer",
        "save_best": False,
    },
    "model": {
        "model_path": "facebook/opt-1.3b",
        "num_layers_unfrozen": 2,
        "delta_kwargs": {
            "delta_type": "lora",
            "modified_modules": "attention",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
        },
    },
    "tokenizer": {"tokenizer_path": "facebook/opt-1.3b", "truncation_side": "right"},
    "optimizer": {"name": "adamw", "kwargs": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6}},
    "scheduler": {"name": "cosine_annealing", "kwargs": {"T_max": 10000, "eta_min": 1e-4}},
    "method": {
        "name": "PPOConfig",
        "num_rollouts": 128,
        "chunk_size": 128,
        "ppo_epochs": 4,
        "init_kl_coef": 0.05,
        "target": 6,
        "horizon": 10000,
        "gamma": 1,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 1,
        "scale_reward": "ignored",
        "ref_mean": None,
        "ref_std": None,
        "cliprange_reward": 10,
        "gen_kwargs": {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True},
    },
}
"""The whole configuration of the write-up."""
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit code, stdout and stderr of a command run in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fairlead", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, printed.out, printed.err

    return call


def changed(base: dict[str, Any] = OPT, **settings: Any) -> Imported:
    """``base`` with values set by `section__key`; a value of ... takes the key out."""
    config = deepcopy(base)
    for path, value in settings.items():
        *parents, last = path.split("__")
        target = config
        for parent in parents:
            target = target.setdefault(parent, {})
        if value is ...:
            target.pop(last, None)
        else:
            target[last] = value
    return import_trlx(config)


def resolved(imported: Imported) -> ResolvedRecipe:
    return resolve(imported.recipe)


def noted(imported: Imported, key: str) -> list[str]:
    """Kind and words of each note on a key."""
    return [f"{note.kind}: {note.text}" for note in imported.notes if note.what.split("=")[0] == key]


# --- the write-up's configuration ----------------------------------------------------------------------------------


def test_the_configuration_of_the_write_up_trains_what_it_trained(command: Command, tmp_path: Path) -> None:
    source, recipe = tmp_path / "opt.json", tmp_path / "opt.yaml"
    source.write_text(json.dumps(OPT, indent=4))
    code, out, err = command("import", "trlx", source, "--out", recipe)
    assert code == 0, err
    assert f"fairlead train {recipe} --dry-run" in out
    code, shown, err = command("train", recipe, "--dry-run")
    assert (code, err) == (0, "")
    assert "ppo.adaptive_kl.target: 6.0" in shown
    code, out, err = command("inspect", recipe, "model.path=opt-1.3b", "--model-only", "--json")
    assert code == 0, err
    parts = {part["role"]: part["trainable"] for part in json.loads(out)["model"]["parts"]}
    assert parts["policy adapter"] == 262_144
    assert parts["value head"] == 2048 + 1
    assert sum(parts.values()) == 262_144 + 2_049


def test_every_number_of_the_write_up_arrives() -> None:
    found = resolved(changed())
    recipe, ppo = found.recipe, found.recipe.settings
    assert recipe.algorithm == "ppo" and recipe.model.path == "facebook/opt-1.3b"
    adapter = recipe.model.adapter
    assert adapter is not None
    assert (adapter.rank, adapter.alpha, adapter.targets, adapter.last) == (8, 16, "attention", 2)
    optim = recipe.optim
    assert (optim.name, optim.learning_rate, optim.betas, optim.eps) == ("adamw", 1e-4, (0.9, 0.95), 1e-8)
    assert (optim.weight_decay, optim.schedule) == (1e-6, "constant")
    train = recipe.train
    assert (train.steps, train.batch_size, train.save_every, train.eval_every) == (10000, 32, 10000, 100)
    assert (recipe.data.max_length, recipe.data.template) == (128, "plain")
    assert (ppo.rollout_size, ppo.rollout_rows, ppo.epochs, ppo.max_new_tokens) == (128, 128, 4, 40)
    assert (ppo.kl_coef, ppo.adaptive_kl.target, ppo.adaptive_kl.horizon) == (0.05, 6, 10000)
    assert (ppo.gamma, ppo.gae_lambda, ppo.clip_range, ppo.value_clip_range, ppo.value_coef) == (1, 0.95, 0.2, 0.2, 1)
    assert (ppo.reward_scaling, ppo.reward_clip, ppo.top_k, ppo.top_p) == ("none", 10, 0, 1)
    assert found.warnings == ()


def test_the_file_says_where_each_setting_comes_from_and_reads_as_the_recipe() -> None:
    imported = changed()
    lines = [line for line in imported.text.splitlines() if not line.startswith("#") and not line.endswith(":")]
    assert all("  # " in line for line in lines)
    assert "    horizon: 10000  # method.horizon" in lines
    assert "  rank: 8  # model.delta_kwargs.lora_r" in [line.removeprefix("  ") for line in lines]
    assert yaml.safe_load(imported.text.replace("1e-0", "1.0e-0")) == imported.recipe


def test_yaml_json_and_dotted_keys_are_one_configuration(tmp_path: Path) -> None:
    flat: dict[str, Any] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                flatten(f"{prefix}.{key}" if prefix else key, child)
        else:
            flat[prefix] = value

    flatten("", OPT)
    (tmp_path / "nested.yml").write_text(yaml.safe_dump(OPT))
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    hparams = {**OPT, "train.batch_size": 64, "method.gen_kwargs.max_new_tokens": 9}
    (tmp_path / "both.json").write_text(json.dumps(hparams))
    whole = changed().recipe
    assert import_config("trlx", tmp_path / "nested.yml").recipe == whole
    assert import_config("trlx", tmp_path / "flat.json").recipe == whole
    both = import_config("trlx", tmp_path / "both.json").recipe
    assert (both["train"]["batch_size"], both["ppo"]["max_new_tokens"]) == (64, 9)
    assert both["ppo"]["kl_coef"] == 0.05


# --- nothing without a word ----------------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {
    "train.total_steps": 77,
    "train.seq_length": 77,
    "train.epochs": 2,
    "train.batch_size": 7,
    "train.checkpoint_interval": 7,
    "train.eval_interval": 7,
    "train.pipeline": "MyPipeline",
    "train.trainer_kwargs": {"a": 1},
    "train.project_name": "mine",
    "train.run_name": "mine",
    "train.entity_name": "mine",
    "train.group_name": "mine",
    "train.checkpoint_dir": "mine",
    "train.rollout_logging_dir": "mine",
    "train.save_best": True,
    "train.save_optimizer": False,
    "train.resume_from_checkpoint": "mine",
    "train.tracker": "wandb",
    "train.logging_dir": "mine",
    "train.tags": ["mine"],
    "train.seed": 7,
    "train.minibatch_size": 7,
    "model.model_path": "gpt2",
    "model.num_layers_unfrozen": 3,
    "model.model_extra_configs": {"trust_remote_code": True},
    "tokenizer.tokenizer_path": "gpt2",
    "tokenizer.padding_side": "right",
    "tokenizer.truncation_side": "left",
    "tokenizer.tokenizer_extra_configs": {"use_fast": False},
    "optimizer.name": "sgd",
    "optimizer.kwargs": {"lr": 1e-3, "momentum": 0.9},
    "scheduler.kwargs": {"T_max": 77, "eta_min": 1e-5, "last_epoch": 3},
    "method.ppo_epochs": 3,
    "method.num_rollouts": 100,
    "method.chunk_size": 50,
    "method.init_kl_coef": 0.1,
    "method.target": 7,
    "method.horizon": 777,
    "method.gamma": 0.9,
    "method.lam": 0.9,
    "method.cliprange": 0.1,
    "method.cliprange_value": 0.1,
    "method.vf_coef": 0.5,
    "method.scale_reward": "running",
    "method.ref_mean": 0.5,
    "method.ref_std": 2.0,
    "method.cliprange_reward": 3,
    "method.num_value_layers_unfrozen": 2,
    "method.gen_kwargs": {"temperature": 0.7, "min_length": 5, "do_sample": False, "num_beams": 4, "eos_token_id": 2},
    "method.gen_experience_kwargs": {"top_k": 5, "repetition_penalty": 1.2},
}
"""Every field of trlX's PPO configuration (main), none with a value that asks for nothing."""


@pytest.mark.parametrize("key", FIELDS)
def test_every_field_is_taken_over_or_spoken_of(key: str) -> None:
    config = {**OPT, key: FIELDS[key]}
    imported = import_trlx(config)
    places = [f"{key}.{name}" for name in FIELDS[key]] if isinstance(FIELDS[key], dict) else [key]
    said = imported.text + "\n".join(map(str, imported.notes))
    assert [place for place in places if place not in said] == []
    assert [note for note in imported.notes if note.kind == "not known"] == []
    resolved(imported)


def test_what_trlx_does_not_know_is_listed_and_stops_nothing(command: Command, tmp_path: Path) -> None:
    source = tmp_path / "config.yml"
    source.write_text(yaml.safe_dump({**OPT, "method.cliprnage": 0.3, "extra": {"a": 1}}))
    code, out, err = command("import", "trlx", source)
    assert code == 0
    assert "not known: method.cliprnage=0.3: nothing was made of it" in err.splitlines()
    assert "not known: extra.a=1: nothing was made of it" in err.splitlines()
    assert "clip_range: 0.2" in out
    code, out, _ = command("import", "trlx", source, "--json")
    notes = json.loads(out)["notes"]
    assert {"kind": "not known", "what": "extra.a=1", "text": "nothing was made of it"} in notes


# --- RFT -----------------------------------------------------------------------------------------------------------

RANDOM_WALKS: dict[str, Any] = {
    "train": {
        "seq_length": 10,
        "epochs": 100,
        "total_steps": 1000,
        "batch_size": 100,
        "checkpoint_interval": 1000,
        "eval_interval": 100,
        "pipeline": "PromptPipeline",
        "trainer": "AccelerateRFTTrainer",
    },
    "model": {"model_path": "CarperAI/randomwalks", "num_layers_unfrozen": -1},
    "tokenizer": {"tokenizer_path": "CarperAI/randomwalks", "truncation_side": "right"},
    "optimizer": {"name": "adamw", "kwargs": {"lr": 3e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0}},
    "scheduler": {"name": "cosine_annealing", "kwargs": {"T_max": 1e12, "eta_min": 3e-4}},
    "method": {
        "name": "RFTConfig",
        "n_generations_per_prompt": 100,
        "start_percentile": 0.9,
        "end_percentile": 0.95,
        "n_improve_steps": 1,
        "gen_kwargs": {"max_new_tokens": 9, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "do_sample": True},
    },
}
"""trlX's own example of RFT."""


def test_a_configuration_of_rft_becomes_one_with_nothing_unsaid() -> None:
    imported = changed(RANDOM_WALKS)
    found = resolved(imported).recipe
    rft = found.settings
    assert (found.algorithm, found.train.steps, found.train.batch_size) == ("rft", 1000, 100)
    assert (rft.num_samples, rft.epochs, rft.start_percentile, rft.end_percentile) == (100, 1, 0.9, 0.95)
    assert (rft.rollout_size, rft.max_new_tokens, found.optim.schedule) == ("all", 9, "constant")
    assert not [note for note in imported.notes if note.kind == "not known"]
    assert any(note.what == "a batch" for note in imported.notes)


def test_an_epoch_of_rft_is_one_improve_step() -> None:
    imported = changed(RANDOM_WALKS, train__total_steps=..., train__epochs=10, method__n_improve_steps=4)
    assert resolved(imported).recipe.train.epochs == 3  # rounds of four of them


# --- what has no recipe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__trainer": ..., "method__name": "ilqlconfig"}, "ILQL.*\n.*reward.loss=regression.*dpo.*kto"),
        ({"train__trainer": "AccelerateILQLTrainer"}, "ILQL"),
        ({"method": {}, "train__trainer": ...}, "names no method of trlX"),
        ({"model__model_arch_type": "seq2seq"}, "seq2seq: Fairlead trains decoders alone"),
        ({"model__delta_kwargs__delta_type": "bitfit"}, "delta_type='bitfit'"),
        ({"model": {"peft_config": {"peft_type": "PROMPT_TUNING"}}}, "peft_type='PROMPT_TUNING'"),
        ({"method__scale_reward": "whiten"}, "scale_reward='whiten'"),
        ({"scheduler__name": "step"}, "scheduler.name='step'"),
        ({"optimizer__name": "lamb"}, "optimizer.name='lamb' cannot be taken over: known are adam, adamw"),
        ({"method__init_kl_coef": "high"}, "method.init_kl_coef='high' cannot be taken over: a number was expected"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_recipe_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(**settings)


def test_a_value_the_recipe_refuses_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "config.json"
    source.write_text(json.dumps({**OPT, "method.lam": 1.5}))
    with pytest.raises(ConfigError, match=r"ppo\.gae_lambda.*got 1\.5"):
        import_config("trlx", source)
    with pytest.raises(ConfigError, match="no configurations of 'trl' are known\nhint: did you mean 'trlx'"):
        import_config("trl", source)


def test_a_file_that_is_there_is_not_written_over(command: Command, tmp_path: Path) -> None:
    source = tmp_path / "config.json"
    source.write_text(json.dumps(OPT))
    code, _, err = command("import", "trlx", source, "--out", source)
    assert code == 2 and "exists already" in err
    assert json.loads(source.read_text()) == OPT


# --- keys that mean one thing together -----------------------------------------------------------------------------


def rates(schedule: Any, steps: int) -> list[float]:
    """Those of torch's scheduler in trlX's loop, one before each step."""
    found: list[float] = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


def ours(imported: Imported, steps: int) -> list[float]:
    optim = resolved(imported).recipe.optim
    return [
        optim.learning_rate
        * learning_rate_factor(
            step,
            steps,
            schedule=optim.schedule,
            warmup_steps=optim.warmup_steps or 0,
            floor=optim.min_learning_rate_ratio,
        )
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize(
    ("name", "kwargs", "kind"),
    [
        ("cosine_annealing", {"T_max": 200, "eta_min": 1e-3}, "constant"),
        ("cosine_annealing", {"T_max": 1e12, "eta_min": 0.0}, "constant"),
        ("cosine_annealing", {"T_max": 200, "eta_min": 1e-4}, "cosine"),
        ("cosine_annealing", {"T_max": 200}, "cosine"),
        ("linear", {"start_factor": 1.0, "end_factor": 0.25, "total_iters": 200}, "linear"),
        ("linear", {"start_factor": 1.0, "end_factor": 1.0, "total_iters": 200}, "constant"),
    ],
)
def test_the_learning_rate_is_that_of_torchs_scheduler(name: str, kwargs: dict[str, float], kind: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    made: Any = {
        "cosine_annealing": torch.optim.lr_scheduler.CosineAnnealingLR,
        "linear": torch.optim.lr_scheduler.LinearLR,
    }[name]
    imported = changed(train__total_steps=200, optimizer__kwargs__lr=1e-3, scheduler={"name": name, "kwargs": kwargs})
    assert resolved(imported).recipe.optim.schedule == kind
    assert ours(imported, 200) == pytest.approx(rates(made(optimizer, **kwargs), 200), rel=0.02, abs=2e-5)
    assert noted(imported, "scheduler.kwargs.T_max") == noted(imported, "scheduler.name") == []


def test_torchs_linear_schedule_is_a_warm_up_by_default() -> None:
    imported = changed(scheduler={"name": "linear"})
    optim = resolved(imported).recipe.optim
    assert (optim.schedule, optim.warmup_steps) == ("constant", 5)
    assert noted(imported, "scheduler.name") == [
        "differs: the rate rises from 0 to lr, there from 0.333 to 1 of lr in 5 steps"
    ]


def test_epochs_are_rounds_and_bound_the_steps() -> None:
    """trlX: min(total_steps, epochs * ppo_epochs * minibatches)."""
    assert changed(train__epochs=20).recipe["train"]["steps"] == 20 * 4 * 4 == 320
    assert changed(train__epochs=20, train__batch_size=100).recipe["train"]["steps"] == 20 * 4 * 2
    assert changed(train__epochs=...).recipe["train"]["steps"] == 10000


def test_rollouts_come_in_whole_chunks() -> None:
    imported = changed(method__num_rollouts=140, method__chunk_size=20, train__epochs=1)
    assert (imported.recipe["ppo"]["rollout_size"], imported.recipe["train"]["steps"]) == (140, 4 * 5)
    imported = changed(method__num_rollouts=128, method__chunk_size=100, train__epochs=1)
    assert (imported.recipe["ppo"]["rollout_size"], imported.recipe["train"]["steps"]) == (200, 4 * 7)


@pytest.mark.parametrize(
    ("scale", "scaling"),
    [("running", "running"), ("ref", "first"), ("ignored", "none"), (None, "none"), (False, "none")],
)
def test_reward_scaling_by_its_names(scale: Any, scaling: str) -> None:
    imported = changed(method__scale_reward=scale)
    assert resolved(imported).recipe.settings.reward_scaling == scaling
    clipped = noted(imported, "method.cliprange_reward")
    assert clipped == (["differs: scores are clipped after they are scaled; there before"] if scaling != "none" else [])


def test_a_given_reference_deviation_is_a_weight_and_said() -> None:
    imported = changed(method__scale_reward="ref", method__ref_mean=0.1, method__ref_std=4.0)
    assert imported.recipe["ppo"]["reward_scaling"] == "none"
    (note,) = noted(imported, "method.ref_std")
    assert note.startswith("not carried over") and "weight: 0.25" in note
    assert noted(imported, "method.ref_mean")
    assert "trlX reads it with" in noted(changed(method__ref_std=4.0), "method.ref_std")[0]


def test_a_falsy_reward_clip_clips_nothing() -> None:
    for value in (0, None, False):
        assert resolved(changed(method__cliprange_reward=value)).recipe.settings.reward_clip is None


def test_a_fixed_coefficient_has_no_controller() -> None:
    fixed = changed(method__target=None)
    assert resolved(fixed).recipe.settings.adaptive_kl is None
    assert noted(fixed, "method.horizon") == ["not carried over: of a coefficient that does not move"]
    zero = changed(method__init_kl_coef=0)
    settings = resolved(zero).recipe.settings
    assert (settings.kl_coef, settings.adaptive_kl) == (0, None)
    assert noted(zero, "method.target") == ["not carried over: a coefficient that begins at 0 stays there"]


def test_rollouts_sample_by_their_own_arguments_where_given() -> None:
    imported = changed(
        method__gen_kwargs={"max_new_tokens": 40, "temperature": 0.5, "do_sample": True, "top_p": 0.9},
        method__gen_experience_kwargs={"max_new_tokens": 30, "temperature": 1.0},
    )
    ppo = resolved(imported).recipe.settings
    assert (ppo.max_new_tokens, ppo.temperature, ppo.eval_temperature, ppo.top_p) == (30, 1.0, 0.5, 1.0)
    assert len(noted(imported, "method.gen_kwargs.max_new_tokens")) == 1
    assert len(noted(imported, "method.gen_kwargs.top_p")) == 1


def test_of_a_list_to_try_at_evaluation_the_first_is_taken() -> None:
    imported = changed(method__gen_kwargs__temperature=[0.7, 1.0])
    assert imported.recipe["ppo"]["temperature"] == 0.7
    assert any("the first one is taken" in note for note in noted(imported, "method.gen_kwargs.temperature"))


# --- models --------------------------------------------------------------------------------------------------------


def test_peft_config_is_an_adapter_and_the_layers_beside_it_were_never_read() -> None:
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["lm_head"],
        "layers_to_transform": [3, 4, 5],
        "use_rslora": True,
        "task_type": "CAUSAL_LM",
        "bias": "none",
    }
    imported = changed(model={"model_path": "gpt2", "num_layers_unfrozen": 2, "peft_config": config})
    adapter = resolved(imported).recipe.model.adapter
    assert adapter is not None
    assert (adapter.method, adapter.rank, adapter.alpha, adapter.targets) == ("rslora", 4, 32, ("q_proj", "v_proj"))
    assert (adapter.train_also, adapter.layers, adapter.last, adapter.dropout) == (("lm_head",), (3, 5), None, 0)
    assert noted(imported, "model.num_layers_unfrozen") == [
        "not carried over: trlX does not read it beside peft_config"
    ]
    assert noted(imported, "model.peft_config.lora_dropout")
    with pytest.raises(ConfigError, match=r"layers_to_transform=\[1, 3\].*one range"):
        changed(model={"model_path": "gpt2", "peft_config": {"layers_to_transform": [1, 3]}})


def test_a_regular_expression_of_peft_is_one_here_and_defaults_are_pefts() -> None:
    imported = changed(model={"model_path": "gpt2", "peft_config": {"target_modules": ".*attn.*"}})
    adapter = imported.recipe["model"]["adapter"]
    assert adapter == {"rank": 8, "alpha": 8, "targets": "re:.*attn.*"}
    imported = changed(model={"model_path": "gpt2", "peft_config": {"r": 16}})
    assert imported.recipe["model"]["adapter"] == {"rank": 16, "alpha": 8}
    assert noted(imported, "model.peft_config.target_modules")


def test_layers_trained_in_full_and_layers_of_the_value() -> None:
    imported = changed(model={"model_path": "gpt2", "num_layers_unfrozen": 3}, method__num_value_layers_unfrozen=2)
    found = resolved(imported).recipe
    assert (found.model.adapter, found.model.num_layers_unfrozen) == (None, 3)
    assert (found.settings.value.trunk, found.settings.value.num_layers) == ("layers", 2)
    assert resolved(changed(model={"model_path": "gpt2"})).recipe.model.num_layers_unfrozen is None
    beside = changed(method__num_value_layers_unfrozen=2)
    assert "value" not in beside.recipe["ppo"]
    assert "ppo.value.trunk=adapter" in noted(beside, "method.num_value_layers_unfrozen")[0]


def test_sft_keeps_dropout_and_its_last_step(tmp_path: Path) -> None:
    config = {
        **{section: OPT[section] for section in ("model", "optimizer", "scheduler", "tokenizer")},
        "train": {**OPT["train"], "trainer": "AccelerateSFTTrainer", "total_steps": 1000, "epochs": 100},
        "method": {"name": "sftconfig", "gen_kwargs": {"max_new_tokens": 40, "top_k": 0}},
    }
    imported = import_trlx(config)
    recipe = resolved(imported).recipe
    assert recipe.algorithm == "sft" and set(imported.recipe) & {"sft", "ppo"} == set()
    assert recipe.model.adapter is not None and recipe.model.adapter.dropout == 0.05
    assert recipe.train.steps == 1000
    assert noted(imported, "train.epochs") and noted(imported, "method.gen_kwargs")
    assert noted(imported, "tokenizer.truncation_side") == []


def test_the_trainer_decides_where_the_method_is_named_otherwise() -> None:
    """trlX's own configs/sft_config.yml names `ppoconfig` beside AccelerateSFTTrainer."""
    imported = changed(train__trainer="AccelerateSFTTrainer")
    assert resolved(imported).recipe.algorithm == "sft"
    assert noted(imported, "method.cliprange") == ["not carried over: it belongs to another method"]
