"""The two harnesses as programs: what each is told for one row, and how the lines it leaves behind
are read.

A harness chooses the questions, writes them and, for some rows, scores the answers. It talks to a
gateway of ours and never to the model, because neither can be told everything: lmms-eval's client
sends a temperature and no other setting of the decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from zppo.suites.table import METRIC, PARSER_OR_JUDGE, Row, Suite, tasks_of

KEY_VARIABLE = "OPENAI_API_KEY"
"""Where both harnesses look for the key."""
SECONDS = 30 * 86_400
"""A request's limit in the harness: none; the gateway has its own."""


class Harness(Struct, frozen=True):
    """`minimum` is the oldest version that can be used; `install` says how to get it."""

    name: str
    package: str
    minimum: str
    install: list[str]


HARNESSES = {
    "lm-eval": Harness("lm-eval", "lm_eval", "0.4.13", ["lm-eval[api]==0.4.13"]),
    # The wheel of 0.7 holds no definitions of tasks at all; 0.7.3 uses what filelock 4 has not.
    "lmms-eval": Harness("lmms-eval", "lmms_eval", "0.7.1", ["lmms-eval==0.7.3", "filelock<4"]),
}


class Asking(Struct, frozen=True, kw_only=True):
    """How a harness reaches its model, and where it may write."""

    url: str
    model: str
    folder: str
    """For its samples; the definitions of tasks that we write lie in `folder`/tasks."""
    concurrent: int
    limit: int | None


class Sample(Struct, frozen=True, kw_only=True):
    """One line of a samples file. `id` names the same question in every run of the harness."""

    id: str
    question: str
    gold: list[str]
    """Any of them is right."""
    response: str
    score: float | None
    """What the harness's metric says; None where it says nothing about this question."""


class SamplesError(ValueError):
    """The harness left something else than was expected; the message is one sentence."""


def shows_final_answer(row: Row) -> bool:
    """Whether the harness is given the content of the last box alone: its parsers and metrics were
    written for answers that are nothing else."""
    return row.scoring in (PARSER_OR_JUDGE, METRIC)


# ---- what it is told -----------------------------------------------------------------------------


def task_files(row: Row, table_folder: Path) -> dict[str, bytes]:
    """Definitions of tasks for lm-eval from the `source` of a row: file name -> content (JSON,
    which is YAML)."""
    source = row.source
    if source is None:
        return {}
    files = {"data_files": {row.split: [str(table_folder / file) for file in source.files]}}
    common: dict[str, Any] = {
        "dataset_path": source.path,
        "test_split": row.split,
        "output_type": "generate_until",
        "doc_to_text": source.question,
        "doc_to_target": source.answer,
        "target_delimiter": "",
        "generation_kwargs": {"until": []},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **({"dataset_kwargs": files} if source.files else {}),
    }
    definitions = {
        task: {"task": task, **common, **({"dataset_name": name} if name else {})}
        for task, name in zip(tasks_of(row), source.names or [""], strict=True)
    }
    return {f"{task}.yaml": msgspec.json.encode(text) for task, text in definitions.items()}


def arguments_of(row: Row, suite: Suite, asking: Asking) -> list[str]:
    """The command line behind `python -P -m PACKAGE`."""
    own = str(Path(asking.folder) / "tasks") if row.source is not None else None
    include = str(Path(suite.folder) / row.include) if row.include is not None else own
    common = ["--tasks", ",".join(tasks_of(row)), "--output_path", asking.folder, "--log_samples"]
    common += ["--include_path", include] if include is not None else []
    common += ["--limit", str(asking.limit)] if asking.limit is not None else []
    if row.harness == "lm-eval":
        return ["run", "--model", "local-chat-completions", "--model_args", _for_lm_eval(asking),
                "--apply_chat_template", "--num_fewshot", "0", *common]  # fmt: skip
    return ["--model", "openai", "--model_args", _for_lmms_eval(asking), "--batch_size", "1",
            "--num_fewshot", "0", "--reasoning_tags", "none", *common]  # fmt: skip


def _for_lm_eval(asking: Asking) -> str:
    return json.dumps(
        {
            "model": asking.model,
            "base_url": f"{asking.url}/chat/completions",
            "num_concurrent": asking.concurrent,
            "max_retries": 1,
            "timeout": SECONDS,
            "tokenized_requests": False,
        }
    )


