"""What becomes of each key of trlX's TRLConfig by itself. What several keys say together is in `trlx`."""

from __future__ import annotations

from dataclasses import replace

from fairlead.migration.draft import Rule, choice, one_range

METHODS = ("ppo", "sft", "ilql", "rft")
INSTEAD = {
    "ilql": (
        "ILQL, which learns the values of texts from their rewards, is not among Fairlead's algorithms",
        "rated samples train a reward model (reward.loss=regression) for ppo; pairs of a better and a worse one train "
        "dpo, single ones, good or bad, kto",
    ),
}
"""What there is in place of a method that is not here."""

COMMON = {
    "train.seq_length": Rule("data.max_length"),
    "train.batch_size": Rule("train.batch_size", "there it is the batch of one process, here of the whole step"),
    "train.checkpoint_interval": Rule("train.save_every"),
    "train.eval_interval": Rule("train.eval_every"),
    "train.project_name": Rule("tracking.project"),
    "train.run_name": Rule("run.name"),
    "train.checkpoint_dir": Rule("run.directory", "runs stand below it, each in a folder of its name"),
    "train.seed": Rule("seed", "the same number draws other samples"),
    "train.tracker": Rule("tracking.sinks", convert=choice({"wandb": ["wandb"], "tensorboard": ["tensorboard"]})),
    "train.pipeline": Rule(note="data.path says where prompts are", silent=("PromptPipeline",)),
    "train.orchestrator": Rule(note="none is needed", silent=("PPOOrchestrator", "OfflineOrchestrator")),
    "train.entity_name": Rule(note="W&B reads WANDB_ENTITY from the environment"),
    "train.group_name": Rule(note="W&B reads WANDB_RUN_GROUP from the environment"),
    "train.tags": Rule(note="W&B reads WANDB_TAGS from the environment"),
    "train.logging_dir": Rule(note="trackers write into the run's folder"),
    "train.rollout_logging_dir": Rule(note="every round is kept in the run's rounds/"),
    "train.save_best": Rule(
        note="the best checkpoint is always kept; train.save_best=true makes it the final model", silent=(False,)
    ),
    "train.save_optimizer": Rule(note="a checkpoint holds all that a continued run needs", silent=(True,)),
    "train.resume_from_checkpoint": Rule(
        note="the same command continues an unfinished run; trlX's checkpoints are not read, but model.path takes the "
        "hf_model folder in them"
    ),
    "model.model_path": Rule("model.path"),
    "model.model_arch_type": Rule(silent=("causal",)),
    "tokenizer.padding_side": Rule(note="rows are packed without padding", silent=("left",)),
    "optimizer.name": Rule(
        "optim.name",
        convert=choice(
            {"adam": "adam", "adamw": "adamw", "sgd": "sgd"}
            | {"adam_8bit_bnb": "adamw-8bit", "adamw_8bit_bnb": "adamw-8bit"}
        ),
    ),
    "optimizer.kwargs.lr": Rule("optim.learning_rate"),
    "optimizer.kwargs.betas": Rule("optim.betas", convert=list),
    "optimizer.kwargs.eps": Rule("optim.eps"),
    "optimizer.kwargs.weight_decay": Rule("optim.weight_decay", "here of matrices only, not of norms and biases"),
}

PPO = {
    "tokenizer.truncation_side": Rule(
        note="prompts longer than seq_length - max_new_tokens are dropped and counted, where trlX cuts them"
    ),
    "method.ppo_epochs": Rule(
        "ppo.epochs",
        "passes over the whole round, as in trlX's main; up to 0.7.0 it is how often in a row a minibatch is learned",
    ),
    "method.gamma": Rule("ppo.gamma"),
    "method.lam": Rule("ppo.gae_lambda"),
    "method.cliprange": Rule("ppo.clip_range"),
    "method.cliprange_value": Rule("ppo.value_clip_range"),
    "method.vf_coef": Rule("ppo.value_coef"),
    "method.cliprange_reward": Rule("ppo.reward_clip", convert=lambda value: value or None),
    "method.num_topk_samples": Rule(note="all samples are learned from", silent=(1,)),
}

