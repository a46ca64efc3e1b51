"""Prompts of tokenizers without a chat template: what stands before a text stays, what stands
behind it goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from zppo.errors import UserError
from zppo.prompting.tokenization import encode_prompts, load_tokenizer
from zppo_protocol.values import ChatMessage, Prompt, ResponseStart

WORDS = ["<bos>", "<eos>", "<sep>", "a", "b", "c"]


def tokenizer_of(frame: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a text into this frame, e.g. `<bos> $A <eos>`."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="c"))
    inner.pre_tokenizer = Whitespace()
    special = [(word, WORDS.index(word)) for word in WORDS[:3]]
    inner.post_processor = TemplateProcessing(single=frame, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>")


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ("$A", [3, 4]),
        ("<bos> $A", [0, 3, 4]),
        ("$A <eos>", [3, 4]),
        ("<bos> $A <eos>", [0, 3, 4]),
        ("<bos> <sep> $A <sep> <eos>", [0, 2, 3, 4]),
    ],
)
def test_no_end_stands_behind_a_prompt(frame: str, expected: list[int]) -> None:
    prompt = Prompt(messages=[ChatMessage(role="user", content="a b")])
    assert encode_prompts(tokenizer_of(frame), [prompt, prompt]) == [expected, expected]


def test_a_given_start_follows_the_prompt_at_once() -> None:
    prompt = Prompt(
        messages=[ChatMessage(role="user", content="a")], start=ResponseStart(text="b c", share=1.0)
    )
    assert encode_prompts(tokenizer_of("<bos> $A <eos>"), [prompt]) == [[0, 3, 4, 5]]


CODE = """from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path(__file__).with_name("ran").touch()
class Mine(PreTrainedTokenizerFast): pass
"""


def test_code_in_a_model_folder_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that transformers has no tokenizer of its own for, so that it would ask on the
    terminal."""
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    tokenizer_of("$A").save_pretrained(tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    said |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "mine.py").write_text(CODE)
    with pytest.raises(UserError, match=r"^student\.model: '.*' has no tokenizer that can be load"):
        load_tokenizer(str(tmp_path), "student.model")
    assert not (tmp_path / "ran").exists()


WITHOUT_MODELS = """
import sys
from zppo.prompting import tokenization
{before}
tokenization.run_no_models()
tokenizer = tokenization.load_tokenizer({folder!r}, "student.model")
print(tokenizer.apply_chat_template({chat}, add_generation_prompt=True, return_dict=False))
tokenization.load_processor({seeing!r}, "student.model")
print("torch" in sys.modules)
import torch
print(torch.ones(2).sum().item())
"""


@pytest.mark.parametrize(
    ("before", "loaded", "example"),
    [("", False, "pictures"), ("import torch", True, "quickstart")],
)
def test_a_process_without_models_needs_no_torch(before: str, loaded: bool, example: str) -> None:
    """And gives the same ids, says nothing, and may import torch later."""
    examples = Path(__file__).parents[3] / "examples"
    folder, seeing = (str(examples / name / "student") for name in (example, "pictures"))
    chat = [{"role": "user", "content": "1 + 1 = ?"}]
    here = load_tokenizer(folder, "student.model").apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    script = WITHOUT_MODELS.format(before=before, folder=folder, chat=chat, seeing=seeing)
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines(), done.stderr) == ([str(here), str(loaded), "2.0"], "")
