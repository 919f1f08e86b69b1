"""``qnext serve``: what cannot start says why. A server that runs: tests/server/."""

from __future__ import annotations

import socket

import pytest


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["/no/folder"], 1, "no folder '/no/folder'"),
        (["--api-key-file", "/no/file"], 2, "key file"),
        (["--api-key", "sha256:1"], 2, "64 hexadecimal digits"),
    ],
)
def test_a_server_that_cannot_start_says_why(qnext, arguments, code, says):
    done = qnext("serve", "--port", "0", *arguments)
    assert done.code == code
    assert says in done.err


def test_a_taken_port_is_told(qnext):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = qnext("serve", "--port", taken.getsockname()[1])
    assert done.code == 2
    assert "cannot listen" in done.err
    assert "--port" in done.err
