"""The door of a run: nothing is started or written after a mistake, and each mistake is one
sentence, word for word."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from openai_server import Server, running
from PIL import Image

from zppo import launch
from zppo.records import binding, checkpoint, run_directory
from zppo_actors.controller.journal import Journal

Launch = Callable[..., tuple[int | None, str]]


class Started(Exception):
    """Stands for the supervisor taking over."""


@pytest.fixture
def start(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Launch:
    """Call the door; returns the exit code (None: it became the supervisor) and what it said on
    stderr, notes left out."""

    def take_over(file: str, command: list[str]) -> None:
        assert command[1:5] == ["-P", "-m", "zppo_actors", "supervisor"]
        raise Started

    monkeypatch.setattr(os, "execv", take_over)

    def start(*arguments: str) -> tuple[int | None, str]:
        try:
            code = launch.main(arguments)
        except Started:
            code = None
        said = capsys.readouterr().err.replace(f"{small}/", "").splitlines(keepends=True)
        return code, "".join(line for line in said if not line.startswith("note: "))

    return start


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- mistakes ------------------------------------------------------------------------------------

SETTING_MISTAKES = [
    ("method.name=zpo", "method.name: there is no method 'zpo' (did you mean 'zppo'?); or name package.module:name or ./file.py:name"),
    ("teacher=null", "teacher: is missing; expected a section, because the method 'zppo' needs a teacher"),
    ("actors.teacher.count=0", "actors.teacher.count is 0; expected at least 1, because the run asks the teacher"),
    ("actors.rollout.count=0", "actors.rollout.count is 0; expected at least 1"),
    (
        "actors.rollout.engine=vlm",
        "actors.rollout.engine: there is no engine 'vlm' (did you mean 'vllm'?); or name package.module:name or ./file.py:name",
    ),
    (
        "actors.rollout.engine_args.max_sequence=9",
        "actors.rollout.engine_args.max_sequence: unknown engine argument "
        "(did you mean 'max_sequences'?)",
    ),
    (
        "actors.rollout.engine_args.max_sequences=7",
        "actors.rollout.engine_args.max_sequences is 7; expected at least 8, the "
        "method.group_size, because a group is sampled as a whole",
    ),
    (
        "actors.teacher.engine_args.max_sequences=three",
        (
            "actors.teacher.engine_args.max_sequences is 'three'; expected a whole number of at "
            "least 1 and at most 65536"
        ),
    ),
    (
        "actors.rollout.devices=[]",
        "actors.rollout.devices is empty; expected at least one device, such as cpu or cuda:0",
    ),
    ("actors.rollout.hosts=[a]", "actors.rollout.hosts names 'a'; expected localhost or a host of cluster.hosts (there is none: cluster.hosts is empty)"),
    (
        "actors.trainer={ranks: 3, devices: [cuda:0, cuda:1]}",
        "actors.trainer.ranks is 3, but actors.trainer.devices names 2; expected one for each "
        "rank, or cpu alone for all",
    ),
    (
        "actors.trainer={devices: [cuda:0, cpu]}",
        "actors.trainer.devices names cuda:0, cpu; expected cards alone, or cpu alone, because "
        "the ranks share one model",
    ),
    (
        "actors.trainer={device: 'cuda:1', ranks: 2}",
        "actors.trainer.devices has 'cuda:1' for 2 ranks; expected a card of its own for each, "
        "such as cuda:0 and cuda:1",
    ),
    (
        "actors.trainer={devices: [cuda, cuda:1]}",
        "actors.trainer.devices names 'cuda' beside others; expected its number as well, such as "
        "cuda:0",
    ),
    (
        "actors.trainer={device: cuda, devices: [cuda:0, cuda:1]}",
        "actors.trainer.device is 'cuda' beside actors.trainer.devices; expected one of the two",
    ),
    (
        "actors.trainer={ranks: 2, collective_seconds: 2}",
        "actors.trainer.collective_seconds is 2; expected more than 2, two of "
        "transport.heartbeat_seconds",
    ),
    ("actors.trainer.device=tpu", "actors.trainer.device names 'tpu'; expected cpu, cuda or cuda:N"),
    ("method.group_size=1", "method.group_size is 1; expected at least 2, because a group of one has no advantage"),
    ("evaluation.every=5", "evaluation.every is 5; expected null, or a file in data.heldout"),
    (
        "scheduler.lease_seconds=2",
        "scheduler.lease_seconds is 2; expected more than 2, two of transport.heartbeat_seconds",
    ),
    (
        "student.dtype=float16",
        "student.dtype is 'float16'; expected 'bfloat16' or 'float32', because gradients in "
        "float16 vanish without loss scaling",
    ),
    (
        "method.dual_clip=1.25",
        "method.dual_clip is 1.25; expected null or at least 1.28, 1 + method.clip_high, because a "
        "bound within the clip range would hold ordinary tokens",
    ),
    (
        "data.max_prompt_tokens=20",
        "data.train: the question 'q0' makes a prompt of 21 tokens; expected at most 20, "
        "data.max_prompt_tokens (6 questions are longer)",
    ),
    (
        "student.sampling.presence_penalty=0.5",
        "student.sampling.presence_penalty is 0.5; expected 0, because the trainer computes "
        "log-probs without a penalty",
    ),
    (
        "student.sampling.temperature=0",
        "student.sampling.temperature is 0; expected a number above 0, because the 8 responses of "
        "a group (method.group_size) would be the same, and such a group has no gradient; "
        "evaluation.sampling may be greedy",
    ),
    *(
        (
            f"student.sampling.{setting}",
            f"student.sampling.{words}, because the 8 responses of a group (method.group_size) "
            "would be the same, and such a group has no gradient; evaluation.sampling may be "
            "greedy",
        )
        for setting, words in (
            ("top_k=1", "top_k is 1; expected 0, or 2 and more"),
            ("min_p=1", "min_p is 1; expected a number below 1"),
        )
    ),
    ("optimizer.beta2=1", "optimizer.beta2 is 1; expected a number below 1"),
    ("run.name=a/b", "run.name is 'a/b'; expected a name that can be the name of a folder"),
    (
        "cluster.launcher=slurm",
        "--set cluster.launcher=slurm: cluster.launcher is 'slurm'; expected one of local, ray, "
        "render",
    ),
    (
        "method.name=GRPO",
        "method.name: there is no method 'GRPO' (did you mean 'grpo'?); or name "
        "package.module:name or ./file.py:name",
    ),
    ("data.grader=maths", "data.grader: unknown grader 'maths' (did you mean 'math'?)"),
    ("data.train=trian.jsonl", "trian.jsonl: no such question file (did you mean 'train.jsonl'?)"),
    (
        "data.heldout=train.jsonl",
        "data.heldout: 6 of its questions are in data.train too, first the training question 'q0'; "
        "expected none in both",
    ), ("student.model=studnet",
    "student.model: there is no model folder 'studnet' (did you mean 'student'?)"), (
        "teacher.model=org/model",
        "teacher.model: there is no model folder 'org/model'; expected one as save_pretrained or "
        "`hf download` writes it",
    ),
    (
        "student.sampling.max_new_tokens=64",
        "student.sampling.max_new_tokens is 64; expected less than 64, the context of 'student'",
    ),
    ("run.steps=0", "--set run.steps=0: run.steps is 0; expected a whole number of at least 1, or null"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "sentence"), SETTING_MISTAKES)
def test_setting_that_cannot_work(start: Launch, small: Path, setting: str, sentence: str) -> None:
    before = files(small)
    code, said = start("--topology", "topology.yaml", "--set", setting)
    assert said == sentence + "\n"
    assert code == 2
    assert files(small) == before


def test_judge_needs_a_teacher(start: Launch) -> None:
    changes = ("--set", "method.name=grpo", "--set", "teacher=null", "--set", "data.grader=judge")
    sentence = (
        "teacher: is missing; expected a section, because data.grader 'judge' asks the teacher\n"
    )
    assert start("--topology", "topology.yaml", *changes) == (2, sentence)


def damage_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def scramble_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)


def remove_end_token(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def not_a_language_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 8, "num_attention_heads": 2}')


MODEL_MISTAKES = [
    (damage_config, "student.model: 'student' is not a model folder: it has no config.json"),
    (
        damage_weights,
        "student.model: 'student' is not a model folder: it has no weights (*.safetensors)",
    ),
    (
        truncate_weights,
        "student.model: 'student/model.safetensors' is cut short; expected {size} bytes",
    ),
    (
        scramble_weights,
        (
            "student.model: 'student/model.safetensors' is not a safetensors file: Input data was "
            "truncated"
        ),
    ),
    (
        remove_end_token,
        "student.model: the tokenizer of 'student' has no end token, so no response would ever "
        "stop; set eos_token in its tokenizer_config.json",
    ),
    (remove_tokenizer, "student.model: 'student' has no tokenizer: tokenizer.json is missing"),
    (
        not_a_language_model,
        (
            "student.model: 'student/config.json' has no num_hidden_layers; expected a causal "
            "language model"
        ),
    ),
]


@pytest.mark.parametrize(("damage", "sentence"), MODEL_MISTAKES)
def test_folder_that_is_no_model(
    start: Launch, small: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    size = (small / "student/model.safetensors").stat().st_size
    damage(small / "student")
    before = files(small)
    assert start("--topology", "topology.yaml") == (2, sentence.format(size=size) + "\n")
    assert files(small) == before


DATA_MISTAKES = [
    ('{"question": "a"}', "train.jsonl:1: the gold answer ('answer') is missing"),
    ('{"question": " ", "answer": "1"}', "train.jsonl:1: the question ('question') is empty"),
    ("{", "train.jsonl:1: not a JSON value (Input data was truncated)"),
    (
        '{"id": "x", "question": "a", "answer": 1}\n{"id": "x", "question": "b", "answer": 2}',
        "train.jsonl:2: the id 'x' was used on line 1",
    ),
    (
        '{"question": "a", "answer": "1", "images": ["no.png"]}',
        "train.jsonl:1: image 'no.png' does not exist",
    ),
]


@pytest.mark.parametrize(("text", "start_of_sentence"), DATA_MISTAKES)
def test_bad_row_is_refused(start: Launch, small: Path, text: str, start_of_sentence: str) -> None:
    (small / "train.jsonl").write_text(text + "\n")
    before = files(small)
    code, said = start("--topology", "topology.yaml")
    assert code == 2
    assert said.startswith(start_of_sentence)
    assert said.endswith(
        "1 bad row where data.max_bad_rows allows 0: mend the file or raise the limit\n"
    )
    assert files(small) == before


def test_pictures_are_refused_for_a_model_that_cannot_be_trained_on_them(
    start: Launch, small: Path
) -> None:
    Image.new("RGB", (4, 4)).save(small / "p.png")
    (small / "train.jsonl").write_text(
        '{"id": "x", "question": "a", "answer": "1", "images": ["p.png"]}\n'
    )
    sentence = (
        "data.train: the question 'x' has pictures, and 'student' (student.model) cannot be trained "
        "on them; expected a model of the family idefics3 or qwen3_5 with its processor "
        "(docs/pictures.md), or text only\n"
    )
    assert start("--topology", "topology.yaml") == (2, sentence)


def test_a_tower_without_pictures_is_not_trained(start: Launch, small: Path) -> None:
    sentence = (
        "student.train_tower is true; expected false, because no question of data.train has a "
        "picture\n"
    )
    given = ("--topology", "topology.yaml", "--set", "student.train_tower=true")
    assert start(*given) == (2, sentence)


def test_too_little_memory(start: Launch, small: Path) -> None:
    code, said = start(
        "--topology", "topology.yaml", "--set", "actors.trainer.micro_batch_tokens=1000000000000"
    )
    assert code == 2
    assert said.startswith("the plan needs ")
    assert said.endswith("; the largest part is trainer with 316650.1 GiB\n")


def test_broken_template(start: Launch, small: Path) -> None:
    (small / "templates").mkdir()
    (small / "templates/plain.j2").write_text("{{ question")
    code, said = start("--topology", "topology.yaml", "--set", "data.templates=templates")
    assert code == 2
    assert said.startswith("templates/plain.j2:1: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("words", "refused"), [(3, False), (4, True)])
def test_longest_prompt(start: Launch, small: Path, words: int, refused: bool) -> None:
    """21 words are the prompt of every training question, 16 of them its closing instruction."""
    (small / "heldout.jsonl").write_text(
        '{"id": "short", "question": "Why?", "answer": "1"}\n'
        + json.dumps({"id": "long", "question": "so " * (5 + words), "answer": "2"})
    )
    code, said = start("--topology", "topology.yaml", "--set", "data.heldout=heldout.jsonl")
    sentence = (
        "data.heldout: the question 'long' makes a prompt of 25 tokens; expected at most 24, "
        "data.max_prompt_tokens (1 question is longer)\n"
    )
    assert (code, said) == ((2, sentence) if refused else (None, ""))
    assert (small / "small-run").exists() is not refused


COMMAND_MISTAKES = [
    (
        (),
        "zppo launch: the topology is missing; expected a file (write one with: zppo init "
        "topology.yaml)",
    ),
    (
        ("a.yaml", "--topology", "b.yaml"),
        "zppo launch: the topology is given twice, 'a.yaml' and --topology 'b.yaml'; expected one",
    ),
    (("--resume",), "--resume: expected a run directory, or the --topology of the run"),
    (
        ("--resume", "topology.yaml"),
        "--resume: 'topology.yaml' is a file; expected a run directory, or the topology in front "
        "of it: zppo launch topology.yaml --resume",
    ),
    (("--resume", "nowhere"), "'nowhere' is not a run directory: it has no run.json"),
    (
        ("--topologie", "x"),
        "zppo launch: there is no option --topologie (did you mean --topology?); see zppo launch "
        "--help",
    ),
    (
        ("x.yaml", "--model", "m"),
        "zppo launch: there is no option --model; settings are changed with --set student.model=…; "
        "see zppo launch --help",
    ),
    (
        ("x.yaml", "--learning-rate=1e-6"),
        "zppo launch: there is no option --learning-rate; settings are changed with --set "
        "optimizer.learning_rate=…; see zppo launch --help",
    ),
    (
        ("x.yaml", "--run.steps", "3"),
        "zppo launch: there is no option --run.steps; settings are changed with --set run.steps=…; "
        "see zppo launch --help",
    ),
    (
        ("x.yaml", "--use-peft"),
        "zppo launch: there is no option --use-peft (LoRA is not built, all weights are trained); "
        "see zppo launch --help",
    ),
    (
        ("x.yaml", "trainer.total_epochs=15"),
        "zppo launch: 'trainer.total_epochs=15' is one argument too many; settings are changed "
        "with --set run.epochs=…; see zppo launch --help",
    ),
    (
        ("x.yaml", "y.yaml"),
        "zppo launch: 'y.yaml' is one argument too many; see zppo launch --help",
    ),
    (
        ("--topology",),
        "zppo launch: argument --topology: expected one argument; see zppo launch --help",
    ),
]


@pytest.mark.parametrize(("arguments", "sentence"), COMMAND_MISTAKES)
def test_mistake_on_the_command_line(
    start: Launch, arguments: tuple[str, ...], sentence: str
) -> None:
    assert start(*arguments) == (2, sentence + "\n")


# ---- what no file system, template or pipe may do --------------------------------------------------

PATHS = [
    (
        f"run.directory={'x' * 300}",
        f"run.directory: the name '{'x' * 60}'… in it has 300 bytes; expected at most 255",
    ),
    ('run.directory="a\\0b"', "run.directory is 'a\\x00b'; expected a path without NUL"),
    (
        'student.model="a\\uD800b"',
        "--set student.model=\"a\\uD800b\":1: not YAML: the text 'a\\ud800b' holds half a "
        "surrogate pair",
    ),
    (
        "data.train=~nobody-at-all/x",
        "data.train is '~nobody-at-all/x', whose home folder is not known; expected a whole path",
    ),
    (
        f"more_teachers=[{{model: {'x' * 256}}}]",
        f"more_teachers[0].model: the name '{'x' * 60}'… in it has 256 bytes; expected at most 255",
    ),
    (
        "run.directory=train.jsonl/run",
        "run.directory: cannot make 'train.jsonl/run': Not a directory",
    ),
    (
        "actors.rollout.engine_args={script: !!binary aGVsbG8=}",
        "--set actors.rollout.engine_args={script: !!binary aGVsbG8=}:1: not YAML: could not "
        "determine a constructor for the tag 'tag:yaml.org,2002:binary'",
    ),
]


@pytest.mark.parametrize(("setting", "sentence"), PATHS, ids=[s[:30] for s, _ in PATHS])
def test_path_or_value_that_cannot_be(
    start: Launch, small: Path, setting: str, sentence: str
) -> None:
    before = files(small)
    assert start("--topology", "topology.yaml", "--set", setting) == (2, sentence + "\n")
    assert files(small) == before
    assert start("--topology", "topology.yaml") == (None, "")


def test_run_directory_leaves_room_for_its_files(start: Launch, small: Path) -> None:
    parts = "/".join(["x" * 200] * 20)
    code, said = start("--topology", "topology.yaml", "--set", f"run.directory={parts}")
    assert code == 2 and said.endswith(" bytes; expected at most 3839\n")
    assert start("--topology", "topology.yaml", "--set", "run.directory=a ?#%20[x]{y}") == (
        None,
        "",
    )


def test_run_directory_that_cannot_be_filled_is_not_left_behind(
    start: Launch, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = files(small)
    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write", full)
        assert start("--topology", "topology.yaml") == (
            2,
            "run.directory: cannot write in 'small-run': No space left on device\n",
        )
    assert files(small) == before
    assert start("--topology", "topology.yaml") == (None, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipe", "settings", "sentence"),
    [
        (
            "questions.jsonl",
            ("data.train=questions.jsonl",),
            "questions.jsonl: is a named pipe, a socket or a device; expected a question file",
        ),
        (
            "templates/plain.j2",
            ("data.templates=templates",),
            "templates/plain.j2: is no file; expected a Jinja2 template",
        ),
        (
            "teacher/config.json",
            (),
            "teacher.model: 'teacher' is not a model folder: it has no config.json",
        ),
        (
            "student/model.safetensors",
            (),
            "student.model: 'student' is not a model folder: it has no weights (*.safetensors)",
        ),
    ],
)
def test_a_named_pipe_is_refused_and_not_waited_for(
    small: Path, pipe: str, settings: tuple[str, ...], sentence: str
) -> None:
    """The real command, so that a hang is a failure and not the end of the tests."""
    (small / pipe).parent.mkdir(exist_ok=True)
    (small / pipe).unlink(missing_ok=True)
    os.mkfifo(small / pipe)
    command = [
        sys.executable,
        "-P",
        "-m",
        "zppo.launch",
        "--topology",
        "topology.yaml",
        "--dry-run",
    ]
    chosen = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr.replace(f"{small}/", "")) == (2, sentence + "\n")


def test_the_checks_of_a_launch_import_no_torch(small: Path) -> None:
    """It would take most of their time."""
    command = [sys.executable, "-P", "-X", "importtime", "-m", "zppo.launch", "topology.yaml"]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "transformers" in imported and "torch" not in imported


TEMPLATES = [
    ("{{ raise_exception('no roles') }}", "no roles"),
    ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
    ("{% for x in range(10**9) %}{% endfor %}", "Range too big. The sandbox blocks ranges larger "),
    ("{% for", "unexpected 'end of template'"),
    ("{{ nothing.at.all }}", "'nothing' is undefined"),
]


@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize(("template", "reason"), TEMPLATES)
def test_chat_template_that_fails_is_one_sentence(
    start: Launch, small: Path, model: str, template: str, reason: str
) -> None:
    (small / model / "chat_template.jinja").write_text(template)
    before = files(small)
    code, said = start("--topology", "topology.yaml")
    assert code == 2 and said.count("\n") == 1
    assert said.startswith(f"{model}.model: the chat template of '{model}' fails ({reason}")
    assert said.endswith(f"); mend it, or the variables in {model}.chat_template_kwargs\n")
    assert files(small) == before


def test_runtime_folder_with_a_path_too_long_for_a_socket(
    start: Launch,
    small: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tmp_path_factory.mktemp("r" * 90)
    before = files(small)
    with monkeypatch.context() as patch:
        patch.setenv("ZPPO_RUNTIME_DIR", str(base))
        code, said = start("--topology", "topology.yaml")
    assert code == 2 and said.startswith(f"the path of a socket in '{base}/zppo-")
    assert said.endswith(" is too long; set ZPPO_RUNTIME_DIR to a shorter one\n")
    assert files(small) == before
    assert start("--topology", "topology.yaml") == (None, "")


def test_notes_are_said_when_a_run_starts(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": "q", "question": "What is 1 + 1?", "answer": "2"},
        {"id": "x", "question": "Who knows?", "answer": "I do not know."},
        {"id": "y", "question": "Where?", "answer": "Paris"},
    ]
    (small / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = {"id": "z", "question": "What is it?", "answer": "1", "picture": "a.png"}
    (small / "held.jsonl").write_text(json.dumps(held))
    (small / "teacher/chat_template.jinja").write_text("{{ messages[0].content }}")
    expected = {
        "data.heldout: 1 question is asked without the picture or video of the column 'picture'; "
        "name it in data.fields (images or videos), or leave it out of the file",
        "optimizer.learning_rate is 100000: AdamW moves every weight by about as much in each "
        "update, and weights of language models are about 0.02; the paper's is 1e-06",
        "data.train: 1 gold answer is words, not mathematics, first 'I do not know.' of the "
        "question 'x': the grader 'math' has little but the same words to go by, see data.grader",
        f"student.model: '{small}/student' has no chat template: messages are put one below the "
        "other, and nothing tells the model whose they are",
    }
    monkeypatch.setattr(os, "execv", lambda *given: sys.exit(0))
    with pytest.raises(SystemExit):
        settings = ("optimizer.learning_rate=1e5", "data.heldout=held.jsonl")
        given = [part for one in settings for part in ("--set", one)]
        launch.main(["--topology", "topology.yaml", *given])
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: ") for line in said)
    notes = {line.removeprefix("note: ") for line in said}
    assert expected <= notes and not any("teacher.model" in note for note in notes)


# ---- starting ------------------------------------------------------------------------------------


def test_the_topology_needs_no_option(start: Launch, small: Path) -> None:
    assert start("topology.yaml", "--dry-run") == start("--topology", "topology.yaml", "--dry-run")


def test_run_is_made_and_the_supervisor_takes_over(start: Launch, small: Path) -> None:
    assert start("--topology", "topology.yaml", "--set", "run.steps=3") == (None, "")
    record = run_directory.read(small / "small-run")
    assert record.start_step == 0
    assert record.topology.run.steps == 3
    assert record.topology.student.model == str(small / "student")
    assert files(small / "small-run") == {"run.json", "checkpoints", "logs", "rollouts"}


def test_bad_rows_within_the_limit_are_listed(start: Launch, small: Path) -> None:
    with (small / "train.jsonl").open("a") as file:
        file.write("nonsense\n")
    assert start("--topology", "topology.yaml", "--set", "data.max_bad_rows=1")[0] is None
    assert (small / "small-run/bad_rows.txt").read_text().startswith("line 7: not a JSON value")


def test_directory_that_holds_a_run_is_refused(start: Launch, interrupted: Path) -> None:
    sentence = (
        "run.directory: 'small-run' exists already; continue it with --resume, or name another "
        "directory\n"
    )
    before = run_directory.read(interrupted)
    assert start("--topology", "topology.yaml") == (2, sentence)
    assert run_directory.read(interrupted) == before


@pytest.mark.parametrize(
    "files", [{"notes.txt": "mine"}, {"run.json": "{}", "metrics.jsonl": '{"step": 0}\n'}]
)
def test_directory_of_another_or_with_steps_is_refused(
    start: Launch, small: Path, files: dict[str, str]
) -> None:
    (small / "small-run").mkdir()
    for name, text in files.items():
        (small / "small-run" / name).write_text(text)
    sentence = "run.directory: 'small-run' exists already; remove it, or name another directory\n"
    assert start("--topology", "topology.yaml") == (2, sentence)
    assert {path.name for path in (small / "small-run").iterdir()} == set(files)


def begun(path: Path) -> None:
    """A run that died in its first step: evaluated and journaled, but not trained."""
    journal = Journal(path)
    journal.record_dispatched("q0", 0)
    (path / "heldout.jsonl").write_text('{"step": 0, "accuracy": 0.5}\n')
    (path / "metrics.jsonl").touch()
    (path / "rollouts/step-000000.parquet").touch()
    (path / "checkpoints/.step-1.partial").mkdir()
    (path / "logs/trainer.log").write_text("out of memory\n")
    (path / "lock").touch()


def cut_off(path: Path) -> None:
    """The launcher died before it had written the record."""
    (path / "run.json").unlink()
    (path / ".run.json.partial").touch()
    (path / "rollouts").rmdir()


def emptied(path: Path) -> None:
    for entry in path.iterdir():
        entry.unlink() if entry.is_file() else entry.rmdir()


@pytest.mark.parametrize("left", [begun, cut_off, emptied])
def test_run_without_a_trained_step_is_begun_again(
    start: Launch, small: Path, left: Callable[[Path], None]
) -> None:
    start("--topology", "topology.yaml")
    path = small / "small-run"
    left(path)
    assert start("--topology", "topology.yaml", "--set", "run.seed=5") == (None, "")
    assert run_directory.read(path).topology.run.seed == 5
    kept = {"logs/trainer.log"} if left is begun else set()
    partial = {".run.json.partial"} if left is cut_off else set()
    skeleton = {"run.json", "checkpoints", "logs", "rollouts", "lock"}
    assert files(path) - partial == skeleton | kept


def test_run_that_has_just_begun_is_not_begun_again(start: Launch, small: Path) -> None:
    start("--topology", "topology.yaml")
    path = small / "small-run"
    before, lock = run_directory.read(path), run_directory.hold(path)
    assert lock is not None
    sentence = "run.directory: 'small-run' is in use by a run that has not ended\n"
    assert start("--topology", "topology.yaml") == (2, sentence)
    assert run_directory.read(path) == before
    os.close(lock)


def test_dry_run_shows_the_plan_and_writes_nothing(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(small)
    assert launch.main(["--topology", "topology.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in ("controller", "trainer", "rollout-0", "teacher-0", "grader-0")
    )
    assert "3, 4 updates each" in shown  # six questions, two a step
    assert files(small) == before


@pytest.mark.slow
def test_exit_code_of_the_real_command(small: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "zppo.launch",
        "--topology",
        "topology.yaml",
        "--set",
        "run.steps=0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert (
        done.stderr
        == "--set run.steps=0: run.steps is 0; expected a whole number of at least 1, or null\n"
    )
    assert done.stdout == ""


# ---- resuming ------------------------------------------------------------------------------------


def test_resume_with_other_ranks(start: Launch, small: Path) -> None:
    """Refused where a run is promised to go on bit for bit, and nowhere else."""
    start("--topology", "topology.yaml")
    path = small / "small-run"
    finish(path, 2)
    assert start("--resume", "small-run", "--set", "actors.trainer.ranks=2") == (None, "")
    finish(path, 3)
    assert start("--resume", "small-run", "--set", "actors.trainer.ranks=1") == (None, "")


def test_exact_resume_with_other_ranks_is_refused(start: Launch, small: Path) -> None:
    exact = ("--set", "scheduler.max_staleness=0", "--set", "method.correction=none")
    start("--topology", "topology.yaml", *exact)
    finish(small / "small-run", 2)
    sentence = (
        "--resume: actors.trainer.ranks was 1 and is now 2; with scheduler.max_staleness 0 and "
        "method.correction 'none' it cannot change, because sums over other ranks differ in their "
        "last bits\n"
    )
    assert start("--resume", "small-run", "--set", "actors.trainer.ranks=2") == (2, sentence)


@pytest.fixture
def interrupted(start: Launch, small: Path) -> Path:
    """A run of `topology.yaml` with a whole checkpoint of step 2."""
    start("--topology", "topology.yaml")
    path = small / "small-run"
    finish(path, 2)
    return path


def test_resume_goes_on_where_the_run_is(start: Launch, interrupted: Path) -> None:
    Path("linked").symlink_to("small-run")
    for same in (Path("small-run").absolute(), "linked", "./x/../small-run", "small-{name}"):
        settings = ("--set", f"run.directory={same}", "--set", "run.name=run")
        assert start("--resume", "small-run", *settings) == (None, ""), same
    assert start("--resume", "small-run", "--set", "run.directory=elsewhere") == (
        2,
        "--set run.directory=elsewhere: the run goes on in 'small-run', which --resume names; "
        "expected no other directory (move the run's before, and name it there)\n",
    )


@pytest.mark.parametrize(
    "arguments", [("--resume", "small-run"), ("--topology", "topology.yaml", "--resume")]
)
def test_resume_begins_another_life(
    start: Launch, interrupted: Path, arguments: tuple[str, ...]
) -> None:
    before = run_directory.read(interrupted)
    assert start(*arguments) == (None, "")
    after = run_directory.read(interrupted)
    assert (after.start_step, after.topology) == (2, before.topology)
    assert after.run_id != before.run_id


def test_resume_may_change_what_does_not_matter(start: Launch, interrupted: Path) -> None:
    changes = ("--set", "run.steps=9", "--set", "actors.grader.count=2")
    assert start("--resume", "small-run", *changes) == (None, "")
    assert run_directory.read(interrupted).topology.run.steps == 9


def test_resume_of_a_torn_checkpoint_takes_the_one_before(start: Launch, interrupted: Path) -> None:
    checkpoint.write_file(checkpoint.begin(interrupted, 3) / "weights", b"1234")
    checkpoint.commit(interrupted, 3)
    (interrupted / "checkpoints/step-3/weights").write_bytes(b"12")
    code, said = start("--resume", "small-run")
    assert code is None
    assert said == (
        "checkpoint small-run/checkpoints/step-3 is not whole and is skipped: weights has 2 bytes "
        "instead of 4\n"
    )
    assert run_directory.read(interrupted).start_step == 2


RESUME_MISTAKES = [
    (
        "method.name=grpo",
        "--resume: method.name was 'zppo' and is now 'grpo'; it cannot change, because the trained "
        "steps were made by another recipe",
    ),
    (
        "data.train=other.jsonl",
        "--resume: data.train was 'train.jsonl' and is now 'other.jsonl'; it cannot change, "
        "because the data cursor counts questions of another corpus",
    ),
    (
        "data.heldout=train.jsonl",
        "--resume: data.heldout was null and is now 'train.jsonl'; it cannot change, because "
        "accuracies before and after would be of other questions",
    ),
    (
        "data.system_prompt=Think.",
        "--resume: data.system_prompt was null and is now 'Think.'; it cannot change, because the "
        "trained steps read other prompts",
    ),
    (
        "student.sampling.max_new_tokens=9",
        "--resume: student.sampling.max_new_tokens was 8 and is now 9; it cannot change, because "
        "the checkpoint holds another student",
    ),
    (
        "run.seed=1",
        "--resume: run.seed was 0 and is now 1; it cannot change, because the order of the corpus "
        "would change in the middle",
    ),
    (
        "scheduler.max_staleness=0",
        "--resume: scheduler.max_staleness was 1 and is now 0; it cannot shrink, because windows "
        "in flight keep to the old bound",
    ),
    (
        "run.steps=1",
        (
            "--resume: run.steps is 1 and the run has reached step 2; extend it, for example with "
            "--set run.steps=4"
        ),
    ),
    (
        "run.steps=2",
        (
            "--resume: the run is finished, step 2 was its last; extend it, for example with --set "
            "run.steps=4"
        ),
    ),
]


@pytest.mark.parametrize(("setting", "sentence"), RESUME_MISTAKES)
def test_resume_that_would_be_another_run(
    start: Launch, interrupted: Path, setting: str, sentence: str
) -> None:
    before = run_directory.read(interrupted)
    assert start("--topology", "topology.yaml", "--set", setting, "--resume") == (
        2,
        sentence + "\n",
    )
    assert run_directory.read(interrupted) == before


def finish(path: Path, step: int) -> None:
    """The run has trained up to a checkpoint of `step`."""
    journal = Journal(path)
    for trained in range(step):
        journal.record_trained(
            trained, [(trained, f"{trained}/q/plain", "q", "plain", "replay")], [trained]
        )
    journal.close()
    record = run_directory.read(path)
    checkpoint.write_file(checkpoint.begin(path, step) / "weights", b"1234")
    checkpoint.commit(path, step, binding.made_with(record.topology, record.corpus))


def test_run_stopped_in_its_last_evaluation_may_go_on(start: Launch, small: Path) -> None:
    (small / "heldout.jsonl").write_text('{"question": "Why?", "answer": "1"}\n')
    start(
        "--topology", "topology.yaml", "--set", "data.heldout=heldout.jsonl", "--set", "run.steps=2"
    )
    path = small / "small-run"
    finish(path, 2)
    (path / "heldout.jsonl").write_text('{"step": 0, "accuracy": 0.5}\n')
    assert start("--resume", "small-run") == (None, "")
    with (path / "heldout.jsonl").open("a") as file:
        file.write('{"step": 2, "accuracy": 0.5}\n')
    sentence = (
        "--resume: the run is finished, step 2 was its last; extend it, for example with --set "
        "run.steps=4\n"
    )
    assert start("--resume", "small-run") == (2, sentence)
    assert start("--resume", "small-run", "--set", "run.steps=3") == (None, "")


@pytest.mark.parametrize(
    "verdict", ["interrupted: 3 of 3 steps are trained and saved", "finished: 3 of 3 steps"]
)
def test_run_to_the_end_of_the_corpus_is_finished_when_it_said_so(
    start: Launch, small: Path, verdict: str
) -> None:
    start("--topology", "topology.yaml", "--set", "run.steps=null")
    path = small / "small-run"
    finish(path, 3)
    journal = Journal(path)
    journal.record_event(0.0, "controller", "run_ended", verdict)
    journal.close()
    sentence = (
        "--resume: the run is finished, step 3 was its last; extend it, for example with --set "
        "run.epochs=2\n"
    )
    assert start("--resume", "small-run") == (
        (2, sentence) if verdict.startswith("finished") else (None, "")
    )
    assert start("--resume", "small-run", "--set", "run.epochs=2") == (None, "")


@pytest.mark.parametrize("row", ['{"id": "q1", "question": "What is 1 + 1?", "answer": "3"}', None])
def test_resume_with_edited_questions(
    start: Launch, interrupted: Path, small: Path, row: str | None
) -> None:
    """An answer was changed, or two rows changed places; the path is the same."""
    lines = (small / "train.jsonl").read_text().splitlines()
    lines[:2] = [lines[1], lines[0]] if row is None else [lines[0], row]
    before = run_directory.read(interrupted)
    (small / "train.jsonl").write_text("\n".join(lines) + "\n")
    sentence = (
        "--resume: the questions of data.train, 'train.jsonl', are not those that the run began "
        "with; they cannot "
        "change, because the data cursor counts questions of another corpus\n"
    )
    assert start("--resume", "small-run") == (2, sentence)
    assert run_directory.read(interrupted) == before


@pytest.mark.parametrize(
    ("setting", "edited", "why"),
    [
        ("data.heldout", "heldout.jsonl", "results on other questions would not compare"),
        ("data.templates", "prompts/plain.j2", "the trained steps read other prompts"),
    ],
)
def test_resume_with_other_held_out_questions_or_templates(
    start: Launch, small: Path, setting: str, edited: str, why: str
) -> None:
    """The path is the same; nothing else would tell that results and prompts have changed."""
    (small / "prompts").mkdir()
    (small / "prompts/plain.j2").write_text("{{ question }}\n")
    (small / "heldout.jsonl").write_text('{"question": "Why?", "answer": "1"}\n')
    given = ("data.heldout=heldout.jsonl", "data.templates=prompts", "run.steps=3")
    start("--topology", "topology.yaml", *(part for one in given for part in ("--set", one)))
    finish(small / "small-run", 2)
    before = (small / edited).read_text()
    (small / edited).write_text(before.replace("{{", "Now: {{").replace("Why", "Why not"))
    path = edited.partition("/")[0]
    sentence = (
        f"{setting}: {path!r} has changed since the run began; put the old content back, because "
        f"{why}\n"
    )
    assert start("--resume", "small-run") == (2, sentence)
    (small / edited).write_text(before)
    assert start("--resume", "small-run") == (None, "")


EDITS = [
    (
        '"group_size": 8',
        '"group_size": 4',
        "--resume: method.group_size was 8 when the checkpoint of step 2 was written, and run.json "
        "says 4; put it back there, because the trained steps were made by another recipe",
    ),
    (
        '"max_staleness": 1',
        '"max_staleness": 0',
        "--resume: scheduler.max_staleness was 1 and is now 0; it cannot shrink, because windows "
        "in flight keep to the old bound",
    ),
]


@pytest.mark.parametrize(("old", "new", "sentence"), EDITS)
def test_resume_with_an_edited_record(
    start: Launch, interrupted: Path, old: str, new: str, sentence: str
) -> None:
    record = (interrupted / "run.json").read_text()
    assert record.count(old) == 1
    (interrupted / "run.json").write_text(record.replace(old, new))
    assert start("--resume", "small-run") == (2, sentence + "\n")
    assert start("--topology", "topology.yaml", "--resume") == (None, ""), "the topology is right"
    assert old in (interrupted / "run.json").read_text()


@pytest.mark.parametrize("arguments", [("--dry-run",), ()])
def test_resume_with_a_swapped_model(
    start: Launch, interrupted: Path, small: Path, arguments: tuple[str, ...]
) -> None:
    (small / "teacher/tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    sentence = (
        "teacher.model: the files of 'teacher' have changed since the checkpoint of step 2 was "
        "written; put the old ones back, or name a copy of the new model in teacher.model\n"
    )
    assert start("--resume", "small-run", *arguments) == (2, sentence)


def test_resume_of_a_checkpoint_that_does_not_say_what_it_was_made_with(
    start: Launch, interrupted: Path
) -> None:
    manifest = interrupted / "checkpoints/step-2/manifest.json"
    raw = json.loads(manifest.read_text())
    del raw["made_with"]
    manifest.write_text(json.dumps(raw))
    sentence = (
        "--resume: run.seed was 0 and is now 1; it cannot change, because the order of the corpus "
        "would change in the middle\n"
    )
    assert start("--resume", "small-run", "--set", "run.seed=1") == (2, sentence)
    assert start("--resume", "small-run") == (None, "")


@pytest.mark.parametrize("arguments", [("--dry-run",), ()])
@pytest.mark.parametrize("damaged", [False, True])
def test_resume_names_a_journal_that_is_worth_nothing(
    start: Launch, interrupted: Path, arguments: tuple[str, ...], damaged: bool
) -> None:
    journal = interrupted / "journal.sqlite"
    journal.unlink()
    problem, kept = "is missing", ""
    if damaged:
        journal.write_bytes(b"not a database, and longer than its header would be" * 40)
        problem = "is damaged (file is not a database)"
        kept = ", the old one is kept as journal.damaged-1.sqlite"
    code, said = start("--resume", "small-run", *arguments)
    assert said == f"small-run/journal.sqlite {problem}: a new one counts from step 2 on{kept}\n"
    assert code == (0 if arguments else None)
    assert journal.exists() == damaged, "the launcher only says so"


def test_resume_without_a_checkpoint(start: Launch, small: Path) -> None:
    start("--topology", "topology.yaml")
    sentence = "--resume: 'small-run' has no whole checkpoint to continue from; {} to begin anew\n"
    again = sentence.format("launch it without --resume")
    assert start("--resume", "small-run") == (2, again)
    (small / "small-run/metrics.jsonl").write_text('{"step": 0}\n')
    assert start("--resume", "small-run") == (2, sentence.format("remove it"))


def test_resume_of_a_run_that_has_not_ended(start: Launch, interrupted: Path) -> None:
    lock = run_directory.hold(interrupted)
    assert lock is not None
    assert start("--resume", "small-run") == (
        2,
        "--resume: 'small-run' is in use by a run that has not ended\n",
    )
    os.close(lock)


def test_run_record_can_be_read_by_anyone(interrupted: Path) -> None:
    record = json.loads((interrupted / "run.json").read_text())
    keys = {"run_id", "created", "start_step", "corpus", "versions", "topology"}
    keys |= {"trainer_deaths", "extensions", "contents", "journal_id"}
    assert set(record) == keys
    assert record["versions"]["zppo"]


# ---- a teacher's server --------------------------------------------------------------------------


def served_by(url: str) -> list[str]:
    settings = (
        "teacher.model=big",
        "actors.teacher.engine=openai",
        f"actors.teacher.engine_args={{base_url: '{url}', startup_seconds: 0.1}}",
    )
    return [part for text in settings for part in ("--set", text)]


def test_a_dry_run_asks_the_teachers_server(start: Launch) -> None:
    with running(Server(models=("big",))) as server:
        command = ("--topology", "topology.yaml", "--dry-run", *served_by(server.base_url))
        assert start(*command) == (0, "")
    with running(Server(models=("bigger",))) as server:
        command = ("--topology", "topology.yaml", "--dry-run", *served_by(server.base_url))
        assert start(*command) == (
            2,
            f"actors.teacher.engine_args.model: the server at {server.base_url} serves no 'big' "
            "(did you mean 'bigger'?)\n",
        )
    code, said = start(*command)
    assert code == 2
    assert said.startswith(
        f"actors.teacher.engine_args.base_url is '{server.base_url}', where no server was ready "
        "within 0.1 s"
    )
    assert start(*command, "--offline") == (0, "")
