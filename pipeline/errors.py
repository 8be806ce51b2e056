"""Every error that Latentmill raises on purpose, named by what the caller should do next.

Not a catalogue of causes: a cause is the message. All of them cross process borders (Ray actors, DataLoader workers),
so each is built from positional arguments that `Exception.args` keeps; a keyword-only constructor would not unpickle.
Messages hold names as they are; whoever shows one to a person makes it `printable`.
Used by every module of `pipeline` and `jobs`.
"""

from __future__ import annotations

from collections.abc import Mapping


def printable(text: str) -> str:
    """A text as one line for logs and terminals: control characters, which names in an input may hold, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class LatentmillError(Exception):
    """Base of all errors raised on purpose; `str(error)` is one sentence for the person who runs the job."""


class UsageError(LatentmillError):
    """The request is wrong: a flag, a YAML key, an input that is not there. Fix the command; exit code 2."""


class ConfigMismatchError(LatentmillError):
    """The output already holds another configuration; exit code 3.

    Args:
        message: what differs and what to do.
        differences: key -> (value in the output, value asked for).
    """

    def __init__(self, message: str, differences: Mapping[str, tuple[object, object]]) -> None:
        super().__init__(message, dict(differences))
        self.message = message
        self.differences = dict(differences)

    def __str__(self) -> str:
        return self.message


class StorageError(LatentmillError):
    """A store or an input location failed for good: denied, no such bucket, not writable. Ends the attempt."""


class StorageNotFoundError(StorageError):
    """The object, file or bucket does not exist."""


class StorageDeniedError(StorageError):
    """A local file exists and this user may not read it. Nothing is said of the files beside it."""


class StorageUnavailableError(StorageError):
    """The store did not answer properly within the retry budget. Trying again later is safe."""


class CredentialsExpiredError(StorageError):
    """Credentials were good and are no more, also when read anew. With valid ones the same command goes on."""


class ObjectExistsError(StorageError):
    """A create-once write found an object under its name. Read it and compare nonces; never assume who wrote it."""


class OutcomeUnknownError(StorageError):
    """A write may or may not have landed (lost response, time-out). Read back before deciding anything."""


class DamagedObjectError(StorageError):
    """Bytes read back do not have the size or SHA-256 that the commit record states."""


class RejectionError(LatentmillError):
    """A video or clip cannot be encoded; recorded as a rejection, and the run goes on.

    Args:
        reason: one of `records.REASONS`.
        message: one sentence with the value found and the value allowed.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class DecodeChildError(LatentmillError):
    """A decode child could not be started or broke its protocol: a fault of the installation, not of a video."""
