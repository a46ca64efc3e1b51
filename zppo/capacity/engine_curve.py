"""The speed of an engine, from what it did: jobs with their begin and end, and the lengths of the
responses that were sampled in them.

All running sequences of an engine advance by one token in each token step, so a job whose longest
response has M tokens lasted M + `prompt_steps` of them, however many sequences ran beside it. With
T_k the time in which k-many ran and r_k the token steps a second then, that is
M + prompt_steps = sum over k of T_k r_k: one equation a job, solved for positive r by the iteration
of Richardson (1972) and Lucy (1974). Nothing is assumed of the curve but that more sequences never
make a step shorter, nor a token dearer.

Shape legend: J jobs, E moments at which the number of running sequences changes, K points of the
curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zppo.simulation import Curve, Engines

POINTS = 8
"""of a curve, at most"""
ROUNDS = 40
"""Curve and prompt steps are estimated in turns."""
TRACES = 4
"""So often is worked out who ran when, with the curve found before."""
LEAST = 0.5
"""With fewer sequences nothing runs: merged jobs count as their mean over time."""
MOST_PROMPT_STEPS = 1e4


class Job(NamedTuple):
    """A group in an engine, in seconds of one clock. `lengths` are empty where they are unknown;
    `size` is how many sequences ran in it, on the average of the time."""

    begin: float
    end: float
    size: float
    lengths: tuple[int, ...] = ()


class EngineRecord(NamedTuple):
    """What one engine did. It stood still in `loads`, (begin, end)."""

    jobs: list[Job]
    loads: list[tuple[float, float]]


class _Equations(NamedTuple):
    """The jobs of known lengths."""

    seconds_JK: np.ndarray
    """in which so many ran and the engine did not stand still; time between two points belongs to
    both"""
    longest_J: np.ndarray


class _Trace(NamedTuple):
    """How many sequences an engine ran from each moment on, and how many token steps it had made
    until then; what was in those steps is where shorter responses of a job ended."""

    times_E: np.ndarray
    running_E: np.ndarray
    places_E: np.ndarray


def engines_of(records: Sequence[EngineRecord], slots: int, load_seconds: float) -> Engines | None:
    """What the engines of a pool are like; None where no job of known lengths was seen to run."""
    if not any(any(job.lengths) for record in records for job in record.jobs):
        return None
    traces: list[_Trace | None] = [None] * len(records)
    prompt_steps = 1.0
    for _ in range(TRACES):
        pairs = zip(records, traces, strict=True)
        found = [_running(record, trace, prompt_steps) for record, trace in pairs]
        running_K = _points(found)
        parts = [_equations(*pair, running_K) for pair in zip(records, found, strict=True)]
        jobs = _Equations(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        rates_K, prompt_steps = _solved(jobs)
        traces = [_placed(trace, running_K, rates_K) for trace in found]
    points = _points_of(running_K, rates_K, jobs.seconds_JK.sum(axis=0))
    if not points:
        return None
    return Engines(
        slots=slots,
        curve=Curve(points=points),
        load_seconds=round(load_seconds, 6),
        prompt_steps=round(prompt_steps, 3),
    )


# ---- who ran when --------------------------------------------------------------------------------


def _running(record: EngineRecord, before: _Trace | None, prompt_steps: float) -> _Trace:
    """Who ran when, as it is known; of a job of unknown lengths each response is as long as a known
    one is on the average. A response of L tokens ends L + `prompt_steps` token steps after the
    begin of its job. Without the trace `before`, token steps pass as time does."""
    jobs = record.jobs
    shares = [share for job in jobs for share in _shares(job, prompt_steps)]
    usual = sum(shares) / len(shares) if shares else 1.0
    events: list[tuple[float, float]] = []
    for job in jobs:
        if job.lengths:
            ends = [(share, 1.0) for share in _shares(job, prompt_steps)]
        else:
            ends = [(1.0 if job.size <= 1.0 else usual, job.size)]
        events.append((job.begin, sum(size for _, size in ends)))
        events += [(_moment(job, share, before), -size) for share, size in ends]
    if not events:
        return _Trace(np.zeros(1), np.zeros(1), np.zeros(1))
    times_E, changes_E = np.array(sorted(events)).T
    running_E = np.maximum(np.cumsum(changes_E), 0.0)
    return _without(_Trace(times_E, running_E, times_E), record.loads)


def _shares(job: Job, prompt_steps: float) -> list[float]:
    """The part of the token steps of a job after which each of its known responses had ended."""
    whole = prompt_steps + max((1, *job.lengths))
    return [(prompt_steps + length) / whole for length in job.lengths]


def _moment(job: Job, share: float, trace: _Trace | None) -> float:
    """When so large a share of the token steps of a job was made."""
    if trace is None:
        return job.begin + share * (job.end - job.begin)
    ends = np.interp((job.begin, job.end), trace.times_E, trace.places_E)
    place = float(ends[0] + share * (ends[1] - ends[0]))
    moment = float(np.interp(place, trace.places_E, trace.times_E))
    return min(max(moment, job.begin), job.end)


def _without(trace: _Trace, loads: Sequence[tuple[float, float]]) -> _Trace:
    """The trace with nothing running while the engine stood still."""
    marks = np.array(sorted(loads)).reshape(-1, 2)
    times = np.unique(np.concatenate([trace.times_E, marks.ravel()]))
    places = np.searchsorted(trace.times_E, times, side="right") - 1
    running = np.where(places >= 0, trace.running_E[np.maximum(places, 0)], 0.0)
    for low, high in marks:
        running[(times >= low) & (times < high)] = 0.0
    return _Trace(times, running, times)


def _placed(trace: _Trace, running_K: np.ndarray, rates_K: np.ndarray) -> _Trace:
    """The trace with the token steps that an engine of these rates makes."""
    rates = np.where(trace.running_E >= LEAST, np.interp(trace.running_E, running_K, rates_K), 0.0)
    steps = np.cumsum(rates[:-1] * np.diff(trace.times_E))
    return trace._replace(places_E=np.concatenate([[0.0], steps]))


def _points(traces: Sequence[_Trace]) -> np.ndarray:
    """Numbers of running sequences [K], ascending whole numbers: the least, the middles of equal
    parts of the time at work, and the most, beyond which nothing is known."""
    running = np.concatenate([trace.running_E[:-1] for trace in traces])
    seconds = np.concatenate([np.diff(trace.times_E) for trace in traces])
    busy = (running >= LEAST) & (seconds > 0.0)
    running, seconds = running[busy], seconds[busy]
    if not len(running):
        return np.ones(1)
    order = np.argsort(running, kind="stable")
    share = (np.cumsum(seconds[order]) - seconds[order] / 2) / seconds.sum()
    places = np.searchsorted(share, (np.arange(POINTS - 2) + 0.5) / (POINTS - 2))
    middles = running[order][np.minimum(places, len(order) - 1)]
    return np.unique(np.rint([running.min(), *middles, running.max()]))


def _equations(record: EngineRecord, trace: _Trace, running_K: np.ndarray) -> _Equations:
    known = [job for job in record.jobs if job.lengths and job.end > job.begin]
    begin_J, end_J = np.array([(job.begin, job.end) for job in known]).reshape(-1, 2).T
    lasted = np.where(trace.running_E >= LEAST, np.append(np.diff(trace.times_E), 0.0), 0.0)
    seconds_JK = np.zeros((len(known), len(running_K)))
    for k in range(len(running_K)):
        share = np.interp(trace.running_E, running_K, np.arange(len(running_K)) == k)
        passed = np.concatenate([[0.0], np.cumsum(share * lasted)[:-1]])
        ends_J = np.interp(end_J, trace.times_E, passed)
        seconds_JK[:, k] = ends_J - np.interp(begin_J, trace.times_E, passed)
    return _Equations(seconds_JK, np.array([max(job.lengths) for job in known], float))


# ---- the curve -----------------------------------------------------------------------------------


def _solved(jobs: _Equations) -> tuple[np.ndarray, float]:
    """(token steps a second [K], prompt steps). A point that no job has seen keeps the usual
    rate."""
    total = max(float(jobs.seconds_JK.sum()), 1e-12)
    rates_K = np.full(jobs.seconds_JK.shape[1], float(jobs.longest_J.sum() + len(jobs.longest_J)))
    rates_K /= total
    seen_K = jobs.seconds_JK.sum(axis=0)
    prompt_steps = 1.0
    for _ in range(ROUNDS):
        steps_J = np.maximum(jobs.seconds_JK @ rates_K, 1e-12)
        ratios_J = (jobs.longest_J + prompt_steps) / steps_J
        factors_K = (jobs.seconds_JK * ratios_J[:, None]).sum(axis=0) / np.maximum(seen_K, 1e-12)
        rates_K = np.clip(np.where(seen_K > 0.0, rates_K * factors_K, rates_K), 1e-9, 1e9)
        prompt_steps = _prompt_steps(jobs.seconds_JK @ rates_K, jobs.longest_J)
    return rates_K, prompt_steps


def _prompt_steps(steps_J: np.ndarray, longest_J: np.ndarray) -> float:
    """How many token steps a job lasts beside those of its longest response: the intercept of a
    straight line through its whole number of steps, over the slope; 1 where lengths do not
    differ."""
    spread = longest_J - longest_J.mean()
    slope = float((spread * steps_J).sum() / max(float((spread**2).sum()), 1e-12))
    if slope <= 0.0:
        return 1.0
    intercept = float(steps_J.mean()) - slope * float(longest_J.mean())
    return min(max(intercept / slope, 0.0), MOST_PROMPT_STEPS)


def _points_of(
    running_K: np.ndarray, rates_K: np.ndarray, weights_K: np.ndarray
) -> tuple[tuple[int, float], ...]:
    """Points of a curve on which more sequences make no step shorter and no token dearer. What was
    found otherwise is averaged, tokens a second first, which leaves the second averages in order;
    so a number of sequences that was seen for a moment cannot bend an end of the curve."""
    seen_K = weights_K > 0.0
    running_K, rates_K, weights_K = running_K[seen_K], rates_K[seen_K], weights_K[seen_K]
    running_K = np.maximum(running_K, 1.0)
    tokens_K = _never_falling(running_K * rates_K, weights_K)
    rates_K = -_never_falling(-tokens_K / running_K, weights_K)
    found = zip(running_K.tolist(), rates_K.tolist(), strict=True)
    return tuple((int(running), round(1.0 / rate, 9)) for running, rate in found)


def _never_falling(values_K: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """The nearest values that never fall, by weighted squares: neighbours that do are averaged
    (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # sum, weight, how many
    for value, weight in zip(values_K.tolist(), weights_K.tolist(), strict=True):
        pools.append((value * weight, weight, 1))
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] > pools[-1][0] * pools[-2][1]:
            (low, before, few), (high, after, more) = pools[-2:]
            pools[-2:] = [(low + high, before + after, few + more)]
    return np.repeat([total / weight for total, weight, _ in pools], [count for *_, count in pools])
