"""Whether prompts suit the models that read them: a place for the system prompt, and room in the
context.

Both are found with the tokenizer alone, before anything is started. Teachers that run behind a
server are left out: only the server knows their template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from heapq import nlargest
from typing import Any

from msgspec import Struct

from zppo.config.served import ServedModel
from zppo.data.question import Question
from zppo.errors import UserError, first_line
from zppo.plan.model_folder import inspect_model
from zppo.plan.picture_checks import has_video, layout_of, text_alone_note, video_note
from zppo.prompting.chat_template import for_template
from zppo.prompting.picture_layout import MarkError, PictureLayout
from zppo.prompting.prompts import PromptSet
from zppo.prompting.tokenization import encode_prompts, load_tokenizer, written_out
from zppo_protocol.places import in_words
from zppo_protocol.values import ChatMessage, Prompt, pictures_of

LENGTH_ARGUMENTS = {"transformers": "max_length", "vllm": "max_model_len"}
"""Engines that read a model folder, and their argument that makes the context shorter."""
LONGEST = 256
"""A teacher's tokenizer is tried on so many of the longest questions, by characters, and as many by
pixels."""
SYSTEM_PROBE = "zppo-system-probe"
QUESTION_PROBES = ("How much is 12 + 5?", "Which letter comes after B?")


class Reader(Struct, frozen=True, kw_only=True):
    """A model that reads prompts in its own tokens. `context` is in tokens, `setting` what bounds
    it, and token ids are below `vocabulary`."""

    served: ServedModel
    context: int
    setting: str
    vocabulary: int

    @classmethod
    def of(cls, served: ServedModel) -> Reader:
        """How `served` reads. Raises UserError if its folder is no model."""
        facts = inspect_model(served.folder, served.model_path)
        context = facts.context
        setting = f"the context of {served.model_path}"
        argument = LENGTH_ARGUMENTS.get(served.actor.engine, "")
        length = served.actor.engine_args.get(argument)
        if isinstance(length, int) and 0 < length < context:
            context, setting = length, f"{served.actor_path}.engine_args.{argument}"
        return cls(served=served, context=context, setting=setting, vocabulary=facts.vocabulary)

    def load_tokenizer(self) -> Any:
        """Its tokenizer. Raises UserError if there is none, or its template shows no question."""
        tokenizer = load_tokenizer(self.served.model.model, self.served.model_path)
        check_question_shown(tokenizer, self.served)
        return tokenizer

    def lengths(self, tokenizer: Any, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt as this model reads it."""
        served = self.served
        own = [for_template(prompt, served.model.chat_template_kwargs) for prompt in prompts]
        pictures = layout_of(served, tokenizer)
        try:
            encoded = encode_prompts(tokenizer, own, pictures)
        except MarkError:
            raise _marked(tokenizer, own, pictures, served) from None
        except UserError:
            raise
        except Exception as error:  # a template may raise whatever Jinja2 can
            raise UserError(
                f"{served.model_path}: the chat template of {served.model.model!r} fails "
                f"({first_line(error)}); mend it, or the variables in "
                f"{served.section}.chat_template_kwargs"
            ) from None
        self._check_ids(tokenizer, encoded)
        return [len(ids) for ids in encoded]

    def _check_ids(self, tokenizer: Any, encoded: Sequence[Sequence[int]]) -> None:
        """Raise UserError for tokens that the model does not have: the tokenizer is another's."""
        highest = max((token for ids in encoded for token in ids), default=0)
        if highest >= self.vocabulary:
            raise UserError(
                f"{self.served.model_path}: the tokenizer in {self.served.model.model!r} is not "
                f"its model's: it gives prompts the token {highest} "
                f"({tokenizer.convert_ids_to_tokens(highest)!r}), and the model has "
                f"{self.vocabulary} tokens; expected the tokenizer that the model was trained with"
            )

    def notes(self, tokenizer: Any, questions: Sequence[Question]) -> list[str]:
        """What works but may surprise of a model that is asked these questions."""
        notes = []
        if tokenizer.chat_template is None:
            notes.append(
                f"{self.served.model_path}: {self.served.model.model!r} has no chat template: "
                "messages are put one below the other, and nothing tells the model whose they are"
            )
        notes += self._unread_variables(tokenizer)
        notes += text_alone_note(self.served, tokenizer)
        if any(map(has_video, questions)):
            notes += video_note(self.served, tokenizer)
        return notes

    def _unread_variables(self, tokenizer: Any) -> list[str]:
        """A note on variables that the chat template does not have, such as misspelt ones."""
        section, model = self.served.section, self.served.model
        given = model.chat_template_kwargs
        words = set(re.findall(r"\w+", str(tokenizer.chat_template or "")))
        return [
            f"{section}.chat_template_kwargs.{name} changes nothing: the chat template of "
            f"{model.model!r} has no such variable"
            for name in given
            if name not in words
        ]


