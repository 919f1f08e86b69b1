"""The Qwen3 tokenizer built from its tiktoken ranks: same vocabulary, merges and added tokens.

For machines that have the ranks (a Python package) but no tokenizer.json. Next: tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from qnext.errors import TextError
from qnext.text.tokenizer import byte_of_char

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Added right after the ranks with special=true."""

PLAIN_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Added next with special=false: they survive ``skip_special_tokens``."""

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenisation of the Qwen2 and Qwen3 families: digits stand alone."""


def qwen3_tokenizer_from_ranks(ranks: Mapping[bytes, int]) -> Backend:
    """Build the tokenizer from ``ranks`` (token bytes to id, ids 0..n-1, all single bytes too).

    A merge is the last step by which lower ranks join a token's bytes into two parts, so the list
    of merges follows from the ranks alone; 151,643 ranks give 151,387 merges.

    Raises:
        TextError: the ranks are not a complete byte-level BPE.
    """
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TextError(f"{len(ranks)} ranks are not the ids 0..{len(ranks) - 1}")
    char_of_byte = {byte: char for char, byte in byte_of_char().items()}

    def written(token: bytes) -> str:
        return "".join(char_of_byte[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_merge(ranks, token, rank)
            merges.append((written(left), written(right)))
    vocab = {written(token): rank for token, rank in ranks.items()}
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in PLAIN_TOKENS])
    return backend


def _last_merge(ranks: Mapping[bytes, int], token: bytes, limit: int) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = (
            (rank, i)
            for i in range(len(parts) - 1)
            if (rank := ranks.get(parts[i] + parts[i + 1], limit)) < limit
        )
        best = min(candidates, default=None)
        if best is None:
            raise TextError(f"rank {limit} ({token!r}) cannot be reached by merges of lower ranks")
        i = best[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if any(part not in ranks for part in parts):
        raise TextError(f"rank {limit} ({token!r}) is made of bytes that have no rank")
    return parts[0], parts[1]
