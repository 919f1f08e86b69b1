"""Run by the interpreter that sees transformers 4.57: logits of a folder, to a file.

usage: transformers_4_logits.py FOLDER IDS.safetensors LOGITS.safetensors
"""

from __future__ import annotations

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, ids_file, logits_file = sys.argv[1:]
if not transformers.__version__.startswith("4.57."):
    raise SystemExit(f"this is transformers {transformers.__version__}, not 4.57")
torch.set_num_threads(1)
model, report = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
)
left = {k: v for k, v in report.items() if v}
if left:
    raise SystemExit(f"not every tensor found its place: {left}")
ids = load_file(ids_file)["ids"]
with torch.no_grad():
    save_file({"logits": model.eval()(ids, use_cache=False).logits}, logits_file)
