"""Variables for chat templates: which may be set, and what the teacher is told when it writes for
us.

Models that think do so unless their template is told not to, and 512 tokens (paper, step 4) are
easily spent within a thought. So thinking is off where the teacher compresses, writes hints or
judges; a template without such a switch takes no notice.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import structs

from zppo.config.topology import OPENAI, TeacherConfig
from zppo.errors import UserError
from zppo_protocol.values import Prompt, TemplateValue

THINKING_OFF: dict[str, TemplateValue] = {"enable_thinking": False}
OWNED = {
    "messages": "they are the prompt",
    "conversation": "it is the prompt",
    "tools": "prompts have none",
    "documents": "prompts have none",
    "chat_template": "it is in the model's folder",
    "add_generation_prompt": "it is always true",
    "continue_final_message": "it is always false",
    "tokenize": "it is always true",
    "return_dict": "it is always false",
    "return_tensors": "it is never set",
    "return_assistant_tokens_mask": "it is never set",
    "tokenizer_kwargs": "they are never set",
    "padding": "prompts are never padded",
    "truncation": "prompts are never cut",
    "max_length": "prompts are never cut",
}
"""Names that are no variables of a template but arguments of the tokenizer, and where they come
from."""


def for_template(prompt: Prompt, variables: Mapping[str, TemplateValue]) -> Prompt:
    """The prompt for the chat template of the model that will read it."""
    return structs.replace(prompt, chat_template_kwargs=dict(variables)) if variables else prompt


def when_writing(teacher: TeacherConfig, engine: str) -> Mapping[str, TemplateValue]:
    """What the template is given when `teacher` compresses, writes hints or judges.

    A server is sent nothing unless the user says so, because not all of them know the field.
    """
    if teacher.compression_chat_template_kwargs is not None:
        return teacher.compression_chat_template_kwargs
    return (
        teacher.chat_template_kwargs
        if engine == OPENAI
        else {**teacher.chat_template_kwargs, **THINKING_OFF}
    )


def check_template_variables(given: Mapping[str, object] | None, where: str) -> None:
    """Raise UserError for what is no variable of a chat template, or no single value. `where` is
    the setting."""
    for name, value in (given or {}).items():
        if not isinstance(value, bool | int | float | str | None):
            raise UserError(
                f"{where}.{name} is {value!r}; expected true, false, a number, a text or null"
            )
        if name in OWNED:
            raise UserError(f"{where}.{name} cannot be set: {OWNED[name]}")
        if not name.isidentifier():
            raise UserError(
                f"{where}: {name!r} is no variable of a template; expected a name such as "
                "enable_thinking"
            )
