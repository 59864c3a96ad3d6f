"""Block tables of a request: what stands in them, and which kinds of attention are refused."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from tests.integrations.vllm_fakes import FullAttentionSpec, SlidingWindowSpec
from tiermem.errors import ConfigError
from tiermem.integrations.vllm_groups import Groups, groups_of, in_order


@dataclass(frozen=True)
class MambaSpec:
    block_size: int = 4


def found(*specs: object) -> Groups:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=4),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
        model_config=SimpleNamespace(max_model_len=100),
        max_in_flight_tokens=32,
    )
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return groups_of(config, SimpleNamespace(kv_cache_groups=groups))


def test_one_table_without_a_window_is_plain() -> None:
    groups = found(FullAttentionSpec())
    assert groups.is_plain
    assert (groups.held(9), groups.longest(5, 100)) == (3, 20)
    assert list(groups.kept(2)) == [(0, 0), (1, 0)]


def test_a_table_with_a_window_begins_where_the_next_token_looks() -> None:
    groups = found(SlidingWindowSpec(6), FullAttentionSpec())
    assert not groups.is_plain
    assert [groups.first(0, blocks) for blocks in range(6)] == [0, 0, 0, 1, 2, 3]
    assert list(groups.kept(4)) == [(0, 1), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]


def test_a_request_holds_of_a_window_what_is_in_flight_too() -> None:
    groups = found(SlidingWindowSpec(6), FullAttentionSpec())
    assert groups.most == (11, 0)  # 5 tokens before, 32 in flight, and one block begun
    assert groups.held(100) == 11 + 25
    assert groups.longest(30, 100) == 76
    assert groups.held(76) == 30


def test_blocks_of_all_tables_go_by_their_place_and_leave_out_what_is_not_held() -> None:
    assert in_order([[0, 0, 7], [3, 4, 5, 6]]) == [3, 4, 7, 5, 6]
    assert in_order([[0, 8, 9]]) == [8, 9]


@pytest.mark.parametrize(
    ("specs", "what"),
    [
        ((FullAttentionSpec(), MambaSpec()), "MambaSpec among"),
        ((FullAttentionSpec(), SlidingWindowSpec(6, block_size=8)), r"blocks of \[8\] tokens"),
    ],
    ids=["another kind", "other blocks"],
)
def test_kinds_that_are_not_followed_are_refused_with_the_way_out(
    specs: tuple[object, ...], what: str
) -> None:
    with pytest.raises(ConfigError, match=f"{what}.*disable-hybrid-kv-cache-manager"):
        found(*specs)


def test_a_kind_that_gives_blocks_back_by_other_rules_is_refused_alone_too() -> None:
    with pytest.raises(ConfigError, match=r"MambaSpec.*TIERMEM=0"):
        found(MambaSpec())
