"""Whether prompts suit the models that read them: a place for the system prompt, and room in the
context.

Both are found with the tokenizer alone, before anything is started. Teachers that run behind a
server are left out: only the server knows their template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from zppo.config.topology import ActorConfig, ModelConfig, Topology
from zppo.data.question import Question
from zppo.errors import UserError
from zppo.plan.model_folder import inspect_model
from zppo.plan.processes import teachers, uses_teacher
from zppo.prompting.chat_template import for_template
from zppo.prompting.prompts import PromptSet
from zppo.prompting.tokenization import encode_prompts, load_tokenizer
from zppo_protocol.values import Prompt, TemplateValue

LENGTH_ARGUMENTS = {"transformers": "max_length", "vllm": "max_model_len"}
"""Engines that read a model folder, and their argument that makes the context shorter."""
LONGEST = 256
"""A teacher's tokenizer is tried on so many of the longest questions, by characters."""
SYSTEM_PROBE = "zppo-system-probe"


class Reader(Struct, frozen=True, kw_only=True):
    """A model that reads prompts in its own tokens. `context` is in tokens, `setting` what bounds
    it."""

    folder: str
    where: str
    context: int
    setting: str
    chat_template_kwargs: Mapping[str, TemplateValue] = {}

    def load_tokenizer(self) -> Any:
        return load_tokenizer(self.folder, self.where)

    def lengths(self, tokenizer: Any, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt as this model reads it."""
        own = [for_template(prompt, self.chat_template_kwargs) for prompt in prompts]
        return [len(ids) for ids in encode_prompts(tokenizer, own)]


def student_reader(topology: Topology) -> Reader:
    """The student, as the rollout actors serve it. Raises UserError if its folder is no model."""
    return _reader(topology.student, "student.model", topology.actors.rollout, "actors.rollout")


def teacher_readers(topology: Topology) -> list[Reader]:
    """The teachers that the run asks and whose tokenizer is here. Raises UserError if a folder is
    no model."""
    asked = teachers(topology) if uses_teacher(topology) else []
    local = [one for one in asked if one.actor.engine in LENGTH_ARGUMENTS]
    return [_reader(one.model, one.model_where, one.actor, one.where) for one in local]


def _reader(model: ModelConfig, model_where: str, actor: ActorConfig, where: str) -> Reader:
    context, setting = (
        inspect_model(Path(model.model), model_where).context,
        f"the context of {model_where}",
    )
    argument = LENGTH_ARGUMENTS.get(actor.engine, "")
    length = actor.engine_args.get(argument)
    if isinstance(length, int) and 0 < length < context:
        context, setting = length, f"{where}.engine_args.{argument}"
    return Reader(
        folder=model.model,
        where=model_where,
        context=context,
        setting=setting,
        chat_template_kwargs=model.chat_template_kwargs,
    )


def check_system_prompt(tokenizer: Any, system_prompt: str | None, folder: str, where: str) -> None:
    """Raise UserError if there is a system prompt and the model's chat template refuses it or
    leaves it out.

    `where` is the setting of the model in `folder`.
    """
    if not system_prompt or tokenizer.chat_template is None:
        return
    messages = [{"role": "system", "content": SYSTEM_PROBE}, {"role": "user", "content": "?"}]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        reason = "" if SYSTEM_PROBE in text else "it leaves them out"
    except Exception as error:  # a template may raise whatever Jinja2 can
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if reason:
        raise UserError(
            f"data.system_prompt: the chat template of {where}, {folder!r}, takes no system "
            "messages "
            f"({reason}); expected null, and the words in a template of data.templates"
        )


def check_room(where: str, question: Question, length: int, reader: Reader) -> None:
    """Raise UserError if a prompt of `length` tokens leaves no room for a response."""
    if length >= reader.context:
        raise UserError(
            f"{where}: the question {question.id!r} makes a prompt of {length} tokens; expected "
            f"less than {reader.context}, {reader.setting}"
        )


def check_teachers(topology: Topology, prompts: PromptSet, questions: Sequence[Question]) -> None:
    """Every teacher takes the system prompt, and has room for a response to the longest questions
    of data.train."""
    for reader in teacher_readers(topology):
        tokenizer = reader.load_tokenizer()
        check_system_prompt(tokenizer, topology.data.system_prompt, reader.folder, reader.where)
        longest = sorted(questions, key=lambda question: len(question.text), reverse=True)[:LONGEST]
        lengths = reader.lengths(tokenizer, [prompts.plain(question) for question in longest])
        for question, length in zip(longest, lengths, strict=True):
            check_room("data.train", question, length, reader)
