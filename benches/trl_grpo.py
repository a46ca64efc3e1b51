"""TRL's side of `end_to_end.py`: GRPOTrainer on the same questions, run by a Python that has TRL
and nothing of ours.

    PYTHON trl_grpo.py ORDER.json

The order (see `end_to_end.Order`) is a JSON file, the result is printed as the last line of the
output. `reward` is the rule of the grader `exact` for plain answers; the parent grades a sample of
the texts again with that grader.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BOX = re.compile(r"\\boxed\{([^{}]*)\}")


def reward(text: str, gold: str) -> float:
    """1 if the last box holds the gold answer, else 0."""
    boxes = BOX.findall(text)
    return float(bool(boxes) and boxes[-1].strip() == gold)


class Clock:
    """When each update ended, the generation and processor time until then, and what was
    generated."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float, float]] = []
        self.generating = 0.0
        self.tokens: list[int] = []
        self.rewards: list[float] = []
        self.texts: list[tuple[str, str, float]] = []

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[Any], **columns: Any
    ) -> list[float]:
        """The reward function that the trainer calls."""
        texts = [completion[0]["content"] for completion in completions]
        rewards = [reward(text, gold) for text, gold in zip(texts, columns["gold"], strict=True)]
        self.tokens.append(sum(map(len, completion_ids)))
        self.rewards += rewards
        self.texts += zip(texts[:4], columns["gold"][:4], rewards[:4], strict=True)
        return rewards

    def watch(self, trainer: Any) -> None:
        """Time `trainer`'s generation and the end of each update."""
        from transformers import TrainerCallback

        generate = trainer._generate

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            outcome = generate(*arguments, **named)
            self.generating += time.perf_counter() - begin
            return outcome

        class Watcher(TrainerCallback):
            def on_step_end(_, *arguments: Any, **named: Any) -> None:
                self.ends.append((time.perf_counter(), self.generating, time.process_time()))

        trainer._generate = timed
        trainer.add_callback(Watcher())


def settings(order: dict[str, Any], folder: str) -> Any:
    """The configuration that equals ours: no KL term, asymmetric clip, token-level loss, one pass
    over each sample."""
    from trl import GRPOConfig

    samples = order["questions"] * order["group_size"]
    each = samples // order["updates_per_step"]
    chosen = {
        "output_dir": folder,
        "per_device_train_batch_size": order["trl_batch"],
        "gradient_accumulation_steps": each // order["trl_batch"],
        "generation_batch_size": samples,
        "num_generations": order["group_size"],
        "max_completion_length": order["tokens"],
        "max_steps": (order["warmup"] + order["steps"]) * order["updates_per_step"],
        "learning_rate": order["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "beta": 0.0,
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "gradient_checkpointing": False,
        "torch_compile": order["trl_compile"],
        "bf16": order["trl_autocast"],
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }
    return GRPOConfig(**chosen)


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Train and return the seconds of the updates behind the warm-up."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer

    torch.set_num_threads(order["threads"])
    rows = [
        json.loads(line) for line in Path(order["prompts"]).read_text(encoding="utf-8").splitlines()
    ]
    clock = Clock()
    dtype = torch.float32 if order["trl_autocast"] else getattr(torch, order["dtype"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(order["model"], dtype=dtype),
            processing_class=AutoTokenizer.from_pretrained(order["model"]),
            reward_funcs=clock.score,
            args=settings(order, folder),
            train_dataset=Dataset.from_list(rows),
        )
        clock.watch(trainer)
        trainer.train()
    return result(order, clock)


def result(order: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Samples and tokens of the measured steps: from the end of the last update of the warm-up
    on."""
    per_step = order["updates_per_step"]
    begin, generated, used = clock.ends[order["warmup"] * per_step - 1]
    end, generated_too, used_too = clock.ends[-1]
    tokens = sum(clock.tokens[-order["steps"] :])
    rewards = clock.rewards[-order["steps"] * order["questions"] * order["group_size"] :]
    return {
        "seconds": end - begin,
        "seconds_generating": generated_too - generated,
        "processor_seconds": used_too - used,
        "updates": len(clock.ends) - order["warmup"] * per_step,
        "samples": order["steps"] * order["questions"] * order["group_size"],
        "tokens": tokens,
        "accuracy": sum(rewards) / len(rewards),
        "texts": clock.texts,
    }


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print("expected the file of one order, as end_to_end.py writes it", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
