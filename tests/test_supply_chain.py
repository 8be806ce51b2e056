"""What is installed is what was tested: the lock names every package of a run, in the versions of constraints.txt."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from lock import ROOT, needed, pins
from packaging.utils import canonicalize_name

LOCK = ROOT / "requirements.lock"
_ENTRY = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)[^\n]*\n((?: +--hash=[^\n]+\n)*)", re.MULTILINE)


def _entries() -> dict[str, tuple[str, list[str]]]:
    """Canonical name -> the pin, and its hashes."""
    text = LOCK.read_text(encoding="utf-8")
    return {
        canonicalize_name(name): (f"{name}=={version}", re.findall(r"--hash=(\S+)", hashes))
        for name, version, hashes in _ENTRY.findall(text)
    }


def test_the_lock_has_every_package_that_a_run_needs_in_the_tested_version() -> None:
    entries, pinned = _entries(), pins()
    assert needed() - entries.keys() == set(), "make lock writes it anew"
    assert entries.keys() - pinned.keys() == set(), "make lock writes it anew"
    differing = {pin for name, (pin, _) in entries.items() if _canonical(pin) != _canonical(pinned[name])}
    assert differing == set(), "make lock writes it anew"


def _canonical(pin: str) -> str:
    name, _, version = pin.partition("==")
    return f"{canonicalize_name(name)}=={version}"


def test_every_line_of_the_lock_has_hashes() -> None:
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line and line[0] not in "# "]
    entries = _entries()
    assert len(lines) == len(entries) > 50
    for name, (_, hashes) in entries.items():
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), name


def test_nothing_that_is_installed_says_it_lacks_something() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_registry_has_what_the_lock_names(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--require-hashes", "--no-deps", "-r", str(LOCK)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    if done.returncode and re.search(r"connection|timed out|name resolution|No matching distribution", done.stderr):
        pytest.skip(f"no registry is at hand: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
