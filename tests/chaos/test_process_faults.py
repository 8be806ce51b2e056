"""Whatever is killed on the way, each sample is there once, with the bytes of a run that nothing disturbed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from chaos.process_faults import KINDS, episode, make_shards, undisturbed

# Twelve, of every kind. The head is last: actors go on without it, and may be done before it is missed.
SHORT = ("child", "actor", "driver", "child", "freeze", "actor", "zombie", "child", "driver", "raylet", "actor", "gcs")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("chaos") / "shards")


@pytest.fixture(scope="module")
def expected(shards: Path, ray_home: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return undisturbed(shards, tmp_path_factory.mktemp("undisturbed"), ray_home)


@pytest.mark.timeout(900)
def test_killed_processes_cost_no_sample_and_no_byte(
    shards: Path, expected: dict[str, str], ray_home: Mapping[str, str]
) -> None:
    result = episode(shards, expected, ray_home, seed=1, kinds=SHORT)
    assert result.problems == []
    assert (result.verdict.num_lost, result.verdict.num_duplicated, result.num_wrong) == (0, 0, 0)
    assert result.verdict.num_recorded == result.verdict.num_planned > 0
    print(f"faults {dict(result.faults)}, s to recover {result.recovery_s}, s to end {result.ending_s}")
    assert result.faults == Counter(SHORT)
    assert result.faults.keys() == set(KINDS)
