"""Topologies: what is read, and the one sentence for each mistake, word for word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.config.load import convert, load, override, run_folder, setting_names
from zppo.config.strict_yaml import parse
from zppo.config.topology import StudentSampling, Topology
from zppo.errors import UserError
from zppo_protocol.values import Sampling

Reader = Callable[..., Topology]
EXAMPLES = Path(__file__).parents[3] / "examples"
BASE = "data: {train: q.jsonl}\nstudent:\n  model: m\n"


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str) -> Topology:
        Path("t.yaml").write_text(text)
        return load(Path("t.yaml"), overrides)

    return read


# Each line: what is added to BASE (or the whole text, if it starts with =), and the sentence.
MISTAKES = [
    (
        "run:\n  steps: many",
        "t.yaml:5: run.steps is 'many'; expected a whole number of at least 1, or null",
    ),
    ("run:\n  step: 3", "t.yaml:5: there is no setting run.step (did you mean 'steps'?)"),
    (
        "run: {group_size: 8}",
        "t.yaml:4: there is no setting run.group_size (did you mean 'method.group_size'?)",
    ),
    ("sheduler: {}", "t.yaml:4: there is no setting sheduler (did you mean 'scheduler'?)"),
    ("=student: {model: m}", "t.yaml: data is missing; expected a section of settings"),
    ("=", "t.yaml: data is missing; expected a section of settings"),
    ("=data: {}\nstudent: {model: m}", "t.yaml:1: data.train is missing; expected a text"),
    (
        "method: {advantage: grop}",
        "t.yaml:4: method.advantage is 'grop'; expected one of batch, center_only, grpo, "
        "grpo_bessel, norm_with_zero, norm_without_zero, rloo (did you mean 'grpo'?)",
    ),
    (
        "method: {group_size: true}",
        "t.yaml:4: method.group_size is true; expected a whole number of at least 1",
    ),
    (
        "method: {group_size: 8.5}",
        "t.yaml:4: method.group_size is 8.5; expected a whole number of at least 1",
    ),
    (
        "method: {dual_clip: 1}",
        "t.yaml:4: method.dual_clip is 1; expected a number above 1.0, or null",
    ),
    (
        "optimizer: {learning_rate: -1e-3}",
        "t.yaml:4: optimizer.learning_rate is -0.001; expected a number above 0.0",
    ),
    (
        "optimizer: {learning_rate: 1e31}",
        "t.yaml:4: optimizer.learning_rate is 1e+31; expected a number above 0.0 and at most 1e+30",
    ),
    (
        "scheduler: {lease_seconds: 1e12}",
        "t.yaml:4: scheduler.lease_seconds is 1000000000000.0; expected a number above 0.0 and at "
        "most 1000000000.0",
    ),
    (
        "actors: {trainer: {threads: 9223372036854775807}}",
        "t.yaml:4: actors.trainer.threads is 9223372036854775807; expected a whole number of at "
        "least 1 and at most 1024, or null",
    ),
    (
        "transport: {max_message_mib: 9223372036854775807}",
        "t.yaml:4: transport.max_message_mib is 9223372036854775807; expected a whole number of at "
        "least 1 and at most 1048576",
    ),
    (
        "transport: {heartbeat_seconds: 1e-9}",
        "t.yaml:4: transport.heartbeat_seconds is 1e-09; expected a number of at least 0.01",
    ),
    (
        "scheduler: {rho_aug: 2}",
        "t.yaml:4: scheduler.rho_aug is 2; expected a number of at least 0.0 and at most 1.0",
    ),
    ("sinks: {tensorboard: no}", "t.yaml:4: sinks.tensorboard is 'no'; expected true or false"),
    (
        "actors:\n  teacher:\n    hosts:\n    - a\n    - 3",
        "t.yaml:8: actors.teacher.hosts[1] is 3; expected a text",
    ),
    ("transport:", "t.yaml:4: transport is null; expected a section of settings"),
    ("teacher: {dtype: float32}", "t.yaml:4: teacher.model is missing; expected a text"),
    ("run: {steps: 3, steps: 4}", "t.yaml:4: run.steps is given twice, first on line 4"),
    ("data: {train: other.jsonl}", "t.yaml:4: data is given twice, first on line 1"),
    ("x: {1: 2}", "t.yaml:4: a key is not a text; expected the name of a setting"),
    ("method: {dual_clip: 1e999}", "t.yaml:4: not YAML: the number 1e999 is too large"),
    (
        f"run: {{steps: {'9' * 5000}}}",
        f"t.yaml:4: not YAML: the whole number {'9' * 40} does not fit into 64 bits",
    ),
    (
        'run: {name: "a\\ud800"}',
        "t.yaml:4: not YAML: the text 'a\\ud800' holds half a surrogate pair",
    ),
    ('"x\\udc00": 3', "t.yaml:4: not YAML: the text 'x\\udc00' holds half a surrogate pair"),
    ("run:\n  name: a\1b", "t.yaml:5: not YAML: the character U+0001 may not stand in it"),
    (
        "---\nrun: {steps: 3}",
        "t.yaml:4: not YAML: expected a single document in the stream, but found another document",
    ),
    ("steps: 3", "t.yaml:4: there is no setting steps (did you mean 'run.steps'?)"),
    (
        "=data: {train: q, heldout: ''}\nstudent: {model: m}",
        "data.heldout is ''; expected a path",
    ),
    ("run: &a [*a]", "t.yaml: is nested too deeply, or an alias refers to itself"),
    ("run: [", "t.yaml:5: not YAML: expected the node content, but found '<stream end>'"),
    (
        "run: !!python/name:os.system x",
        (
            "t.yaml:4: not YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/name:os.system'"
        ),
    ),
    (
        "=data: {train: q}\nstudent: {model: m, chat_template_kwargs: {enable_thinking: [1]}}",
        "t.yaml:2: student.chat_template_kwargs is {'enable_thinking': [1]}; expected each value "
        "to be true or false, "
        "or a whole number, or a number, or a text, or null",
    ),
    (
        "=data: {train: q, fields: {ids: x}}\nstudent: {model: m}",
        (
            "t.yaml:1: data.fields is {'ids': 'x'}; expected a mapping with the keys answer, "
            "grader, id, images, question, system_prompt, videos"
        ),
    ),
]


@pytest.mark.parametrize(("text", "sentence"), MISTAKES)
def test_mistake_in_the_file(read: Reader, text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        read(text[1:] if text.startswith("=") else BASE + text + "\n")
    assert str(caught.value) == sentence


SET_MISTAKES = [
    (
        "run.steps=0",
        "--set run.steps=0: run.steps is 0; expected a whole number of at least 1, or null",
    ),
    ("run.stepz=3", "--set run.stepz=3: there is no setting run.stepz (did you mean 'steps'?)"),
    ("run=3", "--set run=3: run is 3; expected a section of settings"),
    (
        "run.steps.x=3",
        "--set run.steps.x=3: there is no setting run.steps.x; expected a single value there",
    ),
    ("run.steps", "--set run.steps: expected path=value, for example run.steps=100"),
    ("=3", "--set =3: expected path=value, for example run.steps=100"),
    (
        "run.steps=[",
        "--set run.steps=[:1: not YAML: expected the node content, but found '<stream end>'",
    ),
    (
        "run.name=\udcff",
        "--set run.name=\\udcff:1: not YAML: the character U+DCFF may not stand in it",
    ),
    (
        "data.fields.ids=x",
        "--set data.fields.ids=x: there is no setting data.fields.ids (did you mean 'id'?)",
    ),
    ("teacher.dtype=float32", "t.yaml: teacher.model is missing; expected a text"),
]


@pytest.mark.parametrize(("text", "sentence"), SET_MISTAKES)
def test_mistake_in_an_override(read: Reader, text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        read(BASE, text)
    assert str(caught.value) == sentence


def test_missing_file_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").touch()
    with pytest.raises(UserError) as caught:
        load(Path("quikstart.yaml"))
    assert (
        str(caught.value)
        == "quikstart.yaml: there is no such topology (did you mean 'quickstart.yaml'?)"
    )


def test_alias_bomb_is_refused_quickly() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    with pytest.raises(UserError, match="holds more than 100000 values"):
        parse(bomb, "bomb.yaml")


def test_a_topology_that_is_json_has_whole_characters() -> None:
    said = {"system_prompt": "\U0001f600 é"}
    assert parse(json.dumps(said), "t.json").data == said


def test_scalars_are_yaml_1_2() -> None:
    text = "[1e-6, 1.5, .5, -3, 010, no, true, null, ~, 2026-01-01, '1', 1_000]"
    assert parse(text, "t").data == [
        1e-6,
        1.5,
        0.5,
        -3,
        10,
        "no",
        True,
        None,
        None,
        "2026-01-01",
        "1",
        "1_000",
    ]


def test_overrides_win_and_make_sections(read: Reader) -> None:
    overrides = (
        "run.steps=7",
        "optimizer.learning_rate=3e-4",
        "actors.rollout.devices=[cuda:0, cuda:1]",
    )
    topology = read(BASE + "run: {steps: 5}\n", *overrides)
    assert topology.run.steps == 7
    assert topology.optimizer.learning_rate == 3e-4
    assert topology.actors.rollout.devices == ["cuda:0", "cuda:1"]


def test_override_of_a_whole_section_forgets_what_stood_there(read: Reader) -> None:
    assert read(BASE + "teacher: {model: t}\n", "teacher=null").teacher is None


def test_override_of_an_existing_run(read: Reader) -> None:
    topology = read(BASE)
    assert override(topology, ["run.steps=9"]).run.steps == 9
    with pytest.raises(UserError, match=r"^--set run\.steps=x: run\.steps is 'x'"):
        override(topology, ["run.steps=x"])


def test_relative_paths_are_taken_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    text = (
        BASE
        + "teacher: {model: ../t}\nactors: {rollout: {engine: simulated, engine_args: {script: s.json}}}\n"
    )
    (tmp_path / "sub/t.yaml").write_text(text)
    topology = load(Path("sub/t.yaml"))
    assert topology.data.train == str(tmp_path / "sub/q.jsonl")
    assert topology.student.model == str(tmp_path / "sub/m")
    assert topology.teacher is not None
    assert topology.teacher.model == str(tmp_path / "sub/../t")
    assert topology.actors.rollout.engine_args == {"script": str(tmp_path / "sub/s.json")}
    assert run_folder(topology) == tmp_path / "runs/run"


@pytest.mark.parametrize("example", ["quickstart", "smollm2", "one_gpu"])
def test_the_name_of_a_run_is_its_folder(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = EXAMPLES / f"{example}.yaml"
    assert run_folder(load(file)) == tmp_path / "runs" / example.replace("_", "-")
    assert run_folder(load(file, ["run.name=X"])) == tmp_path / "runs/X"


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, (0, False)),
        ({"top_k": 5}, (5, True)),
        ({"top_k": 500}, (128, True)),
        ({"top_p": 0.9}, (128, True)),
        ({"min_p": 0.1, "support_limit": 7}, (7, True)),
        ({"top_k": 5, "temperature": 0.0}, (5, False)),
    ],
)
def test_a_truncated_student_samples_from_at_most_the_limit(
    given: dict[str, float], asked: tuple[int, bool]
) -> None:
    sampling = msgspec.convert(given, StudentSampling)
    assert (sampling.in_training.top_k, sampling.truncates) == asked
    plain = {name: value for name, value in given.items() if name != "support_limit"}
    assert sampling.as_asked == Sampling(max_new_tokens=12_288, **plain)  # type: ignore[arg-type]


def test_a_sampling_section_may_say_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        "data: {train: x}\nstudent: {model: m, sampling: {top_k: 5}}\n"
        "teacher: {model: m, sampling: {temperature: 0.5}, compression_sampling: {temperature: "
        "0}}\n"
        "evaluation: {sampling: {temperature: 0.6}}\n"
    )
    loaded = load(file)
    assert loaded.teacher is not None and loaded.evaluation.sampling is not None
    sections = (loaded.student.sampling, loaded.teacher.sampling, loaded.evaluation.sampling)
    assert [one.max_new_tokens for one in sections] == [12_288] * 3
    assert loaded.teacher.compression_sampling.max_new_tokens == 512
    assert (loaded.student.sampling.top_k, loaded.student.sampling.temperature) == (5, 1.0)


def test_settings_lists_every_leaf() -> None:
    paths = list(setting_names())
    assert len(paths) == len(set(paths))
    assert {"run.steps", "teacher.sampling.top_k", "actors.rollout.engine_args", "sinks"} <= set(
        paths
    )


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_one_sentence(text: str) -> None:
    try:
        parse(text, "t.yaml")
    except UserError as error:
        assert str(error).startswith("t.yaml")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["steps", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(Topology.__struct_fields__), PLAIN, max_size=4))
def test_any_sections_are_converted_or_refused(data: dict[str, object]) -> None:
    try:
        convert(data, {"": "t.yaml"})
    except UserError as error:
        assert str(error).startswith("t.yaml: ")
    else:
        assert msgspec.convert(data, Topology)
