"""`zppo evaluate --suite` with everything real: checkpoints whose answers are known, `vllm serve`,
and both harnesses in environments of their own.

    make harnesses
    python tools/try_suites.py --out runs/try_suites

A tiny Llama with the tokenizer of the quickstart learns 16 questions by heart, four of them with a
wrong answer. Two checkpoints are made, the second of which knows two of the four. A benchmark of
each harness asks all of them, greedily: the first must score 75 %, the second 87.5 %, question by
question as taught. When a row is done the suite is killed with `kill -9` and called again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from zppo.data.question import Question
from zppo.errors import Parser, run_command
from zppo.prompting.prompts import PromptSet

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples/quickstart"
KEY = {f"{a} * {b} mod 23": str(a * b % 23) for a in (6, 9, 12, 14) for b in (5, 7, 16, 18)}
WRONG = {question: str((int(gold) + 1) % 23) for question, gold in [*KEY.items()][::4]}
STEPS = 400
TASK = """\
task: by_heart
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function by_heart.nothing
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 16}}
process_results: !function by_heart.score
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
CODE = """\
def nothing(doc):
    return []

def score(doc, results):
    return {"acc": float(results[0].strip() == doc["answer"])}
"""
TABLE = """\
name: try
decoding: {max_new_tokens: 16, temperature: 0.0, top_p: 1.0, top_k: 0, presence_penalty: 0.0}
rows:
  - {short: Heart, family: LLM, harness: lm-eval, scoring: E+J,
     source: {path: json, files: [q.jsonl], question: "{{question}}", answer: "{{answer}}"}}
  - {short: Metric, family: VLM, harness: lmms-eval, scoring: Det, metric: acc,
     task: [by_heart], include: .}
  - {short: Gone, family: VLM, harness: lmms-eval, scoring: BJ, missing: no harness has it}
"""


def main() -> int:
    """Returns 0 if every score is the one that was taught."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--harnesses", type=Path, default=Path(sys.prefix) / "harnesses")
    asked = parser.parse_args()
    out: Path = asked.out.absolute()
    out.mkdir(parents=True)
    better = dict([*WRONG.items()][2:])
    taught = {"first": {**KEY, **WRONG}, "second": {**KEY, **better}}
    for name, answers in taught.items():
        teach(answers, out / name)
    write_table(out)
    begun = time.monotonic()
    command = suite_command(out, asked.harnesses)
    kill_in_the_middle(command, out)
    code = subprocess.run(command).returncode
    print(f"the suite ended with {code} after {time.monotonic() - begun:.0f} s, one kill included")
    return max(code, check(out, taught))


def teach(answers: dict[str, str], folder: Path) -> None:
    """A model that answers each question as given, and nothing else."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "student")
    # vLLM has CPU kernels for heads of 32, and none for the quickstart's of 24.
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [lesson(tokenizer, question, answer) for question, answer in answers.items()]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [config.eos_token_id] * (length - len(ids)) for ids, _ in rows])
    labels = torch.full_like(ids, -100)
    for i, (row, start) in enumerate(rows):
        labels[i, start : len(row)] = ids[i, start : len(row)]
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{folder.name}: loss {loss.item():.5f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lesson(tokenizer: Any, question: str, answer: str) -> tuple[list[int], int]:
    """Token ids of a conversation, and where the response begins."""
    prompts = PromptSet(QUICKSTART / "templates")
    told = prompts.plain(Question(id="", text=question, answer="")).messages[0].content
    chat = [{"role": "user", "content": told}]
    start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer.encode(start, add_special_tokens=False)
    said = tokenizer.encode(f"\\boxed{{ {answer} }}", add_special_tokens=False)
    return [*prompt, *said, tokenizer.eos_token_id], len(prompt)


def write_table(out: Path) -> None:
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in KEY.items()]
    (out / "q.jsonl").write_text("".join(lines))
    (out / "by_heart.yaml").write_text(TASK.format(file=out / "q.jsonl"))
    (out / "by_heart.py").write_text(CODE)
    (out / "try.yaml").write_text(TABLE)


def suite_command(out: Path, harnesses: Path) -> list[str]:
    command = [sys.executable, "-P", "-m", "zppo.evaluate", str(out / "first"), str(out / "second")]
    command += ["--label", "first", "--label", "second", "--suite", str(out / "try.yaml")]
    command += ["--out", str(out / "results"), "--templates", str(QUICKSTART / "templates")]
    for name in ("lm-eval", "lmms-eval"):
        command += ["--harness-python", f"{name}={harnesses / name / 'bin' / 'python'}"]
    on_cpu = ["max-model-len=256", "enforce-eager=true", "gpu-memory-utilization=0.1",
              "no-enable-chunked-prefill=true"]  # fmt: skip
    return [*command, *(word for option in on_cpu for word in ("--server-arg", option))]


def kill_in_the_middle(command: list[str], out: Path) -> None:
    """Start the suite, and kill it when the first row of the first model is done."""
    child = subprocess.Popen(command)
    done = out / "results/first/rows/Heart/result.json"
    while child.poll() is None and not done.exists():
        time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    print(f"killed, with {'one row' if done.exists() else 'no row'} done: {child.wait()}")


def check(out: Path, taught: dict[str, dict[str, str]]) -> int:
    """0 if every question has the score that follows from what was taught."""
    wrong = 0
    for name, answers in taught.items():
        expected = [float(answers[question] == gold) for question, gold in KEY.items()]
        for row in ("Heart", "Metric"):
            path = out / "results" / name / "rows" / row / "result.json"
            scores = [*json.loads(path.read_text())["scores"].values()]
            share = 100 * sum(scores) / len(scores)
            print(f"{name} {row}: {share:.1f} %, {'as' if scores == expected else 'NOT as'} taught")
            wrong += scores != expected
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(run_command(main))
