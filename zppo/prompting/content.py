"""Chat messages for chat templates and servers: as text alone, or with a list of parts as content,
as those of models that see pictures want them.

Pictures and videos stand at their places in the words (`zppo_protocol.places`), or, where they have
none, before those of the last message of the user. A video is one part where the reader takes it as
such; else its frames are shown one by one, each behind the time at which it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, TypeAlias

from zppo_protocol.places import PLACE, without_places
from zppo_protocol.values import Media, PictureReference, Prompt, VideoReference

Part: TypeAlias = dict[str, Any]


def messages_as_text(prompt: Prompt) -> list[dict[str, str]]:
    """The messages of a prompt for whoever is shown no pictures."""
    return [{"role": one.role, "content": without_places(one.content)} for one in prompt.messages]


def messages_in_parts(
    prompt: Prompt,
    picture: Callable[[PictureReference], Part],
    video: Callable[[VideoReference], Part] | None = None,
) -> list[Part]:
    """The messages of a prompt; `picture` makes the part of one picture or frame, e.g.
    `{"type": "image"}`, and `video` that of a whole video, whose frames are shown without it.
    Raises ValueError for media without a message of the user, and for places that are not one for
    each."""
    if not prompt.media:
        return [
            {**message, "content": [_text(message["content"])]}
            for message in messages_as_text(prompt)
        ]
    contents = [message.content for message in prompt.messages]
    places = sum(text.count(PLACE) for text in contents)
    if not places:
        contents = _before_the_last(prompt)
    elif places != len(prompt.media):
        raise ValueError(
            f"the prompt has {places} places for {len(prompt.media)} pictures and videos"
        )
    parts = [_parts(one, picture, video) for one in prompt.media]
    following = iter(parts)
    return [
        {
            "role": message.role,
            "content": _interleaved(
                content.split(PLACE), list(islice(following, content.count(PLACE)))
            ),
        }
        for message, content in zip(prompt.messages, contents, strict=True)
    ]


def _before_the_last(prompt: Prompt) -> list[str]:
    """The texts of the messages, with a place for each picture or video before the words of the
    last one of the user."""
    users = [i for i, message in enumerate(prompt.messages) if message.role == "user"]
    if not users:
        raise ValueError("the prompt has pictures or videos but no message of the user")
    return [
        PLACE * len(prompt.media) * (i == users[-1]) + message.content
        for i, message in enumerate(prompt.messages)
    ]


def _interleaved(words: list[str], media: list[list[Part]]) -> list[Part]:
    """Texts, and between every two of them the parts of a medium; without empty texts."""
    first, *others = words
    content = [_text(first)] if first or not media else []
    for shown, text in zip(media, others, strict=True):
        content += [*shown, _text(text)] if text else shown
    return content


def _text(words: str) -> Part:
    return {"type": "text", "text": words}


def _parts(
    media: Media,
    picture: Callable[[PictureReference], Part],
    video: Callable[[VideoReference], Part] | None,
) -> list[Part]:
    if isinstance(media, PictureReference):
        return [picture(media)]
    if video is not None:
        return [video(media)]
    shown = zip(media.frames, media.seconds, strict=True)
    return [part for frame, second in shown for part in (_text(frame_time(second)), picture(frame))]


def frame_time(second: float) -> str:
    """The words before a frame, as the processors of Qwen3-VL and Qwen3.5 write them."""
    return f"<{second:.1f} seconds>"
