"""From a question whose pictures stand between its words to what a model reads: through every
template, past whatever models wrote, into the ids that transformers' own processors give."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import recurrent_models
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Idefics3Processor, PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from zppo.data.question import Question
from zppo.errors import UserError
from zppo.prompting.content import messages_in_parts
from zppo.prompting.picture_families import IdeficsPictures, QwenPictures
from zppo.prompting.picture_layout import PictureLayout
from zppo.prompting.picture_tokens import PictureTokens
from zppo.prompting.prompts import PromptSet, neutral
from zppo.prompting.tokenization import encode_prompts
from zppo_protocol.places import PLACE
from zppo_protocol.values import ChatMessage, Media, PictureReference, Prompt

PROMPTS = PromptSet()
TWO = f"In {PLACE} a dog runs, while in {PLACE} it"


def picture(name: str, width: int = 60, height: int = 40) -> PictureReference:
    return PictureReference(path=name, sha256="0" * 64, width=width, height=height)


A, B, C = picture("a"), picture("b", 70, 130), picture("c", 33, 90)


def asked(text: str, *media: PictureReference, earlier: tuple[ChatMessage, ...] = ()) -> Question:
    return Question(id="q", text=text, answer="12", media=media, earlier=earlier)


QUESTION = asked(f"{TWO} sleeps?", A, B)
LATER = asked(
    "And now?", A, earlier=(ChatMessage(role="user", content=f"{PLACE}?"), ChatMessage(role="assistant", content="A dog."))
)  # fmt: skip


def all_prompts(prompts: PromptSet, question: Question, said: str) -> dict[str, Prompt]:
    """Every prompt about a question, in which a model has `said` something wherever one may."""
    return {
        "plain": prompts.plain(question),
        "bcq": prompts.bcq(question, [said, said]),
        "ncq": prompts.ncq(question, [said], [said]),
        "hint": prompts.hint(question, said),
        "prefix": prompts.prefix(question, said),
        "write_hint": prompts.write_hint(question, said, 64, 5),
        "compress": prompts.compress(question, said, 64, 5),
        "judge": prompts.judge(question, rf"\boxed{{{said}}}"),
        "compare": prompts.compare(question, said),
        "rubric": prompts.rubric(question, said, f"Be{PLACE} kind."),
    }


SHOWS = {"plain", "bcq", "ncq", "hint", "prefix", "write_hint", "rubric"}


def parts_of(prompt: Prompt) -> list[str]:
    """Texts and names of pictures, in order."""
    made = messages_in_parts(prompt, lambda one: {"type": "image", "text": f"({one.path})"})
    return [part["text"] for message in made for part in message["content"]]


@pytest.mark.parametrize("said", ["x", f"{PLACE}", f"<cand{PLACE}idate> {PLACE}<image>"])
def test_pictures_keep_their_places_in_every_prompt(said: str) -> None:
    for kind, prompt in all_prompts(PROMPTS, QUESTION, said).items():
        parts = parts_of(prompt)
        if kind in SHOWS:
            assert parts[0].endswith("In ") and parts[1:4] == [
                "(a)",
                " a dog runs, while in ",
                "(b)",
            ]
            assert parts[4].startswith(" it sleeps?")
        else:
            assert prompt.media == [] and len(parts) == 1
            assert "In [picture 1] a dog runs, while in [picture 2] it sleeps?" in parts[0]


def test_pictures_of_earlier_messages_stay_there_or_come_along() -> None:
    for kind, prompt in all_prompts(PROMPTS, LATER, "x").items():
        if kind in SHOWS - {"write_hint", "rubric"}:
            assert parts_of(prompt)[:3] == ["(a)", "?", "A dog."]
        elif kind in SHOWS:
            [before, shown, after] = parts_of(prompt)
            assert (before[-7:], shown, after[:21]) == (
                "[user]\n",
                "(a)",
                "?\n\n[assistant]\nA dog.",
            )
        else:
            assert "[user]\n[picture 1]?" in parts_of(prompt)[0]


def test_what_others_write_has_no_places() -> None:
    """Models, settings, and texts that came by another way than rows."""
    assert neutral(f"{PLACE}a <th{PLACE}ink>b") == "a b"
    told = PromptSet(system_prompt=f"Look{PLACE}.")
    assert told.plain(QUESTION).messages[0].content == "Look."
    strange = asked(f"a{PLACE}b")
    for prompt in all_prompts(PROMPTS, strange, "x").values():
        assert not any(PLACE in message.content for message in prompt.messages)


# ---- templates of the user's ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("plain", "{{ question }} Again: {{ question }}", 4),
        ("hint", "{{ question[:8] }} {{ hint }}", 1),
        ("rubric", "{{ pictures }} {{ question }}{{ question }}{{ gold }}{{ response }}{{ rubric }}", 4),
    ],
)  # fmt: skip
def test_a_template_shows_the_question_once_and_whole(
    tmp_path: Path, name: str, source: str, found: int
) -> None:
    (tmp_path / f"{name}.j2").write_text(source)
    prompts = PromptSet(tmp_path)
    prompts.check_places([asked("12345678", A), asked("no pictures")])
    with pytest.raises(UserError) as refused:
        prompts.check_places([asked("x", A), QUESTION])
    assert str(refused.value) == (
        f"{tmp_path / name}.j2: shows {found} pictures between the words of the question 'q', "
        "which has 2 there; expected {{ question }} once, and as it is"
    )


def test_whose_template_shows_no_pictures_may_show_the_question_as_it_likes(tmp_path: Path) -> None:
    (tmp_path / "compress.j2").write_text(
        "{{ question }}{{ question }}{{ response }}{{ max_tokens }}{{ max_lines }}"
    )
    PromptSet(tmp_path).check_places([QUESTION])
    PROMPTS.check_places([QUESTION, LATER])


def test_a_template_has_no_places_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "plain.j2").write_text(f"{PLACE}{{{{ question }}}}")
    with pytest.raises(UserError) as refused:
        PromptSet(tmp_path).validate()
    assert str(refused.value) == (
        f"{tmp_path / 'plain.j2'}: holds the character U+FFFC, which stands for a picture; "
        "expected none"
    )


# ---- any words -----------------------------------------------------------------------------------

PIECES = st.text(alphabet="ab <>/{}%\n🙂é|", max_size=12)
SAID = st.lists(
    st.sampled_from([*"ab <>/\n", PLACE, "<image>", "</candidate>", "<|end|>"]), max_size=12
).map("".join)


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(PIECES, min_size=2, max_size=5), said=SAID)
def test_any_words_round_any_pictures(pieces: list[str], said: str) -> None:
    media = [picture(f"{i}") for i in range(len(pieces) - 1)]
    question = asked(PLACE.join(["q", *pieces[1:-1], f"{pieces[-1]}?"]), *media)
    for kind, prompt in all_prompts(PROMPTS, question, said).items():
        if kind not in SHOWS:
            assert not any(PLACE in message.content for message in prompt.messages)
            continue
        text = "".join(parts_of(prompt))
        whole = "q" + "".join(
            f"({i}){words}" for i, words in enumerate([*pieces[1:-1], f"{pieces[-1]}?"])
        )
        assert whole in text
        assert [part for part in parts_of(prompt) if part in {f"({i})" for i in range(9)}] == [
            f"({one.path})" for one in media
        ]


# ---- ids -----------------------------------------------------------------------------------------


class QwenWithoutVideos(Qwen3VLProcessor):
    """transformers' processor of Qwen3.5 where torchvision, which its videos need, is not there."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


