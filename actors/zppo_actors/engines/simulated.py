"""Scripted answers and latencies: an engine without a model, for tests, simulations and trying out
a topology.

The script (JSON, `engine_args.script`) says per question how often the answer is right and how long
it takes: `{"default": {…}, "questions": {"3 * 17": {"answer": "5", "accuracy": 0.25,
"accuracy_bcq": 0.5, "wrong": ["7", "9"], "tokens": 12}}, "seconds_per_token": 0.0}`. A question
entry applies to prompts that contain its key; the longest key wins. Everything follows from the
task's seed. Token ids are numbers below 16, log-probs those of a uniform choice; where supports are
asked for, the choice is among as many of the lowest ids as top-k and top-p leave (min-p leaves
all). Asked for scores, it holds each given token for the most probable one, and each of the 15
after it for half as probable as the one before.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from zppo.errors import UserError, nearest
from zppo.plan.engines.own import SimulatedArguments, convert_arguments
from zppo_actors.engines.base import EngineError, EngineSpec
from zppo_actors.engines.sequences import Completion, group_samples
from zppo_protocol.messages import GenerateTask, ScoreTask
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.values import FROZEN, PolicyManifest, ResponseStart, share_of

VOCABULARY = 16
BOX = re.compile(r"\\boxed\{\s*([^{}]*[^{}\s])\s*\}")

Share = Annotated[float, Meta(ge=0.0, le=1.0)]


class Behaviour(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one question is answered. `accuracies` holds the `accuracy_KIND` keys; `fail` and `hang`
    are faults."""

    answer: str = "1"
    accuracy: Share = 0.5
    accuracies: dict[str, Share] = {}
    wrong: tuple[str, ...] = ("0",)
    tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 8
    fail: str | None = None
    """Reason of a failure that comes instead of an answer."""
    hang: bool = False
    """Never answer and make no progress."""

    def share_right(self, kind: str) -> float:
        return self.accuracies.get(kind, self.accuracy)


