"""Scoring given tokens with vLLM: the log-probs that it reports of a prompt, and of one token
behind it.

A request holds the prompt and all tokens of a response but the last. The prompt log-probs are what
the model thinks at these tokens; what it thinks at the last one are the log-probs of the token that
vLLM samples behind them, and which nobody reads. vLLM takes no temperature for prompt log-probs, so
the temperature must be 1.

Legend: n tokens of one response, K most probable tokens.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from zppo_actors.engines.base import EngineError
from zppo_actors.engines.score_tasks import ScoreTable, check_scorable
from zppo_actors.engines.vllm.start import TokenCounter
from zppo_protocol.messages import ScoreTask
from zppo_protocol.samples import TokenScores

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

NUMBERS = itertools.count()
"""The same task may come twice, but a request's name must not."""


async def score(
    llm: AsyncLLM,
    task: ScoreTask,
    counter: TokenCounter,
    failure: Callable[[Exception], EngineError],
) -> TokenScores:
    """The scores of a task; `failure` says what an exception of vLLM means for it. Raises
    EngineError."""
    model = llm.vllm_config.model_config
    vocabulary = int(model.get_vocab_size())
    check_scorable(task, vocabulary, int(model.max_model_len))
    table = ScoreTable(task, vocabulary)
    _check_request(task, table.width, int(model.max_logprobs))
    try:
        async with asyncio.TaskGroup() as requests:
            for index in np.flatnonzero(np.diff(task.offsets)).tolist():
                requests.create_task(_score_one(llm, task, index, table, counter, failure))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return table.scores()


def _check_request(task: ScoreTask, width: int, most: int) -> None:
    if task.media:
        reason = (
            "vLLM scores responses to text alone, and the prompt has pictures or videos; the "
            "engine 'transformers' scores both"
        )
        raise EngineError(reason, retryable=False)
    if task.temperature != 1.0:
        reason = (
            f"vLLM scores at temperature 1 only, not at {task.temperature:g}; the engine "
            "'transformers' does at any"
        )
        raise EngineError(reason, retryable=False)
    if 0 <= most < width:
        reason = (
            f"vLLM gives at most {most} tokens a position, not {width}; raise engine_args "
            "max_logprobs"
        )
        raise EngineError(reason, retryable=False)


async def _score_one(
    llm: AsyncLLM,
    task: ScoreTask,
    index: int,
    table: ScoreTable,
    counter: TokenCounter,
    failure: Callable[[Exception], EngineError],
) -> None:
    """Fill the rows of one response. A cancellation takes the request out of vLLM."""
    response = task.token_ids[task.offsets[index] : task.offsets[index + 1]]
    prompt = {"prompt_token_ids": [*task.prompt_ids.tolist(), *response[:-1].tolist()]}
    request_id = f"{task.task_id}/score/{index}/{next(NUMBERS)}"
    outputs = llm.generate(prompt, _parameters(table.width), request_id)  # type: ignore[arg-type, unused-ignore]
    last: RequestOutput | None = None
    try:
        async for output in outputs:
            last = output
    except Exception as error:
        raise failure(error) from error
    finally:
        await outputs.aclose()
    table.put(index, *read_scores(last, len(response), table.width))
    counter.tokens += len(response)


def _parameters(width: int) -> SamplingParams:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=1,
        logprobs=width,
        prompt_logprobs=width,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def read_scores(
    output: RequestOutput | None, length: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs [n, K] of the last `length` positions of vLLM's answer. Raises EngineError
    if it has fewer."""
    if output is None or not output.outputs or output.outputs[0].logprobs is None:
        raise EngineError("vLLM ended a request without log-probs", retryable=True)
    parts = [_positions(output.outputs[0].logprobs, 1, width)]
    if length > 1:
        parts.insert(0, _positions(output.prompt_logprobs, length - 1, width))
    ids_nK, log_probs_nK = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return ids_nK, log_probs_nK


def _positions(flat: Any, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `count` positions of flat log-probs; of each the given token comes first, then the K
    most probable."""
    starts = np.asarray(flat.start_indices[-count:], dtype=np.int64)
    if len(starts) < count or (np.asarray(flat.end_indices[-count:]) - starts != width + 1).any():
        raise EngineError("vLLM ended a request with too few log-probs", retryable=True)
    picked = starts[:, None] + 1 + np.arange(width)
    return np.asarray(flat.token_ids)[picked], np.asarray(flat.logprobs, dtype=np.float32)[picked]
