"""What a sandboxed process can still do, tried out in real processes, each layer alone and all of them together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import sandbox

ROOT = str(Path(__file__).parents[2])
LAYERS = ("_empty_root", "_nobody", "_landlock", "_seccomp")

# What a process that a hostile file has taken over would try. The canary stands in its parent's environment.
_ATTEMPTS = """
import json, os, signal, socket, subprocess, sys, threading
from pipeline import sandbox

def absent():
    raise OSError("switched off for this test")

def run_program():
    try:
        os.execv("/no/such/program", ["program"])
    except FileNotFoundError:
        pass  # it was looked for

for name in sys.argv[1].split():
    setattr(sandbox, name, absent)
secret_file = sys.argv[2]
already_open = os.open(secret_file, os.O_RDONLY)
if user := int(sys.argv[3] or 0):
    # The job of a plain user: this process becomes that user's, and can be looked into as others can.
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    sandbox._libc().prctl(sandbox._PR_SET_DUMPABLE, 1, 0, 0, 0)
    assert open("/proc/self/environ", "rb").read()
    if child := os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
report = sandbox.enter(os.getppid())
attempts = {
    "read a file": lambda: open(secret_file).close(),
    "list a folder": lambda: os.listdir("/etc"),
    "write a file": lambda: open("/tmp/latentmill-canary", "w").close(),
    "read its parent's environment": lambda: open(f"/proc/{os.getppid()}/environ", "rb").read(),
    "read its parent's memory": lambda: open(f"/proc/{os.getppid()}/mem", "rb").close(),
    "make a socket": lambda: socket.socket().close(),
    "run a program": run_program,
    "start a process": lambda: os.fork() or os._exit(0),
    "signal its parent": lambda: os.kill(os.getppid(), 0),
    "become root": lambda: os.setuid(0),
}
went_through = []
for what, act in attempts.items():
    try:
        act()
        went_through.append(what)
    except OSError:
        pass
thread = threading.Thread(target=lambda: went_through.append("start a thread"))
thread.start()
thread.join()
os.kill(os.getpid(), 0)
went_through.append("signal itself")
assert os.pread(already_open, 6, 0) == b"secret"
print(json.dumps({"report": report, "went_through": went_through}))
"""


def attempts_in_a_sandbox(tmp_path: Path, without: tuple[str, ...] = (), user: int | None = None) -> dict[str, Any]:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    if user is not None:
        os.chown(secret, user, user)
    command = [sys.executable, "-c", _ATTEMPTS, " ".join(without), str(secret), str(user or "")]
    environment = {"PATH": "", "AWS_SECRET_ACCESS_KEY": "canary", "PYTHONPATH": ROOT, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


ALLOWED = ["start a thread", "signal itself"]


@pytest.mark.parametrize("user", [None, 4321])
def test_with_all_layers_nothing_can_be_reached(tmp_path: Path, user: int | None) -> None:
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can run a test as another user")
    found = attempts_in_a_sandbox(tmp_path, user=user)
    report = found["report"]
    if "landlock" not in str(report["layers"]) and "empty root" not in report["layers"]:
        pytest.skip(f"this machine allows neither Landlock nor namespaces: {report}")
    assert found["went_through"] == ALLOWED
    assert sandbox.is_tight(report), report
    assert report["dies_with_parent"]


# What a layer cannot keep from a process that it holds alone; "another user" needs root to begin with.
@pytest.mark.parametrize(
    ("layer", "kept_out"),
    [
        ("_landlock", {"read a file", "list a folder", "write a file", "read its parent's environment"}),
        ("_empty_root", {"read a file", "list a folder", "write a file", "read its parent's environment"}),
        ("_nobody", {"read a file", "read its parent's environment", "become root", "signal its parent"}),
        ("_seccomp", {"make a socket", "run a program", "start a process", "signal its parent"}),
    ],
)
def test_each_layer_holds_alone_and_what_is_open_is_reported(tmp_path: Path, layer: str, kept_out: set[str]) -> None:
    if layer == "_nobody" and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    others = tuple(name for name in LAYERS if name != layer)
    found = attempts_in_a_sandbox(tmp_path, without=others)
    report, went_through = found["report"], set(found["went_through"])
    if len(report["layers"]) < 2:
        pytest.skip(f"this machine does not allow {layer}: {report}")
    assert not kept_out & went_through
    assert report["network"].startswith("open: ") == ("make a socket" in went_through)
    assert report["files"].startswith("open: ") == ("list a folder" in went_through)
    assert report["processes"].startswith("open: ") == ("read its parent's environment" in went_through)
    assert not sandbox.is_tight(report)
    assert "; " in sandbox.in_words(report)


def test_without_any_layer_the_process_runs_and_says_so(tmp_path: Path) -> None:
    found = attempts_in_a_sandbox(tmp_path, without=LAYERS)
    assert "read its parent's environment" in found["went_through"]
    assert found["report"]["layers"] == ["not dumpable"]
    assert sandbox.in_words(found["report"]).count("open: ") == 3


def test_a_process_that_computes_for_too_long_is_ended_by_the_kernel() -> None:
    program = (
        "from pipeline import sandbox\nsandbox.limit_resources(1 << 32, 1 << 20)\nsandbox.limit_cpu_time(0.0)\n"
        "while True: pass"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == -24  # SIGXCPU
