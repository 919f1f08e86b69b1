"""A model of which only some parts are in memory: for work that goes layer by layer."""

from __future__ import annotations

from pathlib import Path

import torch

from qnext.checkpoint.census import read_layout
from qnext.checkpoint.fill import fill
from qnext.checkpoint.load import allocate, choose_dtypes, restore_buffers, skeleton
from qnext.checkpoint.reader import SafetensorsFolder
from qnext.layers.model import CausalLM


class PartialModel:
    """A checkpoint whose parts are loaded and dropped by name.

    Attributes:
        layout: of the folder.
        files: where the tensors are.
        model: its parameters are on the meta device unless they are loaded.

    Args:
        folder: the checkpoint, plain or quantised.
        device: where loaded parts lie.
        dtype: of plain parameters; None keeps what is on disk.
    """

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        self.files = SafetensorsFolder(folder)
        self.layout = read_layout(self.files)
        self._device = device
        self._dtype, self._other = choose_dtypes(self.layout, self.files, dtype)
        self.model: CausalLM = skeleton(self.layout.config, self.layout.packed).eval()
        restore_buffers(self.model, device)

    def load(self, *within: str) -> None:
        """Load the parameters whose names start with one of these."""
        allocate(self.model, self._dtype, self._other, self._device, within)
        wanted = {
            name: rule
            for name, rule in self.layout.tensors.items()
            if rule.parts[0].param.startswith(within) and not rule.optional
        }
        fill(self.model, self.layout.only(wanted), self.files)
        self.model.requires_grad_(False)

    def drop(self, *within: str) -> None:
        """Free them."""
        meta = torch.device("meta")
        allocate(self.model, self._dtype, self._other, meta, within)

    def parts(self) -> list[str]:
        """Names of the parts between the embedding and the final norm, in order."""
        return [f"model.layers.{i}." for i in range(self.layout.config.num_hidden_layers)]
