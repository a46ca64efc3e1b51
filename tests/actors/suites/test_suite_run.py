"""Suites from the order to the page: a stand-in harness, a real gateway, a real HTTP server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from openai_server import Request, Server, running, status
from stub_harness import make_environment
from suite_helpers import CLOSING, QUESTIONS, boxed, knows, order_of, result, run, summary, table

from zppo.errors import UserError
from zppo.prompting.prompts import PromptSet
from zppo.suites.order import Judge, SuiteOrder
from zppo.suites.table import Decoding


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server(models=("student", "judge"))) as served:
        served.default = knows(
            {**boxed(), "What is 4+4?": "it is eight", "What is 3+3?": "\\boxed{7}"}
        )
        yield served


def refused(order: SuiteOrder) -> str:
    with pytest.raises(UserError) as error:
        run(order)
    return str(error.value)


def break_question(folder: Path, short: str, old: str, new: str) -> None:
    path = folder / f"{short}.jsonl"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.slow
def test_the_answer_key_and_the_decoding(tmp_path: Path, server: Server) -> None:
    """Right, right, wrong, and without a box: 50 %, whatever the harness's own metric says."""
    order = order_of(tmp_path, server, "Sums")
    assert run(order) == 0
    assert [*result(order, "Sums")["scores"].values()] == [1.0, 1.0, 0.0, 0.0]
    assert result(order, "Sums")["unboxed"] == 1
    bodies = [request.body for request in server.requests]
    assert {body["messages"][-1]["content"] for body in bodies} == {
        f"{question}\n\n{CLOSING}" for question in QUESTIONS
    }
    told = {name: bodies[0][name] for name in ("max_tokens", "temperature", "top_p", "top_k")}
    assert told == {"max_tokens": 9, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert bodies[0]["presence_penalty"] == 1.5
    [model] = summary(order)["models"]
    assert model["averages"]["LLM"] | {"low": 0, "high": 0} == {
        "family": "LLM", "value": 0.5, "low": 0, "high": 0, "have": 1, "of": 1, "missing": [],
    }  # fmt: skip


@pytest.mark.slow
def test_the_judge_decides_what_the_rule_does_not_find(tmp_path: Path, server: Server) -> None:
    server.default = knows(
        {**boxed(), "What is 4+4?": "it is eight", "What is 3+3?": "\\boxed{six}"}, "correct"
    )
    order = replace(
        order_of(tmp_path, server, "Sums"), judge=Judge(model="judge", base_url=server.base_url)
    )
    assert run(order) == 0
    assert (result(order, "Sums")["judged"], summary(order)["judge"]) == (2, "judge")
    assert [*result(order, "Sums")["scores"].values()] == [1.0] * 4
    asked = [r.body for r in server.requests if r.body["model"] == "judge"]
    words = sorted(body["messages"][0]["content"] for body in asked)
    assert "What is 3+3?" in words[0] and "\nsix\n" in words[0]
    assert "What is 4+4?" in words[1] and "\nit is eight\n" in words[1]  # the whole response
    assert {(body["temperature"], body["max_tokens"]) for body in asked} == {(0.0, 512)}


@pytest.mark.slow
def test_a_choice_that_names_another_letter_needs_no_judge(tmp_path: Path, server: Server) -> None:
    server.default = knows(
        {"1+1": "\\boxed{B}", "2+2": "\\boxed{A}", "3+3": "\\boxed{none}", "4+4": "\\boxed{(C)}"}
    )
    order = order_of(tmp_path, server, "Sums")
    suite = table(tmp_path, "Sums", grader="choice")
    for gold, letter in {"2": "B", "4": "C", "6": "A", "8": "C"}.items():
        break_question(tmp_path, "Sums", f'"{gold}"', f'"{letter}"')
    order = replace(order, suite=suite, judge=Judge(model="judge", base_url=server.base_url))
    assert run(order) == 0
    assert [*result(order, "Sums")["scores"].values()] == [1.0, 0.0, 0.0, 1.0]
    assert result(order, "Sums")["judged"] == 1


@pytest.mark.slow
def test_a_harness_that_fails_is_named_and_the_next_row_is_run(
    tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    order = order_of(tmp_path, server, "Bad", "Good")
    break_question(tmp_path, "Bad", "3+3", "3+3 misbehave")
    assert run(order) == 1
    log = Path(order.out) / "student/rows/Bad/harness.log"
    reason = f"lm-eval failed (code 3, log: {log}): Traceback: the data set is broken"
    out, err = capfd.readouterr()
    assert f"student  Bad: {reason}\n" in out
    assert err == (
        f"rows without a result: Bad; what is done is in {order.out}, and the same command goes "
        "on from there\n"
    )
    [model] = summary(order)["models"]
    assert model["missing"] == {"Bad": reason}
    assert model["averages"]["LLM"]["missing"] == ["Bad"]
    page = (Path(order.out) / "suite.html").read_text()
    assert "50.0 [15.0, 85.0] (1 of 2: without Bad)" in page and "the data set is broken" in page
    asked = len(server.requests)
    break_question(tmp_path, "Bad", " misbehave", "")
    assert run(order) == 0
    assert summary(order)["models"][0]["averages"]["LLM"]["have"] == 2
    assert len(server.requests) <= asked + 4  # Good is done, and what Bad had answered is kept


@pytest.mark.slow
def test_two_models_side_by_side(tmp_path: Path, server: Server) -> None:
    order = order_of(tmp_path, server, "Sums")
    run(order)
    server.default = knows(boxed())
    better = replace(order, models=[replace(order.models[0], label="better")])
    assert run(better) == 0
    first, second = summary(better)["models"]
    assert (first["label"], first["differences"]) == ("student", {})
    found = second["differences"]["Sums"]
    assert (found["value"], found["questions"]) == (0.5, 4)
    # Of the differences 0, 0, 1, 1 one draw in sixteen is all 0, and one all 1.
    assert (found["low"], found["high"]) == (0.0, 1.0)
    page = (Path(order.out) / "suite.html").read_text()
    assert "+50.0 [+0.0, +100.0] over 1" in page


@pytest.mark.slow
def test_a_model_that_goes_away_stops_the_suite_and_a_rerun_goes_on(
    tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    right, down = knows(boxed()), status(503, "overloaded")
    order = replace(order_of(tmp_path, server, "A", "B"), concurrent=1)
    server.answers = [right] * 6
    server.default = down
    assert run(order) == 1
    said = capfd.readouterr().err
    assert said.startswith(
        f"the model 'student' at {server.base_url} does not answer: the server answers HTTP 503: "
        "overloaded (after "
    )
    assert said.endswith(
        f"what is done is in {order.out}, and the same command goes on from there\n"
    )
    assert [*result(order, "A")["scores"].values()] == [1.0] * 4
    assert summary(order)["models"][0]["missing"]["B"].startswith("the model 'student' at ")
    server.default, server.requests = right, []
    assert run(order) == 0
    assert len(server.requests) == 2  # the first two of B are in the journal
    assert (result(order, "B")["asked"], len(result(order, "B")["scores"])) == (2, 4)


@pytest.mark.slow
def test_a_judge_that_does_not_answer(
    tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    good = server.default

    async def no_judge(request: Request, writer: asyncio.StreamWriter) -> None:
        await (status(500) if request.body["model"] == "judge" else good)(request, writer)

    server.default = no_judge
    order = replace(
        order_of(tmp_path, server, "Sums"), judge=Judge(model="judge", base_url=server.base_url)
    )
    assert run(order) == 1
    assert capfd.readouterr().err.startswith(
        f"the judge at {server.base_url} does not answer: the server answers HTTP 500 (after "
    )
    server.default, server.requests = good, []
    assert run(order) == 0
    assert {request.body["model"] for request in server.requests} == {"judge"}


@pytest.mark.slow
def test_a_question_that_the_server_refuses_is_wrong_and_counted(
    tmp_path: Path, server: Server
) -> None:
    right, too_long = knows(boxed()), status(400, "the prompt is too long")

    async def answer(request: Request, writer: asyncio.StreamWriter) -> None:
        long = "2+2" in request.body["messages"][-1]["content"]
        await (too_long if long else right)(request, writer)

    server.default = answer
    order = order_of(tmp_path, server, "Sums")
    assert run(order) == 0
    assert [*result(order, "Sums")["scores"].values()] == [1.0, 0.0, 1.0, 1.0]
    assert result(order, "Sums")["refused"] == 1


@pytest.mark.slow
def test_what_is_refused_before_anything_is_asked(tmp_path: Path, server: Server) -> None:
    order = order_of(tmp_path, server, "Sums")
    old = make_environment(tmp_path / "old", "0.4.12")
    python, lost = str(old), str(tmp_path / "nowhere" / "python")
    assert refused(replace(order, harness_pythons={"lm-eval": python})) == (
        f"--harness-python lm-eval: {python!r} has lm-eval 0.4.12; expected 0.4.13 or newer; "
        f"install it with: {python} -m pip install 'lm-eval[api]==0.4.13'"
    )
    assert refused(replace(order, harness_pythons={"lm-eval": sys.executable})) == (
        f"--harness-python lm-eval: {sys.executable!r} has no lm-eval; install it with: "
        f"{sys.executable} -m pip install 'lm-eval[api]==0.4.13'"
    )
    assert refused(replace(order, harness_pythons={"lm-eval": lost})) == (
        f"--harness-python lm-eval: {lost!r} is no Python interpreter of a harness's environment; "
        "make one with: make harnesses (docs/suites.md)"
    )
    other = replace(order.models[0], model="studnet")
    assert refused(replace(order, models=[other])) == (
        f"--server.engine_args.model: the server at {server.base_url} serves no 'studnet' (did you "
        "mean 'student'?)"
    )
    gone = replace(order.models[0], base_url="http://127.0.0.1:9/v1")
    assert refused(replace(order, models=[gone])).startswith(
        "--server.engine_args.base_url is 'http://127.0.0.1:9/v1', where no server was ready"
    )
    assert server.requests == []


@pytest.mark.slow
def test_results_of_other_settings_are_not_mixed(tmp_path: Path, server: Server) -> None:
    order = order_of(tmp_path, server, "Sums")
    run(order)
    hot = replace(order, suite=replace(order.suite, decoding=Decoding(temperature=1.0)))
    folder = Path(order.out) / "student/rows/Sums"
    assert refused(hot) == (
        f"--out: {str(folder)!r} holds a result of other settings (decoding.max_new_tokens was "
        "'9', now '12288'); name another folder or remove it"
    )
    # Nor beside those of another model, on one page.
    label = replace(order.models[0], label="other")
    judged = replace(
        order, models=[label], judge=Judge(model="judge", base_url=server.base_url), limit=2
    )
    assert refused(judged) == (
        f"--out: {str(folder)!r} holds a result of other settings (judge was '–', now 'judge'); "
        "name another folder or remove it"
    )
    own = tmp_path / "templates"
    own.mkdir()
    (own / "judge.j2").write_text("{{ question }} {{ gold }} {{ answer }}")
    assert refused(replace(order, templates=str(own))) == (
        f"--out: {str(folder)!r} holds a result of other settings (templates was '–', now "
        f"'{PromptSet(own).digest}'); name another folder or remove it"
    )
    clash = replace(order.models[0], label="a/b")
    assert run(replace(order, models=[clash])) == 0
    assert refused(replace(order, models=[replace(clash, label="a b")])) == (
        "--label: two models share a folder, 'a/b' and 'a b'; name them apart"
    )


@pytest.mark.slow
def test_a_question_that_the_harness_did_not_ask_is_not_wrong(
    tmp_path: Path, server: Server
) -> None:
    order = order_of(tmp_path, server, "Sums")
    break_question(tmp_path, "Sums", "3+3", "3+3 skip")
    assert run(order) == 1
    log = Path(order.out) / "student/rows/Sums/harness.log"
    assert summary(order)["models"][0]["missing"] == {
        "Sums": f"lm-eval asked 3 of 4 questions (log: {log}): "
    }


@pytest.mark.slow
def test_no_proxy_stands_between_harness_and_gateway(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert run(order_of(tmp_path, server, "Sums")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("other", ["weights", "seed"])
def test_answers_of_other_weights_or_seeds_are_not_taken(
    tmp_path: Path, server: Server, other: str
) -> None:
    """An interrupted row has no result yet that could be refused, but its answers lie there."""
    right, down = knows(boxed()), status(503, "overloaded")
    order = replace(order_of(tmp_path, server, "Sums"), concurrent=1)
    before = replace(order.models[0], fingerprint="a")
    server.answers, server.default = [right] * 3, down
    assert run(replace(order, models=[before])) == 1
    server.default, server.requests = right, []
    after = replace(before, fingerprint="b" if other == "weights" else "a")
    if other == "seed":
        order = replace(order, seed=1)
    assert run(replace(order, models=[after])) == 0
    assert len(server.requests) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130)])
def test_kill_and_resume(tmp_path: Path, server: Server, number: int, code: int) -> None:
    """Killed while the second row waits for its third answer: the harness dies too, and the same
    order asks only for what is left."""
    right = knows(boxed())
    hold = asyncio.Event()

    async def silent(request: Request, writer: asyncio.StreamWriter) -> None:
        await hold.wait()

    server.answers = [right] * 6
    server.default = silent
    order = replace(order_of(tmp_path, server, "A", "B"), concurrent=1)
    command = [sys.executable, "-P", "-m", "zppo_actors", "suite"]
    child = subprocess.Popen([*command, msgspec.json.encode(order).decode()])
    until = time.monotonic() + 600
    while len(server.requests) < 7 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(server.requests) == 7
    child.send_signal(number)
    assert child.wait() == code
    while children_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert children_of(tmp_path) == []
    server.default, server.requests = right, []
    assert run(order) == 0
    asked = [request.body["messages"][-1]["content"] for request in server.requests]
    assert [text.partition("\n")[0] for text in asked] == ["What is 3+3?", "What is 4+4?"]
    assert summary(order)["models"][0]["averages"]["LLM"]["value"] == 1.0


def children_of(folder: Path) -> list[str]:
    """Processes that still run with a path of this test on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in line and int(path.parent.name) != os.getpid():
            found.append(path.parent.name)
    return found
