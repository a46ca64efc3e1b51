"""From a task to the body of a chat completions request; pictures and the frames of videos travel
inside it as data URLs."""

from __future__ import annotations

import base64
from typing import Any

from zppo.data.pictures import MAX_BYTES, PictureError, plain_bytes
from zppo.plan.engines.openai import OpenAIArguments
from zppo.prompting.content import messages_as_text, messages_in_parts
from zppo_actors.engines.base import EngineError
from zppo_protocol.messages import GenerateTask
from zppo_protocol.values import PictureReference, Prompt, Sampling

SEEDS = 2**31
"""Seeds stay below this, because some servers take no larger ones."""


def chat_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The messages of a request. Reads files. Raises EngineError for a picture that cannot be sent.

    Pictures, and frames of videos with their times, stand as `messages_in_parts` says.
    """
    if not prompt.media:
        return [dict(message) for message in messages_as_text(prompt)]
    try:
        messages = messages_in_parts(prompt, _picture_part)
    except ValueError as error:
        raise EngineError(str(error), retryable=False) from error
    for message in messages:  # plain text where there is nothing else, for the simplest servers
        if [part["type"] for part in message["content"]] == ["text"]:
            message["content"] = message["content"][0]["text"]
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


def _picture_part(reference: PictureReference) -> dict[str, Any]:
    try:
        media_type, content = plain_bytes(reference)
    except PictureError as error:
        raise EngineError(f"a picture cannot be sent: {error}", retryable=False) from error
    if len(content) > MAX_BYTES:
        raise EngineError(
            f"the picture {reference.path!r} takes {len(content)} bytes; at most {MAX_BYTES} are "
            "sent, so set data.max_pixels",
            retryable=False,
        )
    data = base64.b64encode(content).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}}
