"""What is refused of pictures before a run: each in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import recurrent_models
from msgspec.structs import replace
from picture_files import coloured
from vision_helpers import make_seeing, save_seeing

from zppo.config.method import MethodConfig
from zppo.config.served import served_student, teachers
from zppo.config.topology import ActorsConfig, DataConfig, StudentConfig, TeacherConfig, Topology
from zppo.data.question import Question
from zppo.errors import UserError
from zppo.plan.picture_checks import check_media, check_scores
from zppo.plan.prompt_checks import (
    LONGEST,
    Reader,
    check_question_shown,
    check_system_prompt,
    check_teachers,
)
from zppo.prompting.picture_layout import MarkError
from zppo.prompting.prompts import PromptSet
from zppo.prompting.tokenization import encode_prompts, load_picture_layout, load_tokenizer
from zppo_protocol.places import PLACE
from zppo_protocol.values import (
    ChatMessage,
    Media,
    Prompt,
    ResponseStart,
    Sampling,
    VideoReference,
)


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


def question_about(*media: Media) -> Question:
    return Question(id="x", text="w3", answer="1", grader="exact", media=media)


@pytest.mark.parametrize("others", [0, 1])
def test_a_mark_in_the_words_of_a_question_is_found_before_the_run(
    seeing: str, tmp_path: Path, others: int
) -> None:
    """With and without pictures in other prompts of the batch: the engine refuses both."""
    picture = coloured(tmp_path / "a.png", "red", (56, 56))
    reader = Reader(
        served=served_student(topology_of(seeing)), context=512, setting="context", vocabulary=4096
    )
    fine = [prompt("w3", media=[picture]), prompt("w4 w5")]
    lengths = reader.lengths(load_tokenizer(seeing, "student.model"), fine)
    assert lengths == [9, 3]
    marked = [*fine[:others], prompt("w3 <image> w4"), fine[1]]
    with pytest.raises(UserError) as refused:
        reader.lengths(load_tokenizer(seeing, "student.model"), marked)
    assert str(refused.value) == (
        f"student.model: the prompt holds 1 mark of pictures for 0 pictures as {seeing!r} reads "
        "it, of the words that begin 'w3 <image> w4'; expected words without marks"
    )


def test_a_picture_that_the_chat_template_leaves_out_is_found_before_the_run(
    seeing: str, tmp_path: Path
) -> None:
    """Some templates show the text alone of what assistants say."""
    picture = coloured(tmp_path / "a.png", "red", (56, 56))
    turns = [("user", "w3"), ("assistant", f"w4 {PLACE}"), ("user", "w5")]
    messages = [ChatMessage(role=role, content=text) for role, text in turns]  # type: ignore[arg-type]
    shown = Prompt(messages=messages, media=[picture])
    reader = Reader(
        served=served_student(topology_of(seeing)), context=512, setting="context", vocabulary=4096
    )
    tokenizer = load_tokenizer(seeing, "student.model")
    reader.lengths(tokenizer, [shown])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "part.type == 'image'", "part.type == 'image' and message.role == 'user'"
    )
    with pytest.raises(UserError) as refused:
        reader.lengths(tokenizer, [shown])
    assert str(refused.value) == (
        f"student.model: the prompt holds 0 marks of pictures for 1 picture as {seeing!r} reads "
        "it, of the words that begin 'w5'; expected pictures in messages in which its chat "
        "template shows them"
    )


def test_a_template_that_takes_parts_alone_shows_questions_and_system_messages(seeing: str) -> None:
    """As SmolVLM's does: a content that is one text has no parts, so that nothing is shown."""
    tokenizer = load_tokenizer(seeing, "student.model")
    served = served_student(topology_of(seeing))
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    check_question_shown(tokenizer, served)
    check_system_prompt(tokenizer, "Be brief.", served)
    tokenizer.chat_template = "{{ messages[0].role }}"
    with pytest.raises(UserError, match="shows nothing of the question"):
        check_question_shown(tokenizer, served)
    with pytest.raises(UserError, match="it leaves them out"):
        check_system_prompt(tokenizer, "Be brief.", served)


