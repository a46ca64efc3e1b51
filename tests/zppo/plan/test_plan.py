"""The resolved plan: processes, window sizes, memory, and what the machine cannot give."""

from __future__ import annotations

import io
import platform
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import recurrent_models
import torch
import vision_helpers
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from zppo.algorithm.methods import method_names
from zppo.capacity.answer import answer_of, least_memory, memory_by_device
from zppo.config.load import load
from zppo.config.topology import (
    ENGINE_NAMES,
    VLLM,
    ActorConfig,
    ActorsConfig,
    DataConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    Topology,
    TrainerConfig,
)
from zppo.errors import UserError
from zppo.plan.checks import ENGINE_ARGUMENTS
from zppo.plan.machine import GIB, Machine, cpu_dtype, measure_machine
from zppo.plan.make import make_plan
from zppo.plan.memory import (
    MODEL_LIBRARIES,
    _frozen_bytes,
    _trainer_bytes,
    inspect_models,
    need,
    shared_bytes,
)
from zppo.plan.model_folder import ModelFacts, inspect_model, special_tokens, tower_numbers
from zppo.plan.processes import ProcessEntry, processes
from zppo.plan.view import show
from zppo.training.loading import tower_parameters
from zppo_actors.engines import ENGINES

MACHINE = Machine(cores=4, memory=64 * GIB, shared=8 * GIB)


SECOND_TEACHER = "more_teachers=[{model: teacher, sampling: {max_new_tokens: 8}}]"


def topology_of(small: Path, *overrides: str) -> Topology:
    return load(small / "topology.yaml", overrides)


def test_numbers_of_a_window(small: Path) -> None:
    overrides = (
        "scheduler.new_questions=4",
        "scheduler.rho_replay=0.5",
        "scheduler.rho_aug=0.25",
        "run.steps=null",
    )
    windows = make_plan(topology_of(small, *overrides), 10, MACHINE).windows
    assert (windows.new, windows.replayed, windows.reformulated, windows.steps) == (4, 2, 1, 3)
    assert (
        windows.largest_bytes == (4 + 2 + 1) * 8 * 8 * 8
    )  # groups, of 8 responses, of 8 tokens, of 8 bytes


def test_methods_without_buffer_or_reformulation_have_smaller_windows(small: Path) -> None:
    windows = make_plan(
        topology_of(small, "method.name=grpo", "scheduler.new_questions=4"), 10, MACHINE
    ).windows
    assert (windows.replayed, windows.reformulated) == (0, 0)


def test_teacher_is_not_started_without_work(small: Path) -> None:
    plan = make_plan(topology_of(small, "method.name=grpo"), 6, MACHINE)
    assert [entry.name for entry in plan.processes] == [
        "controller",
        "trainer",
        "rollout-0",
        "grader-0",
    ]
    assert "the method 'grpo' has no work for the teacher; it is not started" in plan.notes


