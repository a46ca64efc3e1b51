"""Prompts from templates: the plain question, its reformulations, and what the teacher is asked to
write or to judge.

Templates are Jinja2 files, one for each name in `VARIABLES`; a user's folder replaces them one by
one (docs/templates.md). All are read at the start, so what is edited later shows in no prompt. The
invariant: whatever a model wrote stays inside its `<candidate>` or
`<hint>` element. Words of models pass through `neutral`, which takes structural tags, chat control
marks and places of pictures out, so no response can close its element early, open another, end the
user's turn, or take a picture of the question to itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from heapq import nlargest
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import (
    FunctionLoader,
    StrictUndefined,
    TemplateError,
    TemplateNotFound,
    TemplateSyntaxError,
    meta,
)
from jinja2.loaders import split_template_path
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import structs

from zppo.config.method import MethodConfig
from zppo.config.topology import DataConfig
from zppo.data.question import Question
from zppo.errors import UserError, nearest
from zppo.grading.boxes import last_boxed
from zppo_protocol.places import PLACE, in_words, without_places
from zppo_protocol.values import ChatMessage, Media, Prompt, ResponseStart

DEFAULT_TEMPLATES = Path(__file__).parent / "templates"
PREFIX_SHARE = MethodConfig().prefix_share
Value: TypeAlias = str | int | Sequence[str] | Sequence[int]
VARIABLES: dict[str, dict[str, Value]] = {
    "plain.j2": {"question": "@question"},
    "bcq.j2": {"question": "@question", "candidates": ["@first", "@second"]},
    "ncq.j2": {
        "question": "@question",
        "wrong_answers": ["@wrong", "@false"],
        "candidates": ["@first", "@second"],
        "counts": [1, 2],
    },
    "hint.j2": {"question": "@question", "hint": "@hint"},
    "write_hint.j2": {
        "question": "@question",
        "response": "@response",
        "max_tokens": 512,
        "max_lines": 5,
    },
    "compress.j2": {
        "question": "@question",
        "response": "@response",
        "max_tokens": 512,
        "max_lines": 5,
    },
    "judge.j2": {"question": "@question", "gold": "@gold", "answer": "@answer"},
    "rubric.j2": {
        "question": "@question",
        "gold": "@gold",
        "response": "@response",
        "rubric": "@rubric",
    },
}
"""Template -> its variables, with dummies that `validate` looks for in the rendered text. All have
one more, `PICTURES`."""
PICTURES = "pictures"
"""How many pictures and videos the question has. A request about a response (compress, hint, judge,
rubric) is sent them if its template reads this; prompts that ask the question always are."""

ASKING = ("plain.j2", "bcq.j2", "ncq.j2", "hint.j2")
"""Those that ask the question."""
LONGEST = 256
"""Templates are tried on so many of the longest questions with places, by characters."""

_CHAT_MARK = re.compile(r"<[|｜][^<>|｜]{1,64}[|｜]>")
"""Those of most families, and with the broad bar those of DeepSeek, some of which its tokenizers do
not call special."""
# Possessive: after a "<" and a page of spaces there is nothing to try again.
_STRUCTURE = re.compile(
    rf"<\s*+/?+\s*+(?:candidate|think|hint)\b[^<>]*+>|{_CHAT_MARK.pattern}", re.IGNORECASE
)
_PASSES = 20
"""Marks within marks that are taken out one by one; text that nests deeper is hostile and loses its
angle brackets."""


def _without(text: str, marks: re.Pattern[str]) -> str:
    """A text that holds none of these marks. Removal repeats until nothing is left to remove, since
    taking one out may join two halves of another."""
    for _ in range(_PASSES):
        text, removed = marks.subn("", text)
        if not removed:
            return text
    # A blank in its place joins no halves, but for those of a tag, which may hold blanks; so a
    # bracket, too, leaves a blank.
    return marks.sub(" ", text).replace("<", " ")


def _any_of(marks: Iterable[str]) -> list[str]:
    """Patterns of these texts, the longest that fits first: one for each first character, so that
    a model with a thousand of them costs no more where none begins."""
    by_first: dict[str, list[str]] = {}
    for mark in sorted(marks, key=len, reverse=True):
        by_first.setdefault(mark[0], []).append(re.escape(mark[1:]))
    return [f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in by_first.items()]


def neutral(text: str, structure: re.Pattern[str] = _STRUCTURE) -> str:
    """A model's words without structural tags (`<candidate>`, `<think>`, `<hint>`), chat marks such
    as `<|end|>`, and places of pictures.

    `structure`: these, and the special tokens of models that will read them. Time is linear in the
    text, whatever a model wrote.
    """
    return _without(without_places(text), structure).strip()


def distinct_answers(answers: Iterable[str | None]) -> list[str]:
    """NCQ's list of wrong answers (paper, step 4): parsed answers without repeats, in order of
    first appearance."""
    return list(dict.fromkeys(answer for answer in answers if answer))


def conversation(question: Question) -> str:
    """A question for a reader who takes no part in it: the last turn alone where it is all there
    is, else every turn under the name of its role."""
    if not question.earlier:
        return question.text
    turns = [*question.earlier, ChatMessage(role="user", content=question.text)]
    return "\n\n".join(f"[{turn.role}]\n{turn.content}" for turn in turns)


def without_strangers(prompt: Prompt, question: Question) -> Prompt:
    """A prompt that a method made of a question. Where the question's pictures have no places,
    those in the prompt came with the words of a model."""
    if question.has_places:
        return prompt  # places that are not one for each are refused where it is read
    messages = [
        structs.replace(message, content=without_places(message.content))
        for message in prompt.messages
    ]
    return structs.replace(prompt, messages=messages)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja2's, with the global names of a template in one dict: the chain of two that it makes of
    them takes half of the time of a short prompt to walk."""

    def make_globals(self, d: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
        return {**self.globals, **(d or {})}


class PromptSet:
    """The templates of one run. `system_prompt` goes first in every prompt that a student or
    teacher answers, unless the question has a system message of its own.

    Prompts that ask the question keep its earlier turns as they are, and a template makes the last
    one. Prompts about a response (hint, compression, judge) are one message of their own, in which
    the whole conversation is shown (`conversation`).

    Where the question's pictures have places, they keep them in every prompt that shows them, and
    are words in the others.
    """

    def __init__(
        self,
        templates: Path | None = None,
        system_prompt: str | None = None,
        prefix_share: float = PREFIX_SHARE,
        marks: Iterable[str] = (),
    ) -> None:
        """`templates` is a folder of replacements; a file that it lacks comes from the built-in
        set.

        `prefix_share` is α of Algorithm 6. `marks` are special tokens of the models that will read
        the prompts: spelled out by a model, they would be taken for the tokens.
        """
        if templates is not None and not templates.is_dir():
            raise UserError(
                f"data.templates: {templates} is not a folder; expected one with .j2 templates"
            )
        self._own = templates
        self._prefix_share = prefix_share
        special = _any_of(marks)
        self._chat_marks = re.compile("|".join([_CHAT_MARK.pattern, *special]))
        self._structure = re.compile("|".join([f"(?i:{_STRUCTURE.pattern})", *special]))
        self._reads: dict[str, bool] = {}
        told = without_places(system_prompt or "")
        self._system = [ChatMessage(role="system", content=told)] if told else []
        self._environment = _Environment(
            loader=FunctionLoader(self._source),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            auto_reload=False,
            cache_size=-1,  # all of them, with no account of which was used last
        )
        self._files: dict[str, tuple[bytes, Path]] = {}
        """Name -> content and place of every template, and of what one includes by name."""
        for folder in [DEFAULT_TEMPLATES] if templates is None else [DEFAULT_TEMPLATES, templates]:
            for file in folder.rglob("*.j2"):
                self._read(file.relative_to(folder).as_posix(), file)
        self._read_included()

    @classmethod
    def of(
        cls, data: DataConfig, prefix_share: float = PREFIX_SHARE, marks: Iterable[str] = ()
    ) -> PromptSet:
        """The prompts that `data` names. Raises UserError for a folder that is not one."""
        templates = Path(data.templates) if data.templates else None
        return cls(templates, data.system_prompt, prefix_share, marks)

    def _neutral(self, text: str) -> str:
        return neutral(text, self._structure)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the files of the user's own that were read, by name and content: the
        templates, and what they include. Empty without a folder."""
        own, sha = self._own, hashlib.sha256()
        if own is None:
            return ""
        read = sorted((file, name, content) for name, (content, file) in self._files.items())
        for file, name, content in read:
            if file == own / name:
                sha.update(hashlib.sha256(name.encode() + b"\0" + content).digest())
        return sha.hexdigest()

    def validate(self) -> None:
        """Render every template once. Raises UserError naming file and line, or the variable that
        is never shown."""
        self._refuse_unknown_files()
        for name, variables in VARIABLES.items():
            rendered = self._render(name, {**variables, PICTURES: 1})
            for variable, value in variables.items():
                if not all(dummy in rendered for dummy in _dummies(value)):
                    raise UserError(
                        f"{self._file(name)}: never shows {variable!r}; expected "
                        f"{{{{ {variable} }}}} in it"
                    )
            if PLACE in rendered:
                raise UserError(
                    f"{self._file(name)}: holds the character U+FFFC, which stands for a picture; "
                    "expected none"
                )

    def check_places(self, questions: Iterable[Question]) -> None:
        """Raise UserError for a template that shows places of pictures more than once, or not all
        of them."""
        placed = [question for question in questions if question.has_places]
        for question in nlargest(LONGEST, placed, key=lambda question: question.characters):
            for name, variables in VARIABLES.items():
                others = {key: one for key, one in variables.items() if key != "question"}
                if name in ASKING:
                    self._asking(name, question, **others)
                else:
                    self._about(name, question, **others)

    def plain(self, question: Question) -> Prompt:
        """The question as it is, with the closing instruction."""
        return self._asking("plain.j2", question)

    def bcq(self, question: Question, candidates: Sequence[str]) -> Prompt:
        """Binary candidate-included question (paper, step 4): two compressed candidates in the
        order to be shown."""
        if len(candidates) != 2:
            raise ValueError(f"a BCQ shows 2 candidates, got {len(candidates)}")
        return self._asking(
            "bcq.j2", question, candidates=[self._neutral(text) for text in candidates]
        )

    def ncq(
        self,
        question: Question,
        wrong_answers: Sequence[str],
        candidates: Sequence[str],
        counts: Sequence[int] | None = None,
    ) -> Prompt:
        """Negative candidate-included question (paper, step 4): every wrong answer, every wrong
        candidate.

        `counts` says how many responses each candidate stands for; one each if left out.
        """
        return self._asking(
            "ncq.j2",
            question,
            wrong_answers=distinct_answers(self._neutral(answer) for answer in wrong_answers),
            candidates=[self._neutral(text) for text in candidates],
            counts=counts or [1] * len(candidates),
        )

    def hint(self, question: Question, hint: str) -> Prompt:
        """The question with a hint that does not give the answer away (Algorithm 5)."""
        return self._asking("hint.j2", question, hint=self._neutral(hint))

    def prefix(self, question: Question, response: str) -> Prompt:
        """The plain question, whose answer begins with the first α of the tokens of `response`
        (Algorithm 6)."""
        start = ResponseStart(text=_without(response, self._chat_marks), share=self._prefix_share)
        return structs.replace(self.plain(question), start=start)

    def write_hint(
        self, question: Question, response: str, max_tokens: int, max_lines: int
    ) -> Prompt:
        """Ask the teacher for a hint from a correct response (Algorithm 5)."""
        return self._about(
            "write_hint.j2",
            question,
            response=self._neutral(response),
            max_tokens=max_tokens,
            max_lines=max_lines,
        )

    def compress(
        self, question: Question, response: str, max_tokens: int, max_lines: int
    ) -> Prompt:
        """Ask the teacher to shorten a candidate: one instruction and one cap for teacher's and
        student's texts."""
        return self._about(
            "compress.j2",
            question,
            response=self._neutral(response),
            max_tokens=max_tokens,
            max_lines=max_lines,
        )

    def judge(self, question: Question, response: str) -> Prompt:
        """Ask the teacher to compare what the last box of a response holds with the reference
        (paper, Reward)."""
        return self.compare(question, last_boxed(response) or "")

    def compare(self, question: Question, answer: str) -> Prompt:
        """Ask the teacher to compare an answer with the reference."""
        return self._about("judge.j2", question, gold=question.answer, answer=self._neutral(answer))

    def rubric(self, question: Question, response: str, rubric: str) -> Prompt:
        """Ask the teacher how far a whole response meets a rubric."""
        return self._about(
            "rubric.j2",
            question,
            gold=question.answer,
            response=self._neutral(response),
            rubric=without_places(rubric),
        )

    def _asking(self, name: str, question: Question, **variables: Value) -> Prompt:
        """The question's conversation, whose last turn the template makes."""
        system = [] if question.has_system else self._system
        user = self._user(name, question, question.text, question.media, variables)
        return Prompt(messages=[*system, *question.earlier, user], media=list(question.media))

    def _about(self, name: str, question: Question, **variables: Value) -> Prompt:
        """A task about a response to the question."""
        media = question.media if self._reads_pictures(name) else ()
        user = self._user(name, question, conversation(question), media, variables)
        return Prompt(messages=[*self._system, user], media=list(media))

    def _user(
        self,
        name: str,
        question: Question,
        asked: str,
        shown: Sequence[Media],
        variables: Mapping[str, Value],
    ) -> ChatMessage:
        """The message that a template makes of what is `asked`, with the places of what is `shown`.
        Raises UserError for a template that does not keep these."""
        asked = asked if shown else in_words(asked, question.media)
        given = {"question": asked, PICTURES: len(question.media), **variables}
        content = self._render(name, given)
        places, found = asked.count(PLACE), content.count(PLACE)
        if found != places:
            raise UserError(
                f"{self._file(name)}: shows {found} pictures between the words of the question "
                f"{question.id!r}, which has {places} there; expected {{{{ question }}}} once, and "
                "as it is"
            )
        return ChatMessage(role="user", content=content)

    def _reads_pictures(self, name: str) -> bool:
        """Whether a template, or one that it includes, reads how many pictures there are."""
        if name not in self._reads:
            tree = self._environment.parse(self._text(name))
            included = self._references(name) & set(self._files) - {name}
            self._reads[name] = PICTURES in meta.find_undeclared_variables(tree) or any(
                map(self._reads_pictures, included)
            )
        return self._reads[name]

    def _render(self, name: str, variables: Mapping[str, Value]) -> str:
        try:
            return self._environment.get_template(name).render(variables).strip()
        except TemplateSyntaxError as error:
            place = f"{error.filename or self._file(name)}:{error.lineno}"
            raise UserError(f"{place}: broken template: {error.message}") from None
        except TemplateNotFound as error:
            hint = nearest(str(error.name), sorted(self._files))
            raise UserError(
                f"{self._place(name, error)}: includes {error.name!r}, which does not exist{hint}"
            ) from None
        except TemplateError as error:
            raise UserError(
                f"{self._place(name, error)}: {error.message}; expected one of {_names(name)}"
            ) from None
        except UnicodeDecodeError:
            raise UserError(
                f"{self._file(name)}: is not UTF-8 text; expected a Jinja2 template"
            ) from None
        except (
            Exception
        ) as error:  # a template may divide by zero, recurse or call what is not callable
            raise UserError(f"{self._place(name, error)}: the template fails: {error}") from None

    def _place(self, name: str, error: Exception) -> str:
        """`file:line` of the innermost template frame; Jinja2 puts template lines into the
        traceback."""
        place, trace = str(self._file(name)), error.__traceback__
        while trace is not None:
            file = trace.tb_frame.f_code.co_filename
            place = f"{file}:{trace.tb_lineno}" if file.endswith(".j2") else place
            trace = trace.tb_next
        return place

    def _file(self, name: str) -> Path:
        return self._files[name][1]

    def _source(self, name: str) -> tuple[str, str, None] | None:
        """A template as Jinja2 takes it: text, place, and no word on when to read it again."""
        name = "/".join(split_template_path(name))
        return (self._text(name), str(self._file(name)), None) if name in self._files else None

    def _text(self, name: str) -> str:
        """A template without the byte order mark that some editors write: no word of a prompt."""
        return self._files[name][0].decode("utf-8-sig")

    def _read(self, name: str, file: Path) -> None:
        try:
            if file.is_file():
                self._files[name] = (file.read_bytes(), file)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None

    def _read_included(self) -> None:
        """Read the files of other names that templates include."""
        if self._own is None:
            return
        waiting = list(self._files)
        while waiting:
            for name in self._references(waiting.pop()) - set(self._files):
                self._read(name, self._own / name)
                waiting += [name] if name in self._files else []

    def _refuse_unknown_files(self) -> None:
        """A misspelt file name must not fall back to the built-in template in silence."""
        if self._own is None:
            return
        files = sorted(path.relative_to(self._own).as_posix() for path in self._own.rglob("*.j2"))
        included = {target for name in self._files for target in self._references(name)}
        for name in files:
            if not (self._own / name).is_file():
                raise UserError(f"{self._own / name}: is no file; expected a Jinja2 template")
            if name not in VARIABLES and name not in included:
                raise UserError(
                    f"{self._own / name}: no prompt and no other template uses this "
                    f"file{nearest(name, VARIABLES)}"
                )

    def _references(self, name: str) -> set[str]:
        if name not in self._files:
            return set()
        try:
            tree = self._environment.parse(self._text(name))
            targets = [target for target in meta.find_referenced_templates(tree) if target]
            return {"/".join(split_template_path(target)) for target in targets}
        except (TemplateSyntaxError, TemplateNotFound, UnicodeDecodeError):
            return set()  # rendering it says what is wrong, with its line


def _dummies(value: Value) -> Sequence[str]:
    """The texts to look for; numbers need not be shown."""
    if isinstance(value, str):
        return [value]
    return [] if isinstance(value, int) else [item for item in value if isinstance(item, str)]


def _names(name: str) -> str:
    return ", ".join(VARIABLES.get(name, {}))