def _marked(
    tokenizer: Any, prompts: Sequence[Prompt], pictures: PictureLayout | None, served: ServedModel
) -> UserError:
    """Why the first of these prompts whose marks are not one for each picture cannot be read."""
    for prompt in prompts:
        try:
            encode_prompts(tokenizer, [prompt], pictures)
        except MarkError as error:
            words = in_words(prompt.messages[-1].content, prompt.media)[:60]
            expected = (
                "words without marks"
                if _holds_marks(tokenizer, prompt, pictures)
                else "pictures in messages in which its chat template shows them"
            )
            return UserError(
                f"{served.model_path}: {error} as {served.model.model!r} reads it, of the words "
                f"that begin {words!r}; expected {expected}"
            )
    raise AssertionError("one of the prompts has other marks than pictures")


def _holds_marks(tokenizer: Any, prompt: Prompt, pictures: PictureLayout | None) -> bool:
    """Whether the words of a prompt, or those that begin its response, hold a mark of a picture or
    video."""
    words = [message.content for message in prompt.messages]
    words += [prompt.start.text] if prompt.start is not None else []
    return pictures is not None and any(
        not pictures.marks.isdisjoint(tokenizer(text)["input_ids"]) for text in words
    )


def check_question_shown(tokenizer: Any, served: ServedModel) -> None:
    """Raise UserError if the model's chat template shows nothing of what the user says, so that
    every question would be the same to the model. One that fails is left to `Reader.lengths`."""
    if tokenizer.chat_template is None:
        return
    write = _writer(tokenizer, served)
    try:
        first, second = (write(ChatMessage(role="user", content=one)) for one in QUESTION_PROBES)
    except Exception:  # a template may raise whatever Jinja2 can
        return
    if first == second:
        raise UserError(
            f"{served.model_path}: the chat template of {served.model.model!r} shows nothing of "
            "the question; expected one that shows the content of the messages, as the folder of "
            "the original model has it"
        )


def _writer(tokenizer: Any, served: ServedModel) -> Callable[..., str]:
    """A function of messages that writes them out as `served` reads them."""
    pictures, variables = layout_of(served, tokenizer), served.model.chat_template_kwargs

    def write(*messages: ChatMessage) -> str:
        prompt = for_template(Prompt(messages=[*messages]), variables)
        return written_out(tokenizer, prompt, pictures)

    return write


def check_system_prompt(tokenizer: Any, system_prompt: str | None, served: ServedModel) -> None:
    """Raise UserError if there is a system prompt and the model's chat template refuses it or
    leaves it out."""
    reason = _no_system(tokenizer, served) if system_prompt else ""
    if reason:
        raise UserError(
            f"data.system_prompt: the chat template of {served.model_path}, "
            f"{served.model.model!r}, takes no system messages ({reason}); expected null, and the "
            "words in a template of data.templates"
        )


def check_own_system(
    tokenizer: Any, where: str, questions: Sequence[Question], served: ServedModel
) -> None:
    """The same for the system messages that questions bring. `where` is their setting."""
    first = next((question.id for question in questions if question.has_system), None)
    reason = _no_system(tokenizer, served) if first is not None else ""
    if reason:
        raise UserError(
            f"{where}: the question {first!r} has a system message, and the chat template of "
            f"{served.model_path}, {served.model.model!r}, takes none ({reason}); expected rows "
            "without one"
        )


def _no_system(tokenizer: Any, served: ServedModel) -> str:
    """Why the chat template shows no system message; nothing if it does, or there is none."""
    if tokenizer.chat_template is None:
        return ""
    write = _writer(tokenizer, served)
    told = ChatMessage(role="system", content=SYSTEM_PROBE)
    try:
        text = write(told, ChatMessage(role="user", content="?"))
    except Exception as error:  # a template may raise whatever Jinja2 can
        return first_line(error)
    return "" if SYSTEM_PROBE in text else "it leaves them out"


def check_room(where: str, question: Question, length: int, reader: Reader) -> None:
    """Raise UserError if a prompt of `length` tokens leaves no room for a response."""
    if length >= reader.context:
        raise UserError(
            f"{where}: the question {question.id!r} makes a prompt of {length} tokens; expected "
            f"less than {reader.context}, {reader.setting}"
        )


def _longest(questions: Sequence[Question]) -> list[Question]:
    """Those with the most words, and those with the most pictures, by their pixels."""
    most: tuple[Callable[[Question], int], ...] = (
        lambda question: question.characters,
        lambda question: sum(one.width * one.height for one in pictures_of(question.media)),
    )
    found = {one.id: one for key in most for one in nlargest(LONGEST, questions, key=key)}
    return list(found.values())


def check_teachers(
    asked: Sequence[ServedModel],
    system_prompt: str | None,
    prompts: PromptSet,
    questions: Sequence[Question],
) -> list[str]:
    """Every teacher that is asked, and whose tokenizer is here, takes the system prompt, and has
    room for a response to the longest questions of data.train, in words or pictures. Raises
    UserError. Returns notes."""
    notes = []
    longest = _longest(questions)
    for served in asked:
        if served.actor.engine not in LENGTH_ARGUMENTS:
            continue
        reader = Reader.of(served)
        tokenizer = reader.load_tokenizer()
        check_system_prompt(tokenizer, system_prompt, served)
        check_own_system(tokenizer, "data.train", questions, served)
        lengths = reader.lengths(tokenizer, [prompts.plain(question) for question in longest])
        for question, length in zip(longest, lengths, strict=True):
            check_room("data.train", question, length, reader)
        notes += reader.notes(tokenizer, questions)
    return notes
