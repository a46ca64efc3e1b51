"""Distillation steps against a Jensen-Shannon divergence written out longhand in float64, over the
whole vocabulary.

Shape legend: T response tokens, V vocabulary, K most probable tokens of the teacher.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from served import student_of, teacher_of
from torch import Tensor
from training_cases import (
    CPU,
    MODELS,
    SETTINGS,
    VOCABULARY,
    gemma2_with_soft_cap,
    group,
    llama,
    method,
    mixed_window,
    trainer_of,
    window,
)
from transformers import AutoTokenizer

from zppo.config.method import MethodConfig
from zppo.config.served import teachers
from zppo.config.topology import (
    DTYPE_BYTES,
    ActorsConfig,
    DataConfig,
    StudentConfig,
    TeacherConfig,
    Topology,
    TrainerConfig,
)
from zppo.errors import UserError
from zppo.plan.memory import (
    LOGITS_ROWS,
    RETAINED,
    SCORED_ROWS,
    SCORED_TOKENS,
    inspect_models,
    need,
)
from zppo.plan.processes import ProcessEntry
from zppo.prompting.tokenization import check_same_vocabulary
from zppo.training.batch import StalenessError, assemble
from zppo.training.distillation import Divergence
from zppo.training.metrics import TRAINER_METRICS
from zppo.training.state import build_trainer
from zppo.training.step import split, train_step
from zppo.training.trainer import Counts, Trainer
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import TokenScores, TrainGroup
from zppo_protocol.values import Sampling

STUDENT = Path(__file__).parents[3] / "examples" / "quickstart" / "student"
UNMEASURED = {
    "entropy_coefficient",
    "reference_kl",
    *(
        "clip_low_share",
        "clip_high_share",
        "dual_clip_share",
        "approximate_kl",
        "mismatch_kl",
        "seconds_proximal",
    ),
    *("importance_weight_mean", "importance_weight_max", "log_prob_gap_max"),
    *("positive_advantage_share", "live_rollout_share"),
}
"""What needs advantages or a proximal pass."""


def teacher_model(**changes: Any) -> Any:
    """Another model of the same vocabulary, wider than the student."""
    return llama(seed=7, **({"hidden_size": 24} | changes))


def distilling(
    model: Any, teacher: Any = None, temperature: float = 1.0, beta: float = 0.5, **changes: Any
) -> Trainer:
    words, loss = (
        method(jsd_beta=beta, updates_per_step=1),
        replace(SETTINGS.loss, temperature=temperature),
    )
    return trainer_of(model, teacher=teacher, objective="jsd", method=words, loss=loss, **changes)


def gradient_of(trainer: Trainer, task: TrainWindow) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the one mini-batch of a window."""
    rollouts = assemble(task, max_staleness=0, device=CPU)
    batches = split(rollouts, trainer.settings)
    objective, total = Divergence(trainer, rollouts, batches), 0.0
    trainer.gradients.clear()
    parts = trainer.micro_batches(rollouts, objective.live(batches[0]))
    counts = Counts(rollouts.tokens, rollouts.sequences, len(parts))
    for batch in parts:
        loss, _ = objective.loss(batch, counts, first=True)
        loss.backward()
        total += float(loss.detach())
    return total, {name: tensor.clone() for name, tensor in trainer.gradients.tensors().items()}


# ---- longhand ------------------------------------------------------------------------------------


def longhand_distributions(model: Any, task: TrainWindow, temperature: float = 1.0) -> Tensor:
    """Log-probs [T, V] float64 at every response token, one unpadded forward pass a rollout."""
    rows = []
    for g in task.groups:
        for part in np.split(g.samples.token_ids, g.samples.offsets[1:-1]):
            ids = torch.tensor(np.concatenate([g.samples.prompt_ids, part]), dtype=torch.int64)
            logits = model(input_ids=ids[None]).logits[0, len(g.samples.prompt_ids) - 1 : -1]
            rows.append((logits.double() / temperature).log_softmax(-1))
    return torch.cat(rows)


def longhand_jsd(student_TC: Tensor, teacher_TC: Tensor, beta: float) -> Tensor:
    """Mean over rows of beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S; the
    ends are plain KLs."""
    p_TC, q_TC = teacher_TC.exp(), student_TC.exp()
    if beta == 0.0:
        return (p_TC * (teacher_TC - student_TC)).sum(-1).mean()
    if beta == 1.0:
        return (q_TC * (student_TC - teacher_TC)).sum(-1).mean()
    mixture_TC = (beta * p_TC + (1 - beta) * q_TC).log()
    kls = beta * p_TC * (teacher_TC - mixture_TC) + (1 - beta) * q_TC * (student_TC - mixture_TC)
    return kls.sum(-1).mean()