def _for_lmms_eval(asking: Asking) -> str:
    """Its arguments are split at commas, so none may stand in a value."""
    told = {
        "model_version": asking.model,
        "base_url": asking.url,
        "num_concurrent": asking.concurrent,
        "max_retries": 1,
        "timeout": SECONDS,
        "prefix_aware_queue": False,
    }
    return ",".join(f"{name}={value}" for name, value in told.items())


def environment_of(row: Row, judge_url: str, judge: str, key: str) -> dict[str, str]:
    """What the harness finds in its environment: the gateway's key, and the judge behind the
    gateway in place of OpenAI's."""
    judging = {"API_TYPE": "openai", "MODEL_VERSION": judge}
    urls = dict.fromkeys(("OPENAI_API_URL", "OPENAI_BASE_URL"), judge_url)
    return {KEY_VARIABLE: key, **(judging | urls if row.harness == "lmms-eval" else {})}


# ---- what it leaves behind -----------------------------------------------------------------------


def read_samples(row: Row, folder: Path) -> list[Sample]:
    """All questions of a row, from the newest samples file of each task. Raises SamplesError."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        newest[_task_of(path)] = path
    samples = [sample for task, path in newest.items() for sample in _read(row, task, path)]
    distinct = {sample.id: sample for sample in samples}  # lm-eval: a line for each of its filters
    if not distinct:
        raise SamplesError(f"{row.harness} asked no question")
    if len(newest) < len(tasks_of(row)):  # of a group there are more
        raise SamplesError(
            f"{row.harness} left samples of {', '.join(sorted(newest))} alone; expected "
            f"{', '.join(tasks_of(row))}"
        )
    return list(distinct.values())


def _task_of(path: Path) -> str:
    """`samples_TASK_DATE.jsonl` of lm-eval, `DATE_samples_TASK.jsonl` of lmms-eval."""
    before, _, task = path.stem.partition("samples_")
    return task if before else task.rpartition("_")[0]


def _read(row: Row, task: str, path: Path) -> Iterator[Sample]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            told = json.loads(line)
            id = f"{task}/{told['doc_id']}/{str(told['doc_hash'])[:8]}"
            response = _first(told["resps"] if "resps" in told else told["filtered_resps"])
            # Of a text like "[1, 2]" lm-eval makes a list, which is one answer all the same.
            several = isinstance(told["target"], list) and row.source is None
            gold = told["target"] if several else [told["target"]]
            if not _belongs(told, row.part):
                continue
            sample = Sample(
                id=id,
                question=_question(told),
                gold=[_gold(str(one), row) for one in gold],
                response=response,
                score=score_at(told, row.metric) if row.metric else None,
            )
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise SamplesError(
                f"{path.name}:{number}: {row.harness} writes samples in another form than "
                f"expected ({type(error).__name__}: {error})"
            ) from None
        yield sample


def _belongs(told: dict[str, Any], part: str | None) -> bool:
    """Whether a question is of the part of its task that the row takes."""
    if part is None:
        return True
    path, _, pattern = part.partition("~")
    return re.search(pattern.strip(), str(_at(told, path.strip()))) is not None


def _gold(gold: str, row: Row) -> str:
    """A choice's number, counted from 0, as its letter."""
    is_number = row.grader == "choice" and re.fullmatch("[0-9]{1,2}", gold) and int(gold) < 26
    return chr(ord("A") + int(gold)) if is_number else gold


def _first(value: Any) -> str:
    """The text in any number of lists. Raises TypeError."""
    while isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise TypeError(f"a response is {type(value).__name__}")
    return value


def _question(told: dict[str, Any]) -> str:
    """The last words to the model: a chat in JSON (lm-eval), or text (lmms-eval)."""
    if "arguments" not in told:
        return str(told.get("input", ""))
    chat = json.loads(_first(told["arguments"]["gen_args_0"]["arg_0"]))
    return str(chat[-1]["content"])


def score_at(told: dict[str, Any], metric: str) -> float | None:
    """The score that `metric` names in a line of samples, from 0 to 1; None if it stands
    nowhere."""
    one, equal, other = (part.strip() for part in metric.partition("="))
    value = _at(told, one)
    if equal:
        return None if value is None else float(value == _at(told, other))
    if isinstance(value, bool | int | float):
        return float(value)
    return None


def _at(told: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(told, dict) or key not in told:
            return None
        told = told[key]
    return told


# ---- the closing instruction ---------------------------------------------------------------------


def without_directives(text: str, directives: Sequence[str]) -> str:
    """The text of a question without the format directives of its benchmark."""
    for directive in directives:
        text = re.sub(directive, "", text)
    return text.strip()
