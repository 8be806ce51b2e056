"""Folders for temporary files: private to their user, gone with the `with` block, or at the next start after a kill.

Not the output and not a cache that is meant to last. A killed process cannot clean up after itself, but the lock on a
file in its folder ends with it, also across containers that share a folder and not their process ids. Whoever makes
a folder here removes those whose lock is free. What has no such file is somebody else's. Used by whoever writes
temporary files under a name.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_LOCK_NAME = "owner.lock"


class Scratch:
    """A folder below TMPDIR; a context manager that gives its path.

    Args:
        purpose: part of its name.

    Raises:
        OSError: TMPDIR cannot be written or is full.
    """

    def __init__(self, purpose: str) -> None:
        parent = Path(tempfile.gettempdir())
        for lock in parent.glob(f"latentmill-*/{_LOCK_NAME}"):
            with suppress(OSError), lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=f"latentmill-{purpose}-", dir=parent))
        unlocked = self.path / f"{_LOCK_NAME}.new"
        self._lock = unlocked.open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / _LOCK_NAME)

    def close(self) -> None:
        """Removes the folder; safe to repeat."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()