RFT = {
    "tokenizer.truncation_side": PPO["tokenizer.truncation_side"],
    "method.n_generations_per_prompt": Rule("rft.num_samples"),
    "method.n_improve_steps": Rule("rft.epochs"),
    "method.start_percentile": Rule("rft.start_percentile"),
    "method.end_percentile": Rule("rft.end_percentile"),
}

SFT = {"tokenizer.truncation_side": Rule(note="rows are cut at their end", silent=("right",))}

_OF_THE_KEPT = "log-probabilities and KL are of the tokens kept; there of all"
SAMPLING = {
    "max_new_tokens": Rule("ppo.max_new_tokens"),
    "top_k": Rule("ppo.top_k", _OF_THE_KEPT, silent=(0,)),
    "top_p": Rule("ppo.top_p", _OF_THE_KEPT, silent=(1,)),
    "temperature": Rule(
        "ppo.temperature", "log-probabilities are at this temperature; there at 1, not at what was drawn", silent=(1,)
    ),
    "min_new_tokens": Rule("ppo.min_new_tokens", silent=(0,)),
    "min_length": Rule(note="it counts the prompt too; ppo.min_new_tokens counts the response alone", silent=(0,)),
    "max_length": Rule(note="it counts the prompt too; ppo.max_new_tokens counts the response alone"),
    "do_sample": Rule(note="responses are always drawn: a policy that never varies learns nothing", silent=(True,)),
    "use_cache": Rule(note="keys and values are always kept", silent=(True,)),
    "num_return_sequences": Rule(note="ppo.num_samples draws several responses a prompt", silent=(1,)),
    "eos_token_id": Rule(note="a response ends in the tokenizer's end of sequence, or at a text of ppo.stop"),
    "pad_token_id": Rule(note="nothing is padded"),
}
"""Of `method.gen_kwargs` and `method.gen_experience_kwargs`."""

RFT_SAMPLING = {
    name: replace(
        rule, key=rule.key.replace("ppo.", "rft."), note="" if rule.key else rule.note.replace("ppo.", "rft.")
    )
    for name, rule in SAMPLING.items()
}
"""The same of RFT, which has no log-probabilities and so nothing that would mean something else."""

PEFT = {
    "lora_dropout": Rule("model.adapter.dropout"),
    "modules_to_save": Rule("model.adapter.train_also"),
    "layers_to_transform": Rule("model.adapter.layers", convert=one_range),
    "use_rslora": Rule("model.adapter.method", convert=lambda _: "rslora", silent=(False,)),
    "use_dora": Rule("model.adapter.method", convert=lambda _: "dora", silent=(False,)),
    "bias": Rule(note="biases are not trained", silent=("none",)),
    "init_lora_weights": Rule(note="a new adapter begins at zero effect", silent=(True,)),
    **dict.fromkeys(
        ("task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "fan_in_fan_out"),
        Rule(),
    ),
}
"""Of `model.peft_config`."""

LEFT = {
    "method.gen_": "responses are drawn from the model's own distribution, which only top_k and top_p may cut: what is "
    "learned is what was drawn",
    "optimizer.kwargs.": "the optimizer has no such setting here",
    "scheduler.kwargs.": "schedules are constant, linear and cosine, with optim.warmup_steps",
    "model.delta_kwargs.": "adapters are LoRA of rank, alpha and dropout on named layers",
    "model.peft_config.": "adapters are LoRA, rsLoRA or DoRA with the settings of model.adapter",
    "model.model_extra_configs.": "models are loaded as they were saved; model.dtype and .quantize say in which type",
    "tokenizer.tokenizer_extra_configs.": "tokenizers are loaded as they were saved; model.add_tokens adds to them",
    "train.trainer_kwargs.": "trainers take no arguments of their own here",
}
"""Of sections that may hold any key: why the others are not carried over."""
