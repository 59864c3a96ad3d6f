"""Limits on host memory, read from trees as v1, v2, hybrid and container machines show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiermem.errors import ConfigError
from tiermem.host.limits import available_bytes, cgroup_limits, check, limits

GIB = 1 << 30
NO_LIMIT_V1 = "9223372036854771712\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2_MOUNT = "24 1 0:21 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_v2_takes_the_tightest_level_up_to_the_root(tmp_path: Path) -> None:
    root = tree(tmp_path, {
        "proc/self/cgroup": "0::/kube/pod7/app\n",
        "proc/self/mountinfo": "1 0 8:1 / / rw - ext4 /dev/sda rw\n" + V2_MOUNT,
        "sys/fs/cgroup/kube/memory.max": "max\n",
        "sys/fs/cgroup/kube/memory.current": f"{50 * GIB}\n",
        "sys/fs/cgroup/kube/pod7/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/kube/pod7/memory.current": f"{6 * GIB}\n",
        "sys/fs/cgroup/kube/pod7/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 0\n",
        "sys/fs/cgroup/kube/pod7/app/memory.max": f"{20 * GIB}\n",
        "sys/fs/cgroup/kube/pod7/app/memory.current": f"{GIB}\n",
    })  # fmt: skip
    tightest = limits(root, available=100 * GIB)[0]
    assert tightest.room == 3 * GIB
    assert tightest.total == 8 * GIB
    assert tightest.source.endswith("sys/fs/cgroup/kube/pod7/memory.max")


def test_v2_counts_memory_high_because_above_it_everything_crawls(tmp_path: Path) -> None:
    root = tree(tmp_path, {
        "proc/self/cgroup": "0::/a\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/a/memory.max": f"{9 * GIB}\n",
        "sys/fs/cgroup/a/memory.high": f"{4 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{GIB}\n",
    })  # fmt: skip
    assert available_bytes(root) <= 3 * GIB
    assert limits(root, available=100 * GIB)[0].source.endswith("memory.high")


def test_v1_walks_up_and_ignores_the_number_that_means_no_limit(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    root = tree(tmp_path, {
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/slurm/job1/step0\n0::/\n",
        "proc/self/mountinfo": "30 1 0:9 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        f"{base}/memory.limit_in_bytes": NO_LIMIT_V1,
        f"{base}/slurm/job1/memory.limit_in_bytes": f"{16 * GIB}\n",
        f"{base}/slurm/job1/memory.usage_in_bytes": f"{10 * GIB}\n",
        f"{base}/slurm/job1/memory.stat": f"cache 5\ntotal_inactive_file {2 * GIB}\n",
        f"{base}/slurm/job1/step0/memory.limit_in_bytes": NO_LIMIT_V1,
    })  # fmt: skip
    found = cgroup_limits(root)
    assert [limit.room for limit in found] == [8 * GIB]
    assert "job1" in found[0].source


def test_hybrid_reads_memory_from_v1_although_v2_is_mounted_beside_it(tmp_path: Path) -> None:
    root = tree(tmp_path, {
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/api/box\n0::/api/box\n",
        "proc/self/mountinfo": (
            "30 1 0:9 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "31 1 0:8 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        ),
        "sys/fs/cgroup/memory/api/box/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/unified/api/box/cgroup.controllers": "\n",
    })  # fmt: skip
    assert [limit.total for limit in cgroup_limits(root)] == [2 * GIB]


def test_a_container_that_sees_only_its_part_of_the_tree_finds_its_limit(tmp_path: Path) -> None:
    root = tree(tmp_path, {
        "proc/self/cgroup": "4:memory:/docker/abc/inner\n",
        "proc/self/mountinfo": (
            "30 1 0:9 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
        ),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/inner/memory.limit_in_bytes": f"{3 * GIB}\n",
    })  # fmt: skip
    assert sorted(limit.total for limit in cgroup_limits(root)) == [3 * GIB, 4 * GIB]


def test_a_path_that_is_not_mounted_falls_back_to_the_top_of_the_mount(tmp_path: Path) -> None:
    root = tree(tmp_path, {
        "proc/self/cgroup": "0::/../../other\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
    })  # fmt: skip
    assert [limit.total for limit in cgroup_limits(root)] == [GIB]


def test_without_any_cgroup_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert limits(tmp_path, available=7)[0].room == 7


def test_a_capacity_over_the_limit_is_refused_with_numbers_and_the_file(tmp_path: Path) -> None:
    root = tree(tmp_path, {
        "proc/self/cgroup": "0::/a\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/a/memory.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{GIB}\n",
    })  # fmt: skip
    assert check(GIB, root, available=100 * GIB).room == GIB
    with pytest.raises(ConfigError, match=r"host\.capacity: 1\.50 GiB.*1\.00 GiB.*a/memory\.max"):
        check(GIB * 3 // 2, root, available=100 * GIB)


def test_this_machine_has_some_room() -> None:
    assert available_bytes() > 0
