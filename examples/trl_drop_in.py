"""The policy loss of `zppo_kernels` in TRL's GRPOTrainer, on a CPU, with a tiny random model.

    pip install "trl==1.16.*"
    python examples/trl_drop_in.py

`FusedGRPOTrainer` is the part to copy: it replaces one method. Sampling, rewards, advantages,
optimizer and logging stay TRL's. The loss is computed inside the forward of the model, where
data-parallel wrappers and FSDP have the LM head whole and see the gradients.

Shapes: B sequences, P prompt tokens, L completion tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from zppo_kernels import PolicyLossSettings, policy_loss_from_hidden, summarise_metrics

LOSSES: dict[str, tuple[Any, Any]] = {
    "dapo": ("clip", "token"),
    "bnpo": ("clip", "token"),
    "grpo": ("clip", "sequence"),
    "dr_grpo": ("clip", "fixed_length"),
    "luspo": ("clip", "fixed_length"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
}
"""TRL's `loss_type` as our surrogate and normalisation."""


class FusedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer without a [tokens, vocabulary] tensor and without work for tokens whose advantage
    is zero. Raises ValueError for a configuration that it does not have."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.loss_type not in LOSSES:
            raise ValueError(
                f"loss_type is {self.loss_type!r}; expected one of {', '.join(LOSSES)}"
            )
        entropy = self.top_entropy_quantile < 1.0 or self._entropy_bonus_enabled
        if entropy or self.off_policy_mask_threshold is not None or self.aux_loss_enabled:
            raise ValueError(
                "top_entropy_quantile, entropy_coef, off_policy_mask_threshold and "
                "router_aux_loss_coef are not in this loss"
            )
        add_loss_to_forward(self.model)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        completion_ids_BL = inputs["completion_ids"]
        mask_BL = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        size, length = completion_ids_BL.shape

        def rows_of(values: Any) -> Any:
            """[B], [B, 1] or [B, L] as one value a token; numbers and None as they are."""
            if not isinstance(values, Tensor):
                return values
            return values.reshape(size, -1).expand(size, length).flatten()

        def loss_of(hidden_BTH: Tensor, head: torch.nn.Linear) -> Tensor:
            # The state before a token predicts it, so the last one predicts nothing.
            hidden_TH = hidden_BTH[:, -length - 1 : -1].flatten(0, 1)
            output = policy_loss_from_hidden(
                hidden_TH,
                head.weight,
                completion_ids_BL.flatten(),
                bias_V=head.bias,
                sequence_ids_T=rows_of(torch.arange(size, device=mask_BL.device)),
                # What corrects for vLLM's sampling scales the advantage, token by token.
                advantages_T=rows_of(inputs["advantages"])
                * rows_of(inputs.get("importance_sampling_ratio", 1.0)),
                # Without old log-probs these very weights sampled: the ratio is exactly 1.
                proximal_log_probs_T=rows_of(inputs.get("old_per_token_logps")),
                reference_log_probs_T=rows_of(inputs.get("ref_per_token_logps")),
                mask_T=mask_BL.flatten(),
                token_count=self._token_count(inputs, mask_BL),
                sequence_count=size * self._accumulation(),
                settings=self._settings(),
            )
            self._keep(output.metrics)
            return output.loss

        input_ids = torch.cat([inputs["prompt_ids"], completion_ids_BL], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return model(input_ids=input_ids, attention_mask=attention_mask, loss_of=loss_of)

    def _settings(self) -> PolicyLossSettings:
        """TRL's configuration in our words."""
        surrogate, normalisation = LOSSES[self.loss_type]
        lengths = {"luspo": 1, "dr_grpo": self.max_completion_length}
        cispo = surrogate == "cispo"  # TRL bounds the ratio itself there, not its way from 1
        return PolicyLossSettings(
            surrogate=surrogate,
            clip_low=1.0 if cispo else self.epsilon_low,
            clip_high=self.epsilon_high - 1.0 if cispo else self.epsilon_high,
            dual_clip=self.args.delta,
            sapo_temperature_positive=self.args.sapo_temperature_pos,
            sapo_temperature_negative=self.args.sapo_temperature_neg,
            temperature=self.temperature,
            correction="none",
            normalisation=normalisation,
            fixed_length=lengths.get(self.loss_type),
            ratio_level=self.importance_sampling_level,
            kl_coefficient=self.beta,
            kl_correction="importance" if self.args.use_bias_correction_kl else "none",
        )

    def _token_count(self, inputs: dict[str, Any], mask_BL: Tensor) -> Tensor:
        """Tokens of the whole update where TRL counts them there, else of this micro-batch, of
        which there are as many as are accumulated."""
        if self.loss_type not in ("dapo", "cispo"):
            return mask_BL.sum() * self._accumulation()
        count = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            count = count * self._accumulation() / self.args.steps_per_generation
        return count

    def _accumulation(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _keep(self, metrics: dict[str, Tensor]) -> None:
        kept = self._metrics["train" if self.model.training else "eval"]
        for name, value in summarise_metrics(metrics).items():
            kept[name].append(value)


def add_loss_to_forward(model: Any) -> None:
    """`model(..., loss_of=f)` returns f(last hidden states, LM head)."""
    plain = model.forward

    @wraps(type(model).forward)  # `generate` reads the signature
    def forward(*arguments: Any, loss_of: Callable[..., Tensor] | None = None, **named: Any) -> Any:
        if loss_of is None:
            return plain(*arguments, **named)
        hidden_BTH = model.base_model(*arguments, use_cache=False, **named).last_hidden_state
        return loss_of(hidden_BTH, model.get_output_embeddings())

    model.forward = forward


# ---- a run to see it work -----------------------------------------------------------------------

WORDS = ("<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz")


def tiny_policy() -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A random model of one letter a token."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    return model, tokenizer


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """The reward: the share of vowels in a completion."""
    return [
        sum(letter in "aeiou" for letter in text.split()) / max(len(text.split()), 1)
        for text in completions
    ]


def trainer_for(trainer: type[GRPOTrainer], folder: str, **changes: Any) -> GRPOTrainer:
    """A trainer of this class for the tiny policy; `changes` go to its GRPOConfig."""
    model, tokenizer = tiny_policy()
    model.save_pretrained(folder)  # with `beta`, TRL reads the reference model from where it lies
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 30,
        "logging_steps": 10,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    prompts = [" ".join(WORDS[2 + first : 5 + first]) for first in range(16)]
    return trainer(
        model=Qwen3ForCausalLM.from_pretrained(folder),
        processing_class=tokenizer,
        reward_funcs=vowels,
        args=GRPOConfig(**settings | changes),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )


def main() -> None:
    """Thirty updates; the reward rises."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(FusedGRPOTrainer, folder)
        trainer.train()
        rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
        print("reward: " + " -> ".join(f"{reward:.2f}" for reward in rewards))


if __name__ == "__main__":
    main()
