"""A stand-in for lm-eval, for what a harness does to us and not for what it computes: it reads the
task files and the command line of the real one, asks the same way, and leaves the same lines.

`python stub_harness.py FOLDER VERSION` makes its environment; `misbehave` in a question makes it
end in the middle, `skip` makes it answer that question itself, with nothing.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

INTERPRETER = """\
#!/bin/sh
PYTHONPATH={folder} exec {python} "$@"
"""
MAIN = "import sys; sys.path.insert(0, {helpers!r}); import stub_harness; stub_harness.main()\n"


def make_environment(folder: Path, version: str = "0.4.13") -> Path:
    """The interpreter of an environment with this harness."""
    (folder / "lm_eval").mkdir(parents=True)
    (folder / "lm_eval/__init__.py").touch()
    (folder / "lm_eval/__main__.py").write_text(MAIN.format(helpers=str(Path(__file__).parent)))
    info = folder / f"lm_eval-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lm_eval\nVersion: {version}\n")
    python = folder / "python"
    python.write_text(INTERPRETER.format(folder=folder, python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def main() -> None:
    """One call of `python -m lm_eval run …`."""
    told = dict(zip(sys.argv[2::1], sys.argv[3::1], strict=False))
    model = json.loads(told["--model_args"])
    for name in told["--tasks"].split(","):
        task = json.loads((Path(told["--include_path"]) / f"{name}.yaml").read_text())
        [file] = task["dataset_kwargs"]["data_files"][task["test_split"]]
        docs = [json.loads(line) for line in Path(file).read_text().splitlines()]
        docs = docs[: int(told["--limit"])] if "--limit" in told else docs
        with ThreadPoolExecutor(model["num_concurrent"]) as threads:
            lines = list(threads.map(lambda pair: sample(pair[0], pair[1], model), enumerate(docs)))
        out = Path(told["--output_path"]) / "model"
        out.mkdir(parents=True, exist_ok=True)
        (out / f"samples_{name}_2026-01-01T00-00-00.jsonl").write_text("".join(lines))


def sample(number: int, doc: dict[str, str], model: dict[str, object]) -> str:
    if "misbehave" in doc["question"]:
        print("Traceback: the data set is broken", file=sys.stderr, flush=True)
        os._exit(3)
    if "skip" in doc["question"]:
        return line_of(number, doc, [], "")
    chat = [{"role": "user", "content": doc["question"]}]
    body = {"model": model["model"], "messages": chat, "temperature": 0, "max_tokens": 256}
    request = urllib.request.Request(
        str(model["base_url"]),
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    with urllib.request.urlopen(request) as response:
        text = json.load(response)["choices"][0]["message"]["content"]
    return line_of(number, doc, chat, text)


def line_of(number: int, doc: dict[str, str], chat: list[dict[str, str]], text: str) -> str:
    line = {
        "doc_id": number,
        "doc": doc,
        "target": doc["answer"],
        "arguments": {
            "gen_args_0": {
                "arg_0": [json.dumps(chat or [{"content": "?"}])],
                "arg_1": {"until": []},
            }
        },
        "resps": [[text]],
        "filtered_resps": [text],
        "doc_hash": f"{number:08d}{doc['question']}",
        "exact_match": 0.0,
    }
    return json.dumps(line) + "\n"
