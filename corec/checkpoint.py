"""Checkpoints of a training: written atomically, and loaded only for the same data and parameters."""

import contextlib
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from corec import CorecError, files


def intact(path: Path) -> bool:
    """Whether a file of ``torch.save``, a zip archive, is whole: the checksums of all its parts agree."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError):
        return False


class Checkpoint:
    """File with the state of a training.

    Parameters
    ----------
    path
        The file; its folder is created if missing. None for no checkpoint.
    identity
        Digest of data and parameters of the training (see :func:`corec.files.digest`).
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)

    def load(self, device: torch.device | str, say: Any = print) -> dict[str, Any] | None:
        """Return the saved state, or None if there is none or its identity differs.

        Parameters
        ----------
        device
            Device of the tensors.
        say
            Function that prints the message about another identity.
        """
        if self.path is None or not self.path.exists():
            return None
        saved: dict[str, Any] | None = None
        with contextlib.suppress(UnpicklingError):
            saved = torch.load(self.path, map_location=device, weights_only=True) if intact(self.path) else None
        if saved is None:
            say(f"{self.path.name} is damaged: training starts from the beginning", flush=True)
            return None
        if saved.pop("identity", None) == self.identity:
            return saved
        say(f"{self.path.name} was made with other data or parameters: training starts from the beginning", flush=True)
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file by one with `state` (tensors, numbers, text, and lists and mappings of these)."""
        if self.path is None:
            return
        try:
            with files.aside(self.path) as part:
                torch.save({"identity": self.identity, **state}, part)
        except RuntimeError as error:
            reason = f"{self.path} could not be written ({str(error).splitlines()[0]})"
            raise CorecError(f"{reason}: free disk space, or make the folder writable.") from None
