"""A described cluster: what `--machines` takes, what it refuses, and the paper's layout as its plan
shows it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from zppo import launch, plan_command
from zppo.config.load import load
from zppo.errors import UserError
from zppo.plan.cluster_view import span
from zppo.plan.machine import GIB
from zppo.plan.machines_file import Described, read_machines
from zppo.plan.plan import Plan

ROOT = Path(__file__).resolve().parents[3]
PAPER, MACHINES = ROOT / "examples/paper.yaml", ROOT / "examples/paper.machines.yaml"
GOLDEN = Path(__file__).parent / "paper_plan.txt"
CONFIG = "{model_type: qwen3, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 16, max_position_embeddings: 64}"
TINY = f"""
hosts:
  localhost: {{cards: 0, memory_gib: 16, cores: 4}}
questions: 6
models:
  student: {{config: {CONFIG}, tensors: {{BF16: 1000}}}}
  teacher: {{config: {CONFIG}, tensors: {{BF16: 1000}}}}
"""


def plan_of(*overrides: str, file: Path = MACHINES) -> Plan:
    return Described.of(load(PAPER, overrides), file, PAPER.parent).plan()


@pytest.fixture
def tiny(small: Path) -> Path:
    """The small topology whose models and questions are not there."""
    for name in ("student", "teacher"):
        shutil.rmtree(small / name)
    (small / "train.jsonl").unlink()
    (small / "m.yaml").write_text(TINY)
    return small


# ---- the paper's layout --------------------------------------------------------------------------


def test_the_paper_s_layout_as_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word. `python -m zppo.launch examples/paper.yaml --dry-run --machines
    examples/paper.machines.yaml` shows what is new."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    assert launch.main([str(PAPER), "--dry-run", "--machines", str(MACHINES)]) == 0
    shown = capsys.readouterr().out
    for folder, name in ((tmp_path, "HERE"), (ROOT / "examples", "EXAMPLES")):
        shown = shown.replace(str(folder), name)
    lines = [line.rstrip() for line in shown.splitlines()]
    told, kept = [], True
    for line in lines:  # long paths of this machine wrap elsewhere than short ones
        kept = (
            kept if line.startswith(" ") else not line.startswith(("run ", "student ", "teacher "))
        )
        told += [line] if kept else []
    assert "\n".join(told) + "\n" == GOLDEN.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "trainer", "rollout", "published"),
    [("0.8B", 7.4, 3.7, 6.4), ("2B", 13.2, 6.2, 16.5), ("4B", 18.4, 11.1, 33.8), ("9B", 36.5, 20.1, 70.1)],
)  # fmt: skip
def test_every_student_of_the_paper_fits(
    size: str, trainer: float, rollout: float, published: float
) -> None:
    plan = plan_of(f"student.model=models/Qwen3.5-{size}")
    by_role = {
        entry.role: round(need.device / GIB, 1)
        for entry, need in zip(plan.processes, plan.needs, strict=True)
        if need.device
    }
    assert by_role == {"trainer": trainer, "rank": trainer, "rollout": rollout, "teacher": 31.8}
    assert {round(host.shared / GIB, 1) for host in plan.hosts} == {published}
    assert [len(host.cards) for host in plan.hosts] == [8] * 8


def test_the_teacher_in_fp8_takes_its_stored_bytes_and_a_cache() -> None:
    plan = plan_of()
    teacher = next(
        need
        for entry, need in zip(plan.processes, plan.needs, strict=True)
        if entry.role == "teacher"
    )
    stored = 24_326_963_200 + 2 * 3_031_250_160
    # 16 of 64 layers keep keys and values of 4 heads of 256, 2 bytes each; 48 keep a state, in a
    # page as large as a block of keys and values, which therefore has 7 times 128 tokens.
    state, a_token = (48 * 128 * 128 + (2 * 16 * 128 + 48 * 128) * 4) * 4, 2 * 4 * 256 * 2
    page = 7 * 128 * a_token
    assert 6 * 128 * a_token < state < page
    blocks = 28 + 1  # of 24,576 tokens, and vLLM's own
    cache = (16 * blocks + 48) * page
    assert teacher.device == stored + cache + (1800 << 20)


def test_two_cards_share_an_engine() -> None:
    alone = plan_of().hosts[1].cards["cuda:6"]
    both = plan_of(
        "actors.teacher.count=8",
        "actors.teacher.devices=[cuda:6]",
        "actors.teacher.engine_args={tensor_parallel_size: 2, max_model_len: 24576}",
    ).hosts[1]
    libraries = 1800 << 20
    assert both.cards["cuda:6"] == both.cards["cuda:7"]
    assert both.cards["cuda:6"] - libraries == pytest.approx((alone - libraries) / 2, abs=1)


def test_one_host_s_shortage_is_named() -> None:
    for override, sentence in (
        (
            "cluster.hosts.node-3.cards=6",
            None,  # the file's word counts before
        ),
        (
            "scheduler={max_staleness: 60, lease_seconds: 900}",
            "node-0: the plan keeps weights of 1086.7 GiB in the runtime folder but 950.0 GiB are "
            "free there; lower scheduler.max_staleness or set ZPPO_RUNTIME_DIR to a larger folder",
        ),
        (
            "actors.trainer.micro_batch_tokens=150000",
            "node-0: the plan needs 95.1 GiB on cuda:0 but 79.0 GiB are free; the largest part is "
            "trainer with 95.1 GiB; try actors.trainer.gradient_checkpointing or a smaller "
            "actors.trainer.micro_batch_tokens",
        ),
        (
            "actors.rollout={engine: vllm, count: 8, devices: ['cuda:8'], hosts: [node-0, node-1]}",
            "actors.rollout.devices names 'cuda:8'; 'node-0' has 8 CUDA devices",
        ),
        (
            "checkpoints.keep=100",
            "the run writes 5149.8 GiB into run.directory, 101 checkpoints of 50.9 GiB and 10.6 GiB "
            "of rollouts, but 4000.0 GiB are free there; lower checkpoints.keep, set sinks.rollouts "
            "to false, or name a run.directory on a larger disk",
        ),
    ):
        if sentence is None:
            plan_of(override)
            continue
        with pytest.raises(UserError) as caught:
            plan_of(override)
        assert str(caught.value) == sentence


# ---- hosts ---------------------------------------------------------------------------------------


def test_a_second_host_alone_holds_no_weights() -> None:
    """Weights are published once to each host that has an engine of the student, or the first
    rank."""
    plan = plan_of(
        "student.model=models/Qwen3.5-0.8B",
        "actors.rollout.hosts=[node-0]",
        "actors.rollout.count=3",
        "actors.trainer.hosts=[node-0]",
    )
    assert [host.shared > 0 for host in plan.hosts] == [True, *[False] * 7]


def test_what_is_not_said_of_a_host_is_a_note(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    text = MACHINES.read_text(encoding="utf-8")
    file.write_text(text.replace("  node-7: *node\n", ""))
    with pytest.raises(UserError) as caught:
        plan_of(file=file)
    assert str(caught.value) == (
        f"{file}: hosts.node-7 is missing; expected what it has, because the topology places "
        "processes there (did you mean 'node-6'?)"
    )
    facts = "{address: node-7, cards: 8, card_gib: 79, memory_gib: 1900, cores: 112}"
    plan_of(f"cluster.hosts.node-7={facts}", file=file)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([f"node-{i}" for i in range(8)], "node-0 … node-7"),
        (["a1", "a2"], "a1, a2"),
        (["a1", "a2", "a4"], "a1, a2, a4"),
        (["a", "b", "c"], "a, b, c"),
        (["a1", "2", "3"], "a1, 2, 3"),
        ([], ""),
    ],
)
def test_names_that_follow_one_another(names: list[str], shown: str) -> None:
    assert span(names) == shown


# ---- the file ------------------------------------------------------------------------------------


def test_nothing_of_this_machine_is_looked_at(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def looked(*given: object) -> None:
        raise AssertionError

    for name in (
        "zppo.launch.measure_machine",
        "zppo.launch.load_questions",
        "zppo.launch.ask_servers",
    ):
        monkeypatch.setattr(name, looked)  # fmt: skip
    monkeypatch.chdir(tiny)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    arguments = "{base_url: 'http://127.0.0.1:9/v1', api_key_env: NO_SUCH_KEY}"
    server = f"actors.teacher={{engine: openai, engine_args: {arguments}}}"
    for overrides in ((), ("--set", server)):
        command = ["topology.yaml", "--machines", "m.yaml", *overrides]
        assert launch.main([*command, "--dry-run"]) == 0
        capsys.readouterr()
        assert plan_command.main([*command, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["processes"][0]["host"] == "localhost"


def test_vllm_need_not_be_here(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zppo.plan.checks.check_vllm_arguments", lambda *given: 1 / 0)
    topology = load(tiny / "topology.yaml", ["actors.rollout.engine=vllm"])
    Described.of(topology, tiny / "m.yaml", tiny).plan()


def test_a_folder_with_an_index_alone(tiny: Path) -> None:
    folder = tiny / "shapes"
    folder.mkdir()
    config = {"model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 1, "dtype": "float32",
              "num_attention_heads": 2, "vocab_size": 16, "max_position_embeddings": 64}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    file = tiny / "m.yaml"
    file.write_text(re.sub(r"student: .*", "student: {folder: shapes}", TINY))
    topology = load(tiny / "topology.yaml")
    for metadata, parameters in (
        ({"total_size": 4000}, 1000),
        ({"total_size": 4000, "total_parameters": 900}, 900),
    ):
        index = {"metadata": metadata, "weight_map": {"w": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        plan = Described.of(topology, file, tiny).plan()
        assert plan.shared == (topology.scheduler.max_staleness + 2) * 2 * parameters
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no metadata\.total_size") as caught:
        Described.of(topology, file, tiny).plan()
    assert str(caught.value).startswith(f"{file}: models.student: ")


BAD = [
    ("hosts", "host", "{file}:2: there is no setting host (did you mean 'hosts'?)"),
    (
        "cards: 0",
        "cards: -1",
        "{file}:3: hosts.localhost.cards is -1; expected a whole number of at least 0 and at most 1024, or null",
    ),
    (
        "questions: 6",
        "questions: 0",
        "{file}:4: questions is 0; expected a whole number of at least 1",
    ),
    ("cores: 4", "disk_gib: 4", "{file}: hosts.localhost.cores is missing; expected a number"),
    (
        "  localhost",
        "  local",
        "{file}: hosts.localhost is missing; expected what it has, because the topology places "
        "processes there (did you mean 'local'?)",
    ),
    (
        "  student",
        "  studend",
        "{file}: models has no 'student', which student.model names (did you mean 'studend'?)",
    ),
    (
        "BF16: 1000}}\n  teacher",
        "BF17: 1000}}\n  teacher",
        "{file}: models.student.tensors has the dtype 'BF17'; expected a name of safetensors (did "
        "you mean 'BF16'?)",
    ),
    (
        ", tensors: {BF16: 1000}}\n  teacher",
        "}\n  teacher",
        "{file}: models.student: tensors is missing; expected whole numbers by dtype, as {BF16: "
        "2213241664}",
    ),
    (
        "tensors: {BF16: 1000}}\n  teacher",
        "folder: x}\n  teacher",
        "{file}: models.student: expected config and tensors, or folder",
    ),
    (
        "hidden_size: 8",
        "hidden_size: [8]",
        "{file}: models.student: 'config.json' has no hidden_size; expected a causal language model",
    ),
    (
        "num_attention_heads: 2",
        "num_attention_heads: 2, head_dim: -4",
        "{file}: models.student: 'config.json' has a setting that is not of its kind (32 heads of "
        "-4 numbers in 1 of 1 layers keep keys); expected a file as save_pretrained writes it",
    ),
    (
        "BF16: 1000}}\n  teacher",
        "BF16: 4e9}}\n  teacher",
        "{file}:6: models.student.tensors is {'BF16': 4000000000.0}; expected each value to be a "
        "whole number of at least 1",
    ),
    ("cards: 0", "cards: 2", "{file}: hosts.localhost.cards is 2; expected card_gib beside it"),
    (
        "  teacher",
        "  ./student: {folder: x}\n  teacher",
        "{file}: models has 'student' and './student', which are one path",
    ),
    (
        "  teacher",
        "  ~nobody-at-all/x: {folder: x}\n  teacher",
        "{file}: models has '~nobody-at-all/x', which is no path (Could not determine home "
        "directory.)",
    ),
]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "actors.rollout.hosts=[]",
            "actors.rollout.hosts is empty; expected at least one host, such as localhost",
        ),
        (
            "actors.rollout.hosts=[node-9]",
            "actors.rollout.hosts names 'node-9'; expected localhost or a host of cluster.hosts "
            "(did you mean 'node-7'?)",
        ),
        (
            "actors.rollout.devices=[]",
            "actors.rollout.devices is empty; expected at least one device, such as cpu or cuda:0",
        ),
        (
            "actors.rollout.engine_args={max_model_len: 24576, kv_cache_memory_bytes: x}",
            "actors.rollout.engine_args.kv_cache_memory_bytes is 'x'; expected a whole number of "
            "bytes",
        ),
        (
            "student.train_tower=true",
            "student.train_tower is true; expected false, because the engine 'vllm' keeps what a "
            "tower has made of a picture; or actors.rollout.engine transformers",
        ),
    ],
)
def test_a_bad_layout_is_one_sentence(override: str, sentence: str) -> None:
    """The same that a run on this machine would get, whatever the file says."""
    with pytest.raises(UserError) as caught:
        plan_of(override)
    assert str(caught.value) == sentence


def test_a_small_cache_of_a_described_model_is_left_to_vllm() -> None:
    """Nothing is read of a folder that is not there; what hybrid models keep vLLM knows better."""
    plan_of("actors.rollout.engine_args={max_model_len: 24576, kv_cache_memory_bytes: 1000}")


@pytest.mark.parametrize(("before", "after", "sentence"), BAD)
def test_a_bad_file_is_one_sentence(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: str,
    after: str,
    sentence: str,
) -> None:
    assert before in TINY
    (tiny / "m.yaml").write_text(TINY.replace(before, after, 1))
    monkeypatch.chdir(tiny)
    for door in (launch.main, plan_command.main):
        dry = ["--dry-run"] if door is launch.main else []
        assert door(["topology.yaml", "--machines", "m.yaml", *dry]) == 2
        said = capsys.readouterr().err.replace(f"{tiny}/", "")
        assert said == sentence.replace("{file}", "m.yaml") + "\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            (),
            "--machines: expected --dry-run with it, and no --resume; a run is checked against the "
            "machines that it has",
        ),
        (
            ("--dry-run", "--resume"),
            "--machines: expected --dry-run with it, and no --resume; a run is checked against the "
            "machines that it has",
        ),
    ],
)
def test_a_run_is_not_described(
    options: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main([str(PAPER), "--machines", str(MACHINES), *options]) == 2
    assert capsys.readouterr().err == sentence + "\n"


def test_described_machines_are_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(PAPER), "--machines", str(MACHINES), "--calibrate"]
    assert plan_command.main(command) == 2
    assert capsys.readouterr().err == (
        "--calibrate: measures this machine, and --machines describes others; expected "
        "--calibration FILE or --from-run RUN with --machines\n"
    )


def test_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_machines(tmp_path / "x.yaml")
    assert str(caught.value) == (
        f"--machines: cannot read '{tmp_path}/x.yaml': No such file or directory"
    )
