"""`python -m zppo.evaluate`: accuracy of a checkpoint, a model folder or a server on a set of
questions.

Everything that can be wrong is checked first; then this process becomes the one that loads the
model and asks (`python -m zppo_actors evaluate`). Decoding is the paper's for evaluations unless
options say otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from msgspec.structs import replace

from zppo import evaluate_suite
from zppo.config.options import counting, data_settings, finite, pair, positive, seconds, threads
from zppo.config.served import ServedModel
from zppo.config.topology import (
    JUDGE,
    JUDGE_SAMPLING,
    OPENAI,
    ActorConfig,
    DataConfig,
    ModelConfig,
    ResponseSampling,
    is_own_source,
    is_procedural,
)
from zppo.data.corpus import load_questions, source_notes
from zppo.data.question import Question
from zppo.errors import EXIT_USER_ERROR, Parser, UserError, become_actor, run_command
from zppo.evaluation.order import (
    DTYPES,
    PAPER_SAMPLING,
    EvaluationOrder,
    Located,
    locate_model,
    served_as,
    served_folder,
)
from zppo.plan.checks import check_temperature
from zppo.plan.engines.openai import read_openai_arguments
from zppo.plan.machine import SLOW_BFLOAT16, cpu_dtype
from zppo.plan.picture_checks import check_sees
from zppo.plan.prompt_checks import (
    LENGTH_ARGUMENTS,
    check_own_system,
    check_question_shown,
    check_system_prompt,
)
from zppo.prompting.chat_template import THINKING_OFF, check_template_variables
from zppo.prompting.prompts import PromptSet
from zppo.prompting.tokenization import load_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Check the order and become the evaluating process. Returns 2 after a user error; else it does
    not return. With --suite it is `zppo.evaluate_suite` that does it."""
    argv = sys.argv[1:] if argv is None else argv
    if any(argument.partition("=")[0] == "--suite" for argument in argv):
        return evaluate_suite.main(argv)
    try:
        order = read_order(_parser().parse_args(argv))
        _check_out(order.out)
        prompts = PromptSet.of(order.data)
        prompts.validate()
        corpus = load_questions(order.data.train, order.data, Path.cwd())
        corpus = replace(corpus, questions=corpus.questions[: order.limit])
        _check_questions(corpus.questions, order, prompts)
        notes = [*order.notes, *source_notes(order.data.train, corpus)]
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    become_evaluator(replace(order, notes=notes))


def become_evaluator(order: EvaluationOrder) -> NoReturn:
    """Replace this process by the one that evaluates."""
    become_actor("evaluate", msgspec.json.encode(order).decode())


def read_order(arguments: argparse.Namespace) -> EvaluationOrder:
    """The order that the command line gives. Raises UserError."""
    _check_model_options(arguments)
    located = locate_model(arguments.model) if arguments.model is not None else None
    sampling = _sampling(arguments)
    served, notes = _served(arguments, located, sampling)
    return EvaluationOrder(
        label=str(arguments.model or f"{arguments.served_model} at {arguments.server}"),
        data=_data(arguments, located),
        served=served,
        judge=_judge(arguments),
        samples=arguments.samples,
        limit=arguments.limit,
        seed=arguments.seed,
        grader_seconds=arguments.grader_seconds,
        out=arguments.out,
        json=arguments.json,
        notes=[*(located.notes if located else []), *notes],
    )


# ---- parts of the order --------------------------------------------------------------------------


def _check_model_options(arguments: argparse.Namespace) -> None:
    if (arguments.model is None) == (arguments.server is None):
        raise UserError("zppo evaluate: expected either --model FOLDER or --server URL")
    if arguments.server is not None and arguments.served_model is None:
        raise UserError(
            "--served-model is missing; expected the name under which --server serves the model"
        )
    if arguments.server is not None and arguments.engine is not None:
        raise UserError(
            f"--engine is {arguments.engine!r}; expected none, because --server has its own"
        )


def _sampling(arguments: argparse.Namespace) -> ResponseSampling:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty")
    given = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    try:
        asked = msgspec.convert({**msgspec.to_builtins(PAPER_SAMPLING), **given}, ResponseSampling)
    except msgspec.ValidationError as error:
        reason, _, field = str(error).partition(" - at `$.")
        option = "--" + field.rstrip("`").replace("_", "-")
        value = given[field.rstrip("`")]
        raise UserError(f"{option} is {value}; {reason[0].lower()}{reason[1:]}") from None
    check_temperature("--temperature", asked.temperature)
    return asked


