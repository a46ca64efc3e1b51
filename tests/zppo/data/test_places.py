"""The pictures and videos of a row stand where the row puts them: by marks, by parts, or first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import coloured

from zppo.config.topology import DataConfig
from zppo.data.corpus import Corpus, held_out_overlap, load_questions
from zppo.data.media import Cell
from zppo.data.places import IMAGE, VIDEO, set_places
from zppo.data.question import Question, digest
from zppo.errors import UserError
from zppo.prompting.content import messages_in_parts
from zppo_protocol.places import PLACE
from zppo_protocol.values import ChatMessage, Prompt, VideoReference

HERE, FILM_HERE = {"type": "image"}, {"type": "video"}
FILM = {"frames": ["c.png", "d.png"], "seconds": [0.0, 0.5]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in zip("abcd", ("red", "blue", "green", "black"), strict=True):
        coloured(tmp_path / f"{name}.png", colour)
    return tmp_path


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def said(role: str, *content: Any) -> dict[str, Any]:
    whole = isinstance(content[0], str)
    return {"role": role, "content": content[0] if whole else list(content)}


def load(folder: Path, *rows: dict[str, Any]) -> Corpus:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps({"answer": "2", **row}) + "\n" for row in rows))
    return load_questions(str(file), DataConfig(train=str(file)), folder)


def read(folder: Path, **row: Any) -> Question:
    return load(folder, row).questions[0]


def reason(folder: Path, **row: Any) -> str:
    with pytest.raises(UserError) as refused:
        load(folder, row)
    return str(refused.value).partition(":1: ")[2].rpartition("; 1 bad row")[0]


def names(question: Question) -> list[str]:
    return [
        "film" if isinstance(one, VideoReference) else Path(one.path).stem for one in question.media
    ]


# ---- the ways to say where -----------------------------------------------------------------------

BOTH = f"In {PLACE} a dog runs, in\n{PLACE} it sleeps?"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "In <image> a dog runs, in\n<image> it sleeps?", "images": ["a.png", "b.png"]},
        {
            "prompt": [said("user", "In <image> a dog runs, in\n<image> it sleeps?")],
            "images": ["a.png", "b.png"],
        },
        {
            "prompt": [
                said(
                    "user", text("In "), HERE, text(" a dog runs, in\n"), HERE, text(" it sleeps?")
                )
            ],
            "images": ["a.png", "b.png"],
        },
        {
            "prompt": [
                said(
                    "user",
                    *(text("In "), {"type": "image", "image": "a.png"}, text(" a dog runs, in\n")),
                    *({"type": "image", "path": "b.png"}, text(" it sleeps?")),
                )
            ]
        },
    ],
)
def test_every_way_to_say_it_is_one_question(folder: Path, row: dict[str, Any]) -> None:
    question = read(folder, **row)
    assert (question.text, names(question)) == (BOTH, ["a", "b"])
    assert question.words == "In [picture 1] a dog runs, in\n[picture 2] it sleeps?"


def test_pictures_and_videos_stand_in_the_order_of_their_places(folder: Path) -> None:
    asked = "What does <video> show that <image> does not?"
    question = read(folder, question=asked, images="a.png", videos=FILM)
    assert question.text == f"What does {PLACE} show that {PLACE} does not?"
    assert names(question) == ["film", "a"]
    parts = [text("What does "), FILM_HERE, text(" show that <image> does not?")]
    assert read(folder, prompt=[said("user", *parts)], images="a.png", videos=FILM) == question


def test_what_has_no_place_comes_before_the_last_words(folder: Path) -> None:
    """Beside others that have one it gets one too, so that all have."""
    question = read(folder, question="Is it <image>?", images="a.png", videos=[FILM])
    assert (question.text, names(question)) == (f"{PLACE}Is it {PLACE}?", ["film", "a"])


def test_pictures_of_earlier_messages(folder: Path) -> None:
    row = {
        "prompt": [
            said("system", "Say <image> never."),
            said("user", HERE, text("\nWhat is it?")),
            said("assistant", text("Like "), HERE, text(".")),
            said("user", HERE),
            said("assistant", "Yes."),
            said("user", "And what is this?"),
        ],
        "images": ["a.png", "b.png", "c.png"],
    }
    question = read(folder, **row)
    assert [turn.content for turn in question.earlier] == [
        *("Say <image> never.", f"{PLACE}\nWhat is it?", f"Like {PLACE}."),
        *(PLACE, "Yes."),
    ]
    assert (question.text, names(question)) == ("And what is this?", ["a", "b", "c"])
    marked = [
        *(
            row["prompt"][0],
            said("user", "<image>\nWhat is it?"),
            said("assistant", "Like <image>."),
        ),
        *(said("user", "<image>"), *row["prompt"][4:]),
    ]
    assert read(folder, **{**row, "prompt": marked}) == question


def test_first_of_the_last_turn_is_no_place(folder: Path) -> None:
    """Marks and parts there say what is so without them; such a question is what it always was."""
    plain = read(folder, question="How many?", images=["a.png", "b.png"])
    assert not plain.has_places and plain.text == "How many?"
    for row in (
        {"question": " <image>\n<image> How many?"},
        {"prompt": [said("user", HERE, text("\n"), HERE, text(" How many?"))]},
        {"prompt": [said("user", HERE, HERE, text("<image><image>How many?"))]},
    ):
        assert read(folder, **row, images=["a.png", "b.png"]) == plain
    behind = read(folder, question="How many? <image>", images="a.png")
    assert behind.text == f"How many? {PLACE}"


def test_what_is_no_mark_stays(folder: Path) -> None:
    for asked in ("What is <image> in HTML?", "And <video>, <image>?"):
        assert read(folder, question=asked).text == asked
    assert read(folder, question="What is <video>?", images="a.png").text == "What is <video>?"
    assert read(folder, question="What is <image>?", videos=FILM).text == "What is <image>?"


def test_a_row_cannot_bring_places_of_its_own(folder: Path) -> None:
    """The character is taken out of everything that a row says, before its marks are read."""
    question = read(folder, question=f"Is {PLACE} <im{PLACE}age> red{PLACE}?", images="a.png")
    assert question.text == f"Is  {PLACE} red?"
    turns = [said("user", f"a{PLACE}"), said("assistant", text(f"b{PLACE}")), said("user", "c")]
    question = read(folder, prompt=turns, images="a.png", answer=f"2{PLACE}", id=f"x{PLACE}")
    assert [turn.content for turn in question.earlier] == ["a", "b"]
    assert (question.text, question.answer, question.id) == ("c", "2", "x")


def test_cells_of_tables_are_filled_with_nulls(folder: Path) -> None:
    """As Arrow does where some parts have a key and others have not."""
    nothing = {"bytes": None, "path": None}
    film = {"type": "video", "text": None, "image": nothing, "path": None}
    parts = [text("Is "), film, {**text(" it?"), "image": None}]
    assert read(folder, prompt=[said("user", *parts)], videos=FILM).text == f"Is {PLACE} it?"


@pytest.mark.peers
@pytest.mark.parametrize(
    ("messages", "count"),
    [
        ([said("user", text("In "), HERE, text(" it runs, in "), HERE, text(" it sleeps?"))], 2),
        (
            [
                said("user", HERE, text("What?")),
                said("assistant", "A dog."),
                said("user", text("Sure?")),
            ],
            1,
        ),
        (
            [
                said("user", text("Is it"), HERE),
                said("assistant", HERE),
                said("user", text("Is it?")),
            ],
            2,
        ),
        ([said("user", "What is it?")], 2),
    ],
)
def test_pictures_stand_where_trl_puts_them(
    folder: Path, messages: list[dict[str, Any]], count: int
) -> None:
    trl = pytest.importorskip("trl.data_utils", reason="TRL is not installed")
    images = ["a.png", "b.png"][:count]
    question = read(folder, prompt=messages, images=images)
    turns = [*question.earlier, ChatMessage(role="user", content=question.text)]
    prompt = Prompt(messages=turns, media=list(question.media))
    ours = messages_in_parts(prompt, lambda one: {"image": Path(one.path).name})
    theirs = trl.prepare_multimodal_messages(messages, images)
    shown = [
        [[part.get("text", part.get("image")) for part in one["content"]] for one in made]
        for made in (ours, theirs)
    ]
    assert shown[0] == shown[1]


# ---- bad rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            {"question": "Is <image> in <image>?", "images": "a.png"},
            "the question ('question') holds <image> 2 times and the row has 1 picture; expected "
            "one for each picture, or none",
        ),
        (
            {"question": "Is <video> short?", "videos": [FILM, FILM]},
            "the question ('question') holds <video> once and the row has 2 videos; expected one "
            "for each video, or none",
        ),
        (
            {"prompt": [said("user", text("Is <image> it, or "), HERE)], "images": "a.png"},
            "the question ('prompt') holds <image> in its words and pictures as parts; expected "
            "one of the two",
        ),
        (
            {"prompt": [said("user", text("Is it "), FILM_HERE)], "videos": [FILM, FILM]},
            "the question ('prompt') has 1 parts {type: video} for the row's videos, and the "
            "videos ('videos') hold 2; expected as many",
        ),
        (
            {"question": "<video>\n", "videos": FILM},
            "the question ('question') is empty but for <video>",
        ),
        (
            {"prompt": [said("user", HERE)], "images": "a.png"},
            "the question ('prompt') is empty but for <image>",
        ),
        (
            {"question": "How many?", "images": ["a.png"] * 257},
            "it has 257 pictures and videos; at most 256 are taken",
        ),
    ],
)
def test_places_that_are_not_one_for_each(folder: Path, row: dict[str, Any], why: str) -> None:
    assert reason(folder, **row) == why


# ---- what is the same question -------------------------------------------------------------------


def test_places_tell_questions_apart(folder: Path) -> None:
    """By digest, id made of the content, repeats and the held-out check."""
    images = ["a.png", "b.png"]
    first = {"question": "Is <image> in <image>?", "images": images}
    second = {"question": "Is in <image><image>?", "images": images}
    swapped = {**first, "images": images[::-1]}
    questions = load(folder, first, second, swapped).questions
    assert len({one.id for one in questions}) == len({digest([one]) for one in questions}) == 3
    again = {**first, "question": "is <image> IN <image>?", "id": "other"}
    assert held_out_overlap(questions, [read(folder, **again)]) == [questions[0].id]


def test_questions_without_places_keep_id_and_digest(folder: Path) -> None:
    """Those that a run of an earlier version was begun with."""
    question = read(folder, question="<image>\nHow many?", images="a.png")
    assert question.id == "train-7d633bce768ce8f8"
    assert digest([question]) == (
        "56c71def07deb76939c2d2cb90b970603bfc9b3d9d691c3bc24e22b70c0e230b"
    )


# ---- any text ------------------------------------------------------------------------------------

WORDS = st.text(alphabet=st.sampled_from("ab <>/image\n \u00a0🙂é"), max_size=8).filter(
    lambda words: IMAGE not in words and VIDEO not in words
)


@st.composite
def spoken(draw: Any) -> tuple[list[list[str]], list[Any]]:
    """Turns as pieces of text, between every two of which stands one of the media."""
    media = draw(st.lists(st.sampled_from(["a", "b", "film"]), min_size=1, max_size=5))
    cuts = sorted(draw(st.lists(st.integers(0, len(media)), max_size=2)))
    turns = []
    for begin, end in zip([0, *cuts], [*cuts, len(media)], strict=True):
        turns.append(draw(st.lists(WORDS, min_size=end - begin + 1, max_size=end - begin + 1)))
    turns[-1][-1] += "?"
    return turns, [Cell(None, one) if one != "film" else one for one in media]


@settings(max_examples=150, deadline=None)
@given(case=spoken())
def test_marks_and_parts_keep_media_between_their_words(
    case: tuple[list[list[str]], list[Any]],
) -> None:
    turns, media = case
    following = iter(media)
    marked = [
        pieces[0]
        + "".join(
            (IMAGE if isinstance(next(following), Cell) else VIDEO) + piece for piece in pieces[1:]
        )
        for pieces in turns
    ]
    pictures = [one for one in media if isinstance(one, Cell)]
    films = [one for one in media if not isinstance(one, Cell)]
    by_marks = set_places(marked, [], [*pictures, *films], "it")
    assert by_marks == set_places([PLACE.join(pieces) for pieces in turns], media, [], "it")
    texts, order = by_marks
    assert order == media
    if any(PLACE in one for one in texts):
        assert [one.split(PLACE) for one in texts] == turns
    else:  # all stood before the words of the last turn
        assert "".join(piece for pieces in turns[:-1] for piece in pieces) == "".join(texts[:-1])
        assert all(not piece.strip() for piece in turns[-1][:-1])
        assert texts[-1] == turns[-1][-1].lstrip()
