"""The model as a backend of ``lm-eval``: its tasks, our forward passes and our engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.text import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from qnext.engine.llm import LLM

PACK_TOKENS = 8192


class HarnessModel(LM):
    """What lm-eval asks of a model.

    Args:
        model: for likelihoods; requests are packed, not padded.
        folder: of the model, for its tokenizer and, if a task generates, for an engine.
    """

    def __init__(self, model: CausalLM, folder: Path) -> None:
        super().__init__()
        self.model, self.folder = model, folder
        self.tokenizer = Tokenizer.from_pretrained(folder)
        self.max_length = model.config.max_position_embeddings
        self._llm: LLM | None = None

    @property
    def prefix(self) -> int:
        """Token that stands before a text that has nothing before it."""
        return self.tokenizer.eos_token_id or 0

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether it is the greedy one."""
        del disable_tqdm
        pairs = [self._split(*request.args) for request in requests]
        return self._score(pairs)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows of the model's context."""
        del disable_tqdm
        out = []
        for request in requests:
            ids = [self.prefix, *self.tokenizer.encode(request.args[0])]
            step = self.max_length - 1
            windows = [
                ([ids[start]], ids[start + 1 : start + 1 + step])
                for start in range(0, len(ids) - 1, step)
            ]
            out.append(sum(score for score, _ in self._score(windows)))
        return out

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily (or as the task says) up to its stop strings."""
        del disable_tqdm
        from qnext.engine.llm import LLM
        from qnext.engine.sampling_params import SamplingParams

        if self._llm is None:
            self._llm = LLM(str(self.folder))
        params = []
        for request in requests:
            asked: dict[str, Any] = dict(request.args[1])
            until = asked.get("until") or []
            params.append(
                SamplingParams(
                    temperature=float(asked.get("temperature", 0.0)),
                    max_tokens=int(asked.get("max_gen_toks", 256)),
                    stop=[until] if isinstance(until, str) else list(until),
                    repetition_penalty=1.0,
                )
            )
        prompts = [request.args[0] for request in requests]
        return [result.text for result in self._llm.generate(prompts, params)]

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, cut where the encoding of the whole has the boundary."""
        blank = len(context) - len(context.rstrip())
        if blank:  # a blank belongs to the word after it
            context, continuation = context[:-blank], context[-blank:] + continuation
        before = self.tokenizer.encode(context) if context else [self.prefix]
        whole = self.tokenizer.encode(context + continuation)
        after = whole[len(before) :] if context else whole
        room = max(self.max_length - len(after), 1)
        return before[-room:], after

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        out: list[tuple[float, bool]] = []
        pack: list[tuple[list[int], list[int]]] = []
        for pair in pairs:
            if pack and sum(len(a) + len(b) for a, b in [*pack, pair]) > PACK_TOKENS:
                out += self._score_pack(pack)
                pack = []
            pack.append(pair)
        return out + (self._score_pack(pack) if pack else [])

    def _score_pack(self, pack: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        device = self.model.device
        ids = torch.tensor([t for a, b in pack for t in (*a, *b)], device=device)
        lengths = [len(a) + len(b) for a, b in pack]
        hidden = self.model.hidden_states(ids, PackedBatch.of(lengths, device=device))
        out, start = [], 0
        for (a, b), length in zip(pack, lengths, strict=True):
            rows = hidden[start + len(a) - 1 : start + length - 1]
            scores = self.model.logits(rows).float().log_softmax(-1)
            want = torch.tensor(b, device=device, dtype=torch.int64)
            total = float(scores.gather(1, want.unsqueeze(1)).sum())
            out.append((total, bool((scores.argmax(1) == want).all())))
            start += length
        return out


def run_tasks(
    model: CausalLM,
    folder: Path,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Results of lm-eval by task."""
    manager = TaskManager(include_path=include_path)
    found = simple_evaluate(
        HarnessModel(model, folder), tasks=list(tasks), task_manager=manager, limit=limit,
        bootstrap_iters=0,
    )  # fmt: skip
    numbers = {}
    for task, values in found["results"].items():
        numbers[task] = {k: v for k, v in values.items() if isinstance(v, int | float)}
    return numbers
