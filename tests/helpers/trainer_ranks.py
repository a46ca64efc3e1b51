"""Several ranks of a trainer in processes of their own.

`python trainer_ranks.py` imports everything once, reads lines `COUNT FOLDER` and forks so many ranks
for each. `FOLDER/case.json` says what they train; the first leaves metrics, weights and moments in
`FOLDER/outcome.*`. A `Nest` asks for them and reads what is left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from msgspec import Struct
from recurrent_models import make_seeing
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from training_cases import OPTIMIZER, llama, mixed_window, qwen3, settings_of, trainer_of
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from zppo.config.method import MethodConfig
from zppo.data.pictures import refer
from zppo.prompting.tokenization import load_picture_layout, load_tokenizer
from zppo.training import policy, tensor_file
from zppo.training.loading import freeze_tower
from zppo.training.ranks import ALONE, Ranks, first_row, local
from zppo.training.state import MOMENTS, exhaust, gather_moments, save_share
from zppo.training.step import train_step
from zppo.training.trainer import Trainer
from zppo_protocol.messages import TrainWindow
from zppo_protocol.values import Media, VideoReference

PATIENCE = 600.0


class Case(Struct, kw_only=True):
    """Windows `first` to `last` of `groups` groups each. `begin`, `end`: folders that state is read
    from and left in. `poison`: the rank that finds a number that is none in its second pass.
    `apart`: the one that finds that prompts cannot be shared.
    `given`: so many updates of random gradients in place of windows. `full`: a checkpoint is tried
    on a full disk, in this folder, and one more window is trained. `pictures`: a folder with
    `picture.png` and the files of a model that sees; the first group of each window has it, or if
    `film` a video of three frames of it."""

    dtype: str = "float32"
    state_dtype: str = "float32"
    model: str = "qwen3"
    first: int = 0
    last: int = 3
    groups: int = 10
    micro_batch_tokens: int = 24
    recompute: bool = False
    teacher: bool = False
    method: MethodConfig = MethodConfig()
    begin: str | None = None
    end: str | None = None
    poison: int | None = None
    apart: int | None = None
    given: int = 0
    full: str | None = None
    pictures: str | None = None
    film: bool = False


class Outcome(NamedTuple):
    """Metrics of each window, whole weights and moments."""

    metrics: list[dict[str, float]]
    tensors: dict[str, Tensor]


def moe() -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, initializer_range=0.5,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def seeing() -> Any:
    """A Qwen3.5 with recurrent layers behind a frozen tower."""
    model = make_seeing(first_mark=100).requires_grad_(True)
    freeze_tower(model)
    return model


def seeing_all() -> Any:
    """The same, with a tower that is trained."""
    return make_seeing(first_mark=100).requires_grad_(True)


MODELS = {
    "qwen3": qwen3, "llama": llama, "moe": moe, "seeing": seeing, "seeing_all": seeing_all
}  # fmt: skip


def _windows(case: Case, step: int) -> TrainWindow:
    """Of the step; where the case has pictures, one of its groups has one, and on most ranks most
    passes have none."""
    window = mixed_window(step=step, count=case.groups)
    if case.pictures is None:
        return window
    folder = Path(case.pictures)
    medium: Media = refer(folder / "picture.png")
    if case.film:
        medium = VideoReference(frames=(medium,) * 3, seconds=(0.0, 0.5, 1.0))
    layout = load_picture_layout(str(folder), load_tokenizer(str(folder), "x"), "x")
    assert layout is not None
    first, *others = window.groups
    prompt_ids = np.array(
        [7, 100, *layout.expansion(medium), 101, *first.samples.prompt_ids], np.int32
    )
    tokens = int(np.isin(prompt_ids, list(layout.marks)).sum())
    samples = msgspec.structs.replace(first.samples, prompt_ids=prompt_ids, media_tokens=[tokens])
    shown = msgspec.structs.replace(first, samples=samples, media=[medium])
    return msgspec.structs.replace(window, groups=[shown, *others])


class Nest:
    """The process that the ranks are forked from, while it is entered."""

    def __enter__(self) -> Nest:
        self._process = subprocess.Popen(
            [sys.executable, __file__],  # without -P: it finds the helpers beside it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=PATIENCE)

    def trained(self, folder: Path, count: int, case: Case) -> Outcome:
        """What `count` ranks make of the case; one is trained here, without a process group."""
        folder.mkdir(parents=True)
        if count == 1:
            return train(case, ALONE)
        (folder / "case.json").write_bytes(msgspec.json.encode(case))
        ask, answer = self._process.stdin, self._process.stdout
        assert ask is not None and answer is not None
        ask.write(f"{count} {folder}\n")
        ask.flush()
        codes = json.loads(answer.readline())
        said = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(count))
        assert codes == [0] * count, said
        metrics = msgspec.json.decode((folder / "outcome.json").read_bytes())
        return Outcome(metrics, load_file(folder / "outcome.safetensors"))


def _trainer(case: Case, ranks: Ranks) -> Trainer:
    dtype = getattr(torch, case.dtype)
    optimizer = msgspec.structs.replace(OPTIMIZER, state_dtype=case.state_dtype)
    trainer = trainer_of(
        MODELS[case.model]().to(dtype),
        optimizer=optimizer,
        ranks=ranks,
        recompute=case.recompute,
        teacher=llama(seed=5) if case.teacher else None,
        reference=MODELS[case.model]().to(dtype) if case.method.kl_coefficient else None,
        micro_batch_tokens=case.micro_batch_tokens,
        max_staleness=100,
        **({"objective": "jsd"} if case.teacher else {}),
        **settings_of(case.method),
    )
    if case.pictures is not None:
        trainer.policy.open_eyes(case.pictures, train_tower=case.model == "seeing_all")
    if case.begin is not None:
        _restore(trainer, Path(case.begin))
    return trainer


@torch.no_grad()
def _restore(trainer: Trainer, folder: Path) -> None:
    weights = load_file(folder / "weights.safetensors")
    for name, parameter in trainer.policy.parameters().items():
        share = local(parameter.data)
        start = first_row(parameter)
        share.copy_(weights[name][start : start + len(share)])
    updates = int((folder / "updates").read_text())
    with tensor_file.opened(folder / "moments.safetensors") as saved:
        trainer.optimizer.load(saved, updates=updates)


def train(case: Case, ranks: Ranks) -> Outcome:
    if case.apart == ranks.rank:
        policy.can_share_prompts = lambda model: False
    trainer = _trainer(case, ranks)
    if case.poison == ranks.rank:
        _poison(trainer)
    for update in range(case.given):
        trainer.optimizer.step(_random_gradients(trainer, update))
    windows = range(0) if case.given else range(case.first, case.last)
    metrics = [train_step(trainer, _windows(case, step)) for step in windows]
    if case.full is not None:
        _save_in_vain(trainer, Path(case.full))
        metrics.append(train_step(trainer, mixed_window(step=case.last, count=case.groups)))
    weights = {name: tensor.clone() for name, tensor in trainer.policy.weights()}
    kinds = {name: tensor_file.kind_of(tensor) for name, tensor in trainer.optimizer.tensors()}
    moments = gather_moments(trainer)
    if case.end is not None and ranks.rank == 0:
        folder = Path(case.end)
        folder.mkdir()
        save_file(weights, folder / "weights.safetensors")
        (folder / "updates").write_text(str(trainer.optimizer.updates))
        tensor_file.write(folder / "moments.safetensors", kinds, moments)
        return Outcome(metrics, weights)
    tensors = weights | {name: tensor for name, tensor in zip(kinds, moments, strict=False)}
    exhaust(moments)
    return Outcome(metrics, tensors)


def _save_in_vain(trainer: Trainer, folder: Path) -> None:
    """What the first rank and the others do for a checkpoint; the disk has no room for moments."""
    weights = {name: tensor.clone() for name, tensor in trainer.policy.weights()}
    if trainer.ranks.rank > 0:
        exhaust(gather_moments(trainer))
        return
    folder.mkdir()
    (folder / MOMENTS).symlink_to("/dev/full")
    try:
        save_share(trainer, folder, step=1, weights=weights)
    except OSError:
        return
    raise AssertionError("the disk was not full")


def _random_gradients(trainer: Trainer, update: int) -> dict[str, Tensor]:
    """The same whatever the number of ranks: each takes its rows."""
    generator = torch.Generator().manual_seed(update)
    found = {}
    for name, parameter in trainer.policy.parameters().items():
        gradient = torch.randn(parameter.shape, generator=generator)
        rows, start = len(local(parameter.data)), first_row(parameter)
        found[name] = gradient[start : start + rows].contiguous()
    return found


def _poison(trainer: Trainer) -> None:
    """Let this rank alone find, in one pass of the second update, a loss that is not a number."""
    losses, outputs = [0], trainer.policy.policy_loss_of

    def spoiled(*given: Any, **arguments: Any) -> Any:
        output = outputs(*given, **arguments)
        losses[0] += 1
        if losses[0] == 2:
            object.__setattr__(output, "loss", output.loss * float("nan"))
        return output

    trainer.policy.policy_loss_of = spoiled  # type: ignore[method-assign]


def main(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=PATIENCE)
    )
    assert dist.group.WORLD is not None
    ranks = Ranks(rank, DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    case = msgspec.json.decode((folder / "case.json").read_bytes(), type=Case)
    outcome = train(case, ranks)
    assert not any(isinstance(tensor, DTensor) for tensor in outcome.tensors.values())
    if rank == 0:
        (folder / "outcome.json").write_bytes(msgspec.json.encode(outcome.metrics))
        save_file(outcome.tensors, folder / "outcome.safetensors")
    dist.destroy_process_group()


def fork(rank: int, count: int, folder: Path) -> int:
    """The process id of a rank."""
    if pid := os.fork():
        return pid
    try:
        signal.alarm(int(PATIENCE))
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        main(rank, count, folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def serve() -> None:
    """Fork ranks until the asking process has ended."""
    assert len(os.listdir("/proc/self/task")) == 1
    for line in sys.stdin:
        count, folder = line.rstrip("\n").split(" ", 1)
        ranks = [fork(rank, int(count), Path(folder)) for rank in range(int(count))]
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    serve()
