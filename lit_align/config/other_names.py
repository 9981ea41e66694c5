"""Keys that had another name in an earlier version, or have one in TRL, and what they are called here."""

from __future__ import annotations

# Dotted key of an earlier version, without `init_args`: its key now, or what to write instead.
RENAMED: dict[str, str] = {}

# Import path of an earlier version: the path now.
MOVED: dict[str, str] = {
    "lit_align.steps.ScratchModel": "lit_align.pipeline.scratch_model.ScratchModel",
    "lit_align.sandbox.reward.GoldReward": "lit_align.sandbox.gold_reward.GoldReward",
}

# TRL's argument: our dotted keys, the most usual first; empty if there is none, and why.
TRL: dict[str, tuple[tuple[str, ...], str]] = {
    "model_name_or_path": (("model.network.name",), ""),
    "model_revision": (("model.network.revision",), ""),
    "trust_remote_code": (("model.network.trust_remote_code",), ""),
    "dtype": (("model.network.dtype", "trainer.precision"), "the weights; precision is what they compute in"),
    "torch_dtype": (("model.network.dtype", "trainer.precision"), "the weights; precision is what they compute in"),
    "attn_implementation": (("model.network.attention",), ""),
    "tokenizer_name_or_path": (("data.tokenizer",), ""),
    "chat_template_path": (("data.chat_template",), ""),
    "ref_model": (("model.reference",), ""),
    "reward_model_path": (("model.reward",), "the folder of a reward model, or a list of rewards in a SumReward"),
    "reward_funcs": (("model.reward",), "module.function, a folder, or several in a SumReward"),
    "reward_weights": (("model.reward",), "the `weights` of a SumReward"),
    "dataset_name": (("data.train",), "[NAME], or [{hub: NAME, split: train, limit: 1000}]"),
    "dataset_config": (("data.train",), "[{hub: NAME, subset: CONFIG}]"),
    "dataset_train_split": (("data.train",), "[{hub: NAME, split: SPLIT}]"),
    "dataset_test_split": (("data.val",), "[{hub: NAME, split: SPLIT}]"),
    "dataset_text_field": (("data.train",), "[{path: FILE, columns: {text: COLUMN}}]"),
    "dataset_num_proc": ((), "rows are tokenised once, into a cache"),
    "output_dir": (("out",), ""),
    "seed": (("seed_everything", "data.seed"), ""),
    "data_seed": (("data.seed",), ""),
    "learning_rate": (("model.optimizer",), "{class_path: torch.optim.AdamW, init_args: {lr: 1.0e-6}}, or "
                      "--model.optimizer=AdamW --model.optimizer.lr=1e-6"),
    "weight_decay": (("model.optimizer",), "its init_args.weight_decay"),
    "adam_beta1": (("model.optimizer",), "its init_args.betas"),
    "adam_beta2": (("model.optimizer",), "its init_args.betas"),
    "adam_epsilon": (("model.optimizer",), "its init_args.eps"),
    "optim": (("model.optimizer",), "class_path: torch.optim.AdamW, for one"),
    "lr_scheduler_type": (("model.schedule",), "Cosine, Linear, Constant or WSD"),
    "warmup_ratio": (("model.schedule",), "its init_args.warmup, below 1 a share of all steps"),
    "warmup_steps": (("model.schedule",), "its init_args.warmup"),
    "num_train_epochs": (("trainer.max_epochs",), ""),
    "max_steps": (("trainer.max_steps",), ""),
    "per_device_train_batch_size": (("data.batch_size",), ""),
    "per_device_eval_batch_size": (("data.val_batch_size",), ""),
    "gradient_accumulation_steps": (
        ("trainer.accumulate_grad_batches", "data.micro_batch_tokens"), "micro-batches by tokens"),
    "gradient_checkpointing": (("model.network.activation_checkpointing",), ""),
    "max_grad_norm": (("trainer.gradient_clip_val", "model.max_grad_norm"), "the second in PPO"),
    "bf16": (("trainer.precision",), "bf16-mixed"),
    "fp16": (("trainer.precision",), "16-mixed"),
    "torch_compile": (("model.network.compile",), ""),
    "use_liger_kernel": (("model.network.head",), "liger"),
    "logging_steps": (("trainer.log_every_n_steps",), ""),
    "eval_steps": (("trainer.val_check_interval",), ""),
    "eval_strategy": (("trainer.val_check_interval",), ""),
    "save_steps": (("checkpoint.every_n_train_steps",), ""),
    "save_strategy": (("checkpoint.every_n_train_steps",), ""),
    "save_total_limit": (("checkpoint.save_top_k",), ""),
    "load_best_model_at_end": (("export", "checkpoint.monitor"), "export: best"),
    "metric_for_best_model": (("checkpoint.monitor",), ""),
    "resume_from_checkpoint": (("ckpt_path",), "last"),
    "report_to": (("trainer.logger",), "{class_path: lightning.pytorch.loggers.WandbLogger}"),
    "run_name": (("out", "trainer.logger"), "the folder, or the logger's name"),
    "push_to_hub": ((), "the folder `model` of a run is what `huggingface-cli upload` takes"),
    "dataloader_num_workers": (("data.num_workers",), ""),
    "max_length": (("data.max_length",), ""),
    "max_seq_length": (("data.max_length",), ""),
    "max_prompt_length": (("data.max_length", "data.truncate"), "prompt and answer together"),
    "truncation_mode": (("data.truncate",), ""),
    "packing": (("data.packing",), ""),
    "padding_free": (("data.packing",), "there is no padding"),
    "completion_only_loss": (("data.loss_on",), "response, the default"),
    "assistant_only_loss": (("data.loss_on", "data.turns"), "response, the default"),
    "neftune_noise_alpha": (("model.neftune_alpha",), ""),
    "use_peft": (("model.network.lora",), "{r: 16}"),
    "lora_r": (("model.network.lora.r",), ""),
    "lora_alpha": (("model.network.lora.alpha",), ""),
    "lora_dropout": (("model.network.lora.dropout",), ""),
    "lora_target_modules": (("model.network.lora.targets",), ""),
    "peft_config": (("model.network.lora",), "{r: 16}"),
    "load_in_4bit": ((), "there is no quantised training"),
    "load_in_8bit": ((), "there is no quantised training"),
    "beta": (("model.beta", "model.kl_coef"), "beta in DPO, kl_coef in PPO and GRPO"),
    "loss_type": (("model.loss", "model.advantage"), "DPO's and reward models' loss; for GRPO and its kin `advantage` "
                  "and `aggregation`"),
    "label_smoothing": (("model.label_smoothing",), ""),
    "precompute_ref_log_probs": (("model.cache_reference",), "true"),
    "rpo_alpha": (("model.nll_coef",), ""),
    "simpo_gamma": (("model.coefficients",), "{gamma: 1.4}"),
    "center_rewards_coefficient": (("model.centering",), ""),
    "desirable_weight": (("model.coefficients",), "the loss's own name for it"),
    "undesirable_weight": (("model.coefficients",), "the loss's own name for it"),
    "num_generations": (("model.sampling.samples",), ""),
    "max_completion_length": (("model.sampling.max_new_tokens",), ""),
    "max_new_tokens": (("model.sampling.max_new_tokens",), ""),
    "response_length": (("model.sampling.max_new_tokens",), ""),
    "temperature": (("model.sampling.temperature",), ""),
    "top_p": (("model.sampling.top_p",), ""),
    "use_vllm": (("model.engine",), "{class_path: lit_align.rollout.VLLMEngine}"),
    "num_iterations": (("model.epochs",), "passes over a rollout"),
    "num_ppo_epochs": (("model.epochs",), "passes over a rollout"),
    "num_mini_batches": (("model.mini_batches",), ""),
    "steps_per_generation": (("model.mini_batches",), ""),
    "generation_batch_size": (("data.batch_size",), "prompts of a rollout; sampling.samples answers to each"),
    "epsilon": (("model.clip",), ""),
    "epsilon_high": (("model.clip_high",), ""),
    "cliprange": (("model.clip",), ""),
    "cliprange_value": (("model.value_clip",), ""),
    "delta": (("model.dual_clip",), ""),
    "vf_coef": (("model.value_coef",), ""),
    "kl_coef": (("model.kl_coef",), ""),
    "kl_estimator": (("model.kl_estimator",), ""),
    "gamma": (("model.discount",), ""),
    "lam": (("model.lambda_",), ""),
    "whiten_rewards": (("model.whiten_rewards",), ""),
    "missing_eos_penalty": (("model.missing_eos_penalty",), ""),
    "scale_rewards": (("model.advantage",), "grpo divides by the group's deviation, dr_grpo does not"),
}  # fmt: skip


def now_called(key: str) -> str | None:
    """What to write for an unknown key, if it is one of an earlier version or of TRL.

    Args:
        key: dotted, without `init_args`.
    """
    if (now := _renamed(key)) is not None:
        return f"{key!r} is now {now}"
    name = key.rpartition(".")[2]
    if name not in TRL:
        return None
    ours, note = TRL[name]
    if not ours:
        return f"TRL's {name!r} has no key here: {note}"
    return f"TRL's {name!r} is {' or '.join(ours)} here{f' ({note})' if note else ''}; see docs/coming-from-trl.md"


def moved_class(*paths: str | None) -> str | None:
    """Where the class is now, if one of the import paths is of an earlier version."""
    for path in paths:
        if path in MOVED:
            return f"{path} is now {MOVED[path]}"
    return None


def _renamed(key: str) -> str | None:
    """The key of today, for a key or one under it."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if (now := RENAMED.get(".".join(parts[:length]))) is not None:
            return ".".join([now, *parts[length:]])
    return None
