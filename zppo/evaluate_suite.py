"""`python -m zppo.evaluate CHECKPOINT … --suite NAME`: a suite of benchmarks over lm-eval and
lmms-eval, with the decoding and the closing instruction of the paper.

Everything that can be known is checked first; `--dry-run` prints the plan and ends. Then this
process becomes the one that serves the checkpoint, drives the harnesses and writes the page
(`python -m zppo_actors suite`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import msgspec

from zppo.config.options import counting, positive, rate, seconds
from zppo.errors import EXIT_USER_ERROR, Parser, UserError, become_actor, first_line, nearest
from zppo.evaluation.order import locate_model
from zppo.plan.engines.openai import read_openai_arguments
from zppo.plan.fingerprint import fingerprint
from zppo.plan.model_folder import inspect_model
from zppo.prompting.prompts import PromptSet
from zppo.suites.harness import HARNESSES
from zppo.suites.order import Judge, Served, SuiteOrder
from zppo.suites.page import check_labels
from zppo.suites.plan import known_missing, plan_lines
from zppo.suites.table import load_suite

OWNED = {
    "model": "it is the checkpoint",
    **dict.fromkeys(("host", "port", "uds"), "the server listens at a Unix socket of its own"),
    "served-model-name": "it is --label",
    "api-key": "the server needs none",
}
"""Options of the server that --server-arg cannot set, and why."""


def main(argv: Sequence[str]) -> int:
    """Check the order and become the suite's process, or print the plan. Returns 2 after a user
    error."""
    try:
        arguments = _parser().parse_args(argv)
        order = read_order(arguments)
        PromptSet(Path(order.templates) if order.templates else None).validate()
        if arguments.dry_run:
            missing = known_missing(order.suite, order.judge is not None, os.environ)
            print("\n".join(plan_lines(order, missing, arguments.tokens_per_second)))
            return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    become_actor("suite", msgspec.json.encode(order).decode())


def read_order(arguments: argparse.Namespace) -> SuiteOrder:
    """The order that the command line gives. Raises UserError."""
    if arguments.out is None:
        raise UserError("--out is missing; expected a folder for the results, new or begun")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out: {str(arguments.out)!r} is no folder")
    only = [name for text in arguments.only for name in text.split(",")]
    suite, models = load_suite(arguments.suite, only), _models(arguments)
    check_labels([model.label for model in models])
    return SuiteOrder(
        suite=suite,
        models=models,
        judge=_judge(arguments),
        harness_pythons=_pythons(arguments.harness_python),
        out=str(arguments.out.absolute()),
        limit=arguments.limit,
        concurrent=arguments.concurrent,
        seed=arguments.seed,
        timeout_seconds=arguments.timeout_seconds,
        retry_seconds=arguments.retry_seconds,
        startup_seconds=arguments.startup_seconds,
        server_args=_server_args(arguments.server_arg),
        templates=None if arguments.templates is None else str(arguments.templates.absolute()),
        baseline=arguments.baseline,
    )


# ---- parts of the order --------------------------------------------------------------------------


def _models(arguments: argparse.Namespace) -> list[Served]:
    folders, labels = arguments.checkpoint, arguments.label
    if bool(folders) == (arguments.server is not None):
        raise UserError("zppo evaluate --suite: expected either checkpoints or --server URL")
    if labels and len(labels) != max(1, len(folders)):
        raise UserError(
            f"--label is given {len(labels)} times; expected once for each of the "
            f"{max(1, len(folders))} models"
        )
    if arguments.server is not None:
        if arguments.served_model is None:
            raise UserError(
                "--served-model is missing; expected the name under which --server serves the model"
            )
        _check_url(arguments.server, "--server", arguments)
        label = (labels or [arguments.served_model])[0]
        return [Served(label=label, model=arguments.served_model, base_url=arguments.server)]
    return _checkpoints(folders, labels)


def _checkpoints(folders: Sequence[Path], labels: Sequence[str]) -> list[Served]:
    """Each to be served by vLLM in turn. Raises UserError."""
    if find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed, which serves the checkpoint; install it (docs/vllm.md), or "
            "name a server of yours: --server URL --served-model NAME"
        )
    models = []
    for i, path in enumerate(folders):
        folder = locate_model(path).folder
        inspect_model(folder, "zppo evaluate --suite")
        label = labels[i] if labels else str(path).strip("./")
        served = Served(
            label=label,
            model=label,
            folder=str(folder.absolute()),
            fingerprint=_fingerprint(folder),
        )
        models.append(served)
    return models


def _fingerprint(folder: Path) -> str:
    """Raises UserError."""
    try:
        return fingerprint(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({first_line(error)})") from None


def _judge(arguments: argparse.Namespace) -> Judge | None:
    if arguments.judge_server is None:
        return None
    if arguments.judge_model is None:
        raise UserError(
            "--judge-model is missing; expected the name under which --judge-server serves the "
            "judge"
        )
    _check_url(arguments.judge_server, "--judge-server", arguments)
    return Judge(model=arguments.judge_model, base_url=arguments.judge_server)


def _check_url(url: str, option: str, arguments: argparse.Namespace) -> None:
    given = {"base_url": url, "allow_insecure": arguments.allow_insecure}
    read_openai_arguments(given, option)


def _pythons(given: Sequence[str]) -> dict[str, str]:
    """Harness -> interpreter: those named, else those that `make harnesses` makes."""
    pythons = {
        name: str(Path(sys.prefix) / "harnesses" / name / "bin" / "python") for name in HARNESSES
    }
    for text in given:
        name, _, python = text.partition("=")
        if name not in HARNESSES or not python:
            raise UserError(
                f"--harness-python {text}: expected NAME=PYTHON{nearest(name, HARNESSES)}"
            )
        pythons[name] = str(Path(python).absolute())
    return pythons


def _server_args(given: Sequence[str]) -> dict[str, str]:
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.lstrip("-").replace("_", "-")
        if not equals or not name:
            raise UserError(f"--server-arg {text}: expected NAME=VALUE")
        if name in OWNED:
            raise UserError(f"--server-arg {name} cannot be set: {OWNED[name]}")
        options[name] = value
    return options


# ---- the command line ----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo evaluate --suite",
        description="A suite of benchmarks over lm-eval and lmms-eval (docs/suites.md).",
    )
    parser.add_argument(
        "checkpoint", nargs="*", type=Path, help="run directories, checkpoints, model folders"
    )
    parser.add_argument(
        "--suite", required=True, metavar="NAME", help="paper, llm, vlm, video, or a YAML file"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="A,B", help="these benchmarks of it"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="results of all models; resumes")
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    parser.add_argument(
        "--tokens-per-second", type=rate, metavar="N", help="of the server, for the plan"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="questions of each task")
    parser.add_argument("--seed", type=counting, default=0)
    parser.add_argument("--templates", type=Path, metavar="FOLDER", help="with plain.j2, judge.j2")
    parser.add_argument("--baseline", metavar="LABEL", help="model to compare with (the first)")
    _add_model_options(parser.add_argument_group("models"))
    return parser


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--label", action="append", default=[], help="name of a model, in order")
    group.add_argument("--server", metavar="URL", help="instead of checkpoints")
    group.add_argument("--served-model", metavar="NAME", help="name of the model at --server")
    group.add_argument("--judge-server", metavar="URL", help="server of the judge")
    group.add_argument("--judge-model", metavar="NAME", help="name of the judge there")
    group.add_argument(
        "--allow-insecure", action="store_true", help="allow http to servers on other machines"
    )
    group.add_argument(
        "--harness-python", action="append", default=[], metavar="NAME=PYTHON",
        help="interpreter of the environment of lm-eval or lmms-eval",
    )  # fmt: skip
    group.add_argument(
        "--server-arg", action="append", default=[], metavar="NAME=VALUE",
        help="option of vllm serve, e.g. tensor-parallel-size=8",
    )  # fmt: skip
    group.add_argument("--concurrent", type=positive, default=64, metavar="N", help="at once (64)")
    group.add_argument(
        "--timeout-seconds", type=seconds, default=3600.0, metavar="S", help="of a request (3600)"
    )
    group.add_argument(
        "--retry-seconds", type=seconds, default=120.0, metavar="S",
        help="a server that does not answer is asked again for so long (120)",
    )  # fmt: skip
    group.add_argument(
        "--startup-seconds", type=seconds, default=1800.0, metavar="S", help="of a server (1800)"
    )
