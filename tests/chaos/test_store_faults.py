"""Whatever the store does on the way, racing drivers lose no sample, double none, and write a clean run's bytes."""

from __future__ import annotations

import pytest
from chaos.proxy import possible_pairs
from chaos.store_faults import strike
from conftest import SeaweedFS

NUM_FAULTS = 200


@pytest.mark.timeout(600)
def test_every_fault_on_every_kind_of_key_leaves_each_sample_once_and_the_bytes_of_a_clean_run(
    seaweedfs: SeaweedFS,
) -> None:
    result = strike(seaweedfs.endpoint, seaweedfs.env, seed=1, num_faults=NUM_FAULTS, every_pair=True)
    assert result.problems == []
    assert (result.num_lost, result.num_duplicated, result.num_wrong) == (0, 0, 0)
    assert result.num_recorded == result.num_planned > 0
    assert result.faults.total() >= NUM_FAULTS
    assert result.faults.keys() >= possible_pairs()
