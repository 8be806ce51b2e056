"""Writes requirements.lock: what a run needs, with the SHA-256 of every file that the registry has of each version.

    make lock        after constraints.txt has changed

torch is left out. Its CPU build comes from other places than its CUDA build, which brings packages of its own, so that
no one list of hashes is true on both kinds of machine; its version is in constraints.txt.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# Wheels of decord are for this one platform, and elsewhere decord2 takes its place.
_MARKERS = {"decord": "; sys_platform == 'linux' and platform_machine == 'x86_64'"}
# The package itself, what is not locked, and what torch alone asks for.
_LEFT_OUT = {"latentmill", "torch", "setuptools"}
_HEADER = """\
# What a run needs but torch, each file by its hash; `make lock` writes this from constraints.txt.
"""


def needed() -> set[str]:
    """The packages that an installation without extras consists of here, by canonical name, those left out excepted."""
    found: set[str] = set()
    todo = [("latentmill", frozenset[str]())]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        found.add(canonicalize_name(name))
        if canonicalize_name(name) == "torch":
            continue
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
                entry = (requirement.name, frozenset(requirement.extras))
                todo += [entry] if entry not in seen else []
                seen.add(entry)
    return found - _LEFT_OUT


def pins() -> dict[str, str]:
    """The lines of constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.partition("==")[0]): line for line in lines if line and not line.startswith("#")}


def main() -> None:
    """Asks the registry for the hashes."""
    pinned = pins()
    wanted = "".join(f"{pinned[name]}{_MARKERS.get(name, '')}\n" for name in sorted(needed()))
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-deps", "--generate-hashes", "--universal"]
    command += ["--python-version", "3.11", "--no-header", "--no-annotate", "--quiet", "-"]
    done = subprocess.run(command, input=wanted, stdout=subprocess.PIPE, text=True, check=True)
    (ROOT / "requirements.lock").write_text(_HEADER + done.stdout, encoding="utf-8")


if __name__ == "__main__":
    main()