def test_notes_say_what_may_surprise(small: Path) -> None:
    overrides = (
        "scheduler.max_staleness=0",
        "data.max_prompt_tokens=60",
        "method.hard_threshold=0",
    )
    assert make_plan(topology_of(small, *overrides), 6, MACHINE).notes == [
        "run.steps is 4, but the corpus ends after 3 (run.epochs is 1): the run ends there",
        "scheduler.rho_aug leaves no room for a single reformulated question in a window",
        "method.hard_threshold is 0: no question is ever hard, so nothing is reformulated or replayed",
        "prompts and responses may have 68 tokens together, the student's context has 64: long prompts get shorter "
        "responses",
        "method.updates_per_step is 4, more than the 2 groups that a step may have: an update takes one group at "
        "least",
        "scheduler.max_staleness is 0: sampling and training take turns, as in Algorithm 1",
    ]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ([], "student.dtype and teacher.dtype"),
        (["teacher.dtype=float32"], "student.dtype"),
        (["student.dtype=float32", "actors.teacher.devices=[cpu,'cuda:0']"], "teacher.dtype"),
        (["student.dtype=float32", "method.name=grpo"], None),
        (["student.dtype=float32", "actors.teacher.engine=simulated"], None),
        (
            ["method.name=on_distill", "teacher.scoring=colocated"],
            "student.dtype and teacher.dtype",
        ),
        (["student.dtype=float32", "actors.teacher.devices=['cuda:0']"], None),
    ],
)
def test_a_processor_that_is_slow_in_bfloat16_is_told_of(
    small: Path, settings: list[str], named: str | None
) -> None:
    here = replace(MACHINE, gpus=[64 * GIB], cards=1)
    two = ["student.dtype=bfloat16", "teacher.dtype=bfloat16", "actors.teacher.count=2"]
    topology = topology_of(small, *two, *settings)
    fast = make_plan(topology, 10, here).notes
    slow = make_plan(topology, 10, replace(here, dtype="float32")).notes
    said = [
        "this processor has no AVX-512 and is some 50 times slower in bfloat16 than in float32: "
        f"set {named} to float32"
    ]
    assert [note for note in slow if note not in fast] == (said if named else [])
    assert set(fast) <= set(slow)


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 sse4a\n", "float32"),
        ("flags : avx2 avx512f avx512bw avx512vl avx512dq\nbugs : none\n", "bfloat16"),
        ("flags : avx2 avx512f\nflags : avx512bw avx512vl avx512dq\n", "float32"),
        ("flags : avx2 avx_vnni avx_vnni_int8 avx_ne_convert\n", "bfloat16"),
        ("flags : avx2 avx_vnni\n", "float32"),
        ("processor : 0\nFeatures : fp asimd bf16\n", "bfloat16"),
        (None, "bfloat16"),
    ],
)
def test_the_dtype_of_a_processor(tmp_path: Path, text: str | None, dtype: str) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert cpu_dtype(tmp_path / "cpuinfo") == dtype


def test_the_dtype_of_this_processor_is_the_one_that_torch_has_products_for() -> None:
    if torch.backends.mkldnn.is_available() and platform.machine() == "x86_64":
        fast: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert cpu_dtype() == ("bfloat16" if fast else "float32")


@given(
    cores=st.integers(1, 256),
    rollouts=st.integers(1, 8),
    teachers=st.integers(1, 8),
    threads=st.none() | st.integers(1, 64),
)
def test_threads_are_shared_out_evenly(
    cores: int, rollouts: int, teachers: int, threads: int | None
) -> None:
    topology = Topology(
        data=DataConfig(train="q"),
        student=StudentConfig(model="s"),
        teacher=TeacherConfig(model="t"),
        actors=ActorsConfig(
            rollout=ActorConfig(count=rollouts, devices=["cpu", "cuda:1"]),
            teacher=ActorConfig(count=teachers),
            trainer=TrainerConfig(threads=threads),
        ),
    )
    table = processes(topology, cores)
    assert len({entry.name for entry in table}) == len(table) == rollouts + teachers + 3
    engines = [entry for entry in table if entry.role in ("rollout", "teacher")]
    assert len({entry.threads for entry in engines}) == 1
    shared = engines[0].threads * (len(engines) + 1)
    assert engines[0].threads == 1 or shared <= cores
    trainer = next(entry for entry in table if entry.role == "trainer")
    assert trainer.threads == (threads or engines[0].threads)
    assert [entry.device for entry in table if entry.role == "rollout"] == ["cpu", "cuda:1"] * (
        rollouts // 2
    ) + ["cpu"] * (rollouts % 2)


def test_facts_of_a_model_folder(small: Path) -> None:
    facts = inspect_model(small / "student", "student.model")
    assert (facts.parameters, facts.context, facts.layers, facts.kv_heads, facts.head_dim) == (
        8,
        64,
        1,
        2,
        4,
    )


def test_memory_of_the_trainer_by_hand(small: Path) -> None:
    topology = topology_of(small, "student.dtype=float32", "actors.trainer.micro_batch_tokens=100")
    models = inspect_models(topology)
    size = need(
        ProcessEntry(name="trainer", role="trainer", pool="trainer", device="cpu"), topology, models
    )
    weights_gradients_states = 8 * (4 + 4 + 2 + 2)
    activations = 34 * 100 * 8 * 1 * 4 // 2
    logits = 2 * 1024 * 16 * 4
    assert size.host == MODEL_LIBRARIES + 1.25 * (weights_gradients_states + activations + logits)


