"""Chat messages whose content is a list of parts, as templates of models that see pictures want
them, and as servers do.

Pictures and videos come, in their order, before the text of the last message of the user. The
frames of a video are shown one by one, each behind the time at which it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from zppo_protocol.values import Media, PictureReference, Prompt

Part: TypeAlias = dict[str, Any]


def messages_in_parts(prompt: Prompt, picture: Callable[[PictureReference], Part]) -> list[Part]:
    """The messages of a prompt; `picture` makes the part of one picture or frame, e.g.
    `{"type": "image"}`. Raises ValueError for media without a message of the user."""
    users = [i for i, message in enumerate(prompt.messages) if message.role == "user"]
    if prompt.media and not users:
        raise ValueError("the prompt has pictures or videos but no message of the user")
    media = [part for one in prompt.media for part in _parts(one, picture)]
    return [
        {
            "role": message.role,
            "content": [
                *(media if users and i == users[-1] else []),
                {"type": "text", "text": message.content},
            ],
        }
        for i, message in enumerate(prompt.messages)
    ]


def _parts(media: Media, picture: Callable[[PictureReference], Part]) -> list[Part]:
    if isinstance(media, PictureReference):
        return [picture(media)]
    shown = zip(media.frames, media.seconds, strict=True)
    return [
        part
        for frame, second in shown
        for part in ({"type": "text", "text": frame_time(second)}, picture(frame))
    ]


def frame_time(second: float) -> str:
    """The words before a frame, as the processors of Qwen3-VL and Qwen3.5 write them."""
    return f"<{second:.1f} seconds>"
