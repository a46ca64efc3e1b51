"""The gateway: what becomes of a harness's request, and who is let in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import Server, running
from suite_helpers import CLOSING, knows

from zppo.plan.engines.openai import OpenAIArguments
from zppo.prompting.prompts import PromptSet
from zppo.suites.table import Decoding
from zppo_actors.suites.asked import AskedModel
from zppo_actors.suites.gateway import BadRequest, Gateway, Rewriter
from zppo_actors.suites.journal import Journal

REWRITER = Rewriter(PromptSet(), ["Answer briefly\\.", "You must use <answer> tags\\."], False)
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("sent", "asked"),
    [
        ([user("What?\nAnswer briefly.")], [user(f"What?\n\n{CLOSING}")]),
        (
            [{"role": "system", "content": [text("You must use <answer> tags.")]}, user("What?")],
            [user(f"What?\n\n{CLOSING}")],
        ),
        (
            [user([PICTURE, text("What?"), PICTURE])],
            [user([PICTURE, text(f"What?\n\n{CLOSING}"), PICTURE])],
        ),
        ([user([PICTURE, text("Answer briefly.")])], [user([PICTURE, text(CLOSING)])]),
        (
            [{"role": "system", "content": "You are kind."}, user("What?")],
            [{"role": "system", "content": "You are kind."}, user(f"What?\n\n{CLOSING}")],
        ),
    ],
)
def test_the_closing_instruction_takes_the_place_of_the_directives(sent: Any, asked: Any) -> None:
    assert REWRITER.asked(sent) == asked


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ([], "the harness asked an empty question"),
        ([user("Answer briefly.")], "the harness asked an empty question"),
        ([user("What?"), {"role": "assistant", "content": "x"}], "the harness asked an empty question"),
        ([user(None)], "the harness sent a message without content"),
    ],
)  # fmt: skip
def test_requests_that_ask_nothing(sent: Any, said: str) -> None:
    with pytest.raises(BadRequest) as error:
        REWRITER.asked(sent)
    assert str(error.value) == said


@given(st.text(max_size=60))
def test_an_answer_passes_whole_or_as_its_last_box(words: str) -> None:
    assert REWRITER.answered(words) == words
    final = Rewriter(PromptSet(), [], True)
    assert final.answered(f"{words} \\boxed{{B}}") == "B"
    assert final.answered("no box") == "no box"


def through(
    tmp_path: Path, ask: Callable[[Gateway, httpx2.AsyncClient], Any], server: Server
) -> Any:
    """What `ask` gets from a gateway before a model that knows one answer."""

    async def body() -> Any:
        arguments = OpenAIArguments(base_url=server.base_url, retry_seconds=0.2)
        journal = Journal(tmp_path / "a.jsonl")
        model = AskedModel("the model", "student", arguments, Decoding(), 0, journal)
        rewriter = Rewriter(PromptSet(), [], False)
        async with (
            Gateway(model, None, rewriter, lambda: None) as gateway,
            httpx2.AsyncClient() as http,
        ):
            got = await ask(gateway, http)
        await model.close()
        return got

    return asyncio.run(body())


async def post(gateway: Gateway, http: httpx2.AsyncClient, key: str, path: str, body: Any) -> int:
    reply = await http.post(
        gateway.address + path, json=body, headers={"Authorization": f"Bearer {key}"}
    )
    return reply.status_code


def test_who_is_let_in(tmp_path: Path) -> None:
    body = {"messages": [user("1+1")]}

    async def ask(gateway: Gateway, http: httpx2.AsyncClient) -> list[int]:
        return [
            await post(gateway, http, key, path, body)
            for key, path in [
                ("wrong", "/v1/chat/completions"), (gateway.key, "/v1/elsewhere"),
                (gateway.key, "/judge/v1/chat/completions"), (gateway.key, "/v1/chat/completions"),
            ]
        ]  # fmt: skip

    with running(Server(models=("student",))) as server:
        server.default = knows({"1+1": "\\boxed{2}"})
        assert through(tmp_path, ask, server) == [401, 404, 400, 200]
        assert len(server.requests) == 1


def test_the_same_question_twice_has_two_answers_and_two_seeds(tmp_path: Path) -> None:
    body = {"messages": [user("1+1")]}

    async def ask(gateway: Gateway, http: httpx2.AsyncClient) -> None:
        for _ in range(2):
            await post(gateway, http, gateway.key, "/v1/chat/completions", body)

    with running(Server(models=("student",))) as server:
        server.default = knows({"1+1": "\\boxed{2}"})
        through(tmp_path, ask, server)
        assert len({request.body["seed"] for request in server.requests}) == 2
        through(tmp_path, ask, server)  # from the journal
        assert len(server.requests) == 2


def test_the_first_trouble_is_kept_and_ends_everything(tmp_path: Path) -> None:
    async def ask(gateway: Gateway, http: httpx2.AsyncClient) -> tuple[list[int], str]:
        codes = [
            await post(gateway, http, gateway.key, "/v1/chat/completions", {"messages": messages})
            for messages in ([], [user("1+1")])
        ]
        return codes, str(gateway.trouble.result())

    with running(Server(models=("student",))) as server:
        codes, said = through(tmp_path, ask, server)
        assert (codes, said) == ([400, 400], "the harness asked an empty question")
        assert server.requests == []


def test_a_stranger_is_sent_away_before_a_body_is_read(tmp_path: Path) -> None:
    async def ask(gateway: Gateway, http: httpx2.AsyncClient) -> bytes:
        host, _, port = gateway.address.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n")
        try:
            return await asyncio.wait_for(reader.read(), 600)
        finally:
            writer.close()

    with running(Server(models=("student",))) as server:
        assert through(tmp_path, ask, server).startswith(b"HTTP/1.1 401 ")


def test_what_goes_wrong_here_is_not_taken_for_the_harness_going_away(tmp_path: Path) -> None:
    body = {"messages": [user("1+1")]}

    async def ask(gateway: Gateway, http: httpx2.AsyncClient) -> tuple[int, Exception]:
        gateway._model._journal.close()  # what a disk does that is full: nothing can be written
        code = await post(gateway, http, gateway.key, "/v1/chat/completions", body)
        return code, gateway.trouble.result()

    with running(Server(models=("student",))) as server:
        server.default = knows({"1+1": "\\boxed{2}"})
        code, error = through(tmp_path, ask, server)
        assert (code, str(error)) == (400, "write to closed file")
