"""`python -m zppo.launch`: check everything, make the run directory, and become the run's
supervisor.

Until the run directory is made nothing is started, and nothing is written but pictures that lie
inside a table (`zppo.data.media`), which the next launch finds; so a mistake leaves no other trace:
one sentence on stderr and exit code 2. The supervisor replaces this process (same process
id, same terminal).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console

from zppo.algorithm.methods import Method
from zppo.config.explain import shown
from zppo.config.load import load, override, refuse_other_folder, resolve, run_folder
from zppo.config.served import served_student, teachers
from zppo.config.topology import Topology
from zppo.config.typed import setting_typed
from zppo.data.corpus import (
    Corpus,
    bad_rows_text,
    gold_notes,
    held_out_overlap,
    load_questions,
    source_notes,
)
from zppo.data.question import Question, digest
from zppo.errors import EXIT_USER_ERROR, Parser, UserError, become_actor, count_of, run_command
from zppo.plan.extensions import changed
from zppo.plan.machine import measure_machine, wants_gpu
from zppo.plan.machines_file import Described
from zppo.plan.make import make_plan
from zppo.plan.memory import WITHOUT_FOLDER
from zppo.plan.picture_checks import check_media, check_tower
from zppo.plan.placement import refuse_unbuilt
from zppo.plan.plan import Plan
from zppo.plan.processes import asked_teachers, cores
from zppo.plan.prompt_checks import (
    Reader,
    check_own_system,
    check_room,
    check_system_prompt,
    check_teachers,
)
from zppo.plan.view import show
from zppo.prompting.prompts import PromptSet
from zppo.prompting.tokenization import check_same_vocabulary, run_no_models
from zppo.records import binding, checkpoint, ledger, run_directory
from zppo.records.binding import MAX_STALENESS, RANKS, MadeWith
from zppo.records.summary import read_lines, summarise

DRY_RUN_SECONDS = 10.0
"""How long `--dry-run` waits for the server of a teacher."""
PROMPT_BATCH = 1024
"""Prompts tokenised at once: enough to keep the tokenizer busy, few enough to take little
memory."""


class Checked(Struct, frozen=True, kw_only=True):
    """What the checks have read and laid out. `held` is None without `data.heldout`."""

    corpus: Corpus
    held: Corpus | None
    prompts: PromptSet
    plan: Plan

    @property
    def heldout(self) -> list[Question]:
        return [] if self.held is None else self.held.questions

    @property
    def contents(self) -> dict[str, str]:
        return {"data.heldout": digest(self.heldout), "data.templates": self.prompts.digest}


def main(argv: Sequence[str] | None = None) -> int:
    """Launch, resume or only show a run. Returns 2 after a user error, 0 after `--dry-run`; else it
    does not return."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.topology = _one_topology(arguments)
        if arguments.offline and not arguments.dry_run:
            raise UserError("--offline: expected --dry-run with it; a run asks its teacher")
        resumes = arguments.resume is not None
        if arguments.machines is not None and (not arguments.dry_run or resumes):
            raise UserError(
                "--machines: expected --dry-run with it, and no --resume; a run is checked against "
                "the machines that it has"
            )
        if resumes:
            return _resume(arguments)
        return _launch(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR


def _launch(arguments: argparse.Namespace) -> int:
    if arguments.topology is None:
        raise UserError(
            "zppo launch: the topology is missing; expected a file (write one with: zppo init "
            "topology.yaml)"
        )
    topology = load(arguments.topology, arguments.set)
    directory = run_folder(topology)
    if arguments.machines is not None:
        described = Described.of(topology, arguments.machines, arguments.topology.parent)
        return show_plan(described.plan(), directory, offline=True)
    if directory.exists() and not run_directory.untrained(directory):
        raise UserError(run_directory.in_the_way(directory))
    checked = check(topology, unpack=not arguments.dry_run)
    if arguments.dry_run:
        return show_plan(checked.plan, directory, arguments.offline)
    refuse_unbuilt(topology)
    corpus = checked.corpus
    bad_rows, found = bad_rows_text(corpus), checked.contents
    run_directory.create(directory, topology, digest(corpus.questions), bad_rows, found)
    for note in checked.plan.notes:
        print(f"note: {note}", file=sys.stderr)
    become_supervisor(directory, arguments.keys)


def _resume(arguments: argparse.Namespace) -> int:
    directory = _resumed_directory(arguments)
    record = run_directory.read(directory)
    _check_free(directory)
    found = checkpoint.find_latest(directory)
    if found.folder is None:
        torn = f" ({found.warnings[0]})" if found.warnings else ""
        problem = f"has no whole checkpoint to continue from{torn}"
        begin = "launch it without --resume" if run_directory.untrained(directory) else "remove it"
        raise UserError(f"--resume: {str(directory)!r} {problem}; {begin} to begin anew")
    made = checkpoint.read_made_with(found.folder)
    topology = _resumed_topology(arguments, record.topology, made, found.step)
    if arguments.resume:
        refuse_other_folder(arguments.set, topology, Path(arguments.resume).expanduser())
    checked = _check(topology, directory, unpack=not arguments.dry_run)
    now = binding.made_with(topology, digest(checked.corpus.questions))
    recorded = made.corpus if made is not None else record.corpus
    _check_corpus(topology.data.train, now.corpus, recorded)
    binding.check_contents(topology, record.contents, checked.contents)
    if made is not None:
        binding.check_folders(made, topology, now, found.step)
    worth = changed(
        topology,
        made.extensions if made is not None else record.extensions,
        f"the checkpoint of step {found.step} was written",
    )
    _check_steps(topology, checked.plan.windows.steps, directory, found.step)
    _check_budget(topology, directory, found.step)
    journal = ledger.find_problem(directory, found.step)
    worth += [ledger.begins_anew(directory, journal, found.step)] if journal is not None else []
    for warning in [*found.warnings, *worth]:
        print(warning, file=sys.stderr)
    if arguments.dry_run:
        notes = [*checked.plan.notes, *_cost_so_far(directory, found.step)]
        return show_plan(replace(checked.plan, notes=notes), directory, arguments.offline)
    refuse_unbuilt(topology)
    run_directory.renew(directory, found.step, topology)
    become_supervisor(directory, arguments.keys)


def show_plan(plan: Plan, directory: Path, offline: bool) -> int:
    """What `--dry-run` and `zppo plan` print, after the servers of teachers were asked."""
    if not offline:
        ask_servers(plan)
    show(plan, directory, Console())
    return 0


def ask_servers(plan: Plan) -> None:
    """Raises UserError where the server of a teacher does not answer as it should."""
    # Imported late: a run without such a teacher need not load an HTTP client.
    from zppo.plan.server import check_teachers_servers

    check_teachers_servers(plan.topology, DRY_RUN_SECONDS)


def become_supervisor(directory: Path, key_folder: Path | None = None) -> NoReturn:
    """Replace this process by the supervisor of the run in `directory`; `key_folder`: where it
    writes the key files of further hosts."""
    keys = [] if key_folder is None else ["--keys", str(key_folder.absolute())]
    become_actor("supervisor", "--run", str(directory), *keys)


# ---- checks --------------------------------------------------------------------------------------


def check(topology: Topology, *, unpack: bool = False) -> Checked:
    """Everything that can be wrong with a new run, but for its directory; `unpack`: pictures inside
    tables are written, too. Raises UserError."""
    checked = _check(topology, run_folder(topology), unpack=unpack)
    notes = [
        *checked.plan.notes,
        *source_notes("data.train", checked.corpus),
        *([] if checked.held is None else source_notes("data.heldout", checked.held)),
        *gold_notes("data.train", checked.corpus.questions),
        *_check_prompts(topology, checked),
    ]
    check_vocabularies(topology, checked.plan.method)
    return replace(checked, plan=replace(checked.plan, notes=notes))


def _check(topology: Topology, directory: Path, *, unpack: bool) -> Checked:
    """Everything that can be wrong with settings, data, templates, models and machine, for a run in
    `directory`. Raises UserError."""
    base = run_directory.runtime_base()
    run_directory.runtime_folder(run_directory.new_run_id(), base)
    corpus = load_questions(topology.data.train, topology.data, Path.cwd(), unpack=unpack)
    check_media("data.train", corpus.questions, topology, trained=True)
    check_tower(topology, pictured=any(question.media for question in corpus.questions))
    held = None
    if topology.data.heldout is not None:
        held = load_questions(topology.data.heldout, topology.data, Path.cwd(), unpack=unpack)
        check_media("data.heldout", held.questions, topology)
        _check_overlap(corpus, held)
    prompts = PromptSet.of(topology.data, topology.method.prefix_share)
    prompts.validate()
    prompts.check_places([*corpus.questions, *(held.questions if held else [])])
    machine = measure_machine(cores(), base, directory, wants_gpu(topology))
    plan = make_plan(topology, len(corpus.questions), machine)
    return Checked(corpus=corpus, held=held, prompts=prompts, plan=plan)


def check_vocabularies(topology: Topology, method: Method) -> None:
    """Teachers whose tokens or distributions are trained on share the student's vocabulary; texts
    may come from any."""
    read = teachers(topology) if method.needs_same_vocabulary else []
    for one in read:
        if one.actor.engine not in WITHOUT_FOLDER:
            check_same_vocabulary(served_student(topology), one)


def _check_overlap(train: Corpus, heldout: Corpus) -> None:
    shared = held_out_overlap(train.questions, heldout.questions)
    if shared:
        both = count_of(len(shared), "of its questions is", "of its questions are")
        raise UserError(
            f"data.heldout: {both} in data.train too, first the training question "
            f"{shared[0]!r}; expected none in both"
        )


def _check_prompts(topology: Topology, checked: Checked) -> list[str]:
    """Every plain prompt is as short as `data.max_prompt_tokens` and the contexts of the models
    say. Raises UserError. Returns notes."""
    student, data = Reader.of(served_student(topology)), topology.data
    tokenizer = student.load_tokenizer()
    check_system_prompt(tokenizer, data.system_prompt, student.served)
    limit = data.max_prompt_tokens
    for where, questions in (
        ("data.train", checked.corpus.questions),
        ("data.heldout", checked.heldout),
    ):
        check_own_system(tokenizer, where, questions, student.served)
        lengths = _prompt_lengths(questions, checked.prompts, student, tokenizer)
        longer = [
            (question, length)
            for question, length in zip(questions, lengths, strict=True)
            if length > limit
        ]
        if longer:
            question, length = longer[0]
            count = count_of(len(longer), "question is", "questions are")
            raise UserError(
                f"{where}: the question {question.id!r} makes a prompt of {length} tokens; "
                f"expected at most {limit}, data.max_prompt_tokens ({count} longer)"
            )
        for question, length in zip(questions, lengths, strict=True):
            check_room(where, question, length, student)
    asked = asked_teachers(topology)
    return [
        *student.notes(tokenizer, [*checked.corpus.questions, *checked.heldout]),
        *check_teachers(asked, data.system_prompt, checked.prompts, checked.corpus.questions),
    ]


def _prompt_lengths(
    questions: list[Question], prompts: PromptSet, student: Reader, tokenizer: Any
) -> list[int]:
    batches = (
        questions[start : start + PROMPT_BATCH] for start in range(0, len(questions), PROMPT_BATCH)
    )
    return [
        length
        for batch in batches
        for length in student.lengths(tokenizer, [prompts.plain(question) for question in batch])
    ]


def _resumed_directory(arguments: argparse.Namespace) -> Path:
    if arguments.resume:
        named = Path(arguments.resume).expanduser()
        if named.is_file():
            raise UserError(
                f"--resume: {arguments.resume!r} is a file; expected a run directory, or the "
                f"topology in front of it: zppo launch {arguments.resume} --resume"
            )
        return named.absolute()
    if arguments.topology is None:
        raise UserError("--resume: expected a run directory, or the --topology of the run")
    return run_folder(load(arguments.topology, arguments.set))


def _check_free(directory: Path) -> None:
    lock = run_directory.hold(directory)
    if lock is None:
        raise UserError(f"--resume: {str(directory)!r} is in use by a run that has not ended")
    os.close(lock)


def _resumed_topology(
    arguments: argparse.Namespace, recorded: Topology, made: MadeWith | None, step: int
) -> Topology:
    """The topology to go on with. Raises UserError where it would not be the same run.

    What counts is what the checkpoint was made with; one that does not say goes by `run.json`.
    """
    if arguments.topology is not None:
        topology = load(arguments.topology, arguments.set)
    else:
        topology = resolve(override(recorded, arguments.set), Path.cwd())
    record, new = binding.fixed_settings(recorded), binding.fixed_settings(topology)
    old = made.settings if made is not None else record
    found = binding.first_difference(old, new)
    if found is not None and record[found.setting] == found.after:
        raise UserError(
            f"--resume: {found.setting} was {shown(found.before)} when the checkpoint of "
            f"step {step} was written, and run.json says {shown(found.after)}; put it back "
            f"there, because "
            f"{found.reason}"
        )
    if found is not None:
        raise UserError(
            f"--resume: {found.setting} was {shown(found.before)} and is now "
            f"{shown(found.after)}; it cannot change, because {found.reason}"
        )
    bound = old.get(MAX_STALENESS, record[MAX_STALENESS])
    if topology.scheduler.max_staleness < bound:
        raise UserError(
            f"--resume: {MAX_STALENESS} was {bound} and is now {topology.scheduler.max_staleness}; "
            "it cannot shrink, because windows in flight keep to the old bound"
        )
    before, ranks = old.get(RANKS, 1), new[RANKS]
    exact = topology.scheduler.max_staleness == 0 and topology.method.correction == "none"
    if exact and ranks != before:
        raise UserError(
            f"--resume: {RANKS} was {before} and is now {ranks}; with {MAX_STALENESS} 0 and "
            "method.correction 'none' it cannot change, because sums over other ranks differ in "
            "their last bits"
        )
    return topology


def _check_corpus(train: str, corpus: str, recorded: str) -> None:
    """The paths alone do not say whether a file was edited."""
    if corpus != recorded:
        raise UserError(
            f"--resume: the questions of data.train, {train!r}, are not those that "
            "the run began with; "
            "they cannot change, because the data cursor counts questions of another corpus"
        )


def _check_steps(topology: Topology, total: int, directory: Path, step: int) -> None:
    """Something is left to do: steps of `total`, or the held-out evaluation after the last of
    them."""
    steps, epochs = topology.run.steps, topology.run.epochs
    extend = (
        f"run.steps={2 * step}"
        if steps is not None and steps <= total
        else f"run.epochs={epochs + 1}"
    )
    extend = f"extend it, for example with --set {extend}"
    if steps is not None and step > steps:
        raise UserError(
            f"--resume: run.steps is {steps} and the run has reached step {step}; {extend}"
        )
    if step >= total and _finished(topology, directory, step):
        raise UserError(f"--resume: the run is finished, step {step} was its last; {extend}")


def _check_budget(topology: Topology, directory: Path, step: int) -> None:
    """Something is left of the teacher's budget. A journal that tells nothing is said elsewhere."""
    if topology.teacher is None:
        return
    costs = ledger.read_ledger(directory, step).spent.values()
    for name in ("tokens", "requests"):
        limit = getattr(topology.teacher.budget, name)
        total = sum(getattr(cost, name) for cost in costs)
        if limit is not None and total >= limit:
            raise UserError(
                f"--resume: teacher.budget.{name} is {limit} and {total} are spent; raise it, for "
                f"example with --set teacher.budget.{name}={2 * total}"
            )


def _cost_so_far(directory: Path, step: int) -> list[str]:
    """A note on what the teachers have cost: real steps ask for less than the plan's bound."""
    costs = ledger.read_ledger(directory, step).spent.values()
    requests, tokens = sum(c.requests for c in costs), sum(c.tokens for c in costs)
    if not requests:
        return []
    return [
        f"the teachers have cost {count_of(requests, 'request')} and {count_of(tokens, 'token')} "
        f"so far, {requests / step:,.0f} and {tokens / step:,.0f} for each of "
        f"{count_of(step, 'step')}"
    ]


def _finished(topology: Topology, directory: Path, step: int) -> bool:
    """Whether a run with a checkpoint of its last step has its last held-out evaluation too.

    Where the corpus ends the run, not `run.steps`, only the run itself knows its last step: windows
    may have changed their size on the way. Then its verdict counts.
    """
    if topology.run.steps != step:
        return str(summarise(directory)["verdict"]).startswith("finished")
    evaluated = {line["step"] for line in read_lines(directory / "heldout.jsonl")}
    return topology.data.heldout is None or step in evaluated


def _one_topology(arguments: argparse.Namespace) -> Path | None:
    """The topology that is named, with `--topology` or without. Raises UserError if both are."""
    named: Path | None = arguments.file
    if named is not None and arguments.topology is not None:
        raise UserError(
            f"zppo launch: the topology is given twice, {str(named)!r} and --topology "
            f"{str(arguments.topology)!r}; expected one"
        )
    return named or arguments.topology


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zppo launch",
        description="Start a run as a topology describes it, or continue one.",
        settings=setting_typed,
    )
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="the run, in YAML (see: zppo init)"
    )
    parser.add_argument("--topology", type=Path, metavar="FILE", help="the same, by its name")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one setting, e.g. run.steps=100; may be repeated",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_DIR",
        help=(
            "continue from the last whole checkpoint of RUN_DIR, or of the run that --topology "
            "names"
        ),
    )
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="FOLDER",
        help="where the key files of further hosts are written (default: RUN_DIR.keys)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the resolved plan and start nothing"
    )
    parser.add_argument(
        "--offline", action="store_true", help="with --dry-run: do not ask the teacher's server"
    )
    parser.add_argument(
        "--machines",
        type=Path,
        metavar="FILE",
        help="with --dry-run: plan for the machines and models that FILE describes",
    )
    return parser


if __name__ == "__main__":
    run_no_models()
    sys.exit(run_command(main))