def test_a_mark_in_the_start_of_a_response_is_refused(seeing: str) -> None:
    """What a teacher wrote becomes the start of the student's response (Algorithm 6)."""
    tokenizer = load_tokenizer(seeing, "student.model")
    layout = load_picture_layout(seeing, tokenizer, "student.model")
    started = [
        prompt("w3", start=ResponseStart(text=text, share=0.5))
        for text in ("w4 w5 <image> w6", "w4 <image> w5 w6")
    ]
    assert len(encode_prompts(tokenizer, started[:1], layout)[0]) == 4
    with pytest.raises(MarkError, match="the prompt holds 1 mark of pictures for 0 pictures"):
        encode_prompts(tokenizer, started, layout)


def test_a_teacher_that_scores_must_see(seeing: str, blind: str, tmp_path: Path) -> None:
    asked = [question_about(coloured(tmp_path / "a.png", "red"))]
    check_scores("data.train", asked, topology_of(seeing, seeing, scoring="colocated"))
    check_scores("data.train", asked, topology_of(seeing))
    with pytest.raises(UserError) as unseen:
        check_scores("data.train", asked, topology_of(seeing, blind, scoring="colocated"))
    assert str(unseen.value) == (
        "data.train: the question 'x' has pictures, and the trainer cannot show them to "
        f"{blind!r} (teacher.model); expected a model of the family idefics3 or qwen3_5 with its "
        "processor (docs/pictures.md), or text only"
    )
    remote = topology_of(seeing, seeing, scoring="remote")
    check_scores("data.train", asked, remote)
    actors = ActorsConfig()
    actors = replace(actors, teacher=replace(actors.teacher, engine="vllm"))
    with pytest.raises(UserError) as text_alone:
        check_scores("data.train", asked, replace(remote, actors=actors))
    assert str(text_alone.value) == (
        "data.train: the question 'x' has pictures, and actors.teacher.engine 'vllm' scores "
        "responses to text alone; expected 'transformers', or that teacher.scoring is colocated"
    )


def test_held_out_questions_are_only_asked(blind: str, tmp_path: Path) -> None:
    """A model whose pictures only its engine can lay out may be evaluated on them."""
    question = question_about(coloured(tmp_path / "a.png", "red"))
    topology = topology_of(blind)
    actors = replace(topology.actors, rollout=replace(topology.actors.rollout, engine="vllm"))
    topology = replace(topology, actors=actors)
    check_media("data.heldout", [question], topology)
    with pytest.raises(UserError, match=r"\(student.model\) cannot be trained on them"):
        check_media("data.train", [question], topology, trained=True)


