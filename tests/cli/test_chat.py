"""chat: the conversation with a scripted model, and the real thing on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qnext.cli.chat import Conversation
from qnext.engine.stats import EngineStats
from qnext.errors import RequestError
from qnext.hub import shipped_model
from qnext.text import ChatTemplate, Tokenizer, default_template


class ScriptedLLM:
    """Says what it is told to; everything else is real."""

    max_model_len = 1000

    def __init__(self, folder: Path, *answers: list[str]) -> None:
        self.model_path, self.stats = folder, EngineStats()
        self.tokenizer = Tokenizer.from_pretrained(shipped_model())
        self.answers, self.prompts = list(answers), []

    def render_chat(self, messages, **options):
        return ChatTemplate.from_pretrained(self.model_path).render(messages, **options)

    def stream(self, prompt, params):
        self.prompts.append(prompt)
        if len(prompt) > 2000:
            raise RequestError("the prompt is too long", hint="say less")
        return self._deltas(self.answers.pop(0))

    def _deltas(self, pieces):
        for piece in pieces:
            if piece == "^C":
                raise KeyboardInterrupt
            self.stats.num_generated_tokens += 1
            yield SimpleNamespace(text=piece)


def folder_with(tmp_path: Path, kind: str | None) -> Path:
    if kind is not None:
        (tmp_path / "chat_template.jinja").write_text(default_template(kind).source())
    return tmp_path


def test_answers_and_history(tmp_path, capsys):
    llm = ScriptedLLM(folder_with(tmp_path, "instruct"), ["He", "llo."], ["Bye", "."])
    talk = Conversation(llm, None, "Be brief.")
    talk.say("Hi")
    out, err = capsys.readouterr()
    assert out == "Hello.\n"
    assert re.fullmatch(r"\[context \d+ of 1,000 tokens, \d+%\] \[2 tokens\]\n", err)
    talk.say("And now?")
    assert capsys.readouterr().out == "Bye.\n"
    first, second = llm.prompts
    assert "Be brief." in first
    assert first.endswith("<|im_start|>assistant\n")
    assert second.index("Hi") < second.index("Hello.") < second.index("And now?")
    talk.command("/undo")
    assert "Bye." not in talk.prompt()
    assert "Hello." in talk.prompt()
    talk.command("/undo")
    talk.command("/undo")
    assert talk.prompt() == ""
    assert "(nothing to take back)" in capsys.readouterr().err
    assert "Be brief." in talk.prompt("Hi")


def test_thinking_is_shown_apart_and_not_kept(tmp_path, capsys):
    answer = ["let me ", "see</th", "ink>\n\nIt is ", "four."]
    llm = ScriptedLLM(folder_with(tmp_path, "thinking"), answer, ["Yes."])
    talk = Conversation(llm, None)
    talk.say("2 + 2?")
    assert capsys.readouterr().out == "[thinking] let me see\n[answer] It is four.\n"
    assert talk.exchanges == [("2 + 2?", "It is four.")]
    talk.say("Sure?")
    assert "let me see" not in llm.prompts[1]


def test_ctrl_c_keeps_what_was_said(tmp_path, capsys):
    llm = ScriptedLLM(folder_with(tmp_path, "instruct"), ["One ", "two", "^C", " three"])
    talk = Conversation(llm, None)
    talk.say("Count")
    assert capsys.readouterr().out == "One two [stopped]\n"
    assert talk.exchanges == [("Count", "One two")]


def test_ctrl_c_while_the_answer_is_written_counts_too(tmp_path, monkeypatch):
    llm = ScriptedLLM(folder_with(tmp_path, None), ["One ", "two", " three"])
    talk, written = Conversation(llm, None), []

    def write(text):
        written.append(text)
        if text == "two":
            raise KeyboardInterrupt

    monkeypatch.setattr("qnext.cli.session.write", write)
    talk.say("Count")
    assert written == ["One ", "two", " [stopped]", "\n"]
    assert talk.exchanges == [("Count", "One two")]


def test_a_message_that_does_not_fit_is_not_kept(tmp_path, capsys):
    llm = ScriptedLLM(folder_with(tmp_path, "instruct"), ["Fine."])
    talk = Conversation(llm, None)
    talk.say("word " * 1000)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "qnext: the prompt is too long\nhint: say less\n")
    talk.say("word")
    assert talk.exchanges == [("word", "Fine.")]


def test_a_base_model_continues_the_text(tmp_path, capsys):
    llm = ScriptedLLM(folder_with(tmp_path, None), [" sat", "."], [" slept."])
    talk = Conversation(llm, None)
    talk.say("The cat")
    talk.say("Then it")
    assert llm.prompts == ["The cat", "The cat sat.\nThen it"]
    assert capsys.readouterr().out == " sat.\n slept.\n"
    talk.command("/clear")
    assert talk.prompt("New") == "New"


def test_commands_are_explained(tmp_path, capsys):
    talk = Conversation(ScriptedLLM(folder_with(tmp_path, None)), None)
    talk.command("/help")
    talk.command("/context")
    err = capsys.readouterr().err
    assert all(name in err for name in ("/clear", "/undo", "/context", "/quit"))
    assert "[context 0 of 1,000 tokens, 0%]" in err


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._end, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qnext", *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=cwd,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        )
        os.close(other)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Everything up to and with the pattern, which is then forgotten."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            ready = select.select([self._end], [], [], max(0, end - time.monotonic()))[0]
            if not ready:
                pytest.fail(f"no {pattern!r} in {self.seen!r}")
            try:
                self.seen += os.read(self._end, 4096).decode(errors="replace")
            except OSError:
                pytest.fail(f"ended without {pattern!r}: {self.seen!r}")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


def test_two_turns_and_a_stopped_answer_on_a_terminal(repository):
    with Terminal("chat", "--max-tokens", "2000", cwd=repository) as terminal:
        start = terminal.wait_for("> $")
        assert "A base model without a chat template" in start
        terminal.type("/context\n")
        terminal.wait_for(r"\[context 0 of 8,192 tokens, 0%\].*> $")
        terminal.type("The kernel is\n")
        terminal.wait_for(r"The kernel is\r\n.{20}")
        os.kill(terminal.process.pid, signal.SIGINT)
        first = terminal.wait_for(r"\[stopped\].*\[context (\d+) of .*\n> $")
        assert "tokens/s" in first
        terminal.type("/undo\n")
        terminal.wait_for(r"taken back.*> $")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for(r"\(Ctrl-D leaves\).*> $")
        terminal.type("A \\\n")
        terminal.wait_for(r"\. $")
        terminal.type("file\n")
        terminal.wait_for(r"file\r\n.{20}")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for(r"\[context \d+ of .*\n> $")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
