"""Garbage collection without clocks: what lies in `data/` and can never count, said file by file.

Not an age limit: an attempt may sleep for any time between its files and its record, and whatever is deleted by age can
be named by a record a moment later. Here records alone decide. A file is named after the record that it was written
for; once that record stands and does not name the file, no record ever will, however late its writer wakes: records are
created once, and a writer names only files that it stored for its own record or that an earlier record names already.
In a local folder half-written files of killed writers go as well: a living writer holds a lock on its own.
Called by whoever looks after an output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.commit import load_commits, name_of
from pipeline.storage import ObjectStore

_DATA_KEY = re.compile(r"data/[0-9a-f]{2}/(?P<record>.+)-[0-9a-f]{16}\.(?:parquet|tar|rejected\.parquet)")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataObject:
    """A file below `data/` with the reason why it may go or must stay."""

    key: str
    num_bytes: int
    may_go: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """Every file below `data/`, in the order of the keys, and what killed writers left behind in a local folder.

    Attributes:
        is_deleted: whether those that may go are gone.
    """

    files: tuple[DataObject, ...]
    is_deleted: bool

    @property
    def may_go(self) -> tuple[DataObject, ...]:
        return tuple(file for file in self.files if file.may_go)

    @property
    def num_bytes(self) -> int:
        """Bytes of the files that may go."""
        return sum(file.num_bytes for file in self.may_go)


def collect_garbage(store: ObjectStore, *, delete: bool) -> Garbage:
    """Says of every data file whether it may go, and deletes those that may if asked to. Safe while jobs are writing.

    Raises:
        StorageError: the store may not be listed, read, or deleted from; what was deleted until then could go.
    """
    listed = list(store.list("data/"))
    records: set[str] = set()
    named_by: dict[str, str] = {}
    replaced_by: dict[str, str] = {}
    for commit in load_commits(store):
        records.add(name_of(commit))
        for file in commit.files:
            named_by.setdefault(file.key, name_of(commit))
        if commit.replaces is not None:
            replaced_by[commit.replaces] = name_of(commit)
    found = []
    for info in listed:
        may_go, reason = _judged(info.key, records, named_by, replaced_by)
        found.append(DataObject(key=info.key, num_bytes=info.num_bytes, may_go=may_go, reason=reason))
    for info in store.left_behind():
        reason = "half-written, and its writer is gone"
        found.append(DataObject(key=info.key, num_bytes=info.num_bytes, may_go=True, reason=reason))
    garbage = Garbage(files=tuple(found), is_deleted=delete)
    if delete:
        for data_object in garbage.may_go:
            store.delete(data_object.key)
    return garbage


def _judged(
    key: str, records: set[str], named_by: Mapping[str, str], replaced_by: Mapping[str, str]
) -> tuple[bool, str]:
    if key in named_by:
        record = named_by[key]
        if record in replaced_by:
            return False, f"record {record} names it; {replaced_by[record]} replaces that, but older snapshots read it"
        return False, f"record {record} names it"
    match = _DATA_KEY.fullmatch(key)
    if match is None:
        return False, "its name is none that is given here, so nothing is known of it"
    record = match["record"]
    if record in records:
        return True, f"record {record} stands and does not name it, so none ever will"
    return False, f"record {record} does not exist yet, so an attempt may still be about to name it"
