"""What is promised of the stores, to a local folder and to a real S3 store alike.

Objects are whole or absent; a create happens once, whoever races; what is read is what was written or an error; one
layer repeats requests; errors say what to check and never a secret. Faults on the wire are made by a proxy in front of
the real store, which alone can lose an answer on purpose.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import Fault, FaultProxy

import pipeline.s3
import pipeline.store
from pipeline.errors import (
    CredentialsExpiredError,
    ObjectExistsError,
    OutcomeUnknownError,
    StorageError,
    StorageNotFoundError,
    StorageUnavailableError,
    UsageError,
)
from pipeline.storage import (
    ObjectStore,
    list_inputs,
    open_input,
    open_input_fd,
    open_store,
    sha256_of_file,
    stat_input,
)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.store, "RETRY_BUDGET_S", 0.4)
    monkeypatch.setattr(pipeline.s3, "FIRST_CONTACT_BUDGET_S", 0.4)


def once(what: str) -> Fault:
    left = [what]
    return lambda method, path: left.pop() if left else None


def put(store: ObjectStore, key: str, data: bytes, folder: Path) -> None:
    path = folder / "upload"
    path.write_bytes(data)
    store.put_file(key, path, sha256_of_file(path))


def test_what_is_created_is_read_back_whole_in_part_and_by_list(store: ObjectStore) -> None:
    store.put_if_absent("plans/a.json", b"0123456789")
    assert store.get("plans/a.json") == b"0123456789"
    assert store.get_range("plans/a.json", 3, 4) == b"3456"
    assert store.get_range("plans/a.json", 8, 10) == b"89"
    assert store.get_range("plans/a.json", 20, 5) == b""
    info = store.head("plans/a.json")
    assert info is not None
    assert info.num_bytes == 10
    assert [i.key for i in store.list("")] == ["plans/a.json"]


def test_a_list_takes_any_prefix_in_key_order_and_survives_several_pages(store: ObjectStore) -> None:
    keys = [f"commits/{number % 7:02d}/shard-{number:04d}.json" for number in range(30)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put_if_absent(key, b"{}"), [*keys, "commits-not/x", "data/y"]))
    assert [info.key for info in store.list("commits/")] == sorted(keys)
    assert [info.key for info in store.list("commits/03/shard-000")] == ["commits/03/shard-0003.json"]
    assert list(store.list("nothing/")) == []


def test_an_absent_object_is_none_to_find_and_an_error_to_get(store: ObjectStore, tmp_path: Path) -> None:
    assert store.find("no/such") is None
    assert store.head("no/such") is None
    store.delete("no/such")
    for read in (store.get, lambda key: store.get_range(key, 0, 1), lambda key: store.fetch_file(key, tmp_path / "x")):
        with pytest.raises(StorageNotFoundError, match="no/such"):
            read("no/such")
    assert not (tmp_path / "x").exists()


def test_a_second_create_is_refused_and_changes_nothing(store: ObjectStore) -> None:
    store.put_if_absent("one", b"first")
    for data in (b"second", b"", b"first"):
        with pytest.raises(ObjectExistsError, match="one"):
            store.put_if_absent("one", data)
    assert store.get("one") == b"first"


def test_of_racing_threads_exactly_one_creates(store: ObjectStore) -> None:
    def race(rival: int) -> bool:
        gate.wait()
        try:
            store.put_if_absent("prize", str(rival).encode())
        except (ObjectExistsError, OutcomeUnknownError):
            return False
        return True

    gate = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert sum(won) == 1
    assert store.get("prize") == str(won.index(True)).encode()


def test_a_file_goes_up_and_comes_back_unchanged(store: ObjectStore, tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    put(store, "data/aa/x.parquet", data, tmp_path)
    put(store, "data/aa/x.parquet", data, tmp_path)
    store.fetch_file("data/aa/x.parquet", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    put(store, "data/aa/empty", b"", tmp_path)
    assert store.get("data/aa/empty") == b""


def test_a_file_that_is_not_what_its_hash_says_is_not_stored(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(b"other bytes")
    with pytest.raises(StorageError):
        store.put_file("data/x", tmp_path / "upload", hashlib.sha256(b"these bytes").hexdigest())
    assert store.find("data/x") is None


def test_a_large_file_goes_up_in_parts(s3_env: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pipeline.s3, "SINGLE_PUT_BYTES", 6 << 20)
    monkeypatch.setattr(pipeline.s3, "PART_BYTES", 5 << 20)
    store, data = open_store(s3_env.root()), os.urandom(13 << 20)
    put(store, "data/large", data, tmp_path)
    assert store.get("data/large") == data


@pytest.mark.parametrize("faults", [["lose"], ["500"], ["200"], ["drop"], ["lose", "404"]])
def test_an_upload_in_parts_survives_a_lost_answer_to_its_completion(
    faults: list[str], proxy: FaultProxy, far_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pipeline.s3, "SINGLE_PUT_BYTES", 1)
    monkeypatch.setattr(pipeline.s3, "PART_BYTES", 5 << 20)
    left = list(faults)
    proxy.fault = lambda method, path: left.pop(0) if left and method == "POST" and "uploadId" in path else None
    data = os.urandom(6 << 20)
    put(far_store, "data/large", data, tmp_path)
    assert not left
    assert far_store.get("data/large") == data


def test_an_upload_in_parts_that_the_store_forgot_is_an_error(
    proxy: FaultProxy, far_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pipeline.s3, "SINGLE_PUT_BYTES", 1)
    proxy.fault = lambda method, path: "404" if method == "POST" and "uploadId" in path else None
    with pytest.raises(StorageNotFoundError, match="NoSuchUpload"):
        put(far_store, "data/large", b"1234", tmp_path)
    assert far_store.head("data/large") is None


def test_keys_that_lead_out_of_the_root_are_not_followed(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for key in ("../secret", "/etc/passwd", "a/../../secret", "", "a//b", "a/./b", "nul\0"):
        with pytest.raises(StorageError, match="not followed"):
            store.find(key)


def test_a_store_survives_pickling(store: ObjectStore) -> None:
    store.put_if_absent("x", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.root_uri == store.root_uri
    assert copy.get("x") == b"1"


def test_a_forked_process_reads_and_writes_on_connections_of_its_own(store: ObjectStore) -> None:
    store.put_if_absent("parent", b"1")
    child = os.fork()
    if child == 0:
        try:
            store.put_if_absent("child", store.get("parent"))
            os._exit(0)
        finally:
            os._exit(1)
    assert [store.get("parent") for _ in range(5)] == [b"1"] * 5
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.get("child") == b"1"


_UPLOADER = """
import sys
from pathlib import Path
from pipeline.storage import open_store, sha256_of_file
store, folder = open_store(sys.argv[1]), Path(sys.argv[2])
number = 0
while True:
    path = folder / "block"
    path.write_bytes(number.to_bytes(8, "big") * (1 << 20))
    sha256 = sha256_of_file(path)
    store.put_file(f"data/{sha256}", path, sha256)
    store.put_if_absent(f"commits/{sha256}", sha256.encode() * 1000)
    print(number, flush=True)
    number += 1
