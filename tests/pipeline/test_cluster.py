"""What is said and left behind when a job connects to Ray; clusters themselves are in tests/integration."""

from __future__ import annotations

import io
import os

import pytest

from pipeline import cluster
from pipeline.progress import Progress


@pytest.mark.parametrize(
    ("addresses", "has_token", "is_warned"),
    [
        (["127.0.0.1"], False, False),
        (["127.0.0.1", "10.1.2.3"], False, True),
        (["10.1.2.3"], True, False),
        (["fd00::3"], False, True),
        (["head.internal"], False, True),
        (["localhost"], False, False),
    ],
)
def test_a_ray_that_others_reach_without_a_token_is_warned_of(
    addresses: list[str], has_token: bool, is_warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "NodeManagerAddress": address} for address in addresses]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "is_token_auth_enabled", lambda: has_token)
    said = io.StringIO()
    cluster._warn_of_open_cluster(Progress("plain", said))
    assert ("without token authentication" in said.getvalue()) == is_warned


def test_what_the_workers_of_an_embedded_ray_inherit_is_not_left_in_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LATENTMILL_A", "before")
    monkeypatch.delenv("LATENTMILL_B", raising=False)
    with cluster._environment({"LATENTMILL_A": "1", "LATENTMILL_B": "2"}):
        assert (os.environ["LATENTMILL_A"], os.environ["LATENTMILL_B"]) == ("1", "2")
    assert os.environ["LATENTMILL_A"] == "before"
    assert "LATENTMILL_B" not in os.environ
