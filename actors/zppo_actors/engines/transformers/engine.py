"""The embedded engine: one process, one model of transformers, continuous batching on a CPU or one
GPU.

A worker thread runs the decode loop; asyncio callers post commands (a new group, responses to
score, new weights, a cancellation) that it takes between two tokens. New weights therefore change
the policy in mid-sentence: keys and values stay, and every token carries the version that sampled
it. Scoring goes on between two tokens as well, one forward pass at a time, and touches neither keys
nor values.

Invariant: every job that was taken on is settled exactly once, with its outcome or with a reason. A
failure of the loop fails all unsettled jobs, one of a scoring pass its own job alone, never the
process; one that keeps coming back, or that leaves the weights half loaded, marks the engine as
broken, and its actor leaves.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from zppo.data.pictures import PictureError
from zppo.errors import UserError
from zppo.plan.engines.own import TransformersArguments, convert_arguments
from zppo.training.loading import tower_parameters
from zppo.training.pictures import SeenPrompt, Tower
from zppo_actors.engines.base import EngineError, EngineSpec
from zppo_actors.engines.score_tasks import check_scorable
from zppo_actors.engines.sequences import Running, budget_of, group_samples
from zppo_actors.engines.tokenization import PromptTokenizer
from zppo_actors.engines.transformers.decoder import Decoder, Ended
from zppo_actors.engines.transformers.jobs import Job, SampleJob, ScoreJob, post, resolve
from zppo_actors.engines.transformers.models import adopt_slots, context_length, load_model
from zppo_actors.engines.transformers.scoring import Scorer
from zppo_actors.weights import shared_memory
from zppo_protocol.messages import GenerateTask, ScoreTask
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.values import Media, PolicyManifest

log = logging.getLogger("zppo.engine")

AnyJob = TypeVar("AnyJob", SampleJob, ScoreJob)

FAILURES_IN_A_ROW = 3
"""So many failures without a token between them mean that the device or the model is beyond
help."""


def create(spec: EngineSpec) -> TransformersEngine:
    """Load tokenizer and model, check that they can be served, and start the decode thread. Raises
    UserError."""
    arguments = convert_arguments(
        spec.served.actor.engine_args, TransformersArguments, spec.served.actor_path
    )
    if spec.served.actor.threads is not None:
        torch.set_num_threads(spec.served.actor.threads)
    tokenizer = PromptTokenizer(spec.served.model.model, spec.served.model_path)
    model = load_model(spec)
    adopt_slots(model, spec.served.model.model, spec.served.model_path)
    tower = Tower.of(model, spec.served.model.model, spec.served.model_path)
    context = context_length(model.config.get_text_config())
    max_length = min(context, arguments.max_length or context)
    return TransformersEngine(
        model, tokenizer, arguments.max_sequences, max_length, spec.served.model_path, tower
    )


class TransformersEngine:
    """See the module. `close` must be awaited to end the thread."""

    def __init__(
        self,
        model: Any,
        tokenizer: PromptTokenizer,
        max_sequences: int,
        max_length: int,
        where: str = "model",
        tower: Tower | None = None,
    ) -> None:
        """`model` has our attention already; `max_length` bounds prompt and response together, in
        tokens; `tower` is what sees pictures in it."""
        self._model = model
        self._tokenizer = tokenizer
        self._max_sequences = max_sequences
        self._max_length = max_length
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)
        self._tower = tower
        tokenizer.pictures = None if tower is None else tower.layout
        self._tower_names = {name for name, _ in tower_parameters(model)}
        self._decoder = Decoder(model, tokenizer.end_ids, max_sequences, max_length, tower)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._unsettled: dict[Job, None] = {}
        """Every job somebody waits for, wherever it stands: waiting, being admitted, running,
        scored. Oldest first."""
        self._waiting: deque[SampleJob] = deque()
        self._scoring: deque[ScoreJob] = deque()
        self._where = where
        self._scorer: Scorer | None = None
        """Made for the first task to score, because most engines never see one."""
        self._progress = 0
        self._failures = 0
        self._broken: str | None = None
        self._closing = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> int:
        return self._max_sequences

    @property
    def policy_version(self) -> int:
        return self._decoder.version

    @property
    def progress(self) -> int:
        return self._progress

    @property
    def broken(self) -> str | None:
        return self._broken

    async def generate(
        self, task: GenerateTask, finished: Callable[[int], None] | None = None
    ) -> GroupSamples:
        """Sample `task.n` completions; `finished(k)` is called in the loop whenever k more
        sequences have ended."""
        self._refuse_if_broken()
        prompt_ids = self._tokenizer.encode(task.prompt)
        budget = budget_of(task, prompt_ids, self._vocabulary, self._max_length)
        media = task.prompt.media
        pictures = await asyncio.to_thread(self._look, prompt_ids, media) if media else None
        job = SampleJob(task, prompt_ids, budget, finished or _ignore, pictures)
        completions = await self._outcome(job, self._waiting)
        texts = self._tokenizer.decode(
            [completion.token_ids for completion in completions], task.prompt.start
        )
        media_tokens = [] if pictures is None else pictures.media_tokens
        return group_samples(prompt_ids, completions, texts, media_tokens)

    async def score(self, task: ScoreTask) -> TokenScores:
        """The model's most probable tokens at each token of the responses, at the temperature of
        the task."""
        self._refuse_if_broken()
        check_scorable(task, self._vocabulary, self._max_length)
        scores: TokenScores = await self._outcome(ScoreJob(task), self._scoring)
        return scores

    async def load_policy(self, manifest: PolicyManifest) -> str:
        """Verify in a helper thread while sampling goes on, then copy between two tokens.

        Raises PublicationRefused, or EngineError if the copy got half-way: then the engine is
        broken.
        """
        self._refuse_if_broken()
        pairs = await asyncio.to_thread(shared_memory.match, self._model, manifest)
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[str] = loop.create_future()
        self._commands.put(lambda: self._load(pairs, manifest, loop, loaded))
        return await loaded

    async def close(self) -> None:
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    async def _outcome(self, job: AnyJob, line: deque[AnyJob]) -> Any:
        """Hand a job over to the decode thread and wait for it; a cancellation takes it back."""
        self._commands.put(lambda: self._take_on(job, line))
        try:
            return await job.future
        except asyncio.CancelledError:
            self._commands.put(lambda: self._cancel(job))
            raise

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            raise EngineError(self._broken, retryable=True)

    def _look(self, prompt_ids: np.ndarray, media: Sequence[Media]) -> SeenPrompt:
        """Read the pictures and videos of a prompt. Raises EngineError if a file is not what was
        referred to, UserError if the model's folder cannot show any."""
        assert self._tower is not None, "a prompt with pictures has been encoded"
        try:
            seen = self._tower.seen(prompt_ids, media)
            assert seen is not None
            if int(prompt_ids[-1]) in self._tower.layout.marks:
                raise ValueError("the prompt ends with a picture")
            return replace(seen, pixels=tuple(map(self._tower.pixels, seen.views)))
        except UserError:
            raise
        except (PictureError, ValueError) as error:
            raise EngineError(str(error), retryable=False) from error

    # ---- the decode thread -----------------------------------------------------------------------

    def _run(self) -> None:
        """The decode loop.

        Consumes: commands of the asyncio side. Produces: completions and scores, posted back to
        each caller's loop. Waits for: a command, and only while there is no work. Is unblocked by:
        `generate`, `score`, `load_policy`, `close`.
        """
        torch.set_num_threads(self._threads)  # OpenMP counts threads per thread
        with torch.inference_mode():
            while not self._closing:
                try:
                    self._take_commands()
                    self._advance()
                    self._score()
                except Exception as error:
                    self._fail_all(error)
        self._abandon(EngineError("the engine was closed", retryable=True))

    def _take_commands(self) -> None:
        idle = not (self._decoder.running or self._waiting or self._scoring)
        while idle or not self._commands.empty():
            self._commands.get()()
            idle = False

    def _take_on(self, job: AnyJob, line: deque[AnyJob]) -> None:
        if self._broken is not None:
            job.fail(EngineError(self._broken, retryable=True))
            return
        self._unsettled[job] = None
        line.append(job)

    def _advance(self) -> None:
        self._admit()
        if not self._decoder.running:
            return
        rows = len(self._decoder.running)
        ended = self._decoder.step()
        self._progress += rows
        self._failures = 0
        if ended:
            self._hand_back(ended)

    def _score(self) -> None:
        """One forward pass for the oldest task to score. If it fails, that task alone is given
        back."""
        while self._scoring and self._scoring[0].settled:
            self._scoring.popleft()
        if not self._scoring:
            return
        job = self._scoring[0]
        try:
            self._scorer = self._scorer or Scorer(self._model, self._where, self._tower)
            self._progress += job.advance(self._scorer)
            self._failures = 0
        except (EngineError, UserError) as error:
            job.fail(error)
        except Exception as error:
            log.exception("task %s cannot be scored", job.task.task_id)
            job.fail(self._failure(error))
        if job.settled:
            self._unsettled.pop(job, None)

    def _admit(self) -> None:
        """Fill free slots from the waiting groups, first come first served; a group may come in
        parts."""
        groups: list[list[Running]] = []
        free = self._decoder.free
        while free and self._waiting:
            job = self._waiting[0]
            members = [] if job.settled else job.next_members(free)
            if members:
                groups.append(members)
                free -= len(members)
            if job.settled or job.admitted == job.task.n:
                self._waiting.popleft()
        if groups:
            self._decoder.admit(groups)

    def _hand_back(self, ended: list[Ended]) -> None:
        for sequence, completion in ended:
            sequence.owner.add(sequence.index, completion)
            if sequence.owner.settled:
                self._unsettled.pop(sequence.owner, None)
        if any(sequence.owner.settled for sequence, _ in ended):
            self._decoder.drop(lambda sequence: sequence.owner.settled)

    def _cancel(self, job: Job) -> None:
        job.settled = True
        self._unsettled.pop(job, None)
        self._decoder.drop(lambda sequence: sequence.owner is job)

    def _load(
        self,
        pairs: shared_memory.Pairs,
        manifest: PolicyManifest,
        loop: asyncio.AbstractEventLoop,
        done: asyncio.Future[str],
    ) -> None:
        """Copy and answer. A copy that fails breaks the engine: its weights may be of two
        versions."""
        if self._broken is not None:
            post(loop, resolve, done, EngineError(self._broken, retryable=True))
            return
        try:
            shared_memory.copy(pairs)
            self._renew_tower(manifest)
            self._decoder.set_version(manifest.version)
        except Exception as error:
            self._broken = (
                f"loading policy version {manifest.version} failed half-way: {_sentence(error)}"[
                    :2000
                ]
            )
            post(loop, resolve, done, EngineError(self._broken, retryable=True))
            raise
        post(loop, resolve, done, manifest.digest)

    def _renew_tower(self, manifest: PolicyManifest) -> None:
        """What was made of pictures is right as long as the tower's tensors are the same ones, by
        their digests, whether the run trains it or not."""
        if self._tower is not None:
            self._tower.renew(
                tuple(one.digest for one in manifest.tensors if one.name in self._tower_names)
            )

    def _stop(self) -> None:
        self._closing = True

    def _fail_all(self, error: Exception) -> None:
        """Give every task back with the reason and start afresh."""
        log.exception(
            "the decode loop failed with %d sequences running", len(self._decoder.running)
        )
        self._abandon(self._failure(error))

    def _failure(self, error: Exception) -> EngineError:
        """Count a failure, and say what those who wait are told; too many in a row break the
        engine."""
        reason = self._reason(error)
        self._failures += 1
        if self._broken is None and self._failures >= FAILURES_IN_A_ROW:
            self._broken = (
                f"the engine failed {self._failures} times in a row; the last time: {reason}"
            )
        return EngineError(self._broken or reason, retryable=True)

    def _abandon(self, error: EngineError) -> None:
        """Settle every unsettled job, then forget what ran; in this order, as a lost device can do
        the first only."""
        jobs, self._unsettled = self._unsettled, {}
        self._waiting.clear()
        self._scoring.clear()
        for job in jobs:
            job.fail(error)
        try:
            self._decoder.reset()
        except Exception as fault:
            log.exception("the decoder cannot be reset")
            self._broken = self._broken or f"the decoder cannot be reset: {_sentence(fault)}"

    def _reason(self, error: Exception) -> str:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return (
                f"out of memory with up to {self._max_sequences} sequences of up to "
                f"{self._max_length} tokens; "
                "lower engine_args max_sequences or max_length"
            )
        return _sentence(error)


def _ignore(count: int) -> None:
    """The caller does not want to know about single sequences."""


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
