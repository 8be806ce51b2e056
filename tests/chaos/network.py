"""A second host on this machine, whose lines to this one can be cut in each direction by itself.

The host is a network namespace. A third one is the router between, which drops what is to be lost without a word, as
networks do: `link down`, or a black hole at the sender, would tell the sender at once. Needs root; elsewhere
`second_host` skips the test. Called by test_partitions.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest


@dataclass(frozen=True, slots=True)
class SecondHost:
    """Addresses on both sides, and the lines between them: one pair of addresses for Ray, one for the store.

    Attributes:
        lines: the directions that `cut` knows -> the address that packets in that direction go to.
    """

    name: str
    head: str
    store: str
    node: str
    lines: Mapping[str, str]

    def cut(self, *lines: str) -> None:
        """Loses whatever goes in these directions from now on."""
        for line in lines:
            _ip("-n", f"{self.name}r", "route", "add", "blackhole", f"{self.lines[line]}/32")

    def mend(self, *lines: str) -> None:
        """Ends `cut`."""
        for line in lines:
            _ip("-n", f"{self.name}r", "route", "del", "blackhole", f"{self.lines[line]}/32")

    @contextmanager
    def ray_node(self, address: str, env: Mapping[str, str], num_cpus: int, log: Path) -> Iterator[psutil.Popen]:
        """A Ray node over there, which joins the head at `address`; gone with all its processes afterwards."""
        ray = str(Path(sys.executable).parent / "ray")
        command = ["ip", "netns", "exec", self.name, ray, "start", "--block", f"--address={address}"]
        command += [f"--node-ip-address={self.node}", f"--num-cpus={num_cpus}", "--disable-usage-stats"]
        command += ["--object-store-memory=100000000"]
        with log.open("w") as output:
            node = psutil.Popen(
                command, env={**os.environ, **env}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            seen: list[psutil.Process] = [node]
            try:
                yield node
            finally:
                # Those whose raylet is gone are no children any more, but they are in the namespace.
                pids = _ip("netns", "pids", self.name).split()
                seen += [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]
                for process in seen:
                    try:
                        process.kill()
                    except psutil.NoSuchProcess:
                        continue
                psutil.wait_procs(seen, timeout=30)


def commands_below(process: psutil.Process) -> list[str]:
    """The command lines of living descendants."""
    commands = []
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # zombies count as such
            commands.append(" ".join(child.cmdline()))
    return commands


@contextmanager
def second_host() -> Iterator[SecondHost]:
    """The namespaces and the links between them."""
    name, number = f"lm{os.getpid()}", os.getpid() % 250
    head, store, here = f"10.201.{number}.1", f"10.202.{number}.1", f"10.205.{number}.1"
    node, asker, there = f"10.203.{number}.2", f"10.204.{number}.2", f"10.206.{number}.1"
    router = f"{name}r"
    try:
        try:
            _ip("netns", "add", name)
            _ip("netns", "add", router)
            _ip("link", "add", name, "type", "veth", "peer", "name", "here", "netns", router)
            _ip("-n", router, "link", "add", "there", "type", "veth", "peer", "name", "eth0", "netns", name)
            forwarding = ["ip", "netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]
            subprocess.run(forwarding, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"this user may not make network namespaces here: {said.strip()}")
        for address in (head, store, f"10.205.{number}.2"):
            _ip("addr", "add", f"{address}/32", "dev", name)
        _ip("link", "set", name, "up")
        _ip("-n", router, "addr", "add", f"{here}/32", "dev", "here")
        _ip("-n", router, "addr", "add", f"{there}/32", "dev", "there")
        for device in ("here", "there", "lo"):
            _ip("-n", router, "link", "set", device, "up")
        for address in (node, asker):
            _ip("-n", name, "addr", "add", f"{address}/32", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", name, "link", "set", device, "up")
        # From here, by the address that each of the two lines answers to.
        _ip("route", "add", f"{here}/32", "dev", name)
        _ip("route", "add", f"{node}/32", "via", here, "dev", name, "src", head)
        _ip("route", "add", f"{asker}/32", "via", here, "dev", name, "src", store)
        _ip("-n", router, "route", "add", f"{head}/32", "dev", "here", "scope", "link", "metric", "100")
        _ip("-n", router, "route", "add", f"{store}/32", "dev", "here", "scope", "link", "metric", "100")
        _ip("-n", router, "route", "add", f"{node}/32", "dev", "there", "scope", "link", "metric", "100")
        _ip("-n", router, "route", "add", f"{asker}/32", "dev", "there", "scope", "link", "metric", "100")
        _ip("-n", name, "route", "add", f"{there}/32", "dev", "eth0")
        _ip("-n", name, "route", "add", f"{head}/32", "via", there, "dev", "eth0", "src", node)
        _ip("-n", name, "route", "add", f"{store}/32", "via", there, "dev", "eth0", "src", asker)
        lines = {"to_head": head, "from_head": node, "to_store": store, "from_store": asker}
        yield SecondHost(name, head, store, node, lines)
    finally:
        # The links go with one of their ends.
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)
        for space in (name, router):
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
