"""The job that adds caption embeddings later: every record is covered, once, whatever happens on the way.

The output is made up, the encoder is small and its weights are made; the commit protocol and the files are real.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import encoders
import pytest
from latents import commit_records, manifest, output, record, rejection

from jobs.encode_text import main
from pipeline.columns import ColumnSet, base_file, columns_store
from pipeline.commit import latest_snapshot, load_commits, name_of, read_commit
from pipeline.committed import FileCache
from pipeline.records import Bucket, Commit
from pipeline.redo import order_repair, ordered_repairs
from pipeline.storage import ObjectStore, open_store
from pipeline.store import LocalStore

SHORT = "two dogs"
LONG = "a very long caption indeed " * 9


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    encoders.quiet()
    return str(encoders.clip_text(tmp_path_factory.mktemp("encoder") / "clip"))


class Job:
    """Runs the job in this process on one output."""

    def __init__(self, base: ObjectStore, encoder: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._flags = ["--latents", base.root_uri, "--text-encoder", encoder, "--device", "cpu", "--progress", "plain"]
        self._capsys = capsys

    def __call__(self, *flags: str) -> tuple[int, dict[str, Any]]:
        code = main([*self._flags, *flags])
        result = json.loads(self._capsys.readouterr().out.splitlines()[-1])
        assert result["exit_code"] == code
        return code, result


def _base(root: Path | str) -> ObjectStore:
    shards = [
        [record("a", caption=SHORT), record("b", caption=SHORT), record("c", caption=LONG)],
        [record("d", caption=""), record("e", 3, caption="e e")],
    ]
    return output(root, shards)


def _covered(base: ObjectStore) -> dict[str, str | None]:
    """Record of the set -> SHA-256 of the base file that it is about."""
    return {name_of(commit): commit.source_etag for commit in load_commits(columns_store(base, "text"))}


def _embeddings(base: ObjectStore, cache: Path) -> Callable[[str, str], bytes]:
    texts = ColumnSet.open(base, "text", FileCache(cache, 1 << 30))
    return lambda shard_id, caption: texts.caption(shard_id, caption).tobytes()


def test_every_record_is_covered_once_and_the_same_command_does_what_is_new(
    store: ObjectStore, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = _base(store.root_uri)
    job = Job(base, encoder, capsys)
    code, result = job()
    assert code == 0
    counted = {name: result[name] for name in ("num_records", "num_records_done_before", "num_records_done")}
    assert counted == {"num_records": 2, "num_records_done_before": 0, "num_records_done": 2}
    assert (result["num_texts"], result["num_texts_truncated"], result["snapshot"]) == (5, 1, 1)
    find = _embeddings(base, tmp_path / "cache")
    assert len(find("s000", SHORT)) == 2 * 16 * (2 + len("twodogs"))
    assert find("s000", "") == find("s001", "")
    before = _tree(base)
    code, result = job()
    assert (code, result["num_records_done"], result["num_records_done_before"], result["num_texts"]) == (0, 0, 2, 0)
    assert _tree(base) == before
    commit_records(base, manifest(), "s002", [record("f", caption="new")])
    code, result = job()
    assert (code, result["num_records_done"], result["snapshot"]) == (0, 1, 2)
    assert find("s002", "new")


def _tree(store: ObjectStore) -> dict[str, int]:
    return {info.key: info.num_bytes for info in store.list("")}


def test_retries_and_repairs_of_the_output_are_covered_and_shards_without_samples_need_nothing(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = _base(tmp_path / "out")
    commit_records(base, manifest(), "s009", [], [rejection("x")])
    job = Job(base, encoder, capsys)
    assert job()[0] == 0
    commit_records(base, manifest(), "s000", [record("z", caption="retried")], keys=["z"])
    commit_records(base, manifest(), "s001", [record("d", caption="another")], replaces="s001")
    code, result = job()
    # s001 is replaced by its repair, so that only the repair counts.
    assert (code, result["num_records"], result["num_records_done"]) == (0, 3, 2)
    assert list(_covered(base)) == ["s000", "s000.r1", "s001", "s001.r1"]
    find = _embeddings(base, tmp_path / "cache")
    assert find("s000", "retried")
    assert find("s001", "another")


class _DeathError(BaseException):
    """Ends a run between two requests, as kill -9 does: nothing after it is done by the run itself."""


def test_a_run_that_dies_at_any_write_is_finished_by_the_next_one(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = _base(tmp_path / "undisturbed")
    assert Job(undisturbed, encoder, capsys)()[0] == 0
    # The probes of the start come to nothing by themselves.
    monkeypatch.setattr("jobs.encode_text.check_store", lambda store, single_writer: None)
    wanted = _files(undisturbed)
    num_writes = 0
    for last in range(1, 100):
        base = _base(tmp_path / f"out{last}")
        num_writes = 0

        def counted(write: Callable[..., None], last: int = last) -> Callable[..., None]:
            def call(store: ObjectStore, key: str, *more: object) -> None:
                nonlocal num_writes
                num_writes += 1
                if num_writes == last:
                    raise _DeathError
                write(store, key, *more)
                if num_writes == last - 1 and last % 2:
                    raise _DeathError  # now and then the write lands

            return call

        with monkeypatch.context() as patched:
            for name in ("put_file", "put_if_absent"):
                patched.setattr(LocalStore, name, counted(getattr(LocalStore, name)))
            try:
                Job(base, encoder, capsys)()
            except _DeathError:
                pass
            else:
                break
        assert Job(base, encoder, capsys)()[0] == 0
        assert _files(base) == wanted
    assert num_writes >= 7  # the description, a file and a record for each of two, segment and snapshot


def _files(base: ObjectStore) -> Mapping[str, str]:
    store = columns_store(base, "text")
    commits: list[Commit] = list(load_commits(store))
    snapshot = latest_snapshot(store)
    assert snapshot is not None
    assert {name_of(commit) for commit in snapshot.commits} == {name_of(commit) for commit in commits}
    return {name_of(commit): commit.files[0].sha256 for commit in commits}


def test_damage_of_the_set_is_repaired_by_order_with_the_same_bytes(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = _base(tmp_path / "out")
    job = Job(base, encoder, capsys)
    job()
    store = columns_store(base, "text")
    first = next(iter(load_commits(store, ["s000"])))
    path = Path(store.url(first.files[0].key))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert order_repair(store, "s000", ["size"])
    code, result = job()
    assert (code, result["num_records_done"], result["num_records_repaired"]) == (0, 0, 1)
    assert path.read_bytes() == whole
    assert not ordered_repairs(store, {})
    assert job()[1]["num_records_repaired"] == 0


def test_a_damaged_file_of_the_output_is_left_undone_and_the_others_are_covered(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = _base(tmp_path / "out")
    damaged = read_commit(base, "s000")
    assert damaged is not None
    file = base_file(damaged.files)
    assert file is not None
    Path(base.url(file.key)).write_bytes(b"no parquet")
    code, result = Job(base, encoder, capsys)()
    assert (code, result["num_records_done"], list(result["undone"])) == (4, 1, ["s000"])
    assert file.key in result["undone"]["s000"]
    assert list(_covered(base)) == ["s001"]


def test_at_most_so_many_records_are_covered_in_a_run(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(_base(tmp_path / "out"), encoder, capsys)
    assert [job("--limit", "1")[1]["num_records_done"] for _ in range(3)] == [1, 1, 0]


def test_texts_of_other_columns_are_embedded_as_well(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record("a", caption="long one", fields={"short": "one", "score": 0.5})]
    base = output(tmp_path / "out", [records], passthrough={"short": "string", "score": "float64"})
    job = Job(base, encoder, capsys)
    code, result = job("--text-columns", "caption,score")
    assert code == 2
    assert "'score'" in result["message"]
    assert job("--text-columns", "caption, short")[0] == 0
    find = _embeddings(base, tmp_path / "cache")
    assert find("s000", "one") != find("s000", "long one")


def test_another_encoder_or_dtype_is_refused_with_what_differs(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = _base(tmp_path / "out")
    job = Job(base, encoder, capsys)
    job()
    before = _tree(base)
    code, result = job("--text-dtype", "float32")
    assert (code, result["differences"]) == (3, {"embedding_dtype": ["float16", "float32"]})
    other = encoders.clip(tmp_path / "clip")
    code, result = Job(base, str(other), capsys)()
    assert code == 3
    assert "weights_sha256" in result["differences"]
    assert _tree(base) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--latents", "{tmp}/nothing"], "no output of Latentmill"),
        (["--text-encoder", "{tmp}/nothing"], "there is no folder"),
        (["--text-columns", "subtitle"], "'subtitle'"),
        (["--limit", "0"], "--limit"),
        (["--colour", "red"], "--colour"),
        (["--text-encoder-sha256", "12"], "64 hex digits"),
        (["--latents", "ftp://host/out"], "ftp"),
    ],
)
def test_wrong_use_is_exit_code_2_with_a_message_that_names_the_culprit(
    flags: list[str], said: str, tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = _base(tmp_path / "out")
    code, result = Job(base, encoder, capsys)(*(flag.replace("{tmp}", str(tmp_path)) for flag in flags))
    assert code == 2
    assert said in result["message"]
    assert not (tmp_path / "out" / "columns").exists()


def test_without_an_encoder_nothing_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--latents", _base(tmp_path / "out").root_uri]) == 2
    assert "--text-encoder" in capsys.readouterr().err


def test_of_parquet_files_only_the_texts_are_fetched(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(width_px=256, height_px=256, num_frames=17)
    monkeypatch.setattr("pipeline.format._ROW_GROUP_BYTES", 1 << 18)
    base = output(tmp_path / "out", [[record(f"k{n}", bucket=bucket, caption=f"caption {n}") for n in range(40)]])
    monkeypatch.setattr("pipeline.committed._READ_BLOCK_BYTES", 1 << 12)
    num_bytes = 0
    read = LocalStore.get_range

    def counted(store: LocalStore, key: str, start: int, length: int) -> bytes:
        nonlocal num_bytes
        num_bytes += length
        return read(store, key, start, length)

    monkeypatch.setattr(LocalStore, "get_range", counted)
    assert Job(base, encoder, capsys)()[0] == 0
    file = next(iter(load_commits(open_store(str(tmp_path / "out"))))).files[0]
    assert file.num_bytes > 1_000_000
    assert 0 < num_bytes < file.num_bytes / 10
    assert len(_covered(base)) == 1