IDEFICS_MARKS = ["<image>", "<fake_token_around_image>", "<global-img>"]
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]


def merging_tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges, of words with the spaces round them."""
    pairs = Tokenizer(BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator([f"{TWO} sleeps?\n\nuser: assistant:"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs, pad_token=special[0], additional_special_tokens=special[1:]
    )


def template(mark: str) -> str:
    """Trims a message as Qwen's does, and shows pictures in messages of everybody."""
    return (
        "{% for message in messages %}{{ message.role }}: {% set words %}"
        "{% if message.content is string %}{{ message.content }}{% else %}"
        f"{{% for part in message.content %}}{{% if part.type == 'image' %}}{mark}"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endset %}"
        "{{ words | trim }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )


@cache
def qwen() -> tuple[Any, PictureLayout]:
    tokenizer = merging_tokenizer(recurrent_models.SPECIAL)
    tokenizer.chat_template = template("<|vision_start|><|image_pad|><|vision_end|>")
    processor = QwenWithoutVideos(
        recurrent_models.make_image_processor(), tokenizer, chat_template=tokenizer.chat_template
    )
    sizes = {
        "min_pixels": recurrent_models.SMALLEST,
        "max_pixels": recurrent_models.LARGEST,
    }
    family = QwenPictures(
        int(tokenizer.convert_tokens_to_ids("<|image_pad|>")),
        PictureTokens(patch=16, merge=2, **sizes),
    )
    return processor, PictureLayout(family, tokenizer)


@cache
def idefics() -> tuple[Any, PictureLayout]:
    """With tiles, whose expansion holds ends of lines between its marks."""
    tokenizer = merging_tokenizer(["<pad>", *IDEFICS_MARKS, "<end_of_utterance>", *TILES])
    tokenizer.chat_template = template("<image>")
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 150}, max_image_size={"longest_edge": 56}, do_image_splitting=True
    )
    processor = Idefics3Processor(
        pictures, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )
    family = IdeficsPictures(
        int(tokenizer.convert_tokens_to_ids("<image>")), "<image>", 4, 56, 150, splits=True
    )
    return processor, PictureLayout(family, tokenizer)


def as_transformers_takes_them(
    roles: list[str], turns: list[list[str]], sizes: Iterator[PictureReference]
) -> list[dict[str, Any]]:
    """Pieces of text and pictures in turn, written down without a line of ours."""
    messages = []
    for role, pieces in zip(roles, turns, strict=True):
        content: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            one = next(sizes)
            image = Image.new("RGB", (one.width, one.height))
            content += [{"type": "image", "image": image}, {"type": "text", "text": piece}]
        messages.append({"role": role, "content": content})
    return messages


TEXTS = st.lists(
    st.sampled_from(["", " ", "In ", " a dog runs", ",\n", "\n\n", "while", "é🙂 ", "<im"]),
    max_size=3,
).map("".join)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), family=st.sampled_from([qwen, idefics]))
def test_ids_are_those_of_transformers_processors(data: st.DataObject, family: Any) -> None:
    processor, layout = family()
    turns = data.draw(st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=3))
    roles = ["user", "assistant", "user"][-len(turns) :]
    count = sum(len(pieces) - 1 for pieces in turns)
    media = data.draw(st.lists(st.sampled_from([A, B, C]), min_size=count, max_size=count))
    if not media:
        return
    expected = processor.apply_chat_template(
        as_transformers_takes_them(roles, turns, iter(media)),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    messages = [
        ChatMessage(role=role, content=PLACE.join(pieces))  # type: ignore[arg-type]
        for role, pieces in zip(roles, turns, strict=True)
    ]
    prompt = Prompt(messages=messages, media=list[Media](media))
    assert encode_prompts(processor.tokenizer, [prompt], layout) == expected
