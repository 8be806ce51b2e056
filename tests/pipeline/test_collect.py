"""What is promised of garbage collection: only what no record can ever name goes, and every file says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from commits import later_generation, make_commit

from pipeline.collect import collect_garbage
from pipeline.commit import commit_shard, put_data_file, read_data_file
from pipeline.records import FileStat
from pipeline.storage import ObjectStore, open_store


def stored(store: ObjectStore, folder: Path, shard_id: str, data: bytes, generation: int = 0) -> FileStat:
    (folder / "upload").write_bytes(data)
    return put_data_file(
        store, folder / "upload", shard_id=shard_id, content="parquet", num_rows=1, generation=generation
    )


def reasons(store: ObjectStore, *, delete: bool = False) -> dict[str, tuple[bool, str]]:
    return {file.key: (file.may_go, file.reason) for file in collect_garbage(store, delete=delete).files}


def test_only_files_beside_a_record_that_does_not_name_them_go(store: ObjectStore, tmp_path: Path) -> None:
    named = stored(store, tmp_path, "a", b"of the winner")
    loser = stored(store, tmp_path, "a", b"of the loser")
    undecided = stored(store, tmp_path, "b", b"its writer sleeps")
    store.put_if_absent("data/readme.txt", b"of a person")
    commit = make_commit("a", files=(named,))
    commit_shard(store, commit)
    expected = {
        named.key: (False, "record a names it"),
        loser.key: (True, "record a stands and does not name it, so none ever will"),
        undecided.key: (False, "record b does not exist yet, so an attempt may still be about to name it"),
        "data/readme.txt": (False, "its name is none that is given here, so nothing is known of it"),
    }
    assert reasons(store) == expected
    assert all(store.head(key) is not None for key in expected)
    garbage = collect_garbage(store, delete=True)
    assert garbage.is_deleted
    assert [file.key for file in garbage.may_go] == [loser.key]
    assert garbage.num_bytes == loser.num_bytes
    del expected[loser.key]
    assert reasons(store) == expected
    assert read_data_file(store, named) == b"of the winner"


def test_a_retry_at_work_is_not_robbed_though_its_shard_is_decided(store: ObjectStore, tmp_path: Path) -> None:
    first = make_commit("a", files=(stored(store, tmp_path, "a", b"first"),))
    commit_shard(store, first)
    retry = stored(store, tmp_path, "a", b"retry", generation=1)
    assert reasons(store, delete=True)[retry.key][0] is False
    commit_shard(store, later_generation(first, 1, files=(retry,)))
    lost = stored(store, tmp_path, "a", b"lost", generation=1)
    assert reasons(store, delete=True)[lost.key] == (True, "record a.r1 stands and does not name it, so none ever will")
    assert read_data_file(store, retry) == b"retry"
    assert store.head(lost.key) is None


def test_files_of_a_replaced_record_stay_for_the_snapshots_that_name_it(store: ObjectStore, tmp_path: Path) -> None:
    first = make_commit("a", files=(stored(store, tmp_path, "a", b"first"),))
    commit_shard(store, first)
    repair = stored(store, tmp_path, "a", b"repair", generation=1)
    commit_shard(store, later_generation(first, 1, files=(repair,), replaces="a"))
    assert reasons(store, delete=True)[first.files[0].key] == (
        False,
        "record a names it; a.r1 replaces that, but older snapshots read it",
    )
    assert read_data_file(store, first.files[0]) == b"first"


def test_what_a_killed_writer_left_half_written_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    script = (
        "import os, sys; from pipeline.storage import open_store\n"
        "with open_store(sys.argv[1])._temporary(lambda file: file.write(b'half')):\n"
        "    print('there', flush=True); sys.stdin.read()"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, store.root_uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"there\n"
        assert collect_garbage(store, delete=True).files == ()
        writers[0].kill()
        writers[0].wait()
        garbage = collect_garbage(store, delete=True)
        assert [(file.may_go, file.reason, file.num_bytes) for file in garbage.files] == [
            (True, "half-written, and its writer is gone", 4)
        ]
        assert len(list((tmp_path / "out" / ".tmp").iterdir())) == 1
        assert collect_garbage(store, delete=True).files == ()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert len(collect_garbage(store, delete=True).may_go) == 1
    assert list((tmp_path / "out" / ".tmp").iterdir()) == []
