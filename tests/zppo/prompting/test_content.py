"""Messages in parts: where pictures and the frames of videos stand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.prompting.content import messages_as_text, messages_in_parts
from zppo_protocol.places import PLACE
from zppo_protocol.values import (
    ChatMessage,
    Media,
    PictureReference,
    Prompt,
    VideoReference,
    pictures_of,
)


def reference(name: str) -> PictureReference:
    return PictureReference(path=name, sha256="0" * 64, width=8, height=8)


PICTURES = st.text(alphabet="abc", min_size=1).map(reference)
VIDEOS = st.lists(PICTURES, min_size=1, max_size=3).map(
    lambda frames: VideoReference(
        frames=tuple(frames), seconds=tuple(0.5 * i for i in range(len(frames)))
    )
)
MEDIA = st.lists(PICTURES | VIDEOS, max_size=4)
ROLES = st.lists(st.sampled_from(["user", "assistant"]), max_size=4)


@given(media=MEDIA, roles=ROLES)
def test_all_media_in_their_order_before_the_last_words_of_the_user(
    media: list[Media], roles: list[str]
) -> None:
    roles = [*roles, "user"]
    messages = [ChatMessage(role=role, content=f"{i}") for i, role in enumerate(roles)]  # type: ignore[arg-type]
    made = messages_in_parts(
        Prompt(messages=messages, media=media), lambda one: {"type": "image", "of": one.path}
    )
    assert [one["role"] for one in made] == roles
    assert [one["content"][-1] for one in made] == [
        {"type": "text", "text": f"{i}"} for i in range(len(roles))
    ]
    assert all(len(one["content"]) == 1 for one in made[:-1])
    shown = [part["of"] for part in made[-1]["content"] if part["type"] == "image"]
    assert shown == [one.path for one in pictures_of(media)]


def test_frames_stand_behind_their_times() -> None:
    film = VideoReference(frames=(reference("a"), reference("b")), seconds=(0.0, 1.26))
    prompt = Prompt(messages=[ChatMessage(role="user", content="q")], media=[film])
    [message] = messages_in_parts(prompt, lambda one: {"type": "image"})
    assert [part.get("text", "image") for part in message["content"]] == [
        *("<0.0 seconds>", "image", "<1.3 seconds>", "image", "q")
    ]


WORDS = st.text(alphabet="ab \n<é🙂", max_size=5)


@given(
    turns=st.lists(st.tuples(WORDS, st.lists(st.tuples(PICTURES | VIDEOS, WORDS), max_size=3))),
    last=WORDS,
)
def test_media_stand_at_their_places(
    turns: list[tuple[str, list[tuple[Media, str]]]], last: str
) -> None:
    """Whichever message they are in; frames as several pictures, and no empty text beside them."""
    media = [one for _, pairs in turns for one, _ in pairs]
    messages = [
        ChatMessage(
            role="assistant" if i % 2 else "user",
            content=first + "".join(PLACE + words for _, words in pairs),
        )
        for i, (first, pairs) in enumerate(turns)
    ]
    messages.append(ChatMessage(role="user", content=last))
    made = messages_in_parts(Prompt(messages=messages, media=media), lambda one: {"of": one.path})
    if not media:
        assert [one["content"] for one in made] == [
            [{"type": "text", "text": message.content}] for message in messages
        ]
        return
    for message, (first, pairs) in zip(made, [*turns, (last, [])], strict=True):
        expected = [first]
        for one, words in pairs:
            frames = (
                zip(one.seconds, one.frames, strict=True)
                if isinstance(one, VideoReference)
                else [(None, one)]
            )
            for second, frame in frames:
                expected += [] if second is None else [f"<{second:.1f} seconds>"]
                expected += [f"file {frame.path}"]
            expected += [words]
        shown = [part.get("text", f"file {part.get('of')}") for part in message["content"]]
        assert shown == ([text for text in expected if text] or [""])


@pytest.mark.parametrize("text", [f"{PLACE}{PLACE}", f"{PLACE}{PLACE}{PLACE}{PLACE}"])
def test_places_are_one_for_each(text: str) -> None:
    prompt = Prompt(messages=[ChatMessage(role="user", content=text)], media=[reference("a")] * 3)
    with pytest.raises(ValueError) as refused:
        messages_in_parts(prompt, lambda one: {})
    assert str(refused.value) == f"the prompt has {len(text)} places for 3 pictures and videos"


def test_who_sees_nothing_is_given_words_alone() -> None:
    """Nor does a prompt without media have places."""
    prompt = Prompt(messages=[ChatMessage(role="user", content=f"a{PLACE}b")])
    assert messages_as_text(prompt) == [{"role": "user", "content": "ab"}]
    [message] = messages_in_parts(prompt, lambda one: {})
    assert message["content"] == [{"type": "text", "text": "ab"}]


def test_media_need_a_message_of_the_user() -> None:
    prompt = Prompt(messages=[ChatMessage(role="system", content="s")], media=[reference("a")])
    with pytest.raises(ValueError, match="no message of the user"):
        messages_in_parts(prompt, lambda one: {})
