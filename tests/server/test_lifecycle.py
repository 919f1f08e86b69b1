"""Start, drain and stop of a real process."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
from served import Process

LONG = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True, "seed": 1}


def test_phases_are_told_with_their_times(process: Process):
    text = "".join(process.lines)
    places = [
        text.index(p) for p in ("[listening on ", "[loaded in ", "[warmed up in ", "[ready after ")
    ]
    assert places == sorted(places)


def test_a_server_that_loads_is_healthy_and_not_ready(base_folder: Path):
    server = Process(base_folder, wait=False)
    try:
        with httpx.Client(base_url=server.url) as http:
            first = http.get("/ready")
            assert http.get("/health").status_code == 200
            assert first.status_code == 503
            assert first.headers["retry-after"]
            early = http.post("/v1/completions", json={"prompt": "x"})
            assert (early.status_code, early.json()["error"]["code"]) == (503, "not_ready")
            server.says("ready after")
            assert http.get("/ready").status_code == 200

        lines: list[str] = []

        def read() -> None:
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json=LONG, timeout=120
            ) as answer:
                lines.extend(line for line in answer.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        while not lines:
            time.sleep(0.01)
        server.child.send_signal(signal.SIGTERM)
        reader.join()
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health")
        assert server.child.wait(60) == 0
        assert any("drained" in line for line in server.lines)
    finally:
        server.stop()


def test_a_second_signal_stops_at_once(base_folder: Path):
    server = Process(base_folder)
    try:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
            next(answer.iter_lines())
            for one in (signal.SIGTERM, signal.SIGINT):  # of the same kind, two may become one
                server.child.send_signal(one)
            server.says("stopping", 20)
        assert server.child.wait(30) == 0
    finally:
        server.stop()