@pytest.fixture(scope="module")
def filming(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is shown videos as videos."""
    model = recurrent_models.make_seeing()
    return str(recurrent_models.save_seeing(model, tmp_path_factory.mktemp("filming")))


def film(folder: Path) -> VideoReference:
    frames = tuple(coloured(folder / f"{i}.png", "red", (64, 96)) for i in range(3))
    return VideoReference(frames=frames, seconds=(0.0, 0.5, 1.0))


def under(engine: str, topology: Topology) -> Topology:
    actors = topology.actors
    return replace(topology, actors=replace(actors, rollout=replace(actors.rollout, engine=engine)))


def test_prompts_are_counted_as_videos_are_shown(filming: str, tmp_path: Path) -> None:
    """And a plan says how that is. Two of three frames are merged, each of 6 tokens."""
    tokenizer = load_tokenizer(filming, "student.model")
    lengths, notes = [], []
    for engine in ("transformers", "vllm"):
        served = served_student(under(engine, topology_of(filming)))
        reader = Reader(served=served, context=512, setting="context", vocabulary=4096)
        lengths += reader.lengths(tokenizer, [prompt("w", media=[film(tmp_path)])])
        notes += reader.notes(tokenizer, [question_about(film(tmp_path))])
    assert lengths == [len("<0.2 seconds><1.0 seconds>") + 2 * (6 + 2) + 2 + 1] * 2
    assert notes == [f"student.model: {filming!r} is shown videos as videos, 2 frames in one"] * 2


def test_a_plan_says_nothing_of_videos_without_one(
    filming: str, seeing: str, blind: str, tmp_path: Path
) -> None:
    picture, video = coloured(tmp_path / "a.png", "red"), film(tmp_path)
    notes = []
    for folder, medium in ((filming, picture), (blind, video), (seeing, video)):
        reader = Reader(
            served=served_student(topology_of(folder)),
            context=512,
            setting="context",
            vocabulary=4096,
        )
        notes.append(
            reader.notes(load_tokenizer(folder, "student.model"), [question_about(medium)])
        )
    because = "its folder has no video_preprocessor_config.json of a kind that is known here"
    assert notes == [
        [],
        [],
        [f"student.model: {seeing!r} is shown videos as several pictures, because {because}"],
    ]


def test_a_teacher_that_scores_must_read_the_students_videos(filming: str, tmp_path: Path) -> None:
    model = recurrent_models.make_seeing()
    other = recurrent_models.save_seeing(model, tmp_path / "other")
    (other / "video_preprocessor_config.json").unlink()
    asked = [question_about(film(tmp_path))]
    check_scores("data.train", asked, topology_of(filming, filming, scoring="colocated"))
    check_scores("data.train", asked, topology_of(str(other), filming, scoring="colocated"))
    deaf = topology_of(filming, str(other), scoring="colocated")
    pictures = [question_about(coloured(tmp_path / "a.png", "red"))]
    check_scores("data.train", pictures, deaf)
    with pytest.raises(UserError) as refused:
        check_scores("data.train", asked, deaf)
    assert str(refused.value) == (
        f"data.train: the question 'x' has a video, which {filming!r} is shown as a video, and "
        f"{str(other)!r} (teacher.model), which scores the same tokens, reads none so; expected a "
        "teacher with the video_preprocessor_config.json of its model, or no videos"
    )


def test_a_teacher_has_room_for_the_questions_with_the_most_pictures(
    seeing: str, tmp_path: Path
) -> None:
    """Which are not those with the most words."""
    run = topology_of(seeing, seeing)
    actors = ActorsConfig()
    teacher = replace(actors.teacher, engine="transformers", engine_args={"max_length": 100})
    run = replace(run, actors=replace(actors, teacher=teacher))
    words = [Question(id=f"{i}", text=f"w{i} w4 w5", answer="1") for i in range(LONGEST)]
    [asked], prompts = teachers(run)[:1], PromptSet.of(run.data)
    check_teachers([asked], None, prompts, words)
    picture = coloured(tmp_path / "a.png", "red", (56, 56))
    pictured = Question(id="many", text="w3", answer="1", media=(picture,) * 13)
    with pytest.raises(UserError) as refused:
        check_teachers([asked], None, prompts, [*words, pictured])
    assert re.fullmatch(
        r"data\.train: the question 'many' makes a prompt of 1\d\d tokens; expected less than 100, "
        r"actors\.teacher\.engine_args\.max_length",
        str(refused.value),
    )


PICTURES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"
DOES_NOT_SAY = (
    "student.model: {folder!r} does not say how its model reads pictures ({why}); expected "
    "config.json, preprocessor_config.json and video_preprocessor_config.json as save_pretrained "
    "writes them"
)
CANNOT = "student.model: {folder!r} cannot be shown pictures: its processor of {why}"
CANNOT_WITH = CANNOT.removesuffix("{why}")
RESIZES = "expected true, because only pictures of some sizes could be cut into patches"


def changed(folder: str, copy: Path, file: str, **settings: object) -> str:
    """A copy of a model's folder in which one file has other settings; `...`: not there."""
    shutil.copytree(folder, copy)
    found = json.loads((copy / file).read_text())
    part = found.get("image_processor", found)  # of the file that bundles several processors
    part.update(settings)
    for name in [name for name, value in settings.items() if value is ...]:
        del part[name]
    (copy / file).write_text(json.dumps(found))
    return str(copy)


@pytest.mark.parametrize(
    ("file", "settings", "sentence"),
    [
        (PICTURES, {"do_resize": False}, f"{CANNOT_WITH}pictures has do_resize false; {RESIZES}"),
        (VIDEOS, {"do_resize": False}, f"{CANNOT_WITH}videos has do_resize false; {RESIZES}"),
        (
            PICTURES,
            {"patch_size": 14},
            f"{CANNOT_WITH}pictures has patch_size 14; expected 16, the patch_size of config.json",
        ),
        (
            PICTURES,
            {"temporal_patch_size": 1},
            f"{CANNOT_WITH}pictures has temporal_patch_size 1; expected 2, the "
            "temporal_patch_size of config.json",
        ),
        (
            VIDEOS,
            {"merge_size": 1},
            f"{CANNOT_WITH}videos has merge_size 1; expected 2, the spatial_merge_size of "
            "config.json",
        ),
        (
            PICTURES,
            {"patch_size": "16"},
            f"{CANNOT_WITH}pictures has patch_size '16'; expected 16, the patch_size of "
            "config.json",
        ),
        (
            PICTURES,
            {"min_pixels": 4096, "max_pixels": 1024},
            f"{CANNOT_WITH}pictures has sizes of 4096 to 1024 pixels; expected 1 or more, the "
            "larger one last",
        ),
        (
            PICTURES,
            {"image_processor_type": "SiglipImageProcessor"},
            f"{CANNOT_WITH}pictures has image_processor_type 'SiglipImageProcessor'; expected "
            "'Qwen2VLImageProcessor'",
        ),
        (PICTURES, {"patch_size": ...}, DOES_NOT_SAY.replace("{why}", "'patch_size'")),
        (
            PICTURES,
            {"do_resize": None},
            "student.model: the processor of pictures of {folder!r} fails (",
        ),
        (
            PICTURES,
            {"size": {"shortest_edge": 1024, "longest_edge": 65536, "min_pixels": 1}},
            "student.model: {folder!r} has no processor of pictures that can be loaded (",
        ),
    ],
)
def test_settings_under_which_pictures_are_other_tokens(
    filming: str, tmp_path: Path, file: str, settings: dict[str, object], sentence: str
) -> None:
    """Some of them were found by the first pass over a picture, some by nobody: transformers takes
    them, and makes other features than were laid out, or fails. Text can be trained on."""
    folder = changed(filming, tmp_path / "changed", file, **settings)
    topology = topology_of(folder)
    with pytest.raises(UserError) as refused:
        check_media(
            "data.train",
            [question_about(coloured(tmp_path / "a.png", "red"))],
            topology,
            trained=True,
        )
    assert str(refused.value).startswith(sentence.format(folder=folder))
    reader = Reader(
        served=served_student(topology), context=512, setting="context", vocabulary=4096
    )
    assert reader.lengths(load_tokenizer(folder, "student.model"), [prompt("w")]) == [1]


def test_text_is_trained_on_whatever_the_settings_of_pictures_say(
    filming: str, tmp_path: Path
) -> None:
    """A torn file stops pictures, and an engine that reads it for text, too; a note says so."""
    folder = tmp_path / "torn"
    shutil.copytree(filming, folder)
    file = folder / PICTURES
    file.write_text(file.read_text()[:40])
    topology = topology_of(str(folder))
    reader = Reader(
        served=served_student(topology), context=512, setting="context", vocabulary=4096
    )
    tokenizer = load_tokenizer(str(folder), "student.model")
    assert reader.lengths(tokenizer, [prompt("w")]) == [1]
    asked = question_about(coloured(tmp_path / "a.png", "red"))
    said = f"student.model: {str(file)!r} cannot be read: Input data was truncated"
    assert reader.notes(tokenizer, [question_about()]) == [f"{said}; text does not need it"]
    with pytest.raises(UserError) as refused:
        check_media("data.train", [asked], topology, trained=True)
    assert str(refused.value) == said
    with pytest.raises(UserError) as shown:
        reader.lengths(tokenizer, [prompt("w", media=asked.media)])
    assert str(shown.value) == said
    reader = replace(reader, served=served_student(under("vllm", topology)))
    with pytest.raises(UserError) as read:
        reader.lengths(tokenizer, [prompt("w")])
    assert str(read.value) == said
    with pytest.raises(UserError, match="holds 1 mark of pictures for 0 pictures"):
        Reader(
            served=served_student(topology), context=512, setting="context", vocabulary=4096
        ).lengths(tokenizer, [prompt("a <|image_pad|>")])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"max_image_size": {"longest_edge": 112}},
            "pictures has max_image_size 112; expected 56, the image_size of config.json",
        ),
        (
            {"do_image_splitting": True, "do_resize": False},
            f"pictures has do_resize false; {RESIZES}",
        ),
    ],
)
def test_settings_of_tiles_that_do_not_suit_the_model(
    seeing: str, tmp_path: Path, settings: dict[str, object], sentence: str
) -> None:
    file = "processor_config.json"
    folder = changed(seeing, tmp_path / "changed", file, **settings)
    asked = [question_about(coloured(tmp_path / "a.png", "red"))]
    with pytest.raises(UserError) as refused:
        check_media("data.train", asked, topology_of(folder), trained=True)
    assert str(refused.value) == CANNOT.format(folder=folder, why=sentence)
    whole = changed(seeing, tmp_path / "whole", file, do_resize=False)
    check_media("data.train", asked, topology_of(whole), trained=True)