def longhand(
    model: Any, teacher: Any, task: TrainWindow, beta: float, temperature: float
) -> tuple[float, Any]:
    """Loss and gradient by autograd through a float64 copy of the student."""
    model, teacher = copy.deepcopy(model).double(), copy.deepcopy(teacher).double()
    student_TV = longhand_distributions(model, task, temperature)
    loss = longhand_jsd(
        student_TV, longhand_distributions(teacher, task, temperature).detach(), beta
    )
    loss.backward()
    return float(loss.detach()), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def assert_close(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        scale = float(expected[1][name].abs().max())
        assert float((gradient.double() - expected[1][name]).abs().max()) < 1e-4 * scale + 1e-7, (
            name
        )


def scored(task: TrainWindow, log_probs_TV: Tensor, count: int) -> TrainWindow:
    """The window with the `count` most probable tokens of these distributions, as a remote teacher
    sends them."""
    best = log_probs_TV.topk(count)
    groups, start = [], 0
    for g in task.groups:
        rows = slice(start, start := start + len(g.samples.token_ids))
        scores = TokenScores(
            token_ids=best.indices[rows].numpy().astype(np.int32),
            log_probs=best.values[rows].detach().numpy().astype(np.float32),
        )
        groups.append(msgspec.structs.replace(g, scores=scores))
    return window(*groups, step=task.step)


def frozen(g: TrainGroup, every: int = 1) -> TrainGroup:
    """The group with every `every`-th token, and the first, written by a frozen model."""
    spans = [[1, -1 if token % every == 0 else 0] for token in range(len(g.samples.token_ids))]
    samples = msgspec.structs.replace(
        g.samples, version_spans=np.array(spans, np.int32).reshape(-1, 2)
    )
    return msgspec.structs.replace(g, samples=samples)


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.1, 0.7), (0.0, 1.0), (1.0, 1.3)])
def test_a_colocated_teacher_gives_the_longhand_loss_and_gradient(
    name: str, beta: float, temperature: float
) -> None:
    model, teacher, task = MODELS[name](), teacher_model(), mixed_window()
    trainer = distilling(model, copy.deepcopy(teacher), temperature, beta)
    assert_close(gradient_of(trainer, task), longhand(model, teacher, task, beta, temperature))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 10_000])
