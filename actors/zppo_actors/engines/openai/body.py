"""From a task to the body of a chat completions request; pictures and videos travel inside it as
data URLs."""

from __future__ import annotations

import base64
import mimetypes
from pathlib import Path
from typing import Any

from zppo.data.pictures import FORMATS, MAX_BYTES
from zppo.plan.engines.openai import OpenAIArguments
from zppo_actors.engines.base import EngineError
from zppo_protocol.messages import GenerateTask
from zppo_protocol.values import ChatMessage, MediaReference, Prompt, Sampling

SEEDS = 2**31
"""Seeds stay below this, because some servers take no larger ones."""


def chat_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The messages of a request. Reads files. Raises EngineError for a picture or video that cannot
    be sent.

    Media come in their order before the text of the last message of the user.
    """
    messages: list[dict[str, Any]] = [
        {"role": entry.role, "content": entry.content} for entry in prompt.messages
    ]
    if prompt.media:
        parts = [_media_part(reference) for reference in prompt.media]
        index = _last_of_user(prompt.messages)
        messages[index]["content"] = [
            *parts,
            {"type": "text", "text": prompt.messages[index].content},
        ]
    return messages


def request_body(
    task: GenerateTask,
    messages: list[dict[str, Any]],
    arguments: OpenAIArguments,
    model: str,
    members: range,
) -> dict[str, Any]:
    """Ask for the completions `members` of the task's group.

    Each member has its own seed, so that a group asked for in parts is not the same completion many
    times.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        **_decoding(task.sampling, arguments.length_field),
        "seed": (task.seed + members.start) % SEEDS,
        "stream": True,
        "stream_options": {"include_usage": True},
        **arguments.extra_body,
    }
    if task.prompt.chat_template_kwargs:  # a field of vLLM and SGLang, unknown to others
        body["chat_template_kwargs"] = task.prompt.chat_template_kwargs
    if len(members) > 1:  # some servers do not know `n`
        body["n"] = len(members)
    return {name: value for name, value in body.items() if value is not None}


def _decoding(sampling: Sampling, length_field: str) -> dict[str, Any]:
    common = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        length_field: sampling.max_new_tokens,
    }
    # Sent only where they do something, because not all servers know them; one that does not says
    # so.
    rare = {name: getattr(sampling, name) for name in ("top_k", "min_p", "presence_penalty")}
    return {**common, **{name: value for name, value in rare.items() if value}}


def _last_of_user(messages: list[ChatMessage]) -> int:
    indices = [index for index, message in enumerate(messages) if message.role == "user"]
    if not indices:
        raise EngineError(
            "the prompt has pictures or videos but no message of the user", retryable=False
        )
    return indices[-1]


def _media_part(reference: MediaReference) -> dict[str, Any]:
    kind = f"{reference.kind}_url"
    return {"type": kind, kind: {"url": _data_url(reference)}}


def _data_url(reference: MediaReference) -> str:
    path = Path(reference.path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise EngineError(
                f"{reference.path!r} has {size} bytes; at most {MAX_BYTES} are sent",
                retryable=False,
            )
        media_type = _picture_type(path) if reference.kind == "image" else _video_type(path)
        data = path.read_bytes()
    except OSError as error:  # Pillow's UnidentifiedImageError is one as well
        raise EngineError(f"{reference.path!r} cannot be sent: {error}", retryable=False) from error
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _picture_type(path: Path) -> str:
    """From the file's header, because servers refuse a type that is not the picture's."""
    from PIL import Image

    with Image.open(path, formats=FORMATS) as image:
        return Image.MIME[str(image.format)]


def _video_type(path: Path) -> str:
    guess, _ = mimetypes.guess_type(path.name)
    if guess is None or not guess.startswith("video/"):
        raise EngineError(
            f"{str(path)!r} cannot be sent: its name is not that of a video file", retryable=False
        )
    return guess
