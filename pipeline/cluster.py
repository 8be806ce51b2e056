"""A connection to Ray: the cluster of `ray job submit` or of an address, else an embedded one that ends with the run.

Not where actors are made or watched: `run` does that, `jobs/encode_text.py`, and Ray Train for the training jobs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.exceptions import RayError

from pipeline.errors import UsageError
from pipeline.progress import Progress, counted


@contextmanager
def connected(address: str | None, environment: Mapping[str, str], progress: Progress) -> Iterator[Mapping[str, str]]:
    """A connection to a cluster, or an embedded Ray that ends with the block.

    Never the address file that an earlier `ray start` left behind: a run on a forgotten cluster surprises.

    Args:
        address: of a cluster; None: that of `ray job submit`, if it started this.
        environment: what the workers of an embedded Ray are to have in theirs.

    Yields:
        what is known of the environment of the workers.

    Raises:
        UsageError: there is no cluster at the address.
    """
    inherited: Mapping[str, str] = {}
    if ray.is_initialized():
        yield inherited
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Errors come back with the results; the workers' own output would tear the progress line apart.
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (RayError, ConnectionError, RuntimeError) as error:
            raise UsageError(f"there is no Ray cluster at {address}: {error}") from error
    else:
        inherited = environment
        # Nothing large crosses Ray, so that the smallest object store will do.
        with _environment(environment):
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=80 << 20,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    where = f"cluster {address}" if address else "embedded"
    progress.say("ray", f"Ray {ray.__version__}, {where}, {resources_in_words()}")
    _warn_of_open_cluster(progress)
    try:
        yield inherited
    finally:
        ray.shutdown()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that the processes started meanwhile have."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _warn_of_open_cluster(progress: Progress) -> None:
    addresses = sorted({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    reachable = [address for address in addresses if not _is_loopback(address)]
    # A cluster that checks tokens takes no driver without one.
    if reachable and not is_token_auth_enabled():
        progress.say(
            "warning",
            f"Ray listens on {', '.join(reachable[:3])} without token authentication: whoever reaches it runs code on "
            "every node. Start the cluster with RAY_AUTH_MODE=token, or keep it in a network of its own",
        )


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def resources_in_words() -> str:
    """What the cluster has, for people."""
    total = ray.cluster_resources()
    cpus, gpus = counted(total.get("CPU", 0), "CPU"), counted(total.get("GPU", 0), "GPU")
    return f"{cpus}, {gpus} on {counted(len(_nodes()), 'node')}"


def gpus_per_actor(asked: float | None) -> float:
    """GPUs of an actor: as asked, else one where a node of the cluster has any."""
    return asked if asked is not None else float(ray.cluster_resources().get("GPU", 0) > 0)


def num_places(num_cpus: int, num_gpus: float) -> int:
    """Actors of this size that fit on the nodes of now; a rest on one node does not help another."""
    return sum(
        int(min(node.get("CPU", 0) // num_cpus, node.get("GPU", 0) / num_gpus + 1e-6 if num_gpus else float("inf")))
        for node in _nodes()
    )


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def in_short(error: BaseException) -> str:
    """The first line of an error of Ray, which says what happened, and the last, which says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else type(error).__name__
