"""What other trainers call our settings: TRL's GRPOConfig and verl's ppo_trainer.yaml.

One table serves three readers: the hint about a name that does not exist here, `zppo init --like`,
and the pages docs/from_trl.md and docs/from_verl.md.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

Tool: TypeAlias = Literal["trl", "verl"]
TOOLS: tuple[Tool, ...] = get_args(Tool)
KEPT = ...
TITLES: dict[Tool, str] = {"trl": "TRL", "verl": "verl"}


class Counterpart(NamedTuple):
    """A setting of ours and its names elsewhere, several apart by blanks, the usual one first.

    `values` are the defaults of (TRL, verl) in our terms, KEPT where ours is the same or theirs is
    nothing that can be written here. `note` is what differs in meaning. `typed`: other names that
    people try.
    """

    ours: str
    trl: str = ""
    verl: str = ""
    values: tuple[Any, Any] = (KEPT, KEPT)
    note: str = ""
    typed: str = ""

    def names(self, tool: Tool) -> list[str]:
        """Its names in one tool."""
        return (self.trl if tool == "trl" else self.verl).split()


ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
COUNTERPARTS: tuple[Counterpart, ...] = (
    Counterpart("run.name", "run_name", "trainer.experiment_name"),
    Counterpart("run.directory", "output_dir", "trainer.default_local_dir"),
    Counterpart("run.seed", "seed", "", (42, KEPT)),
    Counterpart(
        "run.steps",
        "max_steps",
        "trainer.total_training_steps",
        note="counted in rollout steps, each of method.updates_per_step updates",
        typed="num_steps total_steps",
    ),
    Counterpart(
        "run.epochs", "num_train_epochs", "trainer.total_epochs", (3, 30), typed="num_epochs"
    ),
    Counterpart(
        "method.name", "", "algorithm.adv_estimator", ("grpo", "grpo"), "zppo is this project's own"
    ),
    Counterpart("method.group_size", "num_generations", f"{ROLLOUT}.n", (8, KEPT), typed="n"),
    Counterpart(
        "method.updates_per_step",
        "steps_per_generation",
        f"{ACTOR}.ppo_mini_batch_size",
        (1, 4),
        "counted in updates, each on an equal share of the step's groups",
        typed="mini_batch_size",
    ),
    Counterpart(
        "method.preset", note="a loss by its name: grpo, dapo, dr_grpo, …", typed="loss algo"
    ),
    Counterpart(
        "method.advantage",
        "scale_rewards",
        "algorithm.norm_adv_by_std_in_grpo",
        ("grpo_bessel", "grpo_bessel"),
    ),
    Counterpart("method.advantage_rewards", "multi_objective_aggregation"),
    Counterpart("method.surrogate", "", f"{ACTOR}.policy_loss.loss_mode"),
    Counterpart("method.ratio_level", "importance_sampling_level"),
    Counterpart(
        "method.clip_low",
        "epsilon epsilon_low",
        f"{ACTOR}.clip_ratio_low {ACTOR}.clip_ratio",
        (0.2, 0.2),
        typed="clip_range cliprange",
    ),
    Counterpart("method.clip_high", "epsilon_high", f"{ACTOR}.clip_ratio_high", (0.2, 0.2)),
    Counterpart("method.dual_clip", "delta", f"{ACTOR}.clip_ratio_c", (None, 3.0)),
    Counterpart("method.sapo_temperature_positive", "sapo_temperature_pos"),
    Counterpart("method.sapo_temperature_negative", "sapo_temperature_neg"),
    Counterpart(
        "method.loss_normalisation",
        "loss_type",
        f"{ACTOR}.loss_agg_mode",
        note="a part of what method.preset sets",
    ),
    Counterpart("method.entropy_coefficient", "entropy_coef", f"{ACTOR}.entropy_coeff"),
    Counterpart(
        "method.entropy_target",
        "entropy_target use_adaptive_entropy",
        note="null leaves the coefficient as it is",
    ),
    Counterpart("method.entropy_step", "entropy_coef_delta"),
    Counterpart("method.entropy_coefficient_max", "entropy_coef_max"),
    Counterpart("method.entropy_quantile", "top_entropy_quantile"),
    Counterpart(
        "method.kl_coefficient",
        "beta",
        f"{ACTOR}.kl_loss_coef {ACTOR}.use_kl_loss algorithm.kl_ctrl.kl_coef",
        note="0 is off",
        typed="kl_beta init_kl_coef",
    ),
    Counterpart("method.kl_estimator", "", f"{ACTOR}.kl_loss_type"),
    Counterpart(
        "method.kl_correction",
        "use_bias_correction_kl",
        note="with method.kl_coefficient, TRL's default is importance",
    ),
    Counterpart("method.truncated", "mask_truncated_completions"),
    Counterpart(
        "method.correction",
        "vllm_importance_sampling_mode vllm_importance_sampling_correction",
        "algorithm.rollout_correction.rollout_is",
        ("none", "none"),
        "token or sequence is method.correction_level",
    ),
    Counterpart(
        "method.correction_cap",
        "vllm_importance_sampling_clip_max vllm_importance_sampling_cap",
        "algorithm.rollout_correction.rollout_is_threshold",
        (3.0, KEPT),
    ),
    Counterpart(
        "method.correction_floor",
        "vllm_importance_sampling_clip_min",
        note="of method.correction: mask",
    ),
    Counterpart("data.train", "train_dataset dataset_name", "data.train_files", typed="dataset"),
    Counterpart("data.heldout", "eval_dataset", "data.val_files"),
    Counterpart(
        "data.fields", "", "data.prompt_key data.image_key", note="known layouts need none"
    ),
    Counterpart(
        "data.reward",
        "reward_funcs reward_weights",
        "custom_reward_function.path reward_model.reward_manager",
        typed="reward reward_function reward_fn reward_func",
    ),
    Counterpart(
        "data.max_prompt_tokens", "max_prompt_length", "data.max_prompt_length", (512, 512)
    ),
    Counterpart(
        "student.model",
        "model_name_or_path model",
        "actor_rollout_ref.model.path",
        typed="base_model pretrained model_id model_name",
    ),
    Counterpart("student.dtype", "dtype torch_dtype bf16 fp16", f"{ROLLOUT}.dtype"),
    Counterpart(
        "student.sampling.max_new_tokens",
        "max_completion_length",
        f"data.max_response_length {ROLLOUT}.response_length",
        (512, 512),
        typed="max_tokens max_length max_seq_length",
    ),
    Counterpart("student.sampling.temperature", "temperature", f"{ROLLOUT}.temperature"),
    Counterpart("student.sampling.top_p", "top_p", f"{ROLLOUT}.top_p"),
    Counterpart("student.sampling.top_k", "top_k", f"{ROLLOUT}.top_k"),
    Counterpart("student.sampling.min_p", "min_p"),
    Counterpart(
        "student.chat_template_kwargs", "chat_template_kwargs", "data.apply_chat_template_kwargs"
    ),
    Counterpart(
        "scheduler.new_questions",
        "per_device_train_batch_size generation_batch_size",
        "data.train_batch_size",
        (1, 1024),
        "counted in questions, each with method.group_size responses",
        typed="batch_size",
    ),
    Counterpart(
        "scheduler.max_staleness",
        "max_staleness",
        "async_training.staleness_threshold",
        (0, 0),
        "0: sampling and training take turns",
        typed="off_policy_steps max_async_level",
    ),
    Counterpart(
        "optimizer.learning_rate", "learning_rate", f"{ACTOR}.optim.lr", (1e-6, 1e-6), "constant"
    ),
    Counterpart("optimizer.weight_decay", "weight_decay", f"{ACTOR}.optim.weight_decay", (0, 0.01)),
    Counterpart("optimizer.gradient_clip", "max_grad_norm", f"{ACTOR}.grad_clip", (1.0, 1.0)),
    Counterpart("optimizer.beta1", "adam_beta1"),
    Counterpart("optimizer.beta2", "adam_beta2"),
    Counterpart("optimizer.epsilon", "adam_epsilon"),
    Counterpart(
        "actors.rollout.engine",
        "use_vllm vllm_mode",
        f"{ROLLOUT}.name",
        (KEPT, "vllm"),
        "transformers or vllm",
    ),
    Counterpart(
        "actors.rollout.engine_args",
        "vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_max_model_length",
        f"{ROLLOUT}.gpu_memory_utilization {ROLLOUT}.tensor_model_parallel_size",
        note="arguments of the engine, by its own names",
    ),
    Counterpart("actors.rollout.devices", "", "trainer.n_gpus_per_node", typed="gpus"),
    Counterpart("actors.trainer.device", "", "trainer.device"),
    Counterpart(
        "actors.trainer.ranks",
        "fsdp",
        f"{ACTOR}.fsdp_config.fsdp_size {ACTOR}.strategy",
        note="processes of FSDP2, one on each of actors.trainer.devices",
        typed="world_size num_gpus fsdp_config",
    ),
    Counterpart(
        "actors.trainer.micro_batch_tokens",
        "gradient_accumulation_steps",
        f"{ACTOR}.ppo_max_token_len_per_gpu {ACTOR}.ppo_micro_batch_size_per_gpu",
        note="counted in padded tokens; gradients are always summed over a whole update",
        typed="micro_batch_size ppo_micro_batch_size",
    ),
    Counterpart(
        "actors.trainer.gradient_checkpointing",
        "gradient_checkpointing",
        "actor_rollout_ref.model.enable_gradient_checkpointing",
        (True, True),
    ),
    Counterpart(
        "cluster.hosts", "", "trainer.nnodes", note="named, with what they have", typed="num_nodes"
    ),
    Counterpart("checkpoints.every", "save_steps", "trainer.save_freq", (500, KEPT)),
    Counterpart("checkpoints.keep", "save_total_limit", "trainer.max_actor_ckpt_to_keep"),
    Counterpart("evaluation.every", "eval_steps", "trainer.test_freq"),
    Counterpart(
        "sinks.rollouts",
        "log_completions",
        "trainer.rollout_data_dir",
        note="as Parquet in the run directory",
    ),
    Counterpart(
        "sinks.wandb",
        "report_to",
        "trainer.logger trainer.project_name",
        note="also sinks.trackio, sinks.mlflow and sinks.tensorboard",
        typed="wandb use_wandb wandb_project logger",
    ),
)

ABSENT: dict[str, str] = {
    "LoRA is not built, all weights are trained": (
        "lora lora_rank lora_alpha lora_r peft peft_config use_peft target_modules"
    ),
    "weights are not quantised": "load_in_4bit load_in_8bit quantization qlora",
    "the learning rate is constant": (
        "lr_scheduler_type lr_scheduler warmup_steps warmup_ratio lr_warmup_steps "
        "lr_warmup_steps_ratio warmup_style scheduler_type"
    ),
    "the trainer's ranks are those of FSDP2 (actors.trainer.ranks)": (
        "deepspeed ulysses_sequence_parallel_size megatron"
    ),
    "a response is trained on once, in one of the method.updates_per_step updates": (
        "num_iterations ppo_epochs"
    ),
    "there is no critic; advantages are those of groups": "critic gamma lam cliprange_value",
    "a reward model is asked by a reward of your own, docs/extending.md": "reward_model",
    "several turns and tools are not built": (
        "tools multi_turn max_tool_calling_iterations environment_factory max_assistant_turns"
    ),
    "code of model folders is never run": "trust_remote_code",
    "every step is logged": "logging_steps logging_dir logging_strategy",
    "docs/from_verl.md has our names for the settings of verl's sections": (
        "actor_rollout_ref algorithm custom_reward_function"
    ),
}
"""What is not here, in the words of the hint, and the names under which it is looked for."""
GENERIC = (
    *("name", "path", "rollout_is"),
    *("gpu_memory_utilization", "tensor_model_parallel_size"),
)
"""Last parts of verl's names that say nothing, or something else, without their sections."""


def hint_for(name: str) -> str | None:
    """What to say about `name`, with or without verl's sections before it, if another tool has it;
    else None."""
    known = _by_name().get(name) or _by_name().get(name.rpartition(".")[2])
    if known is None:
        return _missing().get(name)
    note = f", {known.note}" if known.note else ""
    return f" (it is called {known.ours!r} here{note})"


def setting_called(name: str) -> str | None:
    """Our setting of that name in another tool, if there is one."""
    known = _by_name().get(name)
    return None if known is None else known.ours


def _by_name() -> dict[str, Counterpart]:
    """Every name of the table, those of verl's sections with and without the sections."""
    found: dict[str, Counterpart] = {}
    for one in COUNTERPARTS:
        for name in (*one.trl.split(), *one.verl.split(), *one.typed.split()):
            found[name] = one
            if (last := name.rpartition(".")[2]) not in GENERIC:
                found.setdefault(last, one)
    return found


def _missing() -> dict[str, str]:
    return {name: f" ({reason})" for reason, names in ABSENT.items() for name in names.split()}
