"""Teachers behind a server: what is asked and understood, what a misbehaving server can do, and
where the key goes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import openai_server as fake
import pytest
from actor_helpers import Stage
from engine_helpers import make_task
from hypothesis import given
from hypothesis import strategies as st
from openai_server import MODEL, Server, running
from picture_files import turned
from PIL import Image
from served import student_of, teacher_of

from zppo.config.load import load
from zppo.config.served import ServedModel, teachers
from zppo.config.topology import (
    ActorConfig,
    ActorsConfig,
    DataConfig,
    StudentConfig,
    TeacherConfig,
    Topology,
)
from zppo.data.pictures import NO_BOUNDS, PixelBounds, read_picture, refer
from zppo.errors import UserError
from zppo.plan.engines.openai import OpenAIArguments, check_openai, read_key, read_openai_arguments
from zppo.plan.machine import Machine
from zppo.plan.make import make_plan
from zppo.plan.memory import CLIENT_LIBRARIES
from zppo.plan.plan import Plan
from zppo.records.metrics import prompt_length, response_lengths
from zppo_actors.engines import create
from zppo_actors.engines.base import EngineError, EngineSpec
from zppo_actors.engines.openai import body
from zppo_actors.engines.openai.body import chat_messages
from zppo_actors.engines.openai.engine import OpenAIEngine
from zppo_actors.engines.openai.reply import Events
from zppo_actors.engines.openai.retry import LONGEST_PAUSE_SECONDS, Pauses, RetryBudget, retry_after
from zppo_protocol.messages import GenerateResult, Heartbeat, Hello, Shutdown, TaskFailed, Welcome
from zppo_protocol.places import PLACE
from zppo_protocol.samples import GroupSamples
from zppo_protocol.values import ChatMessage, Prompt, VideoReference

ROOT = Path(__file__).parents[4]
KEY = "sk-very-secret-0123456789"
Result = TypeVar("Result")


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:
        yield lambda *answers, **options: stack.enter_context(running(Server(*answers, **options)))


def spec(
    server: Server,
    model: str = MODEL,
    served_as: Callable[..., ServedModel] = teacher_of,
    **arguments: Any,
) -> EngineSpec:
    given = {"base_url": server.base_url, "startup_seconds": 0.1, **arguments}
    return EngineSpec(served=served_as(model, engine="openai", **given))


def use(
    server: Server, work: Callable[[OpenAIEngine], Coroutine[Any, Any, Result]], **arguments: Any
) -> Result:
    """Run `work` with an engine whose pauses are short."""
    settings = OpenAIArguments(base_url=server.base_url, **arguments)

    async def run() -> Result:
        key = read_key(settings, "engine_args")
        engine = OpenAIEngine(
            settings, MODEL, key, Pauses(first_seconds=0.001, generator=random.Random(0))
        )
        try:
            return await engine.generate(make_task("q")) if work is None else await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def sample(
    server: Server, n: int = 1, seed: int = 0, sampling: Any = None, **arguments: Any
) -> GroupSamples:
    task = make_task("What is 1?", n=n, seed=seed, **(sampling or {}))
    return use(server, lambda engine: engine.generate(task), **arguments)


def failure(server: Server, n: int = 1, **arguments: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        sample(server, n, **arguments)
    return caught.value


# ---- what is asked, and what is understood -------------------------------------------------------


DECODING = {"top_p": 0.9, "top_k": 20, "presence_penalty": 1.5}


def test_a_group_in_one_request(serve: Callable[..., Server]) -> None:
    server = serve()
    samples = sample(server, n=3, seed=2**40 + 5, sampling={**DECODING, "temperature": 0.7})
    (request,) = server.requests
    assert request.body == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is 1?"}],
        "n": 3,
        "temperature": 0.7,
        **DECODING,
        "max_tokens": 16,
        "seed": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert samples.texts == [f"choice {seed}: \\boxed{{1}}" for seed in (5, 6, 7)]
    assert samples.finish_reasons == ["stop"] * 3
    assert samples.text_only and len(samples.token_ids) == 0 and samples.offsets.tolist() == [0] * 4
    assert (
        samples.written_tokens == 15
        and response_lengths(samples) == [None] * 3
        and prompt_length(samples) == 7
    )


def test_lengths_are_known_where_each_request_makes_one_choice(
    serve: Callable[..., Server],
) -> None:
    server = serve(fake.good(), fake.good(usage=False))
    samples = sample(server, n=2, choices_per_request=1)
    assert ["n" in request.body for request in server.requests] == [False, False]
    assert sorted(response_lengths(samples), key=str) == [5, None] and samples.written_tokens == 5


def test_a_server_that_does_not_stream_is_understood(serve: Callable[..., Server]) -> None:
    samples = sample(serve(fake.whole()), n=2)
    assert samples.texts == ["choice 0: \\boxed{1}", "choice 1: \\boxed{1}"]
    assert samples.finish_reasons == ["length"] * 2 and samples.written_tokens == 9


def test_greedy_completions_are_asked_for_one_by_one(serve: Callable[..., Server]) -> None:
    server = serve()
    sample(server, n=3, sampling={"temperature": 0.0})
    assert [request.asked for request in server.requests] == [1, 1, 1]


@pytest.mark.parametrize("makes", [1, 2, 3])
def test_a_server_that_makes_too_few_choices_is_asked_for_the_others(
    serve: Callable[..., Server], makes: int, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()

    async def fewer(request: fake.Request, writer: asyncio.StreamWriter) -> None:
        await fake.good(makes=min(makes, request.asked))(request, writer)

    server.default = fewer
    task = make_task("q", n=7)

    async def twice(engine: OpenAIEngine) -> list[GroupSamples]:
        return [await engine.generate(task), await engine.generate(task)]

    for samples in use(server, twice):
        assert sorted(samples.texts) == [
            f"choice {seed}: \\boxed{{1}}" for seed in range(7)
        ]  # no seed twice
    assert [request.asked for request in server.requests].count(7) == 1
    assert f"the server made {makes} of 7 choices" in caplog.text


@pytest.mark.parametrize("streams", [True, False])
def test_surplus_choices_are_left_out_and_not_counted(
    serve: Callable[..., Server], streams: bool
) -> None:
    choices = [
        {"index": i, "message": {"content": str(i)}, "finish_reason": "stop"} for i in range(5)
    ]
    samples = sample(serve(fake.good(makes=5) if streams else fake.whole(choices=choices)), n=2)
    assert len(samples.texts) == 2 and samples.written_tokens == 0


def test_a_stream_may_end_without_its_last_marks(serve: Callable[..., Server]) -> None:
    assert sample(
        serve(fake.stream(fake.piece(0, "x"), fake.piece(0, "y", "stop").rstrip()))
    ).texts == ["xy"]


def test_extra_body_adds_and_leaves_out(serve: Callable[..., Server]) -> None:
    server = serve()
    extra = {"min_p": 0.1, "seed": None, "temperature": None}
    sample(server, extra_body=extra, length_field="max_completion_tokens")
    (request,) = server.requests
    assert request.body["min_p"] == 0.1 and "chat_template_kwargs" not in request.body
    assert request.body["max_completion_tokens"] == 16
    assert not {"seed", "temperature", "max_tokens"} & set(request.body)


def test_pictures_travel_as_data_urls(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpeg"  # the name lies: it is a PNG
    Image.new("RGB", (2, 2), "red").save(path, format="PNG")
    picture = refer(path)
    film = VideoReference(frames=(picture, picture), seconds=(0.0, 1.25))
    task = make_task("What is this?")
    (message,) = chat_messages(Prompt(messages=task.prompt.messages, media=[picture, film]))
    first, *frames, text = message["content"]
    assert first["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert base64.b64decode(first["image_url"]["url"].split(",")[1]) == path.read_bytes()
    assert frames == [
        {"type": "text", "text": "<0.0 seconds>"},
        first,
        {"type": "text", "text": "<1.2 seconds>"},
        first,
    ]
    assert text == {"type": "text", "text": "What is this?"}


def test_pictures_travel_at_their_places(tmp_path: Path) -> None:
    """Messages with nothing but text stay plain, and one may be nothing but a picture."""
    path = tmp_path / "picture.png"
    Image.new("RGB", (2, 2), "red").save(path)
    picture = refer(path)
    turns = [("user", PLACE), ("assistant", "Red."), ("user", f"Is {PLACE} red?")]
    messages = [ChatMessage(role=role, content=text) for role, text in turns]  # type: ignore[arg-type]
    first, second, third = chat_messages(Prompt(messages=messages, media=[picture, picture]))
    [shown] = first["content"]
    assert shown["type"] == "image_url" and second["content"] == "Red."
    words = [{"type": "text", "text": text} for text in ("Is ", " red?")]
    assert third["content"] == [words[0], shown, words[1]]


def test_places_that_are_not_one_for_each_end_the_request(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (2, 2), "red").save(path)
    messages = [ChatMessage(role="user", content=PLACE * 2)]
    with pytest.raises(EngineError) as refused:
        chat_messages(Prompt(messages=messages, media=[refer(path)]))
    assert str(refused.value) == "the prompt has 2 places for 1 pictures and videos"
    assert not refused.value.retryable


@pytest.mark.parametrize("kind", ["palette", "deep", "turned", "bounded", "bitmap"])
def test_a_server_is_sent_what_other_engines_see(tmp_path: Path, kind: str) -> None:
    """A file that a server may read otherwise is sent as a PNG of what `read_picture` gives."""
    path, bounds = tmp_path / "picture", NO_BOUNDS
    picture = Image.new("RGB", (4, 2), "red")
    picture.putpixel((3, 0), (0, 0, 255))
    if kind == "palette":
        picture.convert("P").save(path, format="PNG", transparency=0)
    elif kind == "deep":
        deep = np.arange(8, dtype=np.uint16).reshape(2, 4) * 8000
        Image.fromarray(deep).save(path, format="PNG")
    elif kind == "turned":
        picture.save(path, format="JPEG", exif=turned(6))
    elif kind == "bounded":
        picture.save(path, format="PNG")
        bounds = PixelBounds(least=200)
    else:
        picture.save(path, format="BMP")
    reference = refer(path, bounds)
    (message,) = chat_messages(Prompt(messages=make_task("q").prompt.messages, media=[reference]))
    head, _, data = message["content"][0]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]) as sent:
        assert sent.mode == "RGB" and sent.size == (reference.width, reference.height)
        assert sent.tobytes() == read_picture(reference).tobytes()


def test_pictures_that_cannot_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (2, 2), "red").save(path)
    reference = refer(path)

    def refused() -> str:
        prompt = Prompt(messages=make_task("q").prompt.messages, media=[reference])
        with pytest.raises(EngineError) as caught:
            chat_messages(prompt)
        assert not caught.value.retryable
        return str(caught.value)

    size = path.stat().st_size
    monkeypatch.setattr(body, "MAX_BYTES", size - 1)
    assert refused() == (
        f"the picture {str(path)!r} takes {size} bytes; at most {size - 1} are sent, so set "
        "data.max_pixels"
    )
    path.unlink()
    assert refused() == f"a picture cannot be sent: the picture {str(path)!r} does not exist"


TEXT = st.characters(codec="utf-8", exclude_characters="\r\n")


@given(data=st.data(), payloads=st.lists(st.text(TEXT, max_size=9), max_size=6))
def test_events_do_not_depend_on_how_the_bytes_are_cut(
    data: st.DataObject, payloads: list[str]
) -> None:
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    encoded = "".join(f": noise{end}data: {text}{end}{end}" for text in payloads).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=8)))
    events = Events()
    parts = [encoded[a:b] for a, b in zip([0, *cuts], [*cuts, len(encoded)], strict=True)]
    found = [event for part in parts for event in events.feed(part)]
    assert [event.decode() for event in [*found, *events.close()]] == payloads


# ---- a server that misbehaves --------------------------------------------------------------------

PIECE = fake.piece(0, "half a")
PASSING = {
    "429": fake.status(429, Retry_After="0"),
    "500": fake.status(500, said="Internal Server Error"),
    "503": fake.status(503),
    "cut before a byte": fake.cut(),
    "cut in the middle": fake.cut(PIECE),
    "stream that just ends": fake.stream(PIECE),
    "done in the middle": fake.stream(PIECE, b"data: [DONE]\n\n"),
    "junk JSON": fake.reply_with(b'{"choices": [', Content_Type="application/json"),
    "junk event": fake.stream(b"data: {nonsense}\n\n"),
    "not text": fake.stream(b'data: {"choices": [{"index": 0, "delta": {"content": "\xff"}}]}\n\n'),
    "deep JSON": fake.reply_with(b"[" * 100_000),
    "HTML": fake.reply_with(b"<html>Bad gateway</html>", Content_Type="text/html"),
    "no choices": fake.whole(choices=[]),
    "no list of choices": fake.whole(choices="none"),
    "no content": fake.whole(choices=[{"index": 0, "message": {}, "finish_reason": "stop"}]),
    "no reason": fake.whole(
        choices=[{"index": 0, "message": {"content": "x"}, "finish_reason": None}]
    ),
    "aborted": fake.good(reason="abort"),
    "index below 0": fake.stream(fake.piece(-1, "x", "stop")),
    "error in the stream": fake.stream(PIECE, fake.event({"error": {"message": "out of memory"}})),
}


@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING.keys())
def test_what_may_pass_is_tried_again(serve: Callable[..., Server], answer: fake.Answer) -> None:
    server = serve(answer)
    assert sample(server).texts == ["choice 0: \\boxed{1}"]
    assert len(server.requests) == 2


@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING.keys())
def test_and_is_handed_back_for_another_try_when_it_lasts(
    serve: Callable[..., Server], answer: fake.Answer
) -> None:
    server = serve()
    server.default = answer
    error = failure(server, retry_seconds=0.02)
    assert error.retryable and "tries)" in str(error)


@pytest.mark.parametrize("code", [301, 400, 404, 413, 422])
def test_what_will_not_pass_is_not_tried_again(serve: Callable[..., Server], code: int) -> None:
    server = serve(fake.status(code, said="no such\n thing", Location="http://127.0.0.1:1/"))
    error = failure(server)
    assert str(error) == f"the server answers HTTP {code}: no such thing" and not error.retryable
    assert len(server.requests) == 1


def test_a_key_that_is_refused_later(serve: Callable[..., Server]) -> None:
    """Servers show parts of the key in this answer, so none of it is repeated."""
    error = failure(serve(fake.status(401, said="Incorrect API key provided: sk-ve****6789")))
    assert str(error) == "the server refuses the key (HTTP 401)" and not error.retryable


def test_an_error_in_the_stream_is_passed_on(serve: Callable[..., Server]) -> None:
    server = serve()
    server.default = PASSING["error in the stream"]
    assert "the server broke off: {'message': 'out of memory'}" in str(
        failure(server, retry_seconds=0.02)
    )


@pytest.mark.parametrize(
    "answer", [fake.flood(fake.piece(0, "word")), fake.whole()], ids=["endless", "whole"]
)
def test_a_text_has_a_bound(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, answer: fake.Answer
) -> None:
    monkeypatch.setattr("zppo_actors.engines.openai.reply.MAX_TEXT", 10)
    server = serve()
    server.default = answer
    assert "a text of more than 10 characters" in str(failure(server, retry_seconds=0.02))


def test_no_server_at_all(serve: Callable[..., Server]) -> None:
    with running(Server()) as server:
        pass
    error = failure(server, retry_seconds=0.05)
    assert error.retryable and "ConnectError" in str(error)


@pytest.mark.parametrize("answer", [fake.drip(), fake.silent()], ids=["slow drip", "silence"])
def test_an_answer_must_be_whole_in_time(serve: Callable[..., Server], answer: fake.Answer) -> None:
    error = failure(serve(answer), timeout_seconds=0.1)
    assert str(error) == "no whole answer within 0.1 s" and not error.retryable


def test_a_flood_is_not_read_to_its_end(serve: Callable[..., Server]) -> None:
    server = serve(fake.flood())
    sample(server)
    assert len(server.requests) == 2
    long = fake.reply_with(b'"' + b"x" * (2 << 20) + b'"')
    assert "is larger than 1064960 bytes" in str(failure(serve(*[long] * 200), retry_seconds=0.02))


def test_compressed_answers_are_refused(serve: Callable[..., Server]) -> None:
    error = failure(serve(fake.reply_with(b"\x1f\x8b", Content_Encoding="gzip")))
    assert "compressed" in str(error) and not error.retryable


def test_a_server_that_keeps_the_stream_open_after_its_end(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zppo_actors.engines.openai.client.DRAIN_SECONDS", 0.01)
    assert sample(serve(fake.cut(fake.piece(0, "x", "stop") + b"data: [DONE]\n\n"))).texts == ["x"]

    async def open_end(request: fake.Request, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9999\r\n\r\n"
        )
        writer.write(fake.piece(0, "x", "stop") + b"data: [DONE]\n\n")
        await fake.silent()(request, writer)

    assert sample(serve(open_end)).texts == ["x"]


def test_connections_are_used_again(serve: Callable[..., Server]) -> None:
    server = serve()

    async def work(engine: OpenAIEngine) -> None:
        for _ in range(3):
            await engine.generate(make_task("q", n=2))

    use(server, work)
    assert (server.connections, len(server.requests)) == (1, 3)


def test_retry_after_holds_all_requests_back(serve: Callable[..., Server]) -> None:
    """The server asks for a long pause: neither the task it told nor any other asks again."""
    server = serve(fake.status(429, Retry_After="1000"))

    async def work(engine: OpenAIEngine) -> list[EngineError]:
        errors = []
        for _ in range(3):
            with pytest.raises(EngineError) as caught:
                await engine.generate(make_task("q"))
            errors.append(caught.value)
        return errors

    first, second, _ = use(server, work, retry_seconds=0.05)
    assert str(first) == "the server answers HTTP 429 (after 1 tries)" and first.retryable
    assert str(second) == "the server asks to wait (after 0 tries)" and second.retryable
    assert len(server.requests) == 1


def test_the_retry_budget_is_for_all_requests_together(serve: Callable[..., Server]) -> None:
    server = serve()
    server.default = fake.status(500)

    async def work(engine: OpenAIEngine) -> list[EngineError]:
        outcomes = await asyncio.gather(
            *(engine.generate(make_task("q")) for _ in range(4)), return_exceptions=True
        )
        return [error for error in outcomes if isinstance(error, EngineError)]

    errors = use(server, work, retry_budget=5)
    assert [error.retryable for error in errors] == [False] * 4
    assert all(str(error).endswith("(and the retry budget is spent)") for error in errors)
    assert len(server.requests) == 4 + 5


def test_requests_that_work_earn_retries(serve: Callable[..., Server]) -> None:
    server = serve(fake.status(500), *[fake.good()] * 11, fake.status(500))

    async def work(engine: OpenAIEngine) -> None:
        for _ in range(12):
            await engine.generate(make_task("q"))

    use(server, work, retry_budget=1)
    assert len(server.requests) == 12 + 2


def test_concurrency_is_bounded_and_the_bound_is_reached(serve: Callable[..., Server]) -> None:
    server = serve()
    server.default = fake.Crowd(size=6)
    given_back: list[int] = []

    async def work(engine: OpenAIEngine) -> None:
        tasks = [make_task("q", n=n, task_id=f"t{i}") for i, n in enumerate([3, 3, 3, 2, 1, 6, 4])]
        await asyncio.gather(*(engine.generate(task, given_back.append) for task in tasks))
        assert engine.progress >= 5 * 22 and engine.capacity == 6

    use(server, work, max_concurrent=6)
    assert server.most_at_once == 6
    assert sum(given_back) == 22


def test_a_failing_part_cancels_the_others(serve: Callable[..., Server]) -> None:
    server = serve(fake.silent(), fake.status(400))

    async def work(engine: OpenAIEngine) -> None:
        with pytest.raises(EngineError, match="HTTP 400"):
            await engine.generate(make_task("q", n=2))
        await engine.generate(make_task("q", n=2))  # its room is free again

    use(server, work, choices_per_request=1, max_concurrent=2)


def test_more_at_once_than_there_is_room_for(serve: Callable[..., Server]) -> None:
    error = failure(serve(), n=3, max_concurrent=2)
    assert (
        str(error) == "3 completions at once are more than max_concurrent, 2"
        and not error.retryable
    )


# ---- budget and pauses by themselves -------------------------------------------------------------


@given(limit=st.integers(0, 5), events=st.lists(st.booleans(), max_size=200))
def test_retries_never_outnumber_the_budget(limit: int, events: list[bool]) -> None:
    budget = RetryBudget(limit)
    retries = worked = 0
    for asks in events:
        if asks:
            retries += budget.take()
        else:
            budget.worked()
            worked += 1
        assert retries <= limit + worked / 10 + 1e-6
    assert limit == 0 or not events or retries > 0 or True not in events


@given(seed=st.integers(0, 99), retries=st.integers(0, 2000))
def test_pauses_are_bounded(seed: int, retries: int) -> None:
    pause = Pauses(generator=random.Random(seed)).seconds(retries)
    assert 0.0 <= pause <= min(LONGEST_PAUSE_SECONDS, 0.5 * 2.0 ** min(retries, 10))


def test_pauses_grow_and_differ() -> None:
    pauses = Pauses(generator=random.Random(0))
    means = [sum(pauses.seconds(retries) for _ in range(400)) / 400 for retries in range(6)]
    assert all(late > 1.6 * early for early, late in pairwise(means))
    assert len({pauses.seconds(3) for _ in range(10)}) == 10


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0.0),
        ("7", 7.0),
        (" 0 ", 0.0),
        ("Thu, 01 Jan 1970 00:01:10 GMT", 10.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("9" * 400, 999_999_999.0),
        ("soon", 0.0),
        ("-3", 0.0),
        ("", 0.0),
        ("٣", 0.0),
        ("Thu, 01 Jan 99999 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_in_all_its_forms(value: str | None, seconds: float) -> None:
    assert retry_after(value, now=60.0) == seconds


# ---- before any work -----------------------------------------------------------------------------


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


WHERE = "actors.teacher.engine_args"
LOCAL = "http://127.0.0.1:8000/v1"
BAD_ARGUMENTS = [
    ({}, f"{WHERE}.base_url is missing; expected a text"),
    (
        {"base_url": LOCAL, "max_conc": 2},
        f"{WHERE}.max_conc: unknown engine argument (did you mean 'max_concurrent'?)",
    ),
    (
        {"base_url": LOCAL, "api_key": KEY},
        f"{WHERE}.api_key: unknown engine argument (did you mean 'api_key_env'?)",
    ),
    (
        {"base_url": LOCAL, "max_concurrent": 0},
        f"{WHERE}.max_concurrent is 0; expected a whole number of at least 1 and at most 65536",
    ),
    (
        {"base_url": LOCAL, "timeout_seconds": 0},
        f"{WHERE}.timeout_seconds is 0; expected a number above 0.0 and at most 86400.0",
    ),
    (
        {"base_url": LOCAL, "api_key_env": KEY},
        f"{WHERE}.api_key_env names an environment variable that is not set",
    ),
    (
        {"base_url": "ftp://host"},
        f"{WHERE}.base_url is 'ftp://host'; expected an http or https address such as {LOCAL}",
    ),
    (
        {"base_url": "127.0.0.1:8000"},
        f"{WHERE}.base_url is '127.0.0.1:8000'; expected an http or https address such as {LOCAL}",
    ),
    (
        {"base_url": "http://[::1"},
        f"{WHERE}.base_url is 'http://[::1'; expected an http or https address such as {LOCAL}",
    ),
    (
        {"base_url": f"https://user:{KEY}@host/v1"},
        f"{WHERE}.base_url: expected an address without a user name, a password, '?' or '#'; "
        "a key comes from the environment, see api_key_env",
    ),
    (
        {"base_url": "http://example.org/v1"},
        f"{WHERE}.base_url is 'http://example.org/v1', which sends prompts and the key in the "
        "clear; expected https, or allow_insecure: true",
    ),
    (
        {"base_url": LOCAL, "extra_body": {"n": 3}},
        f"{WHERE}.extra_body.n cannot be set: it is the size of the group; see choices_per_request",
    ),
    (
        {"base_url": LOCAL, "extra_body": {"seed": 3}},
        f"{WHERE}.extra_body.seed is 3; expected null, which leaves it out of requests",
    ),
    (
        {"base_url": LOCAL, "extra_body": {"top_n": None}},
        (
            f"{WHERE}.extra_body.top_n is null; only fields that are sent anyway can be left out "
            "(did you mean 'top_p'?)"
        ),
    ),
]


@pytest.mark.parametrize(
    ("arguments", "sentence"), BAD_ARGUMENTS, ids=[sentence for _, sentence in BAD_ARGUMENTS]
)
def test_wrong_arguments(arguments: dict[str, Any], sentence: str) -> None:
    said = refusal(lambda: read_openai_arguments(arguments, "actors.teacher"))
    assert said == sentence and KEY not in said


@pytest.mark.parametrize(
    "url", [LOCAL, "http://localhost/v1/", "http://[::1]:1/v1", "https://api.example.org/v1"]
)
def test_good_addresses(url: str) -> None:
    assert read_openai_arguments({"base_url": url}, "actors.teacher").base_url == url


def test_the_key_comes_from_the_environment() -> None:
    default, named, none = (
        OpenAIArguments(base_url=LOCAL, **extra)
        for extra in ({}, {"api_key_env": "K"}, {"api_key_env": None})
    )
    environment = {"OPENAI_API_KEY": KEY, "K": " other\n"}
    assert [read_key(each, WHERE, environment) for each in (default, named, none)] == [
        KEY,
        "other",
        None,
    ]
    assert read_key(default, WHERE, {}) is None
    for broken in ("two words", "line\nbreak", "schlüssel"):
        said = refusal(lambda broken=broken: read_key(default, WHERE, {"OPENAI_API_KEY": broken}))
        assert "no key" in said and broken not in said


def topology(engine_args: dict[str, Any], **scheduler: Any) -> Topology:
    base = Topology(
        data=DataConfig(train="unused"),
        student=StudentConfig(model="unused"),
        teacher=TeacherConfig(model=MODEL),
        actors=ActorsConfig(teacher=ActorConfig(engine="openai", engine_args=engine_args)),
    )
    return msgspec.structs.replace(
        base, scheduler=msgspec.structs.replace(base.scheduler, **scheduler)
    )


def checked(whole: Topology) -> None:
    check_openai(teachers(whole)[0], whole.scheduler, whole.run)


def test_an_unanswered_request_must_end_before_its_lease_does() -> None:
    checked(topology({"base_url": LOCAL}))
    assert refusal(lambda: checked(topology({"base_url": LOCAL}, lease_seconds=200.0))) == (
        f"{WHERE}: timeout_seconds and retry_seconds are 260 together; expected less than 200, the "
        "scheduler.lease_seconds, after which the actor counts as stuck"
    )
    assert refusal(lambda: checked(topology({"base_url": LOCAL}, max_attempts=20))) == (
        f"{WHERE}: timeout_seconds and scheduler.max_attempts times retry_seconds are 1400 "
        "together; "
        "expected less than 600, the run.no_progress_seconds"
    )


def test_rollout_actors_are_refused_with_the_reason(serve: Callable[..., Server]) -> None:
    said = refusal(lambda: create(spec(serve(), served_as=student_of)))
    assert said.startswith(
        "actors.rollout.engine is 'openai', which serves teachers only: training needs the token "
        "ids"
    )


def test_the_server_is_asked_for_its_models_first(serve: Callable[..., Server]) -> None:
    server = serve(models=(MODEL, "small"))
    create(spec(server))
    create(spec(server, model="small"))
    said = refusal(lambda: create(spec(server, model="big-techer")))
    assert (
        said
        == f"{WHERE}.model: the server at {server.base_url} serves no 'big-techer' (did you mean '{MODEL}'?)"
    )
    assert refusal(lambda: create(spec(server, model="x"))).endswith(f"(it serves: {MODEL}, small)")
    hostile = serve(models=("\x1b]0;mine\x07",))
    said = refusal(lambda: create(spec(hostile, model="x")))
    assert said.endswith(r"serves no 'x' (it serves: \x1b]0;mine\x07)")
    create(spec(server, model="x", check_model=False))


def test_a_wrong_key_ends_the_run_before_it_begins(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(key="another")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert refusal(lambda: create(spec(server))) == (
        f"{WHERE}.api_key_env: the server at {server.base_url} asks for a key; expected the name "
        "of the environment variable that holds it (HTTP 401)"
    )
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = refusal(lambda: create(spec(server)))
    assert (
        said == f"{WHERE}.api_key_env: the server at {server.base_url} refuses the key (HTTP 401)"
    )


def test_an_address_without_its_version_is_recognised(serve: Callable[..., Server]) -> None:
    server = serve()
    url = server.base_url.removesuffix("/v1")
    assert refusal(lambda: create(spec(server, base_url=url))) == (
        f"{WHERE}.base_url is '{url}', which has no list of models (HTTP 404); expected the "
        "address up to the API's "
        "version, often /v1, or check_model: false for a server without a list"
    )


def test_a_server_that_is_not_there_ends_the_run(serve: Callable[..., Server]) -> None:
    with running(Server()) as server:
        pass
    said = refusal(lambda: create(spec(server)))
    assert said.startswith(
        f"{WHERE}.base_url is '{server.base_url}', where no server was ready within 0.1 s "
        "(ConnectError"
    )


def test_a_server_that_comes_up_is_waited_for(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zppo.plan.server.PAUSE_SECONDS", 0.001)
    server = serve()
    answers = iter([fake.status(503), fake.status(503), fake.model_list((MODEL,))])

    async def loading(request: fake.Request, writer: asyncio.StreamWriter) -> None:
        await next(answers)(request, writer)

    server.models_answer = loading
    create(spec(server, startup_seconds=60.0))


# ---- the plan ------------------------------------------------------------------------------------

MACHINE = Machine(cores=8, memory=64 << 30, shared=8 << 30)


def plan_of(small: Path, *overrides: str) -> Plan:
    served = (
        "teacher.model=org/big",
        "actors.teacher.engine=openai",
        f"actors.teacher.engine_args={{base_url: '{LOCAL}'}}",
    )
    return make_plan(load(small / "topology.yaml", (*served, *overrides)), 6, MACHINE)


def test_a_served_teacher_has_a_name_and_takes_no_device(small: Path) -> None:
    """Relative model paths are made absolute; a served name must stay as it is. No folder of that
    name exists."""
    plan = plan_of(small)
    assert plan.topology.teacher is not None and plan.topology.teacher.model == "org/big"
    threads = {entry.name: (entry.device, entry.threads) for entry in plan.processes}
    assert threads["teacher-0"] == ("", 1)
    assert threads["rollout-0"] == ("cpu", 4)  # the cores are shared with the trainer alone
    needs = dict(zip(threads, plan.needs, strict=True))
    assert needs["teacher-0"].host == CLIENT_LIBRARIES


def test_the_plan_refuses_what_cannot_work(small: Path) -> None:
    assert refusal(lambda: plan_of(small, "actors.rollout.engine=openai")).startswith(
        "actors.rollout.engine is 'openai'"
    )
    assert refusal(lambda: plan_of(small, "actors.teacher.engine_args.max_concurrent=2")) == (
        f"{WHERE}.max_concurrent is 2; expected at least 4, the method.teacher_group_size, because "
        "a group is sampled as a whole"
    )
    said = refusal(lambda: plan_of(small, f"actors.teacher.engine_args.api_key={KEY}"))
    assert said == f"{WHERE}.api_key: unknown engine argument (did you mean 'api_key_env'?)"
    assert "scheduler.lease_seconds" in refusal(
        lambda: plan_of(small, "scheduler.lease_seconds=100")
    )


# ---- the key goes nowhere else -------------------------------------------------------------------


def test_a_server_that_repeats_the_key_does_not_put_it_into_our_words(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echoes = [
        fake.status(400, said=f"bad key {KEY}"),
        fake.status(401, said=f"bad key {KEY}"),
        fake.stream(fake.event({"error": f"bad key {KEY}"})),
        fake.reply_with(json.dumps({"choices": KEY}).encode()),
    ]
    for echo in echoes:
        server = serve()
        server.default = echo
        error = failure(server, retry_seconds=0.01)
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        cause: BaseException | None = error
        while cause is not None:
            assert KEY not in str(cause)
            cause = cause.__cause__
    assert "a request failed" in caplog.text and KEY not in caplog.text


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Callable[[Topology], Stage]]:
    with ExitStack() as stack:

        def make(topology: Topology) -> Stage:
            stage = Stage(tmp_path, topology)
            stack.callback(stage.close)
            return stage

        yield make


def files_with(folder: Path, text: str) -> list[str]:
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and text.encode() in path.read_bytes()
    ]


@pytest.mark.slow
def test_teacher_actor_behind_a_server(
    stage: Callable[[Topology], Stage],
    serve: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(key=KEY)
    on = stage(topology({"base_url": server.base_url, "max_concurrent": 4}))
    on.start("teacher")
    assert on.next(Hello).capacity == 4
    on.send(Welcome(heartbeat_seconds=0.05))
    on.credits(4)
    on.send(make_task("question", n=3, task_id="a"))
    result = on.next(GenerateResult)
    assert (
        result.task_id == "a"
        and len(result.samples.texts) == 3
        and result.samples.written_tokens == 15
    )
    on.credits(3)
    while on.next(Heartbeat).progress != 15:
        pass
    server.answers = [fake.status(400, said=f"no, {KEY}")]
    on.send(make_task("question", n=1, task_id="b"))
    failed = on.next(TaskFailed)
    assert failed == TaskFailed(
        task_id="b", reason="the server answers HTTP 400: no, ***", retryable=False
    )
    on.credits(1)
    on.send(Shutdown(reason="done"))
    assert on.exit_code() == 0
    assert "a request failed: the server answers HTTP 400" in on.log()
    assert "HTTP Request" not in on.log()
    assert not files_with(tmp_path, KEY)


@pytest.mark.slow
def test_teacher_actor_with_a_wrong_key_says_so(
    stage: Callable[[Topology], Stage],
    serve: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(key="another")
    on = stage(topology({"base_url": server.base_url}))
    on.start("teacher")
    assert on.exit_code() == 2
    assert (
        on.log()
        == f"{WHERE}.api_key_env: the server at {server.base_url} refuses the key (HTTP 401)\n"
    )
    assert not files_with(tmp_path, KEY)
