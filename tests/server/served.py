"""Servers to talk to: a real process, and one in this process whose answers are scripted."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model

from qnext import LLM
from qnext.checkpoint import save_model
from qnext.hub import shipped_model
from qnext.server import ServerOptions, Service
from qnext.server.lifecycle import Serving, _config, listen
from qnext.text import default_template

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """``qnext serve`` as a user starts it, on a free port."""

    def __init__(self, *arguments: object, wait: bool = True) -> None:
        command = [sys.executable, "-m", "qnext", "serve", "--port", "0", *map(str, arguments)]
        self.child = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = self.says(r"listening on (\S+)\]")
        if wait:
            self.says(r"ready after [\d.]+ s: .* at \S+/v1")

    def _read(self) -> None:
        assert self.child.stderr is not None
        with self.child.stderr as stream:
            for line in stream:
                with self._news:
                    self.lines.append(line)
                    self._news.notify_all()

    def says(self, pattern: str, seconds: float = 280) -> str:
        """Wait for a line; its first group, or all that fits."""

        def found() -> re.Match[str] | None:
            return next((m for line in self.lines if (m := re.search(pattern, line))), None)

        with self._news:
            self._news.wait_for(lambda: found() or self.child.poll() is not None, seconds)
        match = found()
        assert match, "".join(self.lines)
        return match[1] if match.re.groups else match[0]

    def stop(self, seconds: float = 60) -> int:
        """SIGTERM; the exit code."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        try:
            code = self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            self.child.kill()
            code = self.child.wait()
        self._reader.join()
        return code


def tiny_folder(path: Path, template: str | None) -> Path:
    """A tiny random model with the words of the shipped one."""
    model = tiny_model(torch.bfloat16, vocab_size=8192, max_position_embeddings=2048)
    save_model(model, path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(shipped_model() / name, path / name)
    if template is not None:
        text = default_template(template).source()
        (path / "chat_template.jinja").write_text(text, encoding="utf-8")
    return path


class Scripted:
    """A server in this process. While ``script`` is set, every answer is that text.

    The engine runs as ever; a logits processor forbids all tokens but the script's next one.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        limits = {name: options.pop(name) for name in ("max_num_seqs",) if name in options}
        self.llm = LLM(folder, device="cpu", **limits)
        self.script: list[int] = []
        self.pause = 0.0
        defaults = self.llm.get_default_sampling_params()
        forced = defaults.replace(logits_processors=(self._force,))
        self.llm.get_default_sampling_params = lambda: forced  # type: ignore[method-assign]
        self.service = Service(ServerOptions(**{"port": 0, **options}))
        self.url = ""
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._started.wait(60)

    def say(self, text: str) -> None:
        """Answer with this text from now on."""
        assert self.llm.tokenizer is not None
        ids = self.llm.tokenizer.encode(text)
        self.script = [*ids, self.llm.engine.options.eos_token_ids[0]]

    @contextmanager
    def free(self) -> Iterator[None]:
        """Let the model say what it likes."""
        before, self.script = self.script, []
        yield
        self.script = before

    def _force(self, output_ids: Any, logits: torch.Tensor) -> torch.Tensor:
        if self.pause:
            time.sleep(self.pause)
        if not self.script:
            return logits
        token = self.script[min(len(output_ids), len(self.script) - 1)]
        only = torch.full_like(logits, -1e9)
        only[token] = 0.0
        return only

    async def _run(self) -> None:
        from qnext.engine.async_llm import AsyncLLM

        engine = AsyncLLM(self.llm)
        self.service.attach(engine)
        self.service.phase = "ready"
        with listen("127.0.0.1", 0) as sock:
            self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            self.server = Serving(_config(self.service), self.service)
            self._started.set()
            await self.server.serve(sockets=[sock])
        await engine.shutdown(drain=False)

    def stop(self) -> None:
        """End it and check the books."""
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.llm.engine.cache.check()
        assert not self.llm.engine.cache.leases