def test_micro_batches_and_a_soft_capped_teacher_change_nothing(micro_batch_tokens: int) -> None:
    model, teacher, task = llama(), gemma2_with_soft_cap(), mixed_window()
    trainer = distilling(model, copy.deepcopy(teacher), micro_batch_tokens=micro_batch_tokens)
    assert trainer.teacher is not None and trainer.teacher.head is not None
    assert trainer.teacher.head.soft_cap == 2.0
    assert_close(gradient_of(trainer, task), longhand(model, teacher, task, 0.5, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap"])
@pytest.mark.parametrize("beta", [0.5, 0.0])
def test_remote_scores_of_the_whole_vocabulary_are_a_colocated_teacher(
    name: str, beta: float
) -> None:
    model, teacher, task = MODELS[name](), teacher_model(), mixed_window()
    remote = scored(task, longhand_distributions(teacher, task, 0.8), VOCABULARY)
    found = gradient_of(distilling(model, None, 0.8, beta), remote)
    colocated = gradient_of(distilling(model, copy.deepcopy(teacher), 0.8, beta), task)
    assert_close(
        found, (colocated[0], {name: gradient.double() for name, gradient in colocated[1].items()})
    )


def top_k_longhand(
    model: Any, task: TrainWindow, ids_TK: Tensor, log_probs_TK: Tensor
) -> tuple[float, Any]:
    """Divergence over the K tokens and the tail as one category, in float64."""
    model = copy.deepcopy(model).double()
    student_TV = longhand_distributions(model, task)
    picked_TK = student_TV.gather(1, ids_TK)
    tails = [torch.log1p(-rows.exp().sum(-1, keepdim=True)) for rows in (picked_TK, log_probs_TK)]
    loss = longhand_jsd(
        torch.cat([picked_TK, tails[0]], 1), torch.cat([log_probs_TK, tails[1]], 1), 0.5
    )
    loss.backward()
    return float(loss.detach()), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.slow
def test_what_the_top_k_leave_is_one_more_category() -> None:
    model, task = llama(), mixed_window()
    teacher_TV = longhand_distributions(teacher_model(), task).detach()
    best = teacher_TV.topk(4)
    found = gradient_of(distilling(model), scored(task, teacher_TV, 4))
    assert_close(found, top_k_longhand(model, task, best.indices, best.values))


def widened(g: TrainGroup, ids: list[int], log_prob: float) -> TrainGroup:
    """Scores with further columns behind those that are there."""
    assert g.scores is not None
    tokens = len(g.scores.token_ids)
    more = TokenScores(
        token_ids=np.hstack([g.scores.token_ids, np.tile(np.array(ids, np.int32), (tokens, 1))]),
        log_probs=np.hstack(
            [g.scores.log_probs, np.full((tokens, len(ids)), log_prob, np.float32)]
        ),
    )
    return msgspec.structs.replace(g, scores=more)


@pytest.mark.slow
def test_padding_and_tokens_that_the_student_lacks_belong_to_the_tail() -> None:
    """Groups of unequal K in one window too: the narrower one is padded by the trainer."""
    model, task = llama(), mixed_window(count=3)
    remote = scored(task, longhand_distributions(teacher_model(), task), 4)
    changed = [
        widened(remote.groups[0], [-1], 0.0),
        widened(remote.groups[1], [VOCABULARY, 5000], -20.0),
        remote.groups[2],
    ]
    expected = gradient_of(distilling(model), remote)
    assert_close(gradient_of(distilling(model), window(*changed)), expected)


@pytest.mark.slow
def test_scores_that_are_missing_are_a_bug_and_say_so() -> None:
    task = mixed_window(count=2)
    nothing = group("e", [1.0, 0.0], lengths=[0, 0])
    scores = scored(task, longhand_distributions(teacher_model(), task), 4)
    assert train_step(distilling(llama()), window(nothing, *scores.groups))["updates"] == 1
    with pytest.raises(
        RuntimeError,
        match="group 'g0' came for distillation without the scores of a remote teacher",
    ):
        train_step(distilling(llama()), task)


# ---- the step ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_makes_one_update_of_every_token_and_measures_what_there_is() -> None:
    model, teacher, task = llama(), teacher_model(), mixed_window()
    loss, gradients = longhand(model, teacher, task, 0.5, 1.0)
    student_TV = longhand_distributions(copy.deepcopy(model).double(), task).detach()
    metrics = train_step(distilling(model, teacher), task)
    table = {metric.name for metric in TRAINER_METRICS} - {"accuracy_<kind>"}
    assert metrics.keys() == (table - UNMEASURED) | {"accuracy_plain", "accuracy_bcq"}
    assert (metrics["updates"], metrics["updates_skipped"], metrics["seconds_update"]) == (1, 0, 1)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4) and metrics["jsd"] == pytest.approx(
        loss, rel=1e-4
    )
    assert metrics["entropy"] == pytest.approx(
        float(-(student_TV.exp() * student_TV).sum(-1).mean()), rel=1e-4
    )
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["accuracy_bcq"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True])
def test_it_does_not_matter_who_wrote_the_tokens(remote: bool) -> None:
    """Not for the loss: but a stale token of the student stops the step, and a teacher's is never
    stale."""
    task = mixed_window(step=3)
    by_teacher = window(*map(frozen, task.groups), step=3)
    by_student = window(*task.groups, step=3)
    if remote:
        log_probs = longhand_distributions(teacher_model(), task)
        by_teacher, by_student = scored(by_teacher, log_probs, 4), scored(by_student, log_probs, 4)
    first, second = (
        distilling(llama(), None if remote else teacher_model(), max_staleness=3) for _ in range(2)
    )
    metrics, other = train_step(first, by_teacher), train_step(second, by_student)
    assert (metrics["staleness_max"], other["staleness_max"]) == (0, 3)
    assert metrics["jsd"] == other["jsd"] and metrics["grad_norm"] == other["grad_norm"]
    with pytest.raises(StalenessError):
        train_step(distilling(llama(), teacher_model(), max_staleness=2), by_student)


