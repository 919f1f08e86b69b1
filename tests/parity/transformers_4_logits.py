"""Run by the interpreter that sees transformers 4.57: logits of checkpoints, to files.

usage: transformers_4_logits.py FOLDER ...; each holds model/ and ids.safetensors, and gets
logits.safetensors. One process for all: importing takes longer than computing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

if not transformers.__version__.startswith("4.57."):
    raise SystemExit(f"this is transformers {transformers.__version__}, not 4.57")
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    left = {k: v for k, v in report.items() if v}
    if left:
        raise SystemExit(f"{folder.name}: not every tensor found its place: {left}")
    ids = load_file(folder / "ids.safetensors")["ids"]
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits
    save_file({"logits": logits}, folder / "logits.safetensors")