def _served(
    arguments: argparse.Namespace, located: Located | None, sampling: ResponseSampling
) -> tuple[ServedModel, list[str]]:
    engine_args = dict(pair(text, "--engine-arg") for text in arguments.engine_arg)
    run = located.topology if located else None
    variables = dict(pair(text, "--chat-template-arg") for text in arguments.chat_template_arg)
    variables = variables or (dict(run.student.chat_template_kwargs) if run else {})
    check_template_variables(variables, "--chat-template-arg")
    if located is None:
        model = ModelConfig(
            model=arguments.served_model, sampling=sampling, chat_template_kwargs=variables
        )
        return _server(arguments.server, model, _allowed(arguments) | engine_args, "--server"), []
    engine = arguments.engine or "transformers"
    dtype = arguments.dtype or (run.student.dtype if run else None)
    model, notes = served_folder(located, sampling, dtype, engine, "--model", variables)
    if engine == "simulated" and sampling.presence_penalty:
        notes.append("the engine 'simulated' knows no presence penalty")
    if (arguments.device, model.dtype, cpu_dtype()) == ("cpu", "bfloat16", "float32"):
        notes.append(f"{SLOW_BFLOAT16}: give --dtype float32")
    return served_as("--model", model, _actor(arguments, engine, engine_args)), notes


def _actor(arguments: argparse.Namespace, engine: str, engine_args: dict[str, Any]) -> ActorConfig:
    return ActorConfig(
        engine=engine,
        engine_args=engine_args,
        devices=[arguments.device],
        threads=arguments.threads,
    )


def _server(url: str, model: ModelConfig, engine_args: dict[str, Any], option: str) -> ServedModel:
    engine_args = {"base_url": url, **engine_args}
    read_openai_arguments(engine_args, option)
    return served_as(option, model, ActorConfig(engine=OPENAI, engine_args=engine_args))


def _allowed(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"allow_insecure": True} if arguments.allow_insecure else {}


def _judge(arguments: argparse.Namespace) -> ServedModel | None:
    if arguments.judge is not None and arguments.judge_server is not None:
        raise UserError("zppo evaluate: expected --judge FOLDER or --judge-server URL, not both")
    if arguments.judge_server is not None:
        if arguments.judge_model is None:
            raise UserError(
                "--judge-model is missing; expected the name under which --judge-server serves the "
                "judge"
            )
        model = ModelConfig(model=arguments.judge_model, sampling=JUDGE_SAMPLING)
        return _server(arguments.judge_server, model, _allowed(arguments), "--judge-server")
    if arguments.judge is None:
        return None
    located = locate_model(arguments.judge)
    engine = "simulated" if arguments.engine == "simulated" else "transformers"
    model, _ = served_folder(
        located, JUDGE_SAMPLING, arguments.dtype, engine, "--judge", THINKING_OFF
    )
    return served_as("--judge", model, _actor(arguments, engine, {}))


def _data(arguments: argparse.Namespace, located: Located | None) -> DataConfig:
    """The questions: those named, else those that the run holds out; read, asked and graded as the
    run does it."""
    run = located.topology.data if located and located.topology else None
    if arguments.data is None and (run is None or run.heldout is None):
        raise UserError(
            "--data is missing; expected a question file, a data set folder, or "
            "reasoning_gym:TASK?…"
        )
    if arguments.data is None and run is not None and is_own_source(str(run.heldout)):
        raise UserError(
            f"--data is missing; expected a source, because the run holds out {run.heldout!r}, "
            "whose code is not run here unless --data names it"
        )
    data = run or DataConfig(train="")
    data = replace(data, train=arguments.data if arguments.data is not None else data.heldout)
    if is_procedural(data.train):  # they have neither columns nor a grader of the user's
        data = replace(data, fields={}, grader="math")
    if data.reward and arguments.grader is None:
        raise UserError(
            f"--grader is missing; expected math, exact or choice, because the run has rewards "
            f"({', '.join(entry.use for entry in data.reward)}), whose code is not run here"
        )
    # With rewards, a row's own rule is one of them.
    kept = {ours: name for ours, name in data.fields.items() if not data.reward or ours != "grader"}
    fields = dict(pair(text, "--field") for text in arguments.field) or kept
    given = {
        "reward": [],
        "fields": fields,
        "grader": arguments.grader or data.grader,
        "max_bad_rows": arguments.max_bad_rows,
        "templates": _absolute(arguments.templates) or data.templates,
        "system_prompt": arguments.system_prompt or data.system_prompt,
        "heldout": None,
    }
    return data_settings({**msgspec.to_builtins(data), **given})


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


