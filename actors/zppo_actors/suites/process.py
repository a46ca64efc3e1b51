"""The process of a suite: model after model, row after row, each row once.

Started as `python -m zppo_actors suite ORDER` (JSON, `zppo.suites.order`). A row is done when its
`result.json` stands; what was answered before is in its journal. So whatever is killed, the same
command goes on where it was. A row whose harness fails has its reason written down and the next one
is begun; when a model or the judge does not answer any more, the suite stops.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from zppo.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError, count_of, first_line
from zppo.plan.engines.openai import OpenAIArguments
from zppo.prompting.prompts import PromptSet
from zppo.records import run_directory
from zppo.report.frame import flatten
from zppo.suites import harness as harnesses
from zppo.suites.harness import HARNESSES, Asking, SamplesError, shows_final_answer
from zppo.suites.order import Served, SuiteOrder
from zppo.suites.page import check_labels, known_labels, write_page
from zppo.suites.pictures import server_options
from zppo.suites.plan import OF_MODEL, known_missing, questions_of, settings_of
from zppo.suites.results import (
    RowResult,
    Trouble,
    read_result,
    row_folder,
    write_result,
)
from zppo.suites.table import Row, decoding_of, tasks_of
from zppo_actors.evaluator.evaluator import Grading, progress_bar
from zppo_actors.suites.asked import JUDGE_DECODING, AskedModel, ModelGone, check_model
from zppo_actors.suites.children import (
    ChildFailed,
    check_harness,
    foreign_environment,
    last_lines,
    serving,
    started,
)
from zppo_actors.suites.gateway import JUDGE, BadRequest, Gateway, Rewriter
from zppo_actors.suites.journal import Journal
from zppo_actors.suites.scoring import Scoring

NAME = "zppo-suite"
"""What a harness calls the model. Its own name might hold a comma, or one that lmms-eval asks
otherwise (`o1`)."""
GRADER_SECONDS = 5.0
"""Processor time of one grading."""


def main(arguments: list[str]) -> int:
    """Carry out one order; returns the exit code. Raises UserError."""
    order = msgspec.json.decode(arguments[0], type=SuiteOrder)
    # A background job inherits it as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger("zppo").setLevel(logging.ERROR)  # a last failure is a sentence of its own
    out = Path(order.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = run_directory.hold(out)
    except OSError as error:
        raise UserError(f"--out: {order.out!r} cannot be written ({error.strerror})") from None
    if lock is None:
        raise UserError(f"--out {order.out!r}: is in use by a suite that has not ended")
    try:
        return _carry_out(order)
    except KeyboardInterrupt:
        print(f"stopped; {_goes_on(order)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:  # a full disk
        print(f"stopped: {first_line(error)}; {_goes_on(order)}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        os.close(lock)


def _carry_out(order: SuiteOrder) -> int:
    """The session and its page. Returns the exit code. Raises UserError."""
    session = Session(order)
    session.check()
    write_page(order)  # also refuses a baseline that is not there
    trouble = ""
    try:
        asyncio.run(session.run())
    except ModelGone as error:
        trouble = str(error)
    for path in write_page(order):
        print(f"wrote {path}")
    if session.failed and not trouble:
        trouble = f"rows without a result: {', '.join(session.failed)}"
    if trouble:
        print(f"{trouble}; {_goes_on(order)}", file=sys.stderr)
    return EXIT_FAILED if trouble else 0


def _goes_on(order: SuiteOrder) -> str:
    return f"what is done is in {order.out}, and the same command goes on from there"


class Session:
    """One call of the command. `failed` names the rows whose harness failed."""

    def __init__(self, order: SuiteOrder) -> None:
        self.failed: list[str] = []
        self._order = order
        self._out = Path(order.out)
        self._versions: dict[str, str] = {}
        self._prompts = PromptSet(Path(order.templates) if order.templates else None)
        self._missing = known_missing(order.suite, order.judge is not None, os.environ)

    def check(self) -> None:
        """Everything that can be known before a model is asked. Raises UserError."""
        order = self._order
        labels = [model.label for model in order.models]
        self._prompts.validate()
        check_labels(list(dict.fromkeys([*known_labels(self._out), *labels])))
        self._check_others()
        pending = {model.label: self._pending(model) for model in order.models}
        for name in sorted({row.harness for rows in pending.values() for row in rows}):
            python = order.harness_pythons[name]
            self._versions[name] = check_harness(HARNESSES[name], python)
        if not any(pending.values()):
            return
        if order.judge is not None:
            arguments = self._reach(order.judge.base_url)
            check_model(arguments, order.judge.model, "--judge-server", order.startup_seconds)
        for model in order.models:
            if model.folder is None and pending[model.label]:
                arguments = self._reach(model.base_url)
                check_model(arguments, model.model, "--server", order.startup_seconds)

    async def run(self) -> None:
        """All rows that have no result. Raises ModelGone, UserError."""
        for model in self._order.models:
            self._write_missing(model)
            pending = self._pending(model)
            if not pending:
                continue
            folder = row_folder(self._out, model.label, "").parent
            folder.mkdir(parents=True, exist_ok=True)
            order = self._order
            log = folder / "server.log"
            options = server_options(model, order)
            async with serving(model, options, order.startup_seconds, log) as url:
                for row in pending:
                    await self._row(model, url, row)
                    write_page(order)

    def _pending(self, model: Served) -> list[Row]:
        """Rows that can be run and have no result. Raises UserError for a result of other
        settings."""
        pending = []
        for row in self._order.suite.rows:
            folder = row_folder(self._out, model.label, row.short)
            result = read_result(folder)
            if result is not None:
                _refuse_other(folder, result.settings, self._settings(row, model))
            if result is None and row.short not in self._missing:
                pending.append(row)
        return pending

    def _check_others(self) -> None:
        """The page holds models of earlier calls as well; whatever may differ between two models,
        how they were asked and judged may not. Raises UserError."""
        order = self._order
        own = [model.label for model in order.models]
        for label in known_labels(self._out):
            for row in [] if label in own else order.suite.rows:
                folder = row_folder(self._out, label, row.short)
                result = read_result(folder)
                if result is not None:
                    now = self._settings(row, order.models[0])
                    now |= {name: result.settings.get(name) for name in OF_MODEL}
                    _refuse_other(folder, result.settings, now)

    def _settings(self, row: Row, model: Served) -> dict[str, Any]:
        """With the templates as they were read at the start."""
        return settings_of(row, model, self._order, self._prompts.digest)

    def _write_missing(self, model: Served) -> None:
        """Keep the reasons of the rows that cannot be run here, for the page."""
        for short, reason in self._missing.items():
            folder = row_folder(self._out, model.label, short)
            folder.mkdir(parents=True, exist_ok=True)
            if read_result(folder) is None:
                write_result(folder, Trouble(reason=reason))

    async def _row(self, model: Served, url: str, row: Row) -> None:
        """One benchmark, to its result or to the reason why it has none. Raises ModelGone."""
        folder = row_folder(self._out, model.label, row.short)
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        try:
            result = await self._ask_and_score(model, url, row, folder)
        except (ChildFailed, SamplesError, BadRequest, ModelGone) as error:
            write_result(folder, Trouble(reason=str(error)))
            if isinstance(error, ModelGone):
                raise
            self.failed.append(row.short)
            print(f"{model.label}  {row.short}: {error}", flush=True)
        else:
            took = msgspec.structs.replace(result, seconds=time.monotonic() - begun)
            write_result(folder, took)
            print(f"{model.label}  {row.short}: {_line(took)}", flush=True)

    async def _ask_and_score(self, model: Served, url: str, row: Row, folder: Path) -> RowResult:
        order = self._order
        settings = self._settings(row, model)
        # By its tasks, because two rows may be parts of one.
        key = hashlib.sha256("\n".join(tasks_of(row)).encode()).hexdigest()[:16]
        asked = AskedModel(
            f"the model {model.label!r}",
            model.model,
            self._reach(url, own=model.folder is not None),
            decoding_of(row, order.suite),
            order.seed,
            Journal(folder.parent / "answers" / f"{key}.jsonl"),
            identity=json.dumps([model.identity, settings["server_args"]]),
        )
        judge = None
        if order.judge is not None:
            arguments = self._reach(order.judge.base_url)
            journal = Journal(folder / "verdicts.jsonl")
            judge = AskedModel(
                "the judge", order.judge.model, arguments, JUDGE_DECODING, order.seed, journal
            )
        try:
            await self._harness(row, folder, model, asked, judge)
            samples = harnesses.read_samples(row, folder / "samples")
            # Where it cannot make a request of a question, lmms-eval goes on with an empty answer.
            if asked.counts.answers < len(samples):
                raise SamplesError(
                    f"{row.harness} asked {asked.counts.answers} of {len(samples)} questions (log: "
                    f"{folder / 'harness.log'}): {last_lines(folder / 'harness.log')}"
                )
            with Grading(GRADER_SECONDS, "") as grading:
                scored = await Scoring(row, self._prompts, grading, judge).score(samples)
        finally:
            await asked.close()
            if judge is not None:
                await judge.close()
        counts = asked.counts
        return RowResult(
            short=row.short,
            settings=settings,
            harness=f"{row.harness} {self._versions[row.harness]}",
            scores={id: one.score for id, one in scored.items()},
            judged=sum(one.judged for one in scored.values()),
            unboxed=counts.unboxed,
            cut_off=counts.cut_off,
            refused=counts.refused + (judge.counts.refused if judge is not None else 0),
            tokens=counts.tokens if counts.counted == counts.answers else None,
            seconds=0.0,
            asked=counts.answers - counts.replayed,
        )

    async def _harness(
        self, row: Row, folder: Path, model: Served, asked: AskedModel, judge: AskedModel | None
    ) -> None:
        """Let the harness ask its questions. Raises ChildFailed, BadRequest or ModelGone."""
        order, samples, log = self._order, folder / "samples", folder / "harness.log"
        shutil.rmtree(samples, ignore_errors=True)  # of an attempt that did not end
        for name, content in harnesses.task_files(row, Path(order.suite.folder)).items():
            (samples / "tasks").mkdir(parents=True, exist_ok=True)
            (samples / "tasks" / name).write_bytes(content)
        rewriter = Rewriter(self._prompts, row.directives, shows_final_answer(row))
        with _progress(f"{model.label} {row.short}", questions_of(row, order)) as advance:
            async with Gateway(asked, judge, rewriter, advance) as gateway:
                asking = Asking(
                    url=f"{gateway.address}/v1",
                    model=NAME,
                    folder=str(samples),
                    concurrent=order.concurrent,
                    limit=order.limit,
                )
                command = [order.harness_pythons[row.harness], "-P", "-m"]
                command += [HARNESSES[row.harness].package]
                command += harnesses.arguments_of(row, order.suite, asking)
                told = harnesses.environment_of(
                    row,
                    f"{gateway.address}{JUDGE}/v1",
                    order.judge.model if order.judge is not None else "none",
                    gateway.key,
                )
                code = await _run(command, foreign_environment(told), log, gateway)
        # lmms-eval ends with 0 whatever happened; then there are no samples.
        if code != 0 or not any(samples.rglob("*.jsonl")):
            raise ChildFailed(f"{row.harness} failed (code {code}, log: {log}): {last_lines(log)}")

    def _reach(self, url: str, *, own: bool = False) -> OpenAIArguments:
        """How a server is asked; one of our own needs no key."""
        order = self._order
        key: dict[str, Any] = {"api_key_env": None} if own else {}
        return OpenAIArguments(
            base_url=url,
            max_concurrent=order.concurrent,
            timeout_seconds=order.timeout_seconds,
            retry_seconds=order.retry_seconds,
            retry_budget=1_000_000,
            **key,
        )


async def _run(command: list[str], environment: dict[str, str], log: Path, gateway: Gateway) -> int:
    """One harness to its end; returns its exit code. Raises the first thing that goes wrong behind
    the gateway."""
    log.unlink(missing_ok=True)
    async with started(command, environment, log) as child:
        ended = asyncio.create_task(child.wait())
        waited: set[asyncio.Future[Any]] = {ended, gateway.trouble}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if gateway.trouble.done():
            raise gateway.trouble.result()
        return ended.result()


# ---- words ---------------------------------------------------------------------------------------


def _line(result: RowResult) -> str:
    share = result.estimate
    refused = f", {result.refused} not taken by the server" if result.refused else ""
    return (
        f"{100 * share.value:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f}), "
        f"{count_of(len(result.scores), 'question')}, {result.judged} judged{refused}, "
        f"{result.seconds:.0f} s"
    )


def _refuse_other(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError for a result of other settings."""
    if before != now:
        raise UserError(
            f"--out: {str(folder)!r} holds a result of other settings ({_differs(before, now)}); "
            "name another folder or remove it"
        )


def _differs(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first setting that is another one."""
    flat_before, flat_now = dict(flatten(before)), dict(flatten(now))
    for name in sorted({*flat_before, *flat_now}):
        if flat_before.get(name) != flat_now.get(name):
            return f"{name} was {flat_before.get(name)!r}, now {flat_now.get(name)!r}"
    return "of another version"


@contextmanager
def _progress(name: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where somebody can see it move; yields what moves it by one answer."""
    with progress_bar() as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