def test_memory_goes_to_the_device(small: Path) -> None:
    topology = topology_of(small)
    models = inspect_models(topology)
    rollout = next(one for one in processes(topology, 1) if one.role == "rollout")
    on_cpu = need(replace(rollout, device="cpu"), topology, models)
    on_gpu = need(replace(rollout, device="cuda:0"), topology, models)
    assert (on_gpu.host, on_gpu.device) == (MODEL_LIBRARIES, on_cpu.host - MODEL_LIBRARIES)
    cache = (
        64 * (24 + 8) * 1 * 2 * 2 * 4 * 2
    )  # sequences, length, layers, keys and values, heads, width, bytes
    assert on_gpu.device == 8 * 2 + cache + 64 * 16 * 4


@pytest.mark.parametrize(
    ("engine", "arguments", "least"),
    [
        ("transformers", "{}", False),
        ("simulated", "{}", False),
        (VLLM, "{}", True),
        (VLLM, "{kv_cache_memory_bytes: 1000000}", False),
        ("their_engines:Fast", "{}", True),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_least_that_an_engine_needs_is_no_upper_estimate(
    small: Path, engine: str, arguments: str, least: bool, device: str
) -> None:
    topology = topology_of(
        small,
        f"actors.rollout.engine={engine}",
        f"actors.rollout.devices=['{device}']",
        f"actors.rollout.engine_args={arguments}",
    )
    models, table = inspect_models(topology), processes(topology, 1)
    sizes = {entry.role: need(entry, topology, models) for entry in table}
    on_host, on_card = sizes["rollout"].host_least, sizes["rollout"].device_least
    assert (on_host, on_card) == (least and device == "cpu", least and device != "cpu")
    assert not any(
        size.host_least or size.device_least for role, size in sizes.items() if role != "rollout"
    )


def test_the_end_of_a_long_path_is_shown(small: Path) -> None:
    out = io.StringIO()
    show(
        make_plan(topology_of(small), 10, MACHINE), small / ("a" * 200), Console(file=out, width=60)
    )
    assert "a" * 200 in "".join(line[16:].rstrip() for line in out.getvalue().splitlines())


def test_a_plan_says_where_it_shows_the_least(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "zppo.plan.checks.check_vllm_arguments", lambda served: None
    )  # vLLM need not be installed
    overrides = ["actors.rollout.engine=vllm", "actors.rollout.engine_args={max_model_len: 64}"]
    out = io.StringIO()
    plan = make_plan(topology_of(small, *overrides), 10, MACHINE)
    show(plan, small, Console(file=out, width=200))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert "memory          3.6 GiB at least on the host, 48 bytes of it published weights" in lines
    [engine] = [line for line in lines if "rollout-0" in line]
    assert engine.split("│")[5].strip() == "at least 2.2 GiB"
    answer = answer_of(plan, str(small), None)
    assert [process.name for process in answer.processes if process.host_least] == ["rollout-0"]
    assert memory_by_device(plan).keys() == {"host"} and least_memory(plan) == ["host"]


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_published_versions_in_shared_memory(small: Path, staleness: int) -> None:
    topology = topology_of(small, f"scheduler.max_staleness={staleness}")
    assert (
        shared_bytes(
            topology.student,
            inspect_models(topology).student,
            topology.scheduler.max_staleness,
        )
        == (staleness + 2) * 8 * 2
    )


REFUSALS = [
    (
        (),
        replace(MACHINE, memory=GIB),
        "the plan needs 1.8 GiB of memory but 1.0 GiB are free; the largest part is trainer with 0.4 GiB",
    ),
    (
        ("scheduler.max_staleness=1000000000",),
        replace(MACHINE, memory=GIB),
        "the plan needs 16.7 GiB of memory but 1.0 GiB are free; the largest part is the published "
        "weights (scheduler.max_staleness) with 14.9 GiB",
    ),
    (
        (),
        replace(MACHINE, shared=7),
        "the plan keeps weights of 48 bytes in the runtime folder but 7 bytes are free there; lower "
        "scheduler.max_staleness or set ZPPO_RUNTIME_DIR to a larger folder",
    ),
    (
        ("actors.rollout.devices=[cuda:1]",),
        replace(MACHINE, gpus=[GIB]),
        "actors.rollout.devices names 'cuda:1'; this machine has 1 CUDA devices",
    ),
    (
        ("actors.trainer.device=cuda",),
        replace(MACHINE, gpus=[], cards=2),
        "actors.trainer.device names 'cuda'; this machine has 0 CUDA devices that torch can use, of 2 "
        "cards; expected a torch that was built for CUDA, and a CUDA_VISIBLE_DEVICES, if it is set, "
        "that names them",
    ),
    (
        ("actors.trainer.device=cuda", "actors.trainer.micro_batch_tokens=1000000"),
        replace(MACHINE, gpus=[GIB // 8]),
        "the plan needs 0.3 GiB on cuda:0 but 0.1 GiB are free; the largest part is trainer with 0.3 "
        "GiB; try actors.trainer.gradient_checkpointing or a smaller actors.trainer.micro_batch_tokens",
    ),
    (
        # Two states and the weights, 6 bytes for each of 8 parameters; rollouts of 4 steps, in each
        # 2 new questions, groups of 8, 8 tokens and 64 bytes beside them.
        ("checkpoints.keep=4",),
        replace(MACHINE, disk=5 * 8 * 6 + 4 * 2 * 8 * (8 + 64) - 1),
        "the run writes 4.7 KiB into run.directory, 5 checkpoints of 48 bytes and 4.5 KiB of "
        "rollouts, but 4.7 KiB are free there; lower checkpoints.keep, set sinks.rollouts to "
        "false, or name a run.directory on a larger disk",
    ),
    (
        ("transport.max_message_mib=1", "scheduler.new_questions=3000"),
        MACHINE,
        "transport.max_message_mib is 1; expected at least 3, the size of a window whose responses all have full "
        "length",
    ),
    (
        # 4 new questions, one replayed, one reformulated, groups of 8, 8 tokens each; without its
        # supports the window has 0.002 MiB.
        (
            "student.sampling.min_p=0.1",
            "student.sampling.support_limit=4000",
            "scheduler.new_questions=4",
            "transport.max_message_mib=4",
        ),
        MACHINE,
        "transport.max_message_mib is 4; expected at least 6, the size of a window whose responses all have full "
        "length and all tokens a support of 4000 ids (student.sampling.support_limit)",
    ),
]


def test_ranks_are_processes_with_a_device_and_a_share_of_the_memory(small: Path) -> None:
    cards = replace(MACHINE, gpus=[GIB, GIB])
    ranks = "actors.trainer={devices: ['cuda:0', 'cuda:1'], micro_batch_tokens: 64}"
    plan = make_plan(topology_of(small, ranks), 6, cards)
    found = [(entry.name, entry.role, entry.device) for entry in plan.processes[1:3]]
    assert found == [("trainer", "trainer", "cuda:0"), ("trainer-1", "rank", "cuda:1")]
    first, second = plan.needs[1:3]
    assert first == second and first.device > 0


def test_a_rank_needs_less_than_the_whole_and_more_than_its_share() -> None:
    """Of a model of 8B parameters with states in bfloat16, 10 bytes a parameter, on 8 ranks."""
    student = StudentConfig(model="x")
    alone, eight = TrainerConfig(micro_batch_tokens=1), TrainerConfig(micro_batch_tokens=1, ranks=8)
    facts = ModelFacts(
        parameters=8_000_000_000, context=4096, hidden=4096, layers=32, kv_heads=8, head_dim=128,
        vocabulary=150_000, tied=False,
    )  # fmt: skip
    whole, share = (_trainer_bytes(t, student, OptimizerConfig(), facts) for t in (alone, eight))
    gathered = 2 * 150_000 * 4096 + 2 * (8_000_000_000 - 2 * 150_000 * 4096) // 32
    assert whole - share == pytest.approx(1.25 * (80e9 * 7 / 8 - 6 * gathered), rel=1e-6)


@pytest.mark.parametrize("helpers", [vision_helpers, recurrent_models])
def test_the_tower_is_what_transformers_has_outside_of_the_language_model(
    tmp_path: Path, helpers: Any
) -> None:
    model = helpers.make_seeing()
    folder = helpers.save_seeing(model, tmp_path / "model")
    expected = sum(one.numel() for _, one in tower_parameters(model))
    assert expected > 0 and inspect_model(folder, "student.model").tower == expected


def test_the_tower_by_names_of_folders_as_they_were_published() -> None:
    """Qwen2-VL's names, LLaVA's, and those of a language model alone, which has none."""
    qwen = {"visual.blocks.0.attn.proj.weight": 5, "model.layers.0.mlp.up_proj.weight": 7}
    head = {"model.embed_tokens.weight": 3, "model.norm.weight": 2, "lm_head.weight": 3}
    llava = {"vision_tower.vision_model.layers.0.weight": 5, "multi_modal_projector.bias": 1}
    words = {"language_model.model.layers.0.weight": 7, "language_model.lm_head.weight": 3}
    assert [tower_numbers(one) for one in (qwen | head, llava | words, head)] == [5, 6, 0]


def test_what_other_programs_read_is_named(tmp_path: Path) -> None:
    expected = (
        "expected a folder with config.json, a tokenizer and *.safetensors, as save_pretrained or "
        "`hf download` writes it"
    )
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for named, problem in (
        (file, f"is a file; {expected}"),
        (tmp_path, f"is not a model folder: it has no config.json but *.gguf; {expected}"),
    ):
        with pytest.raises(UserError) as caught:
            inspect_model(named, "student.model")
        assert str(caught.value) == f"student.model: {str(named)!r} {problem}"


def test_a_frozen_tower_has_weights_alone_and_lies_whole_on_every_rank() -> None:
    """Of 9B parameters, 1B of them in the tower, with states in bfloat16: 2 bytes a frozen one, 10
    a trained one."""
    facts = ModelFacts(
        parameters=9_000_000_000, tower=1_000_000_000, context=4096, hidden=4096, layers=32,
        kv_heads=8, head_dim=128, vocabulary=150_000,
    )  # fmt: skip
    frozen, trained = (StudentConfig(model="x", train_tower=trains) for trains in (False, True))
    gathered = 6 * (150_000 * 4096 + 2 * (8_000_000_000 - 150_000 * 4096) // 32)

    def state(student: StudentConfig, ranks: int) -> float:
        trainer = TrainerConfig(micro_batch_tokens=1, ranks=ranks)
        rest = 34 * 4096 * 2 // 2 + 32 * 4096 * 2 + 2 * 1024 * 150_000 * 4  # and logits
        return _trainer_bytes(trainer, student, OptimizerConfig(), facts) / 1.25 - rest

    assert state(frozen, 1) == pytest.approx(80e9 + 2e9, rel=1e-3)
    assert state(trained, 1) == pytest.approx(90e9, rel=1e-3)
    assert state(frozen, 4) == pytest.approx(80e9 / 4 + 2e9 + gathered, rel=1e-3)
    assert state(trained, 4) == pytest.approx(90e9 / 4 + gathered, rel=1e-3)
    reference = _frozen_bytes(TrainerConfig(micro_batch_tokens=1, ranks=4), frozen, facts)
    assert reference / 1.25 == pytest.approx((8e9 / 4 + 1e9 + gathered / 6) * 2, rel=0.15)


@pytest.mark.parametrize(("overrides", "machine", "sentence"), REFUSALS)
def test_what_the_machine_cannot_give(
    small: Path, overrides: tuple[str, ...], machine: Machine, sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(topology_of(small, *overrides), 3000, machine)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("overrides", "checkpoint", "checkpoints", "rollouts"),
    [
        ((), 8 * (2 + 2 * 2), 3, 64 * (8 + 64)),
        (("student.dtype=float32", "sinks.rollouts=false"), 8 * (4 + 2 * 2), 3, 0),
        (("optimizer.state_dtype=float32", "run.steps=1"), 8 * (2 + 2 * 4), 3, 16 * (8 + 64)),
        (("checkpoints.keep=1", "scheduler.rho_replay=0.5"), 48, 2, 96 * (8 + 64)),
    ],
)
def test_disk_of_a_run_by_hand(
    small: Path, overrides: tuple[str, ...], checkpoint: int, checkpoints: int, rollouts: int
) -> None:
    disk = make_plan(topology_of(small, *overrides), 3000, MACHINE).disk
    assert (disk.checkpoint, disk.checkpoints, disk.rollouts) == (checkpoint, checkpoints, rollouts)
    enough = checkpoint * checkpoints + rollouts
    make_plan(topology_of(small, *overrides), 3000, replace(MACHINE, disk=enough))
    with pytest.raises(UserError, match=r"the run writes .* into run\.directory"):
        make_plan(topology_of(small, *overrides), 3000, replace(MACHINE, disk=enough - 1))


def test_free_disk_counts_what_a_continued_run_has_there(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    machine = measure_machine(1, tmp_path, run_dir, False)
    assert abs(machine.disk - shutil.disk_usage(tmp_path).free) < GIB
    (run_dir / "checkpoints/step-1").mkdir(parents=True)
    with (run_dir / "checkpoints/step-1/model").open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert measure_machine(1, tmp_path, run_dir, False).disk > machine.disk + (1 << 39)


def test_cards_are_asked_by_another_process_and_their_driver_s_refusal_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks a card holds some of it, and `zppo compare` stays."""
    assert measure_machine(1, tmp_path, tmp_path, True).gpus == [
        torch.cuda.mem_get_info(one)[0] for one in range(torch.cuda.device_count())
    ]
    monkeypatch.setattr("zppo.plan.cards.ASK", "print('a note'); print([7, 5])")
    assert measure_machine(1, tmp_path, tmp_path, True).gpus == [7, 5]
    assert measure_machine(1, tmp_path, tmp_path, False).gpus == []
    old = "The NVIDIA driver on your system is too old (found version 12020)."
    monkeypatch.setattr("zppo.plan.cards.ASK", f"raise RuntimeError({old!r})")
    with pytest.raises(UserError) as caught:
        measure_machine(1, tmp_path, tmp_path, True)
    assert str(caught.value) == (
        f"torch cannot use the GPUs of this machine (RuntimeError: {old}); expected cards that are "
        "free to use and a driver that suits this torch (nvidia-smi shows both)"
    )


SERVER = (
    "actors.teacher.engine=openai",
    "actors.teacher.engine_args={base_url: http://127.0.0.1:9/v1, model: m}",
)
REMOTE = ("method.name=on_distill", "teacher.scoring=remote")
METHOD_REFUSALS = [
    (
        (SECOND_TEACHER.replace("8", "64"),),
        "more_teachers[0].sampling.max_new_tokens is 64; expected less than 64, the context of "
        "'{small}/teacher'",
    ),
    (
        ("method.name=off_distil",),
        "method.name: there is no method 'off_distil' (did you mean 'off_distill'?); or name "
        "package.module:name or ./file.py:name",
    ),
    (
        ("method.name=grpo", "method.group_size=1"),
        "method.group_size is 1; expected at least 2, because a group of one has no advantage",
    ),
    (
        ("method.name=on_distill", "teacher=null"),
        "teacher: is missing; expected a section, because the method 'on_distill' needs a teacher",
    ),
    (
        ("method.name=off_distill", *SERVER),
        "actors.teacher.engine is 'openai'; expected 'transformers' or 'vllm', because the method 'off_distill' trains "
        "on the teacher's tokens, and a server gives text alone",
    ),
    (
        ("method.name=grpo_replay_teacher_response", *SERVER),
        "actors.teacher.engine is 'openai'; expected 'transformers' or 'vllm', because the method "
        "'grpo_replay_teacher_response' trains on the teacher's tokens, and a server gives text alone",
    ),
    (
        (*REMOTE, *SERVER),
        "actors.teacher.engine is 'openai'; expected 'transformers' or 'vllm', because the method 'on_distill' needs a "
        "teacher that scores tokens, and a server gives text alone",
    ),
    (
        (*REMOTE, "actors.teacher.count=0"),
        "actors.teacher.count is 0; expected at least 1, because the run asks the teacher",
    ),
    (
        (*REMOTE, "actors.teacher.engine_args={max_sequences: 7}"),
        "actors.teacher.engine_args.max_sequences is 7; expected at least 8, the method.group_size, because a group is "
        "sampled as a whole",
    ),
    (
        ("evaluation.sampling={temperature: 1e-300}",),
        "evaluation.sampling.temperature is 1e-300; expected 0, which is greedy, or at least 0.001, because logits are "
        "divided by it",
    ),
    (
        ("scheduler.rho_aug_max=0.125",),
        "scheduler.rho_aug_max is 0.125; expected null or at least 0.25, scheduler.rho_aug",
    ),
    (
        ("method.name=on_distill", "method.dynamic_sampling=true"),
        "method.dynamic_sampling is true; expected false, because 'on_distill' learns from answers that are all right "
        "or all wrong as well",
    ),
    (
        ("method.name=on_distill", "more_teachers=[{model: teacher}]"),
        "more_teachers: expected none, because 'on_distill' learns the distribution of a single teacher",
    ),
    (
        ("method.name=grpo", "teacher=null", "more_teachers=[{model: teacher}]"),
        "more_teachers: there are some, but no section teacher; expected the first one there",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), METHOD_REFUSALS)
def test_what_a_method_cannot_be_run_with(
    small: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(topology_of(small, *overrides), 6, MACHINE)
    assert str(caught.value) == sentence.replace("{small}", str(small))


@pytest.mark.parametrize(("temperature", "refused"), [(0.7, True), (1, False)])
def test_vllm_scores_at_temperature_1_alone(
    small: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, refused: bool
) -> None:
    monkeypatch.setattr(
        "zppo.plan.checks.check_vllm_arguments", lambda *given: None
    )  # vLLM need not be installed
    overrides = (
        *REMOTE,
        "actors.teacher.engine=vllm",
        f"student.sampling.temperature={temperature}",
    )
    try:
        make_plan(topology_of(small, *overrides), 6, MACHINE)
    except UserError as error:
        assert refused and str(error) == (
            "student.sampling.temperature is 0.7; expected 1, because 'vllm' scores tokens at temperature 1 alone (or "
            "set teacher.scoring to colocated)"
        )
    else:
        assert not refused


@pytest.mark.parametrize(
    ("sampling", "most", "expected"),
    [("top_p=0.9", 127, 128), ("top_k=5", 4, 5), ("top_k=500", 100, 128), ("top_k=5", 5, None)],
)
def test_vllm_must_be_let_report_the_largest_support(
    small: Path, monkeypatch: pytest.MonkeyPatch, sampling: str, most: int, expected: int | None
) -> None:
    monkeypatch.setattr("zppo.plan.checks.check_vllm_arguments", lambda *given: None)
    overrides = (
        "actors.rollout.engine=vllm",
        f"actors.rollout.engine_args={{max_logprobs: {most}, enable_chunked_prefill: false}}",
        f"student.sampling.{sampling}",
    )
    try:
        make_plan(topology_of(small, *overrides), 6, MACHINE)
    except UserError as error:
        assert str(error) == (
            f"actors.rollout.engine_args.max_logprobs is {most}; expected at least {expected}, the "
            "tokens that one may be sampled from (student.sampling.top_k, support_limit)"
        )
    else:
        assert expected is None


@pytest.mark.parametrize(
    "overrides",
    [
        ("student.sampling.top_p=0.9",),
        ("student.sampling.top_k=5", "student.sampling.min_p=0.1"),
        (*REMOTE, "student.sampling.top_p=0.9"),
        (*REMOTE, "method.name=off_distill"),
        (*REMOTE, "actors.teacher.engine_args={max_sequences: 8}"),
        (
            "method.name=on_distill",
            *SERVER,
        ),  # its teacher writes nothing, and the trainer has a copy of it
        ("method.name=hint", *SERVER),
        ("method.name=prefix", *SERVER),
        ("method.name=zppo", "method.dynamic_sampling=true", "scheduler.rho_aug_max=0.25"),
        ("method.name=grpo_replay_teacher_response", SECOND_TEACHER),
    ],
)
def test_what_a_method_can_be_run_with(small: Path, overrides: tuple[str, ...]) -> None:
    assert make_plan(topology_of(small, *overrides), 6, MACHINE).method.name in method_names()


@pytest.mark.parametrize(
    ("overrides", "teacher"),
    [
        (("method.name=on_distill",), False),
        (REMOTE, True),
        (("method.name=off_distill",), True),
        (("method.name=grpo_replay",), False),
    ],
)
def test_the_teacher_is_started_where_it_has_work(
    small: Path, overrides: tuple[str, ...], teacher: bool
) -> None:
    plan = make_plan(topology_of(small, *overrides), 6, MACHINE)
    assert ("teacher-0" in [entry.name for entry in plan.processes]) == teacher


def test_remote_scores_make_larger_windows(small: Path) -> None:
    overrides = ("method.name=on_distill", "scheduler.new_questions=4", "teacher.score_top_k=16")
    colocated = make_plan(topology_of(small, *overrides), 10, MACHINE).windows.largest_bytes
    remote = make_plan(
        topology_of(small, *overrides, "teacher.scoring=remote"), 10, MACHINE
    ).windows.largest_bytes
    assert remote == 17 * colocated  # a token and its log-prob, and as much for each of the 16


def test_an_adaptive_cap_makes_room_for_the_largest_window(small: Path) -> None:
    overrides = (
        "scheduler.new_questions=4",
        "scheduler.rho_aug=0.25",
        "scheduler.rho_aug_max=0.75",
    )
    assert make_plan(topology_of(small, *overrides), 10, MACHINE).windows.reformulated == 3


def test_what_vllm_takes_of_a_card_it_shares(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "zppo.plan.checks.check_vllm_arguments", lambda *given: None
    )  # vLLM need not be installed
    overrides = [
        "method.name=grpo",
        "actors.trainer.device=cuda:0",
        "actors.rollout.devices=['cuda:0']",
    ]
    overrides += ["actors.rollout.engine=vllm", "actors.trainer.micro_batch_tokens=1000000"]
    machine = replace(MACHINE, gpus=[16 * GIB])
    shared = "actors.rollout.engine_args={max_model_len: 64, gpu_memory_utilization: 0.4}"
    assert make_plan(topology_of(small, *overrides, shared), 10, machine)
    cache = "actors.rollout.engine_args={max_model_len: 64, kv_cache_memory_bytes: 1000000}"
    assert make_plan(topology_of(small, *overrides, cache), 10, machine)
    greedy = "actors.rollout.engine_args={max_model_len: 64, gpu_memory_utilization: 0.999}"
    with pytest.raises(UserError) as caught:
        make_plan(topology_of(small, *overrides, greedy), 10, machine)
    assert (
        "the largest part is rollout-0 with 16.0 GiB; try fewer or shorter sequences, and with vLLM a smaller"
        in str(caught.value)
    )


def test_a_card_that_nobody_uses_is_mentioned(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr("zppo.plan.machine.NVIDIA", tmp_path / "gpus")
    note = "every device is cpu, though this machine has 1 GPU: see actors.trainer.device and actors.rollout.devices"
    machine = replace(MACHINE, cards=measure_machine(1, tmp_path, tmp_path, False).cards)
    assert note in make_plan(topology_of(small), 10, machine).notes
    used = topology_of(small, "actors.teacher.devices=[cuda]")
    assert note not in make_plan(used, 10, replace(machine, gpus=[8 * GIB])).notes
    with pytest.raises(UserError, match="no setting names a GPU"):
        make_plan(topology_of(small), 10, replace(machine, memory=GIB))


def test_ncq_without_a_teacher_says_who_shortens_the_candidates(small: Path) -> None:
    note = "there is no teacher: candidates are shortened by rule, not compressed as in the paper"
    assert (
        note
        in make_plan(
            topology_of(small, "method.name=grpo_replay_ncq", "teacher=null"), 10, MACHINE
        ).notes
    )
    assert (
        note not in make_plan(topology_of(small, "method.name=grpo_replay_ncq"), 10, MACHINE).notes
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "student.chat_template_kwargs={tokenize: false}",
            "student.chat_template_kwargs.tokenize cannot be set: it is always true",
        ),
        (
            "teacher.compression_chat_template_kwargs={tools: null}",
            "teacher.compression_chat_template_kwargs.tools cannot be set: prompts have none",
        ),
        (
            "teacher.chat_template_kwargs={enable-thinking: false}",
            "teacher.chat_template_kwargs: 'enable-thinking' is no variable of a template; expected a name such as "
            "enable_thinking",
        ),
    ],
)
def test_only_variables_of_templates_can_be_set(small: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(topology_of(small, override), 10, MACHINE)
    assert str(caught.value) == sentence


def test_every_engine_can_be_planned_for() -> None:
    # The arguments of vLLM are vLLM's own.
    assert {*ENGINE_ARGUMENTS, VLLM} == set(ENGINES) == set(ENGINE_NAMES)


def test_only_what_no_text_holds_by_chance_is_a_special_token(tmp_path: Path) -> None:
    """A model writes brackets, blanks and numbers, whatever a tokenizer calls them."""
    marks, words = {"</s>", "[INST]", "<unk>"}, ["", "[", "▁", "\n\n\n", "    ", "123", "user"]
    tokens = [{"content": word, "special": True} for word in [*marks, *words]]
    tokens.append({"content": "<tool_call>", "special": False})
    (tmp_path / "tokenizer.json").write_bytes(msgspec.json.encode({"added_tokens": tokens}))
    assert special_tokens([tmp_path, tmp_path / "none"]) == marks