# ---- checks --------------------------------------------------------------------------------------


def _check_out(out: str | None) -> None:
    if out is None:
        return
    path = Path(out)
    if path.exists():
        raise UserError(f"--out: {out!r} exists already; name another file or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out: there is no folder {str(path.absolute().parent)!r}")


def _check_questions(
    chosen: Sequence[Question], order: EvaluationOrder, prompts: PromptSet
) -> None:
    prompts.check_places(chosen)
    pictured = next((question.id for question in chosen if question.media), None)
    if pictured is not None:
        check_sees(order.data.train, pictured, order.served)
    if order.served.actor.engine in LENGTH_ARGUMENTS:
        tokenizer = load_tokenizer(order.served.model.model, order.served.model_path)
        check_question_shown(tokenizer, order.served)
        check_system_prompt(tokenizer, order.data.system_prompt, order.served)
        check_own_system(tokenizer, order.data.train, chosen, order.served)
    if order.judge is None and any(question.grader == JUDGE for question in chosen):
        raise UserError(
            "--grader is 'judge'; expected a judge as well: --judge FOLDER or --judge-server URL"
        )


# ---- the command line ----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo evaluate",
        description="Accuracy of a model on a set of questions, with its 95 % interval.",
        epilog="Suites of benchmarks: zppo evaluate --suite paper --help (docs/suites.md)",
    )
    _add_model_options(parser.add_argument_group("model"))
    _add_question_options(parser.add_argument_group("questions"))
    _add_decoding_options(parser.add_argument_group("decoding (defaults: those of the paper)"))
    parser.add_argument(
        "--out", metavar="FILE", help="write one JSON line per question, with all responses"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="run directory, checkpoint step-N, or model folder",
    )
    group.add_argument(
        "--server", metavar="URL", help="OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1"
    )
    group.add_argument("--served-model", metavar="NAME", help="name of the model at --server")
    group.add_argument(
        "--engine", metavar="NAME", help="engine for --model: transformers (default) or vllm"
    )
    group.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the engine; may be repeated",
    )
    group.add_argument(
        "--chat-template-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="e.g. enable_thinking=false",
    )
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, …")
    group.add_argument("--dtype", choices=DTYPES, help="default: that of the model")
    group.add_argument("--threads", type=threads, metavar="N", help="CPU threads")
    group.add_argument(
        "--judge", type=Path, metavar="FOLDER", help="model that compares answers not found right"
    )
    group.add_argument("--judge-server", metavar="URL", help="server of such a model")
    group.add_argument("--judge-model", metavar="NAME", help="name of the judge at --judge-server")
    group.add_argument(
        "--allow-insecure", action="store_true", help="allow http to servers on other machines"
    )


def _add_question_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data", metavar="SOURCE", help="file, folder, or reasoning_gym:TASK?… (docs/data.md)"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    group.add_argument(
        "--field", action="append", default=[], metavar="FIELD=COLUMN", help="e.g. question=problem"
    )
    group.add_argument("--grader", help="math, exact, choice or judge")
    group.add_argument(
        "--grader-seconds",
        type=seconds,
        default=5.0,
        metavar="S",
        help="processor time of one grading",
    )
    group.add_argument(
        "--max-bad-rows", type=counting, default=0, metavar="N", help="rows that may be left out"
    )
    group.add_argument(
        "--templates", metavar="FOLDER", help="folder with plain.j2 (docs/templates.md)"
    )
    group.add_argument("--system-prompt", metavar="TEXT")


def _add_decoding_options(group: argparse._ArgumentGroup) -> None:
    defaults = PAPER_SAMPLING
    group.add_argument(
        "--samples", type=positive, default=4, metavar="N", help="responses to each question (4)"
    )
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help=f"longest response ({defaults.max_new_tokens})",
    )
    group.add_argument("--temperature", type=finite, help=f"0 is greedy ({defaults.temperature})")
    group.add_argument("--top-p", type=finite, help=f"1 is off ({defaults.top_p})")
    group.add_argument("--top-k", type=counting, help=f"0 is off ({defaults.top_k})")
    group.add_argument("--min-p", type=finite, help=f"0 is off ({defaults.min_p})")
    group.add_argument(
        "--presence-penalty", type=finite, help=f"0 is off ({defaults.presence_penalty})"
    )
    group.add_argument("--seed", type=counting, default=0)


if __name__ == "__main__":
    sys.exit(run_command(main))
