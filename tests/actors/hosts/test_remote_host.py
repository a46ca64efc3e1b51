"""A further host as the supervisor sees it: orders and reports that may be lost, late or stale."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from zppo_actors.supervisor.remote_host import KILLED, RemoteHost, RemoteProcess
from zppo_protocol.messages import HostReport
from zppo_protocol.values import ActorOrder, ActorReport


def order(name: str = "rollout-0", incarnation: int = 0) -> ActorOrder:
    return ActorOrder(name, "rollout", incarnation, {"OMP_NUM_THREADS": "1"})


def said(
    exit_code: int | None = None, name: str = "rollout-0", incarnation: int = 0
) -> ActorReport:
    return ActorReport(name, incarnation, 7, exit_code, 1.5, 100)


def report(*actors: ActorReport, attempt: str = "a") -> HostReport:
    return HostReport(attempt=attempt, actors=list(actors), parts=[])


def joined() -> RemoteHost:
    host = RemoteHost("node-1")
    host.greet("life", 0.0)
    host.report(report(attempt=""), 0.0)
    host.begin("a", b"record", {"rollout-0": b"key"})
    return host


def test_record_and_keys_are_sent_until_the_host_has_them() -> None:
    host = joined()
    first = host.orders({})
    assert (first.attempt, first.record, first.secrets) == ("a", b"record", {"rollout-0": b"key"})
    host.report(report(), 1.0)
    later = host.orders({})
    assert (later.attempt, later.record, later.secrets) == ("a", b"", {})


def test_a_process_runs_until_its_end_is_reported() -> None:
    host = joined()
    process = host.start(order())
    assert host.fresh and host.orders({}).actors == [order()] and not host.fresh
    host.report(report(), 1.0)  # from before the orders came
    assert process.poll() is None
    host.report(report(said()), 2.0)
    assert process.poll() is None and process.used({}) == (1.5, 100)
    host.report(report(said(exit_code=3)), 3.0)
    assert process.poll() == process.wait() == 3
    process.kill()  # as the supervisor does with all that have ended
    assert host.orders({}).actors == []


def test_a_killed_process_has_ended_when_the_host_no_longer_names_it() -> None:
    host = joined()
    process = host.start(order())
    host.report(report(said()), 1.0)
    process.kill()
    assert host.orders({}).actors == []
    host.report(report(said()), 2.0)
    assert process.poll() is None
    host.report(report(), 3.0)
    assert process.poll() == KILLED


def test_what_another_attempt_says_is_not_heard() -> None:
    host = joined()
    process = host.start(order())
    host.report(report(said(exit_code=1), attempt="earlier"), 1.0)
    assert process.poll() is None


def test_killing_an_ended_process_leaves_its_next_incarnation_alone() -> None:
    host = joined()
    first = host.start(order())
    host.report(report(said(exit_code=1)), 1.0)
    host.start(order(incarnation=1))
    first.kill()
    assert host.orders({}).actors == [order(incarnation=1)]


def test_a_lost_host_has_no_processes_and_says_why() -> None:
    host = joined()
    process = host.start(order())
    host.lose("node-1 was not heard for 60 s")
    assert (process.poll(), process.reason) == (KILLED, "node-1 was not heard for 60 s")
    assert host.trouble == "node-1 was not heard for 60 s" and not host.ready
    host.greet("other", 9.0)
    assert host.trouble == "" and not host.ready and host.orders({}).actors == []


def test_an_ended_attempt_is_clean_when_the_host_says_so() -> None:
    host = joined()
    host.report(report(), 1.0)
    host.end()
    assert not host.clean
    host.report(report(attempt=""), 2.0)
    assert host.clean


Reports = st.lists(st.sampled_from(["heard", "lost", "killed", "died", "stale"]), max_size=30)


@given(Reports)
def test_no_process_is_forgotten_whatever_is_lost(steps: list[str]) -> None:
    """However orders and reports are lost, a process that runs there is wanted here, or the next
    orders end it, and each that has ended is known to have after one more round trip."""
    host, process = joined(), None
    there: dict[str, ActorReport] = {}  # what the host runs

    def exchange() -> HostReport:
        wanted = {one.name: one for one in host.orders({}).actors}
        for name in [name for name in there if name not in wanted]:
            del there[name]
        for name, one in wanted.items():
            if name not in there or there[name].incarnation != one.incarnation:
                there[name] = said(name=name, incarnation=one.incarnation)
        return report(*there.values())

    incarnations: Iterator[int] = iter(range(100))
    process = host.start(order(incarnation=next(incarnations)))
    stale = report()
    for now, step in enumerate(steps):
        if step == "killed":
            process.kill()
        elif step == "died" and "rollout-0" in there:
            there["rollout-0"] = said(3, incarnation=there["rollout-0"].incarnation)
        elif step == "stale":
            host.report(stale, float(now))
        else:
            stale = exchange()
            if step == "heard":
                host.report(stale, float(now))
        process = renewed(host, process, incarnations)
    host.report(exchange(), 99.0)
    host.report(exchange(), 100.0)
    running = {one.incarnation for one in there.values() if one.exit_code is None}
    alive = set() if process.poll() is not None else {process.order.incarnation}
    assert running == alive


def renewed(host: RemoteHost, process: RemoteProcess, incarnations: Iterator[int]) -> RemoteProcess:
    """The next incarnation of a process that has ended."""
    if process.poll() is None:
        return process
    process.kill()
    return host.start(order(incarnation=next(incarnations)))
