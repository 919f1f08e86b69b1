"""Quantised folders made by packers of their own, written from the formats' descriptions.

They share no code with the package: numbers are placed one nibble at a time. Each folder comes
with its twin, the plain folder that holds what the packed one means.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qnext.checkpoint import save_model
from qnext.checkpoint.reader import SINGLE
from qnext.layers.model import CausalLM

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]

# Sizes that every packing can hold: rows and columns are multiples of eight.
EVEN: dict[str, Any] = {
    "hidden_size": 32, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
    "linear_num_value_heads": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
    "intermediate_size": 40, "mlp_only_layers": [], "num_experts": 8,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "qwen3_next, dense and three value heads": {"mlp_only_layers": [2],
                                                "linear_num_value_heads": 6},
    "qwen3_next, heads of odd rows": {"linear_key_head_dim": 12, "linear_value_head_dim": 12,
                                      "linear_num_value_heads": 4},
    "qwen3_5": {"model_type": "qwen3_5", "num_nextn_predict_layers": 0, "num_experts": None,
                "mtp_num_hidden_layers": 1},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe"},
    "qwen3_moe": {"model_type": "qwen3_moe", "layer_types": None, "partial_rotary_factor": 1.0,
                  "shared_expert_intermediate_size": 0, "num_nextn_predict_layers": 0},
    "qwen3": {"model_type": "qwen3", "layer_types": None, "partial_rotary_factor": 1.0,
              "attention_bias": True, "num_nextn_predict_layers": 0},
}  # fmt: skip

PLAIN = ("embed_tokens", "lm_head", "mlp.gate", "shared_expert_gate", "mtp.fc", "in_proj_ba",
         "in_proj_b", "in_proj_a")  # fmt: skip


def is_linear(name: str, tensor: torch.Tensor, plain: tuple[str, ...] = PLAIN) -> bool:
    stem = name.removesuffix(".weight")
    return name.endswith(".weight") and tensor.ndim == 2 and not stem.endswith(plain)


def fp8(weight: torch.Tensor, rng: np.random.Generator, rows: int, columns: int) -> Packed:
    """Any values, any scales: nothing is rounded to them, so nothing can be right by chance."""
    n, k = weight.shape
    values = (weight / weight.abs().max() * 200).to(torch.float8_e4m3fn)
    grid = rng.uniform(1e-3, 2e-3, (-(-n // rows), -(-k // columns))).astype(np.float32)
    wide, truth = values.float().numpy(), np.empty((n, k), np.float32)
    for i in range(n):
        for j in range(k):
            truth[i, j] = wide[i, j] * grid[i // rows, j // columns]
    pieces = {".weight": values, ".weight_scale_inv": torch.from_numpy(grid)}
    return pieces, torch.from_numpy(truth)


def float_quantized(
    weight: torch.Tensor, rng: np.random.Generator, strategy: str, rows: int, columns: int
) -> Packed:
    """E4M3 as compressed-tensors stores it: its own name, and one scale without axes to spare."""
    pieces, truth = fp8(weight, rng, rows or len(weight), columns or weight.shape[1])
    scale = pieces.pop(".weight_scale_inv")
    return {**pieces, ".weight_scale": scale.view(1) if strategy == "tensor" else scale}, truth


def float_args(strategy: str, block: list[int] | None = None) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": block,
            "symmetric": True, "dynamic": False}  # fmt: skip


def draw_int4(
    shape: torch.Size, rng: np.random.Generator, group: int, symmetric: bool, order: bool
) -> tuple[Any, Any, Any, Any, torch.Tensor]:
    """Nibbles (N, K), zeros (N, G), scales (N, G) half, groups of columns (K,), and the matrix."""
    n, k = shape
    count = k // group
    u = rng.integers(0, 16, (n, k))
    zero = np.full((n, count), 8) if symmetric else rng.integers(1, 16, (n, count))
    scale = rng.uniform(0.01, 0.03, (n, count)).astype(np.float16)
    g_idx = np.arange(k) // group
    if order:
        g_idx = rng.permutation(g_idx)
    truth = np.empty((n, k), np.float32)
    for i in range(n):
        for j in range(k):
            g = g_idx[j]
            truth[i, j] = np.float32(u[i, j] - zero[i, g]) * np.float32(scale[i, g])
    return u, zero, scale, g_idx, torch.from_numpy(truth)


def words(nibbles: Any, place: Callable[[int], tuple[int, int]], axis: int) -> torch.Tensor:
    """Pack along an axis; ``place`` says which word and nibble holds an index."""
    n, k = nibbles.shape
    shape = (n, -(-k // 8)) if axis == 1 else (-(-n // 8), k)
    out = np.zeros(shape, np.uint32)
    for i in range(n):
        for j in range(k):
            word, nibble = place(j if axis == 1 else i)
            at = (i, word) if axis == 1 else (word, j)
            out[at] |= np.uint32(int(nibbles[i, j]) << (4 * nibble))
    return torch.from_numpy(out.view(np.int32))


def in_order(index: int) -> tuple[int, int]:
    return index // 8, index % 8


def interleaved(index: int) -> tuple[int, int]:
    return index // 8, [0, 2, 4, 6, 1, 3, 5, 7].index(index % 8)


def pack_quantized(
    weight: torch.Tensor, rng: np.random.Generator, group: int, symmetric: bool, order: bool
) -> Packed:
    u, zero, scale, g_idx, truth = draw_int4(weight.shape, rng, group, symmetric, order)
    pieces = {
        ".weight_packed": words(u, in_order, 1),
        ".weight_scale": torch.from_numpy(scale),
        ".weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        pieces[".weight_zero_point"] = words(zero, in_order, 0)
    if order:
        pieces[".weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return pieces, truth


def gptq(
    weight: torch.Tensor, rng: np.random.Generator, group: int, symmetric: bool, order: bool,
    minus: int = 1,
) -> Packed:  # fmt: skip
    u, zero, scale, g_idx, truth = draw_int4(weight.shape, rng, group, symmetric, order)
    return {
        ".qweight": words(u.T, in_order, 0),
        ".scales": torch.from_numpy(scale.T.copy()),
        ".qzeros": words((zero - minus).T, in_order, 1),
        ".g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }, truth


def awq(weight: torch.Tensor, rng: np.random.Generator, group: int) -> Packed:
    u, zero, scale, _, truth = draw_int4(weight.shape, rng, group, False, False)
    return {
        ".qweight": words(u.T, interleaved, 1),
        ".scales": torch.from_numpy(scale.T.copy()),
        ".qzeros": words(zero.T, interleaved, 1),
    }, truth


def fp8_config(rows: int, columns: int, ignore: list[str]) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [rows, columns], "modules_to_not_convert": ignore}  # fmt: skip


def compressed_config(weights: dict[str, Any], ignore: list[str], kind: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None,
             "output_activations": None, "format": kind}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": kind, "ignore": ignore,
            "quantization_status": "compressed", "config_groups": {"group_0": group},
            "kv_cache_scheme": None, "version": "0.12.0"}  # fmt: skip


def int4_args(group: int, symmetric: bool, order: bool) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group,
            "symmetric": symmetric, "actorder": "group" if order else None, "dynamic": False,
            "observer": "minmax"}  # fmt: skip


# Name -> (packer, quantization_config for a list of plain modules).
FORMATS: dict[str, tuple[Callable[..., Packed], Callable[[list[str]], dict[str, Any]]]] = {
    "fp8 128x128": (lambda w, r: fp8(w, r, 128, 128), lambda i: fp8_config(128, 128, i)),
    "fp8 16x8": (lambda w, r: fp8(w, r, 16, 8), lambda i: fp8_config(16, 8, i)),
    "fp8 10x7": (lambda w, r: fp8(w, r, 10, 7), lambda i: fp8_config(10, 7, i)),
    "int4": (lambda w, r: pack_quantized(w, r, 8, True, False),
             lambda i: compressed_config(int4_args(8, True, False), i, "pack-quantized")),
    "int4, zero points": (
        lambda w, r: pack_quantized(w, r, 8, False, False),
        lambda i: compressed_config(int4_args(8, False, False), i, "pack-quantized")),
    "int4, activation order": (
        lambda w, r: pack_quantized(w, r, 8, False, True),
        lambda i: compressed_config(int4_args(8, False, True), i, "pack-quantized")),
    "float-quantized, blocks": (
        lambda w, r: float_quantized(w, r, "block", 16, 8),
        lambda i: compressed_config(float_args("block", [16, 8]), i, "float-quantized")),
    "float-quantized, rows": (
        lambda w, r: float_quantized(w, r, "channel", 1, 0),
        lambda i: compressed_config(float_args("channel"), i, "float-quantized")),
    "float-quantized, tensor": (
        lambda w, r: float_quantized(w, r, "tensor", 0, 0),
        lambda i: compressed_config(float_args("tensor"), i, "float-quantized")),
    "gptq": (lambda w, r: gptq(w, r, 8, True, False),
             lambda i: {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False,
                        "sym": True}),
    "gptq, activation order": (
        lambda w, r: gptq(w, r, 8, False, True),
        lambda i: {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True,
                   "sym": False, "checkpoint_format": "gptq"}),
    "gptq_v2": (lambda w, r: gptq(w, r, 8, False, False, minus=0),
                lambda i: {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False,
                           "sym": False, "checkpoint_format": "gptq_v2"}),
    "awq": (lambda w, r: awq(w, r, 8),
            lambda i: {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True,
                       "version": "gemm", "modules_to_not_convert": i}),
}  # fmt: skip


def write_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def export(
    model: CausalLM, name: str, folder: Path, *, plain: tuple[str, ...] = PLAIN, seed: int = 0
) -> tuple[Path, Path]:
    """(packed folder, plain folder of what it means) for a format."""
    pack, config = FORMATS[name]
    packed, truth = folder / "packed", folder / "truth"
    for target in (packed, truth):
        save_model(model, target, fused_experts=False)
    rng = np.random.default_rng(seed)
    tensors, meaning, ignore = load_file(truth / SINGLE), {}, []
    for key, tensor in list(tensors.items()):
        stem = key.removesuffix(".weight")
        if not is_linear(key, tensor, plain):
            if tensor.ndim == 2 and "embed_tokens" not in key:
                ignore.append(stem)
            continue
        pieces, meaning[key] = pack(tensor.float(), rng)
        del tensors[key]
        tensors |= {stem + suffix: piece.contiguous() for suffix, piece in pieces.items()}
    save_file(tensors, packed / SINGLE, {"format": "pt"})
    save_file(load_file(truth / SINGLE) | meaning, truth / SINGLE, {"format": "pt"})
    write_config(packed, quantization_config=config(ignore))
    return packed, truth
