"""Prompts that the models of a run cannot read are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import make_model, make_tokenizer
from msgspec import structs
from served import student_of

from zppo.config.method import MethodConfig
from zppo.config.served import served_models, served_student
from zppo.config.topology import (
    ActorConfig,
    ActorsConfig,
    DataConfig,
    ModelConfig,
    StudentConfig,
    Topology,
)
from zppo.data.question import Question
from zppo.errors import UserError
from zppo.plan.model_folder import special_tokens
from zppo.plan.processes import asked_teachers
from zppo.plan.prompt_checks import (
    Reader,
    check_own_system,
    check_question_shown,
    check_room,
    check_system_prompt,
    check_teachers,
)
from zppo.prompting.prompts import PromptSet
from zppo.prompting.tokenization import load_tokenizer
from zppo_protocol.values import ChatMessage

PLAIN = "{% for message in messages %}{{ message.content }} {% endfor %}"
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% "
    "endif %}" + PLAIN
)
DROPS = (
    "{% for message in messages %}{% if message.role != 'system' %}{{ message.content }} {% endif "
    "%}{% endfor %}"
)


def tokenizer_with(template: str | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [None, PLAIN])
def test_system_prompt_that_is_shown_passes(template: str | None) -> None:
    check_system_prompt(tokenizer_with(template), "Be brief.", student_of("models/a"))


@pytest.mark.parametrize("template", [PLAIN, REFUSES, DROPS])
def test_without_a_system_prompt_any_template_passes(template: str) -> None:
    check_system_prompt(tokenizer_with(template), None, student_of("models/a"))


@pytest.mark.parametrize(
    ("template", "reason"), [(REFUSES, "System role not supported"), (DROPS, "it leaves them out")]
)
def test_template_without_a_system_role_is_one_sentence(template: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        check_system_prompt(tokenizer_with(template), "Be brief.", student_of("models/a"))
    assert str(caught.value) == (
        "data.system_prompt: the chat template of student.model, 'models/a', takes no system "
        "messages "
        f"({reason}); expected null, and the words in a template of data.templates"
    )
    told = ChatMessage(role="system", content="Be brief.")
    plain = Question(id="a", text="1 + 1?", answer="2")
    own = Question(id="b", text="2 + 2?", answer="4", earlier=(told,))
    reads = tokenizer_with(template), "data.train"
    check_own_system(*reads, [plain], student_of("models/a"))
    with pytest.raises(UserError) as caught:
        check_own_system(*reads, [plain, own], student_of("models/a"))
    assert str(caught.value) == (
        "data.train: the question 'b' has a system message, and the chat template of "
        f"student.model, 'models/a', takes none ({reason}); expected rows without one"
    )


@pytest.mark.parametrize("template", [None, PLAIN, REFUSES, "{{ raise_exception('no') }}"])
def test_a_template_that_shows_the_question_passes(template: str | None) -> None:
    check_question_shown(tokenizer_with(template), student_of("models/a"))


@pytest.mark.parametrize("template", ["", "hello", "{{ messages[0].role }}"])
def test_a_template_that_shows_nothing_of_the_question_is_refused(
    tmp_path: Path, template: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_question_shown(tokenizer_with(template), student_of("models/a"))
    assert str(caught.value) == (
        "student.model: the chat template of 'models/a' shows nothing of the question; expected "
        "one that shows the content of the messages, as the folder of the original model has it"
    )
    run = topology(tmp_path, {})
    tokenizer_with(template).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"^teacher\.model: .* shows nothing of the question"):
        check_all_teachers(run, [])


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "student", vocab_size=20)
    reader = Reader.of(student_of(folder))
    prompts = PromptSet.of(DataConfig(train="unused"))
    prompt = prompts.plain(Question(id="q", text="w35", answer="1"))
    tokenizer = reader.load_tokenizer()
    highest = max(tokenizer("w35")["input_ids"])
    with pytest.raises(UserError) as caught:
        reader.lengths(tokenizer, [prompt])
    assert str(caught.value) == (
        f"student.model: the tokenizer in {folder!r} is not its model's: it gives prompts the token "
        f"{highest} ('w35'), and the model has 20 tokens; expected the tokenizer that the model was "
        "trained with"
    )


def test_a_variable_that_the_chat_template_does_not_have_is_noted() -> None:
    one = student_of("models/a")
    given = {"enable_thinkng": False, "thinking": True}
    one = structs.replace(one, model=structs.replace(one.model, chat_template_kwargs=given))
    reader = Reader(served=one, context=64, setting="context", vocabulary=64)
    template = PLAIN + "{% if thinking %}<think>{% endif %}"
    assert reader.notes(tokenizer_with(template), []) == [
        "student.chat_template_kwargs.enable_thinkng changes nothing: the chat template of "
        "'models/a' has no such variable"
    ]


def save(folder: Path, template: str | None = PLAIN, **sizes: Any) -> str:
    make_model("llama", **sizes).save_pretrained(folder)
    tokenizer_with(template).save_pretrained(folder)
    return str(folder)


def topology(
    tmp_path: Path, teacher_args: dict[str, Any], engine: str = "transformers", **data: Any
) -> Topology:
    student, teacher = (
        save(tmp_path / "student"),
        save(tmp_path / "teacher", DROPS, max_position_embeddings=64),
    )
    return Topology(
        data=DataConfig(train="unused", **data),
        method=MethodConfig(name="zppo"),
        student=StudentConfig(model=student, dtype="float32"),
        teacher=ModelConfig(model=teacher, dtype="float32"),
        actors=ActorsConfig(
            rollout=ActorConfig(engine="transformers", engine_args={"max_length": 100}),
            teacher=ActorConfig(engine=engine, engine_args=teacher_args),
        ),
    )


def check_all_teachers(run: Topology, questions: list[Question]) -> None:
    check_teachers(asked_teachers(run), run.data.system_prompt, PromptSet.of(run.data), questions)


def test_context_is_the_smaller_of_model_and_engine(tmp_path: Path) -> None:
    run = topology(tmp_path, {"max_length": 1000})
    student, teacher = (Reader.of(one) for one in served_models(run))
    assert (student.context, student.setting) == (100, "actors.rollout.engine_args.max_length")
    assert (teacher.context, teacher.setting) == (64, "the context of teacher.model")


def test_teacher_behind_a_server_is_not_asked(tmp_path: Path) -> None:
    run = topology(tmp_path, {"base_url": "http://127.0.0.1:1/v1"}, engine="openai")
    long = Question(id="q", text="w5 " * 100, answer="1")
    check_all_teachers(run, [long])


def test_prompt_without_room_is_one_sentence(tmp_path: Path) -> None:
    student = Reader.of(served_student(topology(tmp_path, {})))
    question = Question(id="q7", text="?", answer="1")
    check_room("data.train", question, 99, student)
    with pytest.raises(UserError) as caught:
        check_room("data.train", question, 100, student)
    assert str(caught.value) == (
        "data.train: the question 'q7' makes a prompt of 100 tokens; expected less than 100, "
        "actors.rollout.engine_args.max_length"
    )


def test_teachers_are_checked_in_their_own_tokens_on_the_longest_questions(tmp_path: Path) -> None:
    run = topology(tmp_path, {})
    short, long = (Question(id=f"q{n}", text="w5 " * n, answer="1") for n in (3, 70))
    check_all_teachers(run, [short])
    with pytest.raises(
        UserError,
        match=r"'q70' makes a prompt of \d+ tokens; expected less than 64, the context of",
    ):
        check_all_teachers(run, [short, long])


def test_system_prompt_that_a_teacher_leaves_out_is_refused(tmp_path: Path) -> None:
    run = topology(tmp_path, {}, system_prompt="Be brief.")
    with pytest.raises(
        UserError, match=r"the chat template of teacher\.model, .* takes no system messages"
    ):
        check_all_teachers(run, [])


def test_special_tokens_are_those_that_no_text_may_hold(tmp_path: Path) -> None:
    """Of the tokenizers in the folders that are there; a spelled-out one is read as the token."""
    student = Path(__file__).parents[3] / "examples/quickstart/student"
    tokens = [
        {"id": 0, "content": "</s>", "special": True},
        {"id": 1, "content": "word", "special": True},
        {"id": 2, "content": "<tool>"},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {}}))
    found = special_tokens([student, tmp_path, tmp_path / "nowhere"])
    assert found == {"<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "</s>"}
    tokenizer = load_tokenizer(str(student), "student.model")
    assert tokenizer("1<eos>2", add_special_tokens=False)["input_ids"][1] == tokenizer.eos_token_id
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError) as caught:
        special_tokens([tmp_path])
    assert str(caught.value).startswith(f"{str(tmp_path / 'tokenizer.json')!r} cannot be read: ")
