# SPDX-License-Identifier: Apache-2.0
"""The folder of a run that quantises block by block (`layerwise`), which goes on from it after a kill."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import strict_json
from .._checkpoint_file import digest
from ..checkpoint import load, save


class BlocksFolder:
    """Finished blocks on disk: block-000.safetensors, ..., and run.json, which says what they are of.

    A block counts as finished once run.json names it, with the errors of its layers and the digest of what it was made
    from.

    Args:
        path: the folder, which is made.
        settings, text: what a run must have been of to be gone on with; the text as its digest.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], text: str) -> None:
        self.path, self.file = Path(path), Path(path) / "run.json"
        self.path.mkdir(parents=True, exist_ok=True)
        self.run: dict[str, Any] = {"settings": dict(settings), "text": text, "blocks": []}
        if self.file.exists():
            run = self._read()
            for key in ("settings", "text"):
                if run.get(key) != self.run[key]:
                    raise ValueError(
                        f"quantize_: folder must hold a run with the same {key}, {self.path} holds another one; take"
                        " another folder"
                    )
            self.run = run

    def _read(self) -> dict[str, Any]:
        try:
            run = strict_json.read(self.file)
            kinds = [(type(block["original"]), type(block["errors"])) for block in run["blocks"]]
            if isinstance(run["blocks"], list) and set(kinds) <= {(str, dict)}:
                return run
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(
            f"quantize_: folder must hold a whole run, {self.file} is cut off or damaged; delete it to begin anew"
        )

    def has(self, index: int) -> bool:
        """Whether the block is finished."""
        return index < len(self.run["blocks"])

    def resume(self, index: int, block: nn.Module) -> dict[str, float]:
        """Load a finished block into the model's and return its layers' errors."""
        finished = self.run["blocks"][index]
        if finished["original"] != digest_of(**block.state_dict()):
            raise ValueError(
                f"quantize_: folder must hold a run of the same model, {self.path} has another block {index}; take"
                " another folder"
            )
        load(block, self.path / f"block-{index:03}.safetensors")
        return finished["errors"]

    def keep(self, block: nn.Module, original: str, errors: dict[str, float]) -> None:
        save(block, self.path / f"block-{len(self.run['blocks']):03}.safetensors")
        self.run["blocks"].append({"original": original, "errors": errors})
        strict_json.write(self.file, self.run)


def digest_of(**tensors: Tensor) -> str:
    return digest({}, {name: t.cpu().contiguous() for name, t in tensors.items()})
