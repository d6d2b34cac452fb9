"""One way to resume a training: a file that is written whole, and read only by a training of the same data and parameters."""

from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """How far a training has come.

    Parameters
    ----------
    path
        The file; without one nothing is kept.
    identity
        Digest of data and parameters of the training (see :func:`corec.files.digest`).
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)

    def load(self, device: torch.device | str, say: Any = print) -> dict[str, Any] | None:
        """The state that was saved; None where there is none, or one of another identity."""
        if self.path is None or not self.path.exists():
            return None
        saved: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
        if saved.pop("identity", None) == self.identity:
            return saved
        say(f"{self.path.name} is of other data or parameters: training begins anew", flush=True)
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file by one with `state` (tensors, numbers, text and lists and mappings of them)."""
        if self.path is None:
            return
        part = self.path.with_suffix(".part")
        torch.save({"identity": self.identity, **state}, part)
        part.replace(self.path)

    def remove(self) -> None:
        """Delete the file, once the training's result is kept elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
