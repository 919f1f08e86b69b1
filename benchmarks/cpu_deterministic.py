"""What deterministic mode costs on a CPU: the shipped model in CPU seconds of one thread.

    python benchmarks/cpu_deterministic.py

CPU seconds, because they depend less on what else runs; the smallest of five.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from qnext.checkpoint import load_model
from qnext.layers.fused import fuse
from qnext.layers.invariant import make_invariant
from qnext.layers.model import CausalLM

ROUNDS, STEPS, PROMPT = 5, 10, 2048


def seconds(job: Callable[[CausalLM], None], model: CausalLM) -> float:
    start = time.thread_time()
    job(model)
    return time.thread_time() - start


def prefill(model: CausalLM, ids: torch.Tensor) -> None:
    state = model.new_state(1, PROMPT + 1)
    hidden = model.hidden_states(ids, state.batch([len(ids)], slots=[0]), state)
    model.logits(hidden[-1:])


def decode(model: CausalLM, ids: torch.Tensor, sequences: int, past: int) -> None:
    state = model.new_state(sequences, past + STEPS + 1)
    for step in range(STEPS):
        batch = state.batch(
            [1] * sequences, slots=range(sequences), context_lens=[past + step] * sequences
        )
        model.logits(model.hidden_states(ids[:sequences], batch, state))


def main() -> None:
    torch.set_num_threads(1)
    ids = torch.randint(8000, (PROMPT,), generator=torch.Generator().manual_seed(0))
    usual, strict = (load_model(None, dtype="float32", device="cpu") for _ in range(2))
    fuse(usual)
    make_invariant(strict)
    jobs: dict[str, Callable[[CausalLM], None]] = {
        f"prefill of {PROMPT}": lambda model: prefill(model, ids),
        "decode, 1 sequence, 100 cached": lambda model: decode(model, ids, 1, 100),
        "decode, 1 sequence, 2,048 cached": lambda model: decode(model, ids, 1, 2048),
        "decode, 16 sequences, 300 cached": lambda model: decode(model, ids, 16, 300),
    }
    print(f"torch {torch.__version__}, one thread")
    with torch.inference_mode():
        for name, job in jobs.items():
            steps = 1 if name.startswith("prefill") else STEPS
            took = []
            for model in (usual, strict):
                took.append(min(seconds(job, model) for _ in range(ROUNDS)) / steps)
            print(f"{name:34} {took[0] * 1e3:9.2f} ms {took[1] * 1e3:9.2f} ms "
                  f"{took[1] / took[0]:6.2f} times")  # fmt: skip


if __name__ == "__main__":
    main()
