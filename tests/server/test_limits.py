"""Keys, hosts, sizes, queues, and clients that leave."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from served import Scripted, tiny_folder

from qnext.errors import ConfigError, EngineError
from qnext.server.errors import error_response
from qnext.server.options import ServerOptions, key_digest, read_keys


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    """A base model behind two keys, with room for one running and one waiting sequence."""
    path = tmp_path_factory.mktemp("guarded")
    (path / "keys").write_text(
        f"# one plain, one hashed\nkey-one\nsha256:{hashlib.sha256(b'key-two').hexdigest()}\n"
    )
    found = Scripted(
        tiny_folder(path / "base", None),
        max_num_seqs=1,
        max_queue=1,
        key_digests=read_keys(path / "keys"),
        allowed_origins=("https://page.example",),
        max_seconds=5.0,
        body_seconds=1.0,
    )
    yield found
    found.stop()


def values(text: str) -> dict[str, float]:
    """Sums over labels of all samples."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_both_keys_open_and_no_other(guarded: Scripted):
    for headers, status in (
        ({"Authorization": "Bearer key-one"}, 200),
        ({"Authorization": "bearer key-two"}, 200),
        ({"x-api-key": "key-two"}, 200),
        ({"Authorization": "Bearer key-three"}, 401),
        ({"Authorization": "Basic key-one"}, 401),
        ({}, 401),
    ):
        answer = httpx.get(f"{guarded.url}/v1/models", headers=headers)
        assert answer.status_code == status
        if status == 401:
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{guarded.url}/metrics").status_code == 401
    assert httpx.get(f"{guarded.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{guarded.url}/ready").status_code == 200


def test_only_digests_of_keys_are_kept(guarded: Scripted):
    kept = repr(guarded.service.options)
    assert "key-one" not in kept
    assert "key-two" not in kept
    for wrong in ("", "sha256:12", "sha256:xyz"):
        with pytest.raises(ConfigError):
            key_digest(wrong)


def test_pages_may_call_only_from_the_origin_that_was_named(guarded: Scripted):
    def ask(origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return httpx.options(f"{guarded.url}/v1/completions", headers=headers)

    assert ask("https://page.example").headers["access-control-allow-origin"]
    assert "access-control-allow-origin" not in ask("https://other.example").headers


def test_a_name_that_resolves_here_is_not_enough(process):
    def ask(host: str) -> int:
        return httpx.get(f"{process.url}/health", headers={"Host": host}).status_code

    assert [ask(h) for h in ("localhost:80", "127.0.0.1", "[::1]:1", "LOCALHOST")] == [200] * 4
    assert [ask(h) for h in ("evil.example", "localhost.evil.example", "")] == [403] * 3
    assert ServerOptions(host="0.0.0.0").hosts is None
    assert "proxy" in (ServerOptions(allowed_hosts=("proxy",)).hosts or ())


def test_bodies_are_bounded_and_must_be_json(process):
    url = f"{process.url}/v1/completions"
    large = httpx.post(url, json={"prompt": "x" * 100_001})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    chunked = httpx.post(url, content=iter([b"x" * 60_000] * 2))
    assert chunked.status_code == 413
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}"):
        answer = httpx.post(url, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    deep = b'{"prompt": ' + b"[" * 40_000
    headers = {"Content-Type": "application/json"}
    assert httpx.post(url, content=deep, headers=headers).status_code == 400
    plain = httpx.post(url, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 400
    lone = httpx.post(
        url, content=b'{"prompt": "\\ud800x", "max_tokens": 1, "echo": true}', headers=headers
    )
    assert lone.status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(guarded: Scripted):
    host, port = guarded.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer key-one\r\n"
        "Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{"
    )
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(head.encode())
        answer = b"".join(iter(lambda: line.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()


def test_a_base_model_says_that_it_cannot_chat(guarded: Scripted):
    with (
        OpenAI(base_url=f"{guarded.url}/v1", api_key="key-one") as client,
        pytest.raises(openai.BadRequestError) as failure,
    ):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}])
    assert failure.value.code == "no_chat_template"
    assert "/v1/completions" in failure.value.message
    assert "tmp" not in failure.value.message


def test_a_full_queue_says_when_to_come_back(guarded: Scripted):
    guarded.pause = 0.05
    headers = {"Authorization": "Bearer key-one"}
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}
    url = f"{guarded.url}/v1/completions"
    done: list[int] = []

    def ask() -> None:
        done.append(httpx.post(url, json=body, headers=headers, timeout=60).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while guarded.service.loaded.admission.num_open < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    refused = httpx.post(url, json=body, headers=headers)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    for thread in threads:
        thread.join()
    guarded.pause = 0.0
    assert set(done) <= {200, 504}
    assert guarded.service.loaded.admission.num_open == 0


def test_a_request_ends_at_the_time_limit(guarded: Scripted):
    guarded.pause = 0.05
    headers = {"Authorization": "Bearer key-one"}
    body = {"prompt": "y", "max_tokens": 1000, "ignore_eos": True}
    whole = httpx.post(f"{guarded.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    with (
        OpenAI(base_url=f"{guarded.url}/v1", api_key="key-one", max_retries=0) as client,
        pytest.raises(openai.APIError, match="longer"),
    ):
        for _ in client.completions.create(
            model="base", prompt="y", max_tokens=1000, stream=True,
            extra_body={"ignore_eos": True},
        ):  # fmt: skip
            pass
    guarded.pause = 0.0
    idle(guarded)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(guarded: Scripted, stream):
    guarded.pause = 0.02
    before = guarded.llm.stats.num_aborted
    headers = {"Authorization": "Bearer key-one"}
    body = {"prompt": "z", "max_tokens": 1000, "ignore_eos": True, "stream": stream}
    url = f"{guarded.url}/v1/completions"
    if stream:
        with httpx.stream("POST", url, json=body, headers=headers) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, headers=headers, timeout=0.5)
    idle(guarded)
    guarded.pause = 0.0
    assert guarded.llm.stats.num_aborted == before + 1


def idle(server: Scripted) -> None:
    """The engine has nothing to do, soon."""
    deadline = time.monotonic() + 3
    while server.llm.engine.has_work or server.service.loaded.admission.num_open:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_prometheus_reads_what_happened(process):
    before = values(httpx.get(f"{process.url}/metrics").text)
    body = {"prompt": "Counting is", "max_tokens": 5, "ignore_eos": True}
    assert httpx.post(f"{process.url}/v1/completions", json=body, timeout=60).status_code == 200
    after = values(httpx.get(f"{process.url}/metrics").text)

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert gained("vllm:generation_tokens_total") == 5
    assert gained("vllm:prompt_tokens_total") == gained("vllm:prefix_cache_queries_total") == 3
    assert gained("vllm:request_success_total") == 1
    assert gained("vllm:e2e_request_latency_seconds_count") == 1
    assert gained("vllm:time_to_first_token_seconds_count") == 1
    assert gained("qnext:http_requests_total") == 2
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1


def test_what_is_unforeseen_is_told_without_its_details():
    for error, status in (
        (ZeroDivisionError("/secret/path"), 500),
        (EngineError("failed: /secret/path"), 503),
        (OSError(2, "No such file", "/secret/path"), 500),
    ):
        answer = error_response(error)
        assert answer.status_code == status
        assert b"secret" not in answer.body
    assert json.loads(error_response(ValueError("x"), "/v1/messages").body)["type"] == "error"
