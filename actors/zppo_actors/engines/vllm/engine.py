"""The engine on vLLM: continuous batching in a process of its own, on CPUs and GPUs, with weight
updates in flight.

Token ids go in and come out, vLLM tokenises nothing. Every sequence of a group is a request of its
own, so that it can end alone; they share the key-value blocks of their prompt through vLLM's prefix
cache. Three rules are kept here:

- log-probs are those of the distribution that was sampled (`processed_logprobs`: after temperature,
  min-p, top-k and top-p), and what it leaves of the vocabulary can be read from them;
- a publication is verified and laid out in the workers while sampling goes on, and only a whole one
  pauses it; running sequences are kept, and every token carries the version that sampled it;
- cached keys and values of a prompt are shared only among requests that came in under the same
  policy version;
- new weights leave what sees pictures as it was (`zppo.training.loading.freeze_tower`), so what it
  has made of a picture stays right in vLLM's caches.

When the engine core is gone, or a load failed half-way, the engine is broken for good and its actor
must leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from zppo.plan.engines.vllm import KV_POLICY, KvPolicy
from zppo.prompting.picture_families import unsampled_ids
from zppo_actors.engines.base import EngineError, EngineSpec
from zppo_actors.engines.sequences import Completion, budget_of, group_samples
from zppo_actors.engines.tokenization import PromptTokenizer
from zppo_actors.engines.vllm.media import PictureTokenizer, takes_pictures
from zppo_actors.engines.vllm.publication import (
    PREPARING,
    READY,
    Layout,
    Update,
    read_layout,
    verify,
)
from zppo_actors.engines.vllm.score import score
from zppo_actors.engines.vllm.start import TokenCounter, arguments_of, start
from zppo_actors.weights import PublicationRefused
from zppo_protocol.messages import GenerateTask, ScoreTask
from zppo_protocol.samples import GroupSamples, TokenScores
from zppo_protocol.values import FROZEN, PolicyManifest

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger("zppo.engine")

TEXT_ONLY = "the model takes text only, but the prompt has pictures or videos"
SINGLE = (
    "the prompt has a single token, of which vLLM's engine core dies on a CPU where layers are "
    "recurrent"
)
DEAD = "the engine core of vLLM has died"
CLOSE_SECONDS = 2.0
"""How long vLLM may take to end its processes by itself; whatever is left then is killed."""
LEAST_BIAS = -100.0
"""What vLLM adds at the least to a logit, before the temperature t: of such a token's odds
e^(-100/t) is left, which is 4e-44 at 1 and 2e-22 at 2."""
POLL_SECONDS = 0.02
"""How often the workers are asked whether an update is ready; each time costs the engine core a
moment."""
PULSE_SECONDS = 0.2
"""How often a waiting call looks whether the engine core still lives."""

Outcome = TypeVar("Outcome")


def create(spec: EngineSpec) -> VllmEngine:
    """Start vLLM for the model of `spec`. Raises UserError for arguments or a model that it cannot
    take."""
    arguments = arguments_of(spec)
    folder, where = spec.served.model.model, spec.served.model_path
    tokenizer = (PictureTokenizer if takes_pictures(folder) else PromptTokenizer)(folder, where)
    layout = (
        read_layout(folder, spec.served.model.dtype, where)
        if spec.served.role == "rollout"
        else None
    )
    llm = start(arguments, spec, counter := TokenCounter())
    return VllmEngine(
        llm, tokenizer, layout, counter, spec.served.actor.engine_args.get(KV_POLICY, "keep")
    )


class LoadSeconds(NamedTuple):
    """What one load of a policy took. Sampling goes on in the first three parts: `drained` ends the
    step in flight."""

    verified: float
    prepared: float
    drained: float
    stopped: float


class VllmEngine:
    """See the module. `close` must be awaited to end vLLM's processes."""

    def __init__(
        self,
        llm: AsyncLLM,
        tokenizer: PromptTokenizer,
        layout: Layout | None,
        counter: TokenCounter,
        kv_policy: KvPolicy,
    ) -> None:
        """`layout` is what publications must have, None for a model that stays as it is; `counter`
        counts for `llm`."""
        config = llm.vllm_config
        self._llm = llm
        self._tokenizer = tokenizer
        self._layout = layout
        self._counter = counter
        self._kv_policy = kv_policy
        self._max_length = int(config.model_config.max_model_len)
        self._vocabulary = int(config.model_config.get_vocab_size())
        unsampled = unsampled_ids(config.model_config.hf_config.to_dict())
        self._left_out = dict.fromkeys(unsampled, LEAST_BIAS)
        self._max_sequences = int(config.scheduler_config.max_num_seqs)
        on_cpu = config.device_config.device_type == "cpu"
        self._least_length = 2 if on_cpu and config.model_config.is_hybrid else 1
        self._numbers = itertools.count()
        self._version = FROZEN
        self._broken: str | None = None
        self._loading = asyncio.Lock()
        self.last_load: LoadSeconds | None = None

    @property
    def capacity(self) -> int:
        return self._max_sequences

    @property
    def policy_version(self) -> int:
        return self._version

    @property
    def progress(self) -> int:
        return self._counter.tokens

    @property
    def broken(self) -> str | None:
        if self._broken is None and self._llm.errored:
            self._broken = DEAD
        return self._broken

    async def generate(
        self, task: GenerateTask, finished: Callable[[int], None] | None = None
    ) -> GroupSamples:
        """Sample `task.n` completions; `finished(1)` is called in the loop whenever one of them has
        ended."""
        self._refuse_if_broken()
        prompt_ids = self._tokenizer.encode(task.prompt)
        self._refuse_single(prompt_ids)
        budget = budget_of(task, prompt_ids, self._vocabulary, self._max_length)
        # The salt is the newest version that is loaded for sure: nothing older than it can lie
        # under it.
        prompt = {"prompt_token_ids": prompt_ids.tolist(), "cache_salt": f"policy-{self._version}"}
        prompt, tokens = await self._with_pictures(task, prompt)
        members = [
            self._sample(task, index, budget, prompt, finished or _ignore)
            for index in range(task.n)
        ]
        samples = await self._while_alive(_all(members))
        completions = [completion for _, completion in samples]
        texts = self._tokenizer.decode(
            [completion.token_ids for completion in completions], task.prompt.start
        )
        return group_samples(samples[0][0], completions, texts, tokens)

    async def score(self, task: ScoreTask) -> TokenScores:
        """The model's most probable tokens at each token of the responses; see `vllm_score`."""
        self._refuse_if_broken()
        self._refuse_single(task.prompt_ids)
        return await self._while_alive(score(self._llm, task, self._counter, self._failure))

    async def load_policy(self, manifest: PolicyManifest) -> str:
        """Verify in a helper thread while sampling goes on, then pause, load and resume; running
        sequences are kept."""
        if self._layout is None:
            raise PublicationRefused(manifest, "a teacher keeps its weights")
        async with self._loading:
            clock = [time.perf_counter()]
            update = await asyncio.to_thread(verify, self._layout, manifest)
            clock.append(time.perf_counter())
            self._refuse_if_broken()
            for part in (self._prepare, self._pause, self._swap):
                with self._breaking(manifest.version):
                    await self._while_alive(part(update))
                clock.append(time.perf_counter())
        self.last_load = LoadSeconds(*(end - begin for begin, end in itertools.pairwise(clock)))
        message = (
            "policy version %d: verified in %.3f s, prepared in %.3f s, step ended in %.3f s, "
            "stopped for %.3f s"
        )
        log.info(message, manifest.version, *self.last_load)
        return manifest.digest

    async def close(self) -> None:
        await asyncio.to_thread(self._llm.shutdown, CLOSE_SECONDS)

    # ---- sampling --------------------------------------------------------------------------------

    def _refuse_single(self, prompt_ids: np.ndarray) -> None:
        if len(prompt_ids) < self._least_length:
            raise EngineError(SINGLE, retryable=False)

    async def _with_pictures(
        self, task: GenerateTask, prompt: dict[str, Any]
    ) -> tuple[dict[str, Any], list[int]]:
        """The prompt as vLLM's processor lays it out with its pictures, once for the whole group,
        and the tokens of each picture or video. Raises EngineError if they cannot be shown or
        read."""
        media = task.prompt.media
        if not media:
            return prompt, []
        if not isinstance(self._tokenizer, PictureTokenizer):
            raise EngineError(TEXT_ONLY, retryable=False)
        shown = self._tokenizer.shown
        prompt |= await asyncio.to_thread(shown.open, media)
        try:
            [rendered] = await self._llm.renderer.render_cmpl_async([prompt])
        except Exception as error:
            raise self._failure(error) from error
        found = {
            kind: [place.get_num_embeds() for place in places]
            for kind, places in rendered["mm_placeholders"].items()
        }
        return rendered, shown.tokens(media, found)

    async def _sample(
        self,
        task: GenerateTask,
        index: int,
        budget: int,
        prompt: dict[str, Any],
        finished: Callable[[int], None],
    ) -> tuple[np.ndarray, Completion]:
        """Sample one sequence; returns the prompt as the model read it, and the response.

        Raises EngineError; a cancellation takes the sequence out of vLLM.
        """
        request_id = f"{task.task_id}/{index}/{next(self._numbers)}"  # the same task may come twice
        params = self._parameters(task, index, budget)
        # A generator that is left early would abort its request only when it is collected.
        outputs = self._llm.generate(prompt, params, request_id)  # type: ignore[arg-type, unused-ignore]
        try:
            last: RequestOutput | None = None
            async for output in outputs:
                last = output
        except Exception as error:
            raise self._failure(error) from error
        finally:
            await outputs.aclose()
        finished(1)
        if last is None:
            raise EngineError("vLLM ended a sequence with nothing", retryable=True)
        completion = read_completion(last.outputs[0], task.support_limit)
        return np.asarray(last.prompt_token_ids, dtype=np.int32), completion

    def _parameters(self, task: GenerateTask, index: int, budget: int) -> SamplingParams:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = task.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            max_tokens=budget,
            seed=sequence_seed(task.seed, index),
            # 0: of the sampled token alone. Else those of the whole support, and -inf behind it.
            logprobs=min(task.support_limit, self._vocabulary),
            flat_logprobs=True,
            stop_token_ids=sorted(self._tokenizer.end_ids),
            logit_bias=self._left_out or None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _failure(self, error: Exception) -> EngineError:
        """What an exception of vLLM means for the task."""
        if self.broken is not None:
            return EngineError(self._broken or DEAD, retryable=True)
        from vllm.exceptions import VLLMClientError

        cause = error.__cause__ or error
        retryable = not isinstance(cause, (ValueError, VLLMClientError))
        return EngineError(f"{type(cause).__name__}: {cause}"[:2000], retryable=retryable)

    # ---- weights ---------------------------------------------------------------------------------

    async def _prepare(self, update: Update) -> None:
        """Let every worker lay the new weights out. Raises PublicationRefused with the old ones
        serving if one cannot."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update.to_payload()))
        while PREPARING in (states := await self._llm.collective_rpc("zppo_preparation")):
            await asyncio.sleep(POLL_SECONDS)
        if problems := [state for state in states if state != READY]:
            await self._llm.finish_weight_update()
            raise PublicationRefused(update.manifest, problems[0])

    async def _pause(self, update: Update) -> None:
        """Let the step in flight end, and begin no other."""
        # `pause_generation` is this and a pause of 20 ms, after which a caller has seen the last
        # tokens: no need here.
        await self._llm.engine_core.pause_scheduler_async(
            mode="keep", clear_cache=self._kv_policy == "recompute"
        )

    async def _swap(self, update: Update) -> None:
        """Put the new weights in place and go on."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest())
        await self._llm.finish_weight_update(str(update.manifest.version))
        self._version = update.manifest.version
        await self._llm.resume_generation()

    @contextlib.contextmanager
    def _breaking(self, version: int) -> Iterator[None]:
        """What vLLM raises in an update may have left a mixture of weights: the engine is broken
        then."""
        try:
            yield
        except (EngineError, PublicationRefused):
            raise
        except Exception as error:
            self._broken = f"loading policy version {version} failed half-way: {error}"[:2000]
            raise EngineError(self._broken, retryable=True) from error

    # ---- life ------------------------------------------------------------------------------------

    def _refuse_if_broken(self) -> None:
        if self.broken is not None:
            raise EngineError(self._broken or DEAD, retryable=True)

    async def _while_alive(self, work: Awaitable[Outcome]) -> Outcome:
        """Await `work`, but no longer than the engine core lives: vLLM leaves some calls of a dead
        core unanswered."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=PULSE_SECONDS)
                if not task.done():
                    self._refuse_if_broken()
            return task.result()
        finally:
            task.cancel()


def sequence_seed(seed: int, index: int) -> int:
    """A seed for one sequence of a group, in the range that vLLM takes; groups of neighbouring
    seeds share none."""
    low, high = np.random.SeedSequence([seed, index]).generate_state(2, np.uint32)
    return int(low) | (int(high) >> 1) << 32


def read_completion(output: CompletionOutput, support_limit: int = 0) -> Completion:
    """Take tokens, log-probs, supports, versions and the reason to end out of vLLM's answer. Raises
    EngineError if one is odd."""
    if output.finish_reason not in ("stop", "length"):
        raise EngineError(
            f"vLLM ended a sequence with finish reason {output.finish_reason!r}", retryable=True
        )
    token_ids = np.asarray(output.token_ids, dtype=np.int32)
    # Flat log-probs hold one or more entries a position; the sampled token's is the first.
    flat: Any = output.logprobs
    starts = np.asarray(flat.start_indices, dtype=np.int64)
    log_probs = np.asarray(flat.logprobs, dtype=np.float32)[starts]
    if len(log_probs) != len(token_ids) or not np.isfinite(log_probs).all():
        raise EngineError(
            "the model gives probabilities that are not finite numbers", retryable=True
        )
    support = None
    if support_limit:
        log_probs, support = read_support(flat, len(token_ids), support_limit)
    spans = [
        (span.end - span.start, read_version(span.version)) for span in output.weight_versions or ()
    ]
    return Completion(token_ids, log_probs, spans, output.finish_reason, support)


def read_support(flat: Any, tokens: int, limit: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Log-probs [T] and the support of each token out of vLLM's most probable ones.

    What cannot be sampled has -inf. On a CPU vLLM's top-k keeps every token that is as probable as
    the last one, so a support may be larger than the limit. The least probable ones are then left
    out, the sampled one never, and the log-prob is that of the distribution over the rest.
    """
    ids_TK = np.asarray(flat.token_ids, dtype=np.int32).reshape(tokens, -1)
    log_probs_TK = np.asarray(flat.logprobs, dtype=np.float64).reshape(tokens, -1)
    inside_TK = log_probs_TK > -np.inf
    # The sampled token stands first, and mostly once more among the most probable ones.
    inside_TK[:, 1:] &= ids_TK[:, 1:] != ids_TK[:, :1]
    inside_TK &= np.cumsum(inside_TK, axis=1) <= limit
    total_T = np.log(np.where(inside_TK, np.exp(log_probs_TK), 0.0).sum(axis=1))
    rows = np.split(ids_TK[inside_TK], np.cumsum(inside_TK.sum(axis=1))[:-1])
    # A rounding error must not put a token that was sure to be sampled above 1.
    log_probs_T = np.minimum(log_probs_TK[:, 0] - total_T, 0.0)
    return log_probs_T.astype(np.float32), rows


def read_version(label: str) -> int:
    """The policy version of vLLM's label for its weights; weights that were never updated are
    frozen ones."""
    return int(label) if label.isdigit() else FROZEN


async def _all(coroutines: list[Coroutine[Any, Any, Outcome]]) -> list[Outcome]:
    """Await all of them; the first failure cancels the others and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _ignore(count: int) -> None:
    """The caller does not want to know about single sequences."""
