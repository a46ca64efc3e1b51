"""What is refused of pictures before a run: each in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from picture_files import coloured
from vision_helpers import make_seeing, save_seeing

from zppo.config.method import MethodConfig
from zppo.config.served import served_student
from zppo.config.topology import ActorsConfig, DataConfig, StudentConfig, TeacherConfig, Topology
from zppo.data.question import Question
from zppo.errors import UserError
from zppo.launch import _check_media
from zppo.plan.picture_checks import check_scores
from zppo.plan.prompt_checks import Reader
from zppo.prompting.picture_families import MarkError
from zppo.prompting.tokenization import encode_prompts, load_picture_layout, load_tokenizer
from zppo_protocol.values import ChatMessage, Prompt, ResponseStart, Sampling


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_seeing(make_seeing(), tmp_path_factory.mktemp("seeing")))


@pytest.fixture(scope="module")
def blind(seeing: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model, of which nothing says how it reads pictures."""
    folder = tmp_path_factory.mktemp("blind")
    for file in Path(seeing).iterdir():
        if "processor" not in file.name:
            (folder / file.name).symlink_to(file)
    return str(folder)


def topology_of(student: str, teacher: str | None = None, **teachers: object) -> Topology:
    return Topology(
        data=DataConfig(train="x"),
        student=StudentConfig(model=student, sampling=Sampling(max_new_tokens=8)),
        teacher=None if teacher is None else TeacherConfig(model=teacher, **teachers),  # type: ignore[arg-type]
        method=MethodConfig(name="zppo" if teacher is None else "on_distill"),
    )


def prompt(text: str, **more: object) -> Prompt:
    return Prompt(messages=[ChatMessage(role="user", content=text)], **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("others", [0, 1])
def test_a_mark_in_the_words_of_a_question_is_found_before_the_run(
    seeing: str, tmp_path: Path, others: int
) -> None:
    """With and without pictures in other prompts of the batch: the engine refuses both."""
    picture = coloured(tmp_path / "a.png", "red", (56, 56))
    reader = Reader(served=served_student(topology_of(seeing)), context=512, setting="context")
    fine = [prompt("w3", media=[picture]), prompt("w4 w5")]
    lengths = reader.lengths(load_tokenizer(seeing, "student.model"), fine)
    assert lengths == [9, 3]
    marked = [*fine[:others], prompt("w3 <image> w4"), fine[1]]
    with pytest.raises(UserError) as refused:
        reader.lengths(load_tokenizer(seeing, "student.model"), marked)
    assert str(refused.value) == (
        f"student.model: the prompt holds 1 marks of pictures for 0 pictures as {seeing!r} reads "
        "it, of the words that begin 'w3 <image> w4'; expected words without marks, because "
        "pictures are put before them"
    )


def test_a_mark_in_the_start_of_a_response_is_refused(seeing: str) -> None:
    """What a teacher wrote becomes the start of the student's response (Algorithm 6)."""
    tokenizer = load_tokenizer(seeing, "student.model")
    layout = load_picture_layout(seeing, tokenizer, "student.model")
    started = [
        prompt("w3", start=ResponseStart(text=text, share=0.5))
        for text in ("w4 w5 <image> w6", "w4 <image> w5 w6")
    ]
    assert len(encode_prompts(tokenizer, started[:1], layout)[0]) == 4
    with pytest.raises(MarkError, match="the prompt holds 1 marks of pictures for 0 pictures"):
        encode_prompts(tokenizer, started, layout)


def test_a_teacher_that_scores_must_see(seeing: str, blind: str) -> None:
    check_scores("data.train", "x", topology_of(seeing, seeing, scoring="colocated"))
    check_scores("data.train", "x", topology_of(seeing))
    with pytest.raises(UserError) as unseen:
        check_scores("data.train", "x", topology_of(seeing, blind, scoring="colocated"))
    assert str(unseen.value) == (
        "data.train: the question 'x' has pictures, and the trainer cannot show them to "
        f"{blind!r} (teacher.model); expected a model of the family idefics3 or qwen3_5 with its "
        "processor (docs/pictures.md), or text only"
    )
    remote = topology_of(seeing, seeing, scoring="remote")
    check_scores("data.train", "x", remote)
    actors = ActorsConfig()
    actors = replace(actors, teacher=replace(actors.teacher, engine="vllm"))
    with pytest.raises(UserError) as text_alone:
        check_scores("data.train", "x", replace(remote, actors=actors))
    assert str(text_alone.value) == (
        "data.train: the question 'x' has pictures, and actors.teacher.engine 'vllm' scores "
        "responses to text alone; expected 'transformers', or that teacher.scoring is colocated"
    )


def test_held_out_questions_are_only_asked(blind: str, tmp_path: Path) -> None:
    """A model whose pictures only its engine can lay out may be evaluated on them."""
    picture = coloured(tmp_path / "a.png", "red")
    question = Question(id="x", text="w3", answer="1", grader="exact", media=(picture,))
    topology = topology_of(blind)
    actors = replace(topology.actors, rollout=replace(topology.actors.rollout, engine="vllm"))
    topology = replace(topology, actors=actors)
    _check_media("data.heldout", [question], topology)
    with pytest.raises(UserError, match=r"\(student.model\) cannot be trained on them"):
        _check_media("data.train", [question], topology)