def test_a_teacher_that_scores_must_make_the_students_tokens(filming: str, tmp_path: Path) -> None:
    """A picture, or a video, that another size makes of more tokens was found in the first step."""
    small = {"shortest_edge": 1024, "longest_edge": 4096}
    pictured = [question_about(coloured(tmp_path / "a.png", "red", (96, 128)))]
    filmed = [question_about(film(tmp_path))]
    for asked, other, what in (
        (pictured, PICTURES, "picture of 96 × 128 pixels, which is 12 tokens"),
        (filmed, VIDEOS, "video of 3 frames of 64 × 96 pixels, which is 42 tokens"),
    ):
        teacher = changed(filming, tmp_path / f"small-{other}", other, size=small)
        fits = filmed if asked is pictured else pictured
        for scoring in ("colocated", "remote"):
            topology = topology_of(filming, teacher, scoring=scoring)
            check_scores("data.train", fits, topology)
            with pytest.raises(UserError) as refused:
                check_scores("data.train", asked, topology)
            said = str(refused.value)
            assert said.startswith(
                f"data.train: the question 'x' has a {what} for {filming!r} and "
            )
            assert said.endswith(
                f" for {teacher!r} (teacher.model), which scores the same tokens; expected one "
                "size in preprocessor_config.json and video_preprocessor_config.json of both"
            )


def test_the_mark_of_a_video_in_the_words_of_a_question_is_found_before_the_run(
    filming: str,
) -> None:
    reader = Reader(
        served=served_student(topology_of(filming)), context=512, setting="context", vocabulary=4096
    )
    with pytest.raises(UserError) as refused:
        reader.lengths(load_tokenizer(filming, "student.model"), [prompt("a <|video_pad|>")])
    assert str(refused.value) == (
        f"student.model: the prompt holds 1 mark of videos for 0 videos as {filming!r} reads it, "
        "of the words that begin 'a <|video_pad|>'; expected words without marks"
    )
