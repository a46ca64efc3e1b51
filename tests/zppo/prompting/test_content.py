"""Messages in parts: where pictures and the frames of videos stand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.prompting.content import messages_in_parts
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


def test_media_need_a_message_of_the_user() -> None:
    prompt = Prompt(messages=[ChatMessage(role="system", content="s")], media=[reference("a")])
    with pytest.raises(ValueError, match="no message of the user"):
        messages_in_parts(prompt, lambda one: {})
