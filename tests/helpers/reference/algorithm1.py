"""Algorithm 1 (ZPPO), its ablations and GRPO, naively: plain, BCQ and NCQ rollouts, all of them the
student's."""

from __future__ import annotations

from reference.run import (
    Oracle,
    Run,
    Step,
    ask_teacher,
    begin,
    cap,
    drop_trivial,
    hardest_first,
    refresh,
    train,
)


def algorithm1(
    run: Run, t: int, oracle: Oracle, *, replay: bool, kinds: list[str], teacher: bool
) -> Step:
    """One rollout step. `kinds` are the reformulations in the order of the post-cap."""
    step = begin(run, t, oracle, replay)
    taught = ask_teacher(run, step, oracle, step.hard) if teacher else {}
    limit = cap(run, step)
    admits: dict[str, list[str]] = {q: [] for q in step.x}
    for q in step.hard:
        wrong = found_wrong(run, step, q)
        if "bcq" in kinds and wrong and teacher and any(r >= 1 for r in taught[q][1]):
            admits[q].append("bcq")
        if "ncq" in kinds and wrong:
            admits[q].append("ncq")
    kept = hardest_first(step, [q for q in step.x if admits[q]])[:limit]
    step.instances = [(q, kind) for q in kept for kind in admits[q]][:limit]
    for q, kind in step.instances:
        check_candidates(run, step, oracle, q, kind, taught[q][1] if teacher else [])
    for q in step.x:
        train(step, q, "plain", step.plain[q])
    for q, kind in step.instances:
        train(step, q, kind, run.rewards(f"{t}/{q}/{kind}", run.g_s))
    drop_trivial(run, step)
    if replay:
        refresh(run, step)
    return step


def found_wrong(run: Run, step: Step, q: str) -> list[int]:
    """The plain rollouts that were graded to the end, and wrong."""
    name = f"{step.t}/{q}/plain"
    return [i for i, r in enumerate(step.plain[q]) if r < 1 and not run.undecided(name, i)]


def check_candidates(
    run: Run, step: Step, oracle: Oracle, q: str, kind: str, taught: list[float]
) -> None:
    """A BCQ shows one student response that was found wrong and one correct teacher response, an NCQ
    every response that was found wrong."""
    drawn = oracle["candidates"][q, kind]
    wrong = found_wrong(run, step, q)
    right = [i for i, r in enumerate(taught) if r >= 1]
    if kind == "bcq":
        assert sorted(source for source, _, _ in drawn) == ["student", "teacher"]
        for source, index, count in drawn:
            assert index in (wrong if source == "student" else right) and count == 1
    else:
        texts = run.responses(f"{step.t}/{q}/plain", run.g_s)
        shown = merge(wrong, texts) if run.merge else [(i, 1) for i in wrong]
        assert drawn == [("student", index, count) for index, count in shown]


def merge(wrong: list[int], texts: list[tuple[str, str]]) -> list[tuple[int, int]]:
    """Our option: a response that ends like an earlier one and has 0.8 of the longer one's words
    counts with it."""
    kept: list[int] = []
    counts: dict[int, int] = {}
    for i in wrong:
        for j in kept:
            if texts[i][1] == texts[j][1] and shared(texts[i][0], texts[j][0]) >= 0.8:
                counts[j] += 1
                break
        else:
            kept.append(i)
            counts[i] = 1
    return [(i, counts[i]) for i in kept]


def shared(one: str, other: str) -> float:
    """Words in common, each as often as it stands in both, over the words of the longer text."""
    left, common = other.split(), 0
    for word in one.split():
        if word in left:
            left.remove(word)
            common += 1
    return common / max(len(one.split()), len(other.split()))