"""


def test_a_killed_writer_leaves_no_half_written_object(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    writer = subprocess.Popen(
        [sys.executable, "-c", _UPLOADER, store.root_uri, str(tmp_path / "work")], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    with writer.stdout:
        for _ in range(3):
            assert writer.stdout.readline()
        time.sleep(0.07)  # into the next round, wherever that is
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    found = list(store.list("data/"))
    assert len(found) >= 3
    for info in found:
        assert hashlib.sha256(store.get(info.key)).hexdigest() == info.key.rpartition("/")[2]
    for info in store.list("commits/"):
        assert store.get(info.key) == info.key.rpartition("/")[2].encode() * 1000


def test_requests_are_repeated_until_the_store_recovers(proxy: FaultProxy, far_store: ObjectStore) -> None:
    far_store.put_if_absent("x", b"1")
    for what in ("503", "500", "drop", "lose", "short", "409"):
        proxy.first(3, what, "GET")
        before = proxy.count("GET")
        assert far_store.get("x") == b"1", what
        assert proxy.count("GET") - before == 4, f"{what}: one layer repeats, once per failure"


def test_a_put_is_repeated_and_a_create_is_not(proxy: FaultProxy, far_store: ObjectStore, tmp_path: Path) -> None:
    proxy.first(2, "503", "PUT")
    put(far_store, "data/x", b"1", tmp_path)
    assert proxy.count("PUT") == 3
    for what in ("503", "500", "409", "drop", "lose"):
        proxy.first(1, what, "PUT")
        before = proxy.count("PUT")
        with pytest.raises(OutcomeUnknownError):
            far_store.put_if_absent(f"once-{what}", b"1")
        assert proxy.count("PUT") - before == 1
    assert far_store.get("once-lose") == b"1"
    assert far_store.find("once-drop") is None


def test_a_store_that_stays_down_ends_in_an_error_within_the_budget(
    proxy: FaultProxy, far_store: ObjectStore, impatient: None
) -> None:
    proxy.fault = lambda method, path: "503"
    with pytest.raises(StorageUnavailableError, match="503 SlowDown"):
        far_store.get("x")
    assert proxy.count("GET") < 20


def test_failed_requests_are_counted_as_repeated_or_given_up_and_answers_are_not(
    proxy: FaultProxy, far_store: ObjectStore, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.store.StoreErrors, "num_repeated", 0)
    monkeypatch.setattr(pipeline.store.StoreErrors, "num_given_up", 0)
    errors = pipeline.store.StoreErrors
    far_store.put_if_absent("x", b"1")
    with pytest.raises(ObjectExistsError):
        far_store.put_if_absent("x", b"2")
    assert far_store.find("y") is None
    assert (errors.num_repeated, errors.num_given_up) == (0, 0)
    proxy.first(2, "500", "GET")
    far_store.get("x")
    assert (errors.num_repeated, errors.num_given_up) == (2, 0)
    proxy.fault = lambda method, path: "500"
    with pytest.raises(StorageUnavailableError):
        far_store.get("x")
    assert errors.num_repeated > 2
    assert errors.num_given_up == 1


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_store_that_asks_for_fewer_requests_gets_fewer_from_all_and_then_more_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, pace = Clock(), pipeline.store.Pace()
    monkeypatch.setattr(pipeline.store, "time", clock)

    def seconds_of(count: int, answer: Any) -> float:
        before = clock.now
        for _ in range(count):
            pace.wait()
            answer()
        return clock.now - before

    assert seconds_of(1000, pace.faster) == 0, "free until a store asks for fewer"
    assert seconds_of(10, pace.slower) < 1, "many refusals at once count once"
    assert seconds_of(100, pace.slower) > 300
    assert seconds_of(6, pace.slower) == pytest.approx(60), "in the end one request in ten seconds, of all threads"
    assert seconds_of(200, pace.faster) < 60
    assert seconds_of(1000, pace.faster) == 0


def test_an_outage_of_a_quarter_of_an_hour_costs_few_requests_and_creates_wait_their_turn_too(
    proxy: FaultProxy, far_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(pipeline.store, "time", clock)
    monkeypatch.setattr(pipeline.s3, "_pace", pipeline.store.Pace())
    proxy.fault = lambda method, path: "503"
    with pytest.raises(StorageUnavailableError):
        far_store.get("x")
    # The last pause ends within the budget; the shared pace may ask for one more turn to be waited for.
    assert clock.now <= pipeline.store.RETRY_BUDGET_S + 1 / pipeline.store._SLOWEST_PER_S
    assert proxy.count("GET") < 200, "requests of a quarter of an hour"
    before = clock.now
    with pytest.raises(OutcomeUnknownError):
        far_store.put_if_absent("x", b"1")
    assert clock.now > before


@pytest.mark.parametrize("what", ["flip", "truncate"])
def test_a_body_damaged_on_the_way_is_read_again(what: str, proxy: FaultProxy, far_store: ObjectStore) -> None:
    far_store.put_if_absent("x", b"0123456789")
    if what == "truncate":
        # The length of a range can be checked against the object; its content carries no checksum.
        proxy.first(1, what, "GET")
        assert far_store.get_range("x", 0, 8) == b"01234567"
    else:
        proxy.first(1, what, "GET")
        assert far_store.get("x") == b"0123456789"
    assert proxy.count("GET") == 2


def test_a_body_that_stalls_on_the_way_is_read_again(
    proxy: FaultProxy, far_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.s3, "READ_TIMEOUT_S", 1.0)
    pipeline.s3._client_of.cache_clear()
    try:
        far_store.put_if_absent("x", b"0123456789" * 1000)
        proxy.first(1, "stall", "GET")
        assert far_store.get("x") == b"0123456789" * 1000
        assert proxy.count("GET") == 2
    finally:
        pipeline.s3._client_of.cache_clear()


def test_an_expired_token_is_renewed_once_and_then_ends_the_attempt(proxy: FaultProxy, far_store: ObjectStore) -> None:
    far_store.put_if_absent("x", b"1")
    proxy.first(1, "400", "GET")
    assert far_store.get("x") == b"1"
    proxy.fault = lambda method, path: "400"
    with pytest.raises(CredentialsExpiredError, match=r"ExpiredToken.*AWS_SESSION_TOKEN"):
        far_store.get("x")


def test_keys_that_are_exchanged_while_a_job_runs_are_taken_up_once(proxy: FaultProxy, far_store: ObjectStore) -> None:
    for act in (lambda: far_store.put_if_absent("x", b"1"), lambda: far_store.get("x"), lambda: far_store.head("x")):
        proxy.fault = once("403")
        act()
    proxy.fault = lambda method, path: "403"
    before = len(proxy.requests)
    with pytest.raises(StorageError, match=r"denied by .*AccessDenied"):
        far_store.put_if_absent("y", b"1")
    assert len(proxy.requests) - before == 2


def test_a_missing_bucket_is_named(s3_env: Any) -> None:
    store = open_store("s3://no-such-bucket/x")
    for act in (lambda: store.find("k"), lambda: list(store.list("")), lambda: store.put_if_absent("k", b"")):
        with pytest.raises(StorageNotFoundError, match=r"bucket 'no-such-bucket' does not exist at http://127"):
            act()


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong-secret"), ("AWS_ACCESS_KEY_ID", "WRONGKEY")]
)
def test_wrong_credentials_say_what_to_check_and_show_no_secret(
    variable: str, value: str, s3_env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    store = open_store(s3_env.root())
    for act in (lambda: store.find("k"), lambda: store.head("k"), lambda: store.put_if_absent("k", b"")):
        with pytest.raises(StorageError, match="check AWS_ACCESS_KEY_ID") as caught:
            act()
        assert value not in str(caught.value)
        assert "testtest" not in str(caught.value)
        assert isinstance(pickle.loads(pickle.dumps(caught.value)), StorageError)


def test_no_credentials_at_all_are_named(s3_env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"no usable credentials.*AWS_PROFILE"):
        open_store(s3_env.root()).find("k")


def test_an_endpoint_that_never_answered_is_given_up_soon(
    s3_env: Any, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageUnavailableError, match=r"http://127.0.0.1:9 did not answer.*check AWS_ENDPOINT_URL"):
        open_store("s3://latents/x").find("k")


def test_an_output_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        open_store(str(tmp_path / "file"))
    with pytest.raises(StorageError, match="Not a directory"):
        open_store(str(tmp_path / "file" / "below")).put_if_absent("k", b"")
    with pytest.raises(StorageError, match="No such file or directory"):
        open_store("/proc/nothing").put_if_absent("k", b"")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("gs://bucket/x", "scheme is 'gs'"),
        ("https://user:pw@host/x?X-Amz-Signature=abc", "scheme is 'https'"),
        ("s3://", "does not name a bucket"),
        ("s3://AKIA:pw@bucket/x", "credentials belong into the environment"),
        ("", "empty"),
    ],
)
def test_an_output_uri_that_cannot_be_used_is_refused_without_showing_secrets(uri: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        open_store(uri)
    assert "pw" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_bucket_name_that_cannot_be_is_a_usage_error(s3_env: Any) -> None:
    with pytest.raises(UsageError, match="not a valid bucket name"):
        open_store("s3://no_such bucket!/x").find("k")


def test_local_uris_are_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("out").root_uri == str(tmp_path / "out")
    assert open_store(f"file://{tmp_path}/with%20blank").root_uri == str(tmp_path / "with blank")
    assert open_store("out").url("data/x") == str(tmp_path / "out" / "data" / "x")


def test_what_is_not_finished_is_not_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_if_absent("x", b"1")
    (tmp_path / ".tmp" / "left-by-a-killed-writer").write_bytes(b"half")
    assert [info.key for info in store.list("")] == ["x"]


@pytest.fixture
def shards(store: ObjectStore, tmp_path: Path) -> str:
    """The root of an input with two tars, a table below, and a name full of special characters."""
    for key in ("00000.tar", "00001.tar", "below/table.parquet", "below/odd [1] *.mp4"):
        put(store, key, key.encode() * 100, tmp_path)
    return store.root_uri


def test_inputs_are_listed_from_a_folder_a_glob_and_a_file(shards: str) -> None:
    assert [file.uri for file in list_inputs(shards)] == [
        f"{shards}/{name}" for name in ("00000.tar", "00001.tar", "below/odd [1] *.mp4", "below/table.parquet")
    ]
    assert [file.uri for file in list_inputs(f"{shards}/*.tar")] == [f"{shards}/00000.tar", f"{shards}/00001.tar"]
    assert [file.uri for file in list_inputs(f"{shards}/**/*.parquet")] == [f"{shards}/below/table.parquet"]
    assert [file.uri for file in list_inputs(f"{shards}/below/")] == [
        f"{shards}/below/odd [1] *.mp4",
        f"{shards}/below/table.parquet",
    ]
    (file,) = list_inputs(f"{shards}/below/odd [1] *.mp4")
    assert file == stat_input(file.uri)
    assert file.num_bytes == 1900


def test_local_links_are_followed_and_a_broken_one_is_missed_by_name(tmp_path: Path) -> None:
    root, cache = tmp_path / "in", tmp_path / "cache"
    (root / "real" / "deep").mkdir(parents=True)
    (cache / "more").mkdir(parents=True)
    (cache / "blob").write_bytes(b"bytes")
    (cache / "more" / "c.mp4").write_bytes(b"c")
    (root / "real" / "a.mp4").symlink_to(cache / "blob")
    (root / "real" / "gone.mp4").symlink_to(tmp_path / "gone")
    (root / "real" / "itself.mp4").symlink_to("itself.mp4")
    (root / "linked").symlink_to(cache)
    (root / "again").symlink_to(cache)
    (root / "real" / "deep" / "loop").symlink_to(root)
    (cache / "loop").symlink_to(root)
    sizes = {file.uri.removeprefix(f"{root}/"): file.num_bytes for file in list_inputs(str(root))}
    assert sizes == {
        "real/a.mp4": 5,
        "real/gone.mp4": None,
        "real/itself.mp4": None,
        **{
            f"{link}/{name}": size
            for link in ("linked", "again")
            for name, size in {"blob": 5, "more/c.mp4": 1}.items()
        },
    }
    found = [file.uri for file in list_inputs(f"{root}/*/a.mp4")]
    assert found == [f"{root}/real/a.mp4"]
    assert [file.uri for file in list_inputs(f"{root}/li*/**/*.mp4")][-1] == f"{root}/linked/more/c.mp4"
    (file,) = list_inputs(f"{root}/real/a.mp4")
    assert file == stat_input(f"{root}/real/a.mp4")
    for read in (list_inputs, stat_input):
        for name in ("gone", "itself"):
            with pytest.raises(StorageNotFoundError, match=name):
                read(f"{root}/real/{name}.mp4")


def test_a_glob_reads_no_deeper_than_it_can_match(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("0.tar", "a/1.tar", "a/b/2.tar"):
        (tmp_path / name).write_bytes(b"")
    for glob, found in {
        "*.tar": ["0"],
        "*/*.tar": ["a/1"],
        "a*/b/*": ["a/b/2"],
        "**/*.tar": ["0", "a/1", "a/b/2"],
    }.items():
        assert [file.uri for file in list_inputs(f"{tmp_path}/{glob}")] == [f"{tmp_path}/{name}.tar" for name in found]


def test_odd_keys_on_s3_do_not_hide_their_neighbours(s3_env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The store behind the tests tidies its keys, so only the listing is made up.
    names = ("/0.mp4", "a.mp4", "d/", "e/x//b.mp4", "f/./b.txt", "g/../c.mp4")
    infos = [pipeline.store.ObjectInfo(key=name, num_bytes=1, etag=None) for name in names]
    monkeypatch.setattr(pipeline.s3.S3Store, "list", lambda self, prefix: iter(infos))
    for uri in (f"s3://{s3_env.bucket}", f"s3://{s3_env.bucket}/**"):
        assert [file.uri for file in list_inputs(uri)] == [
            f"s3://{s3_env.bucket}/{name}" for name in names if not name.endswith("/")
        ]
    with pytest.raises(StorageError, match="has a part"):
        stat_input(f"s3://{s3_env.bucket}/g/../c.mp4")


def test_what_was_uploaded_after_a_list_is_in_the_next(store: ObjectStore, shards: str) -> None:
    before = list_inputs(shards)
    store.put_if_absent("00002.tar", b"new")
    assert len(list_inputs(shards)) == len(before) + 1


def test_inputs_are_read_as_streams_and_as_descriptors(shards: str) -> None:
    expected = b"00001.tar" * 100
    with open_input(f"{shards}/00001.tar") as stream:
        assert stream.read(5) == expected[:5]
        stream.seek(-4, os.SEEK_END)
        assert stream.read() == expected[-4:]
        assert stream.seek(9) == 9
        assert stream.read(9) == expected[9:18]
    descriptor = open_input_fd(f"{shards}/00001.tar")
    try:
        assert os.read(descriptor, 9999) == expected
        os.lseek(descriptor, 0, os.SEEK_SET)
        assert os.read(descriptor, 3) == expected[:3]
    finally:
        os.close(descriptor)


def test_inputs_that_do_not_exist_are_named(shards: str) -> None:
    missing = f"{shards}/missing.tar"
    for read in (list_inputs, stat_input, open_input, open_input_fd):
        with pytest.raises(StorageNotFoundError, match=r"missing\.tar"):
            read(missing)
    with pytest.raises(StorageNotFoundError, match=r"\*\.zip"):
        list_inputs(f"{shards}/*.zip")


def test_only_regular_files_become_descriptors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ""):
        with pytest.raises(StorageNotFoundError):
            open_input_fd(str(tmp_path / name))


def test_a_tar_is_streamed_from_s3_through_a_dying_connection(
    proxy: FaultProxy, far_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.storage._READ_AHEAD_BYTES", 64 << 10)
    members = {f"{number:03d}.mp4": os.urandom(30_000) for number in range(20)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    put(far_store, "00000.tar", buffer.getvalue(), tmp_path)
    number = iter(range(1000))
    proxy.fault = lambda method, path: ("short", "drop", "truncate", None)[next(number) % 4]
    with open_input(far_store.url("00000.tar")) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        read = {}
        for entry in tar:
            content = tar.extractfile(entry)
            assert content is not None
            read[entry.name] = content.read()
    assert read == members


def test_an_input_scheme_that_cannot_be_read_is_refused_without_showing_secrets() -> None:
    for uri in ("nonsense://u:secret@host/x?sig=secret", "zip://x.mp4::https://u:secret@host/y"):
        with pytest.raises(UsageError) as caught:
            list_inputs(uri)
        assert "secret" not in str(caught.value)