@pytest.mark.slow
def test_steps_bring_the_student_nearer_and_leave_the_teacher_alone() -> None:
    teacher, task = teacher_model(), mixed_window()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = distilling(llama(), teacher)
    divergences = [train_step(trainer, task)["jsd"] for _ in range(8)]
    assert divergences[-1] < 0.8 * divergences[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("objective", ["jsd", "clipped_surrogate"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_window_without_tokens_trains_nothing(objective: str, remote: bool) -> None:
    model = llama()
    trainer = trainer_of(model, teacher=None if remote else teacher_model(), objective=objective)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    empty = group("e", [1.0, 0.0], lengths=[0, 0])
    for task in (window(), window(empty)):
        metrics = train_step(trainer, task)
        assert (metrics["loss"], metrics["updates"], metrics["tokens_trained"]) == (0, 0, 0)
        assert not metrics.keys() & {"staleness_max", "approximate_kl", "jsd"}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_masked_rollouts_are_as_good_as_absent() -> None:
    whole = group("a", [1, 0, 1], lengths=[2, 5, 3], cut_off={1})
    kept, samples = [0, 1, 7, 8, 9], whole.samples
    part = msgspec.structs.replace(
        samples,
        token_ids=samples.token_ids[kept],
        log_probs=samples.log_probs[kept],
        offsets=np.array([0, 2, 5], np.int32),
        version_spans=np.array([[5, 0]], np.int32),
        finish_reasons=["stop", "stop"],
    )
    without = msgspec.structs.replace(whole, samples=part, rewards=whole.rewards[[0, 2]])
    words, student = method(truncated="mask", updates_per_step=1), llama()
    models = [copy.deepcopy(student), copy.deepcopy(student)]
    tasks = [window(whole), window(without)]
    trainers = [
        trainer_of(model, teacher=teacher_model(), objective="jsd", method=words)
        for model in models
    ]
    found = [train_step(trainer, task) for trainer, task in zip(trainers, tasks, strict=True)]
    assert found[0]["jsd"] == pytest.approx(found[1]["jsd"], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-5)


def test_an_empty_completion_among_others_is_no_trouble() -> None:
    metrics = train_step(
        distilling(llama(), teacher_model()), window(group("g", [1.0, 0.0], lengths=[0, 3]))
    )
    assert (metrics["updates"], metrics["tokens_trained"]) == (1, 3)


def test_prompts_are_shared_only_if_both_models_can() -> None:
    task = window(group("g", [1.0, 0.0], lengths=[3, 4]))
    rollouts = assemble(task, max_staleness=0, device=CPU)
    rows = {}
    for name, teacher in (("both", teacher_model()), ("one", gemma2_with_soft_cap())):
        (batch,) = distilling(llama(), teacher).micro_batches(rollouts, np.arange(2))
        rows[name] = len(batch.input_ids_BL)
    assert rows == {"both": 1, "one": 2}


@pytest.mark.slow
def test_a_teacher_of_another_dtype_serves() -> None:
    model, task = llama(), mixed_window()
    loss, _ = gradient_of(distilling(model, teacher_model(dtype=torch.bfloat16)), task)
    assert loss == pytest.approx(longhand(model, teacher_model(), task, 0.5, 1.0)[0], rel=0.05)


# ---- from the topology ---------------------------------------------------------------------------


def distillation(tmp_path: Path, **words: Any) -> Topology:
    """A student and a teacher on disk, of one tokenizer."""
    for name, model in (
        ("student", llama(vocab_size=64)),
        ("teacher", teacher_model(vocab_size=64)),
    ):
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(STUDENT).save_pretrained(tmp_path / name)
    return Topology(
        data=DataConfig(train="x"),
        student=StudentConfig(
            model=str(tmp_path / "student"),
            dtype="float32",
            sampling=Sampling(max_new_tokens=8, temperature=0.7),
        ),
        teacher=TeacherConfig(
            model=str(tmp_path / "teacher"),
            dtype="float32",
            scoring=words.pop("scoring", "colocated"),
        ),
        method=MethodConfig(name="on_distill", **words),
        actors=ActorsConfig(trainer=TrainerConfig(micro_batch_tokens=100)),
    )


def rename_token(folder: Path, index: int, name: str) -> None:
    """Give one token of a saved tokenizer another name."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    [old] = [token for token, at in vocabulary.items() if at == index]
    vocabulary[name] = vocabulary.pop(old)
    path.write_text(json.dumps(tokenizer))


@pytest.mark.slow
def test_the_trainer_loads_a_colocated_teacher_and_does_as_the_method_says(tmp_path: Path) -> None:
    topology = distillation(tmp_path, jsd_beta=0.3)
    trainer = build_trainer(topology, float)
    assert trainer.teacher is not None and trainer.teacher.model.config.hidden_size == 24
    assert (
        not any(p.requires_grad for p in trainer.teacher.model.parameters())
        and not trainer.teacher.model.training
    )
    settings = trainer.settings
    assert (settings.objective, settings.method.updates_per_step, settings.loss.temperature) == (
        "jsd",
        1,
        0.7,
    )
    student, teacher, task = trainer.policy.model, trainer.teacher.model, mixed_window()
    loss, _ = longhand(student, teacher, task, 0.3, 0.7)
    assert train_step(trainer, task)["jsd"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_a_remote_teacher_is_not_loaded(tmp_path: Path) -> None:
    assert build_trainer(distillation(tmp_path, scoring="remote"), float).teacher is None


@pytest.mark.slow
def test_another_vocabulary_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    topology = distillation(tmp_path)
    student, teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
    check_same_vocabulary(student_of(student), teacher_of(teacher))
    own = {
        index: token for token, index in AutoTokenizer.from_pretrained(student).get_vocab().items()
    }
    rename_token(tmp_path / "teacher", 21, "another")
    rename_token(tmp_path / "teacher", 17, "odd")
    with pytest.raises(UserError) as error:
        build_trainer(topology, float)
    assert str(error.value) == (
        f"teacher.model: the method needs one vocabulary, but token 17 is {own[17]!r} for the "
        f"student {student!r} and 'odd' for the teacher {teacher!r}"
    )


@pytest.mark.slow
def test_a_token_that_only_one_has_is_a_difference(small: Path) -> None:
    tokenizer = json.loads((small / "teacher" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 2
    (small / "teacher" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        UserError, match="token 2 is no token for the student 'student' and 'more' for the teacher"
    ):
        check_same_vocabulary(student_of("student"), teacher_of("teacher"))
    with pytest.raises(
        UserError, match="token 2 is 'more' for the student 'teacher' and no token for the teacher"
    ):
        check_same_vocabulary(student_of("teacher"), teacher_of("student"))


def test_memory_counts_the_colocated_teacher_and_its_logits(small: Path) -> None:
    def trainer_bytes(name: str, scoring: str = "colocated") -> int:
        topology = Topology(
            data=DataConfig(train="x"),
            student=StudentConfig(model="student", dtype="float32"),
            teacher=TeacherConfig(model="teacher", dtype="bfloat16", scoring=scoring),  # type: ignore[arg-type]
            method=MethodConfig(name=name),
            actors=ActorsConfig(trainer=TrainerConfig(micro_batch_tokens=100)),
        )
        plan = ProcessEntry(name="trainer", role="trainer", pool="trainer", device="cuda:0")
        return need(plan, topology, inspect_models(topology)).device

    weights, activations = 8 * DTYPE_BYTES["bfloat16"], 34 * 100 * 8 * DTYPE_BYTES["bfloat16"] // 2
    expected = math.ceil(RETAINED * (weights + activations + LOGITS_ROWS * 16 * 4))
    plain = trainer_bytes("grpo")
    assert trainer_bytes("on_distill") == plain + expected
    assert trainer_bytes("on_distill", "remote") == plain


def test_memory_counts_the_passes_of_a_teacher_that_scores(small: Path) -> None:
    def teacher_bytes(name: str, scoring: str) -> int:
        topology = Topology(
            data=DataConfig(train="x", max_prompt_tokens=24),
            student=StudentConfig(model="student"),
            teacher=TeacherConfig(model="teacher", scoring=scoring),  # type: ignore[arg-type]
            method=MethodConfig(name=name),
        )
        plan = ProcessEntry(
            name="teacher-0",
            role="teacher",
            pool="teacher",
            device="cuda:0",
            served=teachers(topology)[0],
        )
        return need(plan, topology, inspect_models(topology)).device

    one_pass = 34 * SCORED_TOKENS * 8 * DTYPE_BYTES["bfloat16"] // 2 + 2 * SCORED_ROWS * 16 * 4
    assert (
        teacher_bytes("on_distill", "remote") - teacher_bytes("on_distill", "colocated") == one_pass
    )
    assert teacher_bytes("zppo", "remote") == teacher_bytes("zppo", "colocated")