class Script(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    default: Behaviour = Behaviour()
    questions: dict[str, Behaviour] = {}
    seconds_per_token: Annotated[float, Meta(ge=0.0, le=3600.0)] = 0.0

    def behaviour(self, text: str) -> Behaviour:
        """The entry of the longest key that the prompt contains."""
        found = max((key for key in self.questions if key in text), key=len, default=None)
        return self.default if found is None else self.questions[found]


def create(spec: EngineSpec) -> SimulatedEngine:
    """Read the script. Raises UserError naming the file, the key and the nearest valid one."""
    arguments = convert_arguments(
        spec.served.actor.engine_args, SimulatedArguments, spec.served.actor_path
    )
    where = f"{spec.served.actor_path}.engine_args.script"
    script = Script() if arguments.script is None else read_script(Path(arguments.script), where)
    return SimulatedEngine(script, arguments.max_sequences)


def read_script(path: Path, where: str) -> Script:
    """Read a script file. Raises UserError."""
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
        return msgspec.convert(_with_accuracies(raw, f"{where}: {path}"), Script)
    except OSError as error:
        raise UserError(f"{where}: cannot read {str(path)!r} ({error.strerror})") from error
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise UserError(
            f"{where}: {str(path)!r} is not a script of the simulated engine: {error}"
        ) from error


class SimulatedEngine:
    """Answers from a script; it holds no weights but checks and stamps every policy version as a
    real engine does."""

    def __init__(self, script: Script, max_sequences: int) -> None:
        self._script = script
        self._max_sequences = max_sequences
        self._version = FROZEN
        self._progress = 0

    @property
    def capacity(self) -> int:
        return self._max_sequences

    @property
    def policy_version(self) -> int:
        return self._version

    @property
    def progress(self) -> int:
        return self._progress

    @property
    def broken(self) -> str | None:
        return None

    async def generate(
        self, task: GenerateTask, finished: Callable[[int], None] | None = None
    ) -> GroupSamples:
        text = "\n".join(message.content for message in task.prompt.messages)
        behaviour = self._script.behaviour(text)
        if behaviour.fail is not None:
            raise EngineError(behaviour.fail, retryable=True)
        if behaviour.hang:
            await asyncio.get_running_loop().create_future()
        tokens = min(behaviour.tokens, task.sampling.max_new_tokens)
        spans = await self._pass_time(task.n, tokens)
        if finished is not None:
            finished(task.n)
        reason = "stop" if tokens == behaviour.tokens else "length"
        choices = _choices(task)
        ids = np.random.default_rng(task.seed).integers(
            0, choices, size=(task.n, tokens), dtype=np.int32
        )
        log_probs = np.full(tokens, -np.log(choices), dtype=np.float32)
        support = [np.arange(choices, dtype=np.int32)] * tokens if task.with_support else None
        completions = [
            Completion(ids[i], log_probs, spans, reason, support)  # type: ignore[arg-type]
            for i in range(task.n)
        ]
        start = _start(task.prompt.start)
        texts = [start + sampled for sampled in self._texts(task, text, behaviour)]
        return group_samples(_prompt_ids(text + start), completions, texts)

    async def score(self, task: ScoreTask) -> TokenScores:
        """See the module; takes the time of one token, as all responses are read at once."""
        await asyncio.sleep(self._script.seconds_per_token)
        self._progress += len(task.token_ids)
        tokens, width = len(task.token_ids), min(task.top_k, VOCABULARY)
        ids_TK = (task.token_ids[:, None] + np.arange(width, dtype=np.int32)) % VOCABULARY
        log_probs_K = -np.log(2.0) * np.arange(width) / task.temperature - _normaliser(
            task.temperature
        )
        log_probs_TK = np.broadcast_to(log_probs_K, (tokens, width))
        return TokenScores(
            token_ids=ids_TK.astype(np.int32), log_probs=log_probs_TK.astype(np.float32)
        )

    async def load_policy(self, manifest: PolicyManifest) -> str:
        """Verify the file as a real engine would, then serve under its version."""
        from zppo_actors.weights import (
            shared_memory,
        )  # only here, so that a run without weights needs no torch

        await asyncio.to_thread(shared_memory.open_policy, manifest)
        self._version = manifest.version
        return manifest.digest

    async def close(self) -> None:
        """Nothing to free."""

    async def _pass_time(self, sequences: int, tokens: int) -> list[tuple[int, int]]:
        """Let the tokens of all sequences tick by; returns the spans of the versions that were
        serving meanwhile."""
        spans: list[tuple[int, int]] = []
        for _ in range(tokens):
            if self._script.seconds_per_token > 0.0:
                await asyncio.sleep(self._script.seconds_per_token)
            if spans and spans[-1][1] == self._version:
                spans[-1] = (spans[-1][0] + 1, self._version)
            else:
                spans.append((1, self._version))
            self._progress += sequences
        return spans

    def _texts(self, task: GenerateTask, text: str, behaviour: Behaviour) -> list[str]:
        if task.kind == "compress":
            return [_compressed(text)] * task.n
        return [
            self._text(random.Random(f"{task.seed}/{i}"), task.kind, behaviour)
            for i in range(task.n)
        ]

    def _text(self, numbers: random.Random, kind: str, behaviour: Behaviour) -> str:
        right = numbers.random() < behaviour.share_right(kind)
        answer = behaviour.answer if right else numbers.choice(behaviour.wrong or ("",))
        return f"The answer is \\boxed{{{answer}}}"


def _choices(task: GenerateTask) -> int:
    """How many tokens are chosen among: all, unless their support is asked for."""
    if not task.with_support:
        return VOCABULARY
    most = min(task.sampling.top_k, VOCABULARY)
    return max(1, math.ceil(most * task.sampling.top_p - 1e-9))


def _compressed(text: str) -> str:
    """A faithful compression keeps the last answer of the text, right or wrong."""
    boxes = BOX.findall(text)
    return f"In short: \\boxed{{{boxes[-1]}}}" if boxes else "In short: no answer"


def _start(start: ResponseStart | None) -> str:
    """The given share of the start's tokens, one per byte; half a character is none."""
    if start is None:
        return ""
    text = start.text.encode()
    return text[: share_of(start.share, len(text))].decode(errors="ignore")


def _normaliser(temperature: float) -> float:
    """Logarithm of the sum of the 16 halving weights at this temperature."""
    return float(np.log(np.exp2(-np.arange(VOCABULARY) / temperature).sum()))


def _prompt_ids(text: str) -> np.ndarray:
    """Token ids [P] int32, one per byte, the same for the same prompt."""
    return np.frombuffer(text.encode() or b"\0", dtype=np.uint8).astype(np.int32) % VOCABULARY


def _with_accuracies(raw: dict[str, object], where: str) -> dict[str, object]:
    """Gather the `accuracy_KIND` keys of every behaviour, and check the names of the others."""
    changed = dict(raw)
    if isinstance(default := raw.get("default"), dict):
        changed["default"] = _behaviour(default, f"{where}, default")
    if isinstance(questions := raw.get("questions"), dict):
        changed["questions"] = {
            key: _behaviour(value, f"{where}, question {key!r}")
            if isinstance(value, dict)
            else value
            for key, value in questions.items()
        }
    return changed


def _behaviour(raw: dict[str, object], where: str) -> dict[str, object]:
    prefix = "accuracy_"
    known = Behaviour.__struct_fields__
    for key in raw:
        if key not in known and not key.startswith(prefix):
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    accuracies = {
        key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)
    }
    return {
        **{key: value for key, value in raw.items() if not key.startswith(prefix)},
        "accuracies": accuracies,
    }
