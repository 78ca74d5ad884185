"""Who gets in, and what happens to requests that are too many, too large, too slow, or in the way of a shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import time

import aiohttp
import pytest

from contrib.serving.options import Limits
from tests.contrib.serving.conftest import Serve, Site, WritingVLLM

QUESTION = {"question": "Where does the Danube flow?"}
CLAIMS = {"testbed": "truthfulQA", "claims": [{"question": "Is fire hot?", "choice": "Yes"}]}
TOKEN = "planted-token-0123456789"


async def raw(site: Site, *pieces: bytes, pause: float = 0.0) -> tuple[int, dict[str, str], bytes]:
    """Send bytes as they are; (status, headers, body) of the first answer, 0 where the connection was closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    try:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:] if line)}
            length = headers.get("content-length")
            body = await (reader.read() if length is None else reader.readexactly(int(length)))
        return int(lines[0].split()[1]), headers, body
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0, {}, b""
    finally:
        writer.close()


def post(body: bytes, *headers: bytes, path: bytes = b"/query") -> bytes:
    kind = b"" if any(h.lower().startswith(b"content-type") for h in headers) else b"Content-Type: application/json\r\n"
    length = b"" if any(b"ength" in h or b"ncoding" in h for h in headers) else b"Content-Length: %d\r\n" % len(body)
    return b"POST %b HTTP/1.1\r\nHost: x\r\n%b%b%b\r\n%b" % (
        path,
        kind,
        length,
        b"".join(h + b"\r\n" for h in headers),
        body,
    )


# ---- probes


async def test_health_answers_before_the_model_does_and_ready_does_not(serve: Serve, model: WritingVLLM) -> None:
    async with serve(ready=False, url="http://127.0.0.1:9") as site:
        assert (await site.get("/health"))[0] == 200
        status, problem = await site.get("/ready")
        assert status == 503
        assert "127.0.0.1" not in problem, "where the model is is nobody's business"
        status, answer = await site.post("/query", QUESTION)
        assert (status, answer["error"]) == (503, "the model is not ready")
        assert "icm_serving_ready 0.0" in (await site.get("/metrics"))[1]


async def test_ready_means_that_the_model_writes(serve: Serve, model: WritingVLLM) -> None:
    async with serve(Limits(canary_seconds=0.3)) as site:
        status, text = await site.get("/ready")
        assert (status, json.loads(text)["model"]) == (200, model.model)
        assert "icm_serving_ready 1.0" in (await site.get("/metrics"))[1]
        model.latency = 60.0
        await asyncio.sleep(1.05)  # the last canary's answer holds for a second
        assert (await site.get("/ready"))[0] == 503
        assert (await site.get("/health"))[0] == 200
        model.latency = 0.0
        await site.until_ready()


async def test_many_probers_cost_one_canary(serve: Serve, model: WritingVLLM) -> None:
    async with serve() as site:
        await asyncio.sleep(1.05)
        model.latency, before = 0.1, len(model.prompts)
        assert {status for status, _ in await asyncio.gather(*(site.get("/ready") for _ in range(20)))} == {200}
        assert len(model.prompts) == before + 1


async def test_another_model_at_the_same_place_is_found(serve: Serve, model: WritingVLLM) -> None:
    async with serve() as site:
        name, model.model = model.model, "another"
        await asyncio.sleep(1.05)
        assert (await site.get("/ready"))[0] == 503
        model.model = name
        await site.until_ready()
        assert (await site.post("/score", CLAIMS))[0] == 200


async def test_health_fails_when_the_own_model_server_has_ended(serve: Serve) -> None:
    alive = True
    async with serve(alive=lambda: alive) as site:
        assert (await site.get("/health"))[0] == 200
        alive = False
        assert (await site.get("/health"))[0] == 503


