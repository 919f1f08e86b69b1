"""One process with the shipped model and one scripted server for all tests of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from served import ROOT, Process, Scripted, tiny_folder


@pytest.fixture(scope="session")
def process() -> Iterator[Process]:
    """``qnext serve`` with the shipped model and a chat template."""
    template = ROOT / "qnext/text/templates/instruct.jinja"
    found = Process("--chat-template", template, "--max-body-bytes", 100_000, "--max-n", 4)
    yield found
    assert found.stop() == 0


@pytest.fixture(scope="session")
def client(process: Process) -> Iterator[OpenAI]:
    """OpenAI's client of it."""
    with OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    """A scripted server of a model that thinks and calls tools."""
    found = Scripted(tiny_folder(tmp_path_factory.mktemp("tiny") / "thinker", "thinking"))
    yield found
    found.stop()


@pytest.fixture(scope="session")
def thinker_client(thinker: Scripted) -> Iterator[OpenAI]:
    """OpenAI's client of it."""
    with OpenAI(base_url=f"{thinker.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model."""
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "base", None)
