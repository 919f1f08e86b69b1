"""A checkpoint's own byte-level BPE tokenizer: text to ids and back, and which ids mean what.

The `tokenizers` library does the heavy work; here are the facts a runtime needs beside it: end
tokens, special against merely added tokens, embedding rows without a token. Next: detokenize.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from qnext.errors import TextError

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: one printable character for each of the 256 bytes (GPT-2)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in kept}
    others = (byte for byte in range(256) if byte not in set(kept))
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = byte_of_char()


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: a byte-level tokenizer of the `tokenizers` library.
        special_tokens: named tokens, e.g. ``{"eos_token": "<|im_end|>"}``.
        eos_token_ids: ids that end generation; the named ``eos_token`` is always one of them.

    Raises:
        TextError: the backend is not byte-level, or a named token is not in its vocabulary.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        decoder = type(backend.decoder).__name__
        if decoder != "ByteLevel":
            raise TextError(
                f"the tokenizer decodes with {decoder}; qnext reads byte-level tokenizers only",
                hint="Qwen3 family checkpoints carry a ByteLevel decoder in tokenizer.json",
            )
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._token_bytes: dict[int, bytes] = {}
        for name, token in self.special_tokens.items():
            if backend.token_to_id(token) is None:
                raise TextError(
                    f"{name} is {token!r}, which is not in the vocabulary",
                    hint="tokenizer_config.json and tokenizer.json belong to different checkpoints",
                )
        eos = self._named_id("eos_token")
        ids = list(dict.fromkeys([*([] if eos is None else [eos]), *eos_token_ids]))
        self.eos_token_ids: tuple[int, ...] = tuple(ids)
        """Ids that end generation, the named end token first."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Load the tokenizer of a checkpoint folder.

        Reads ``tokenizer.json`` and, where present, ``tokenizer_config.json``,
        ``special_tokens_map.json``, ``generation_config.json`` (end tokens) or ``config.json``.

        Raises:
            TextError: ``tokenizer.json`` is missing, or a file is damaged or contradicts it.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TextError(
                f"no tokenizer.json in {folder}",
                hint="use token ids (skip_tokenizer_init=True) or fetch the file of the checkpoint",
            )
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TextError(
                f"{path} is not a tokenizer: {error}", hint="fetch the file again"
            ) from error
        config = _read_json(folder / "tokenizer_config.json")
        _add_missing(backend, config, folder)
        named: dict[str, str] = {}
        for source in (_read_json(folder / "special_tokens_map.json"), config):
            for name in _NAMED:
                token = source.get(name)
                content = token.get("content") if isinstance(token, Mapping) else token
                if isinstance(content, str):
                    named[name] = content
        return cls(backend, special_tokens=named, eos_token_ids=_eos_ids(folder))

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; added tokens written out in it are recognised, nothing is prepended."""
        return list(self.backend.encode(_encodable(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores the library may use."""
        found = self.backend.encode_batch([_encodable(t) for t in texts], add_special_tokens=False)
        return [list(one.ids) for one in found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 give U+FFFD, ids without a token nothing."""
        kept = self.special_ids if skip_special_tokens else frozenset[int]()
        raw = b"".join(self.token_bytes(i) for i in ids if i not in kept)
        return raw.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for (b"" for an id without a token)."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self.id_to_token(token_id) or ""
            try:
                known = bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:  # an added token outside the byte alphabet stands for itself
                known = token.encode()
            self._token_bytes[token_id] = known
        return known

    def token_to_id(self, token: str) -> int | None:
        """Id of a token given as it is written in the vocabulary."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """Token as written in the vocabulary (byte alphabet), None for an id without one."""
        if not 0 <= token_id < self.vocab_size:
            return None
        found: str | None = self.backend.id_to_token(token_id)
        return found

    @cached_property
    def vocab_size(self) -> int:
        """Largest used id plus one; 151,669 for Qwen3."""
        return max(self._used_ids) + 1

    @cached_property
    def _used_ids(self) -> frozenset[int]:
        return frozenset(self.backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """All added tokens by id: control tokens and also ``<think>``, ``<tool_call>``, ..."""
        return {i: t.content for i, t in sorted(self.backend.get_added_tokens_decoder().items())}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids dropped by ``skip_special_tokens`` (flag special=true; Qwen3: up to 151656)."""
        decoder = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in decoder.items() if token.special)

    @property
    def bos_token_id(self) -> int | None:
        """Begin token, None for the Qwen3 family."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The named end token, or the first id that ends generation."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def pad_token_id(self) -> int | None:
        """Padding token."""
        return self._named_id("pad_token")

    def padding_ids(self, model_vocab_size: int) -> list[int]:
        """Rows of an embedding of ``model_vocab_size`` rows that have no token; never sample them.

        Raises:
            TextError: the tokenizer has ids that the model has no row for.
        """
        if self.vocab_size > model_vocab_size:
            raise TextError(
                f"the tokenizer has ids up to {self.vocab_size - 1}, "
                f"the model has {model_vocab_size} rows",
                hint="tokenizer.json and config.json belong to different checkpoints",
            )
        return [i for i in range(model_vocab_size) if i not in self._used_ids]

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)


def _encodable(text: str) -> str:
    """Text without lone surrogates, which have no UTF-8 form."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path} is not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(found, dict):
        raise TextError(f"{path} holds {type(found).__name__}, not an object")
    return found


def _eos_ids(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        found = config.get("eos_token_id")
        if found is None and isinstance(config.get("text_config"), Mapping):
            found = config["text_config"].get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise TextError(f"eos_token_id in {folder / name} is {found!r}, not token ids")
        return ids
    return []


def _add_missing(backend: Backend, config: Mapping[str, Any], folder: Path) -> None:
    """Add tokens that only tokenizer_config.json lists, each at the very id it names."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        tokens = {int(i): t for i, t in listed.items()}
        for i, token in sorted(tokens.items()):
            content = token["content"]
            if backend.token_to_id(content) is None:
                flags = {k: bool(token.get(k)) for k in ("lstrip", "rstrip", "single_word")}
                added = AddedToken(
                    content, normalized=bool(token.get("normalized")), special=False, **flags
                )
                (backend.add_special_tokens if token.get("special") else backend.add_tokens)(
                    [added]
                )
            if backend.token_to_id(content) != i:
                raise TextError(
                    f"tokenizer_config.json in {folder} puts {content!r} at {i}, "
                    f"tokenizer.json at {backend.token_to_id(content)}"
                )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TextError(f"added_tokens_decoder in {folder} is damaged: {error!r}") from error