# ---- the token


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, f"Basic {TOKEN}", "Bearer é"],
)
async def test_without_the_token_nothing_but_probes_is_answered(
    serve: Serve, model: WritingVLLM, header: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {} if header is None else {"Authorization": header}
    async with serve(token=TOKEN) as site:
        for path, body in (("/query", QUESTION), ("/score", CLAIMS)):
            async with site.web.post(site.url + path, json=body, headers=headers) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/metrics", "/openapi.json", "/nothing"):
            assert (await site.get(path, headers=headers))[0] == 401
        for path in ("/health", "/ready"):
            assert (await site.get(path, headers=headers))[0] == 200
        assert all("Question:" not in prompt for prompt in model.prompts)
    assert TOKEN not in caplog.text


async def test_the_token_opens_and_is_never_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with caplog.at_level(logging.DEBUG, logger="contrib"), caplog.at_level(logging.DEBUG, logger="uvicorn"):
        async with serve(token=TOKEN) as site:
            assert (await site.post("/query", QUESTION, headers=headers))[0] == 200
            assert (await site.get("/metrics", headers=headers))[0] == 200
            assert (await site.get("/metrics", headers={"Authorization": f"bearer {TOKEN}"}))[0] == 200
            assert (await site.get(f"/metrics?token={TOKEN}"))[0] == 401
    assert "POST /query 200" in caplog.text
    assert TOKEN not in caplog.text


# ---- size, time, kind


async def test_a_body_over_the_limit_is_refused_by_its_announced_length(serve: Serve) -> None:
    async with serve(Limits(body_bytes=1_000)) as site:
        status, headers, body = await raw(site, post(b"", b"Content-Length: 999999999999999999999999999"))
        assert status in (400, 413)  # a length of 27 digits is refused by the HTTP library itself
        begin = time.monotonic()
        status, headers, body = await raw(site, post(b"", b"Content-Length: 1001", b"Expect: 100-continue"))
        assert status == 413, "told before it sends anything"
        assert time.monotonic() - begin < 1
        status, headers, body = await raw(site, post(b"{" * 1001))
        assert (status, headers["connection"]) == (413, "close")
        assert b"larger than 1000 bytes" in body


async def test_a_body_that_announces_nothing_is_counted(serve: Serve) -> None:
    async with serve(Limits(body_bytes=1_000)) as site:
        chunks = [b"1f4\r\n" + b" " * 500 + b"\r\n"] * 3
        status, *_ = await raw(site, post(b"", b"Transfer-Encoding: chunked"), *chunks)
        assert status == 413


async def test_a_large_body_is_refused_to_an_ordinary_client(serve: Serve) -> None:
    async with serve() as site:
        body = io.BytesIO(json.dumps({"question": "x" * 3_000_000}).encode())
        headers = {"Content-Type": "application/json"}
        async with site.web.post(site.url + "/query", data=body, headers=headers) as response:
            assert response.status == 413
            assert (await response.json())["error"]


async def test_a_body_that_trickles_in_is_given_up(serve: Serve) -> None:
    async with serve(Limits(body_seconds=0.3, concurrent=1)) as site:
        status, *_ = await raw(site, post(b"", b"Content-Length: 50"), b" ", b" ", pause=0.05)
        assert status == 408
        assert (await site.post("/query", QUESTION))[0] == 200, "its place is free again"


async def test_an_answer_that_takes_too_long_is_given_up_and_the_model_stops(serve: Serve, model: WritingVLLM) -> None:
    async with serve(Limits(request_seconds=0.3)) as site:
        model.latency = 60.0
        status, problem = await site.post("/query", QUESTION)
        assert (status, problem["error"]) == (504, "no answer within 0.3 s")
        await gone(model)


async def gone(model: WritingVLLM) -> None:
    async with asyncio.timeout(5):
        while model.in_flight:
            await asyncio.sleep(0.02)


async def test_a_client_that_leaves_stops_its_question(serve: Serve, model: WritingVLLM) -> None:
    async with serve() as site:
        model.latency = 60.0
        with pytest.raises(TimeoutError):
            await site.post("/query", QUESTION, timeout=aiohttp.ClientTimeout(total=0.3))
        await gone(model)
        assert 'requests_refused_total{reason="left"} 1.0' in (await site.get("/metrics"))[1]


DEEP = b"[" * 100_000
HOSTILE = {
    "no JSON": (400, post(b"question")),
    "half JSON": (400, post(b'{"question": "x"')),
    "nothing": (422, post(b"")),
    "deep lists": (400, post(DEEP)),
    "deep objects": (400, post(b'{"question":' * 50_000)),
    "a number of 9,000 digits": (400, post(b'{"question": "x", "passages": ' + b"9" * 9_000 + b"}")),
    "no UTF-8": (400, post(b'{"question": "\xff\xfe"}')),
    "half a character": (422, post(b'{"question": "\\ud800"}')),
    "half a character as a name": (422, post(b'{"question": "x", "\\udfff": 1}')),
    "NaN": (422, post(b'{"question": NaN}')),
    "NaN as a number": (422, post(b'{"question": "x", "passages": NaN}')),
    "infinity": (422, post(b'{"question": "x", "max_tokens": -Infinity}')),
    "1e400": (422, post(b'{"question": "x", "max_tokens": 1e400}')),
    "a truth value as a number": (422, post(b'{"question": "x", "passages": true}')),
    "a list": (422, post(b'["question"]')),
    "a huge name": (422, post(b'{"question": "x", "' + b"n" * 500_000 + b'": 1}')),
    "many names": (422, post(b'{"question": "x"' + b"".join(b', "n%d": 1' % n for n in range(50_000)) + b"}")),
    "a form": (415, post(b"question=x", b"Content-Type: application/x-www-form-urlencoded")),
    "no content type": (415, post(b'{"question": "x"}', b"Content-Type:")),
    "text": (415, post(b'{"question": "x"}', b"Content-Type: text/plain")),
    "a file": (415, post(b"--b\r\n\r\n--b--", b"Content-Type: multipart/form-data; boundary=b")),
    "no HTTP": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n"),
    "two lengths": (400, post(b"{}", b"Content-Length: 2", b"Content-Length: 3")),
    "another path": (404, post(b"{}", path=b"/queries")),
    "a path out of here": (404, post(b"{}", path=b"/../../etc/passwd")),
    "a path of 8,000 characters": (404, post(b"{}", path=b"/" + b"q" * 8_000)),
    "another method": (405, b"DELETE /query HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a body to a probe": (405, post(b"{}", path=b"/health")),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_input_gets_a_reason_and_never_a_500(serve: Serve, name: str) -> None:
    expected, request = HOSTILE[name]
    async with serve(ready=False) as site:
        status, headers, body = await raw(site, request)
        assert status == expected, (status, body)
        assert len(body) < 12_000
        if headers.get("content-type") == "application/json":
            assert json.loads(body)["error"]
        else:
            assert body, "the HTTP library's own words"
        assert (await site.get("/health"))[0] == 200


async def test_a_header_without_end_is_cut_off(serve: Serve) -> None:
    async with serve(ready=False) as site:
        status, *_ = await raw(site, b"POST /query HTTP/1.1\r\nHost: x\r\nX-Padding: " + b"x" * 1_000_000)
        assert status in (0, 400), "0: it was closed while the header still came"
        assert (await site.get("/health"))[0] == 200


async def test_an_error_that_nobody_foresaw_shows_nothing_of_itself(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("planted detail")

    monkeypatch.setattr("contrib.serving.answering.answer", broken)
    async with serve() as site:
        status, problem = await site.post("/query", QUESTION)
    assert (status, problem) == (500, {"error": "internal error", "details": []})
    assert "planted detail" in caplog.text


# ---- how many at once


async def test_one_too_many_is_told_when_to_come_back(serve: Serve, model: WritingVLLM) -> None:
    async with serve(Limits(concurrent=2)) as site:
        model.latency = 0.5
        asking = [asyncio.create_task(site.post("/query", QUESTION)) for _ in range(2)]
        await asyncio.sleep(0.2)
        async with site.web.post(site.url + "/score", json=CLAIMS) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
            assert "2 requests" in (await response.json())["error"]
        assert (await site.get("/health"))[0] == 200
        assert (await site.get("/ready"))[0] == 200
        assert "icm_serving_requests_in_flight 2.0" in (await site.get("/metrics"))[1]
        assert [status for status, _ in await asyncio.gather(*asking)] == [200, 200]
        model.latency = 0.0
        assert (await site.post("/query", QUESTION))[0] == 200


async def test_a_flood_never_works_on_more_than_the_limit(serve: Serve, model: WritingVLLM) -> None:
    async with serve(Limits(concurrent=4)) as site:
        model.latency, model.max_in_flight = 0.02, 0
        answers = await asyncio.gather(*(site.post("/query", QUESTION) for _ in range(100)))
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 429}
        assert model.max_in_flight <= 4
        metrics = (await site.get("/metrics"))[1]
        assert f'requests_refused_total{{reason="busy"}} {statuses.count(429)}.0' in metrics
        assert "icm_serving_requests_in_flight 0.0" in metrics


async def test_visitors_make_no_new_series(serve: Serve) -> None:
    async with serve() as site:
        for path in ("/a", "/b", "/query/c", "/%00"):
            await site.get(path)
        metrics = (await site.get("/metrics"))[1]
    assert 'icm_serving_requests_total{route="other",status="404"} 4.0' in metrics


# ---- shutdown


async def test_what_is_at_work_may_finish(serve: Serve, model: WritingVLLM) -> None:
    async with serve(Limits(shutdown_seconds=10)) as site:
        model.latency = 0.3
        asking = asyncio.create_task(site.post("/query", QUESTION))
        await asyncio.sleep(0.1)
        site.server.should_exit = True
        status, answer = await asking
        assert status == 200
        assert answer["answer"] == "Through ten countries."


async def test_what_does_not_finish_in_time_is_told_so(serve: Serve, model: WritingVLLM) -> None:
    async with serve(Limits(shutdown_seconds=0.5)) as site:
        model.latency = 60.0
        asking = asyncio.create_task(site.post("/query", QUESTION))
        await asyncio.sleep(0.2)
        begin = time.monotonic()
        site.server.should_exit = True
        status, problem = await asking
        assert (status, problem["error"]) == (503, "the server was stopped")
        assert time.monotonic() - begin < 3
        await gone(model)


async def test_a_draining_application_is_not_ready_and_takes_nothing_new(serve: Serve, model: WritingVLLM) -> None:
    async with serve(Limits(shutdown_seconds=5)) as site:
        site.guard.drain()
        assert (await site.get("/ready"))[0] == 503
        assert (await site.get("/health"))[0] == 200
        async with site.web.post(site.url + "/query", json=QUESTION) as response:
            assert response.status == 503
            assert response.headers["Retry-After"]
