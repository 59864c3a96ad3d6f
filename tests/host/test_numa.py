"""NUMA facts from sysfs, and None where it does not say."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tiermem.host.numa import cpus_of_node, node_of_pci, parse_cpulist, stay_on


def test_cpu_lists_are_read_as_the_kernel_writes_them() -> None:
    assert parse_cpulist("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    assert parse_cpulist("\n") == ()


def test_the_node_of_a_device_is_found_whatever_way_its_domain_is_written(tmp_path: Path) -> None:
    path = tmp_path / "sys/bus/pci/devices/0000:3b:00.0/numa_node"
    path.parent.mkdir(parents=True)
    path.write_text("1\n")
    assert node_of_pci("0000:3b:00.0", tmp_path) == 1
    assert node_of_pci("00000000:3B:00.0", tmp_path) == 1
    path.write_text("-1\n")
    assert node_of_pci("0000:3b:00.0", tmp_path) is None


def test_what_sysfs_does_not_say_is_none(tmp_path: Path) -> None:
    assert node_of_pci("0000:3b:00.0", tmp_path) is None
    assert node_of_pci("nonsense", tmp_path) is None
    assert cpus_of_node(0, tmp_path) == ()


def test_cpus_of_a_node_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sys/devices/system/node/node1/cpulist"
    path.parent.mkdir(parents=True)
    path.write_text("4-5\n")
    assert cpus_of_node(1, tmp_path) == (4, 5)


def test_a_thread_stays_on_allowed_cpus_only() -> None:
    seen: list[object] = []

    def run() -> None:
        one = min(os.sched_getaffinity(0))
        seen.append(stay_on([one, 100_000]))
        seen.append(os.sched_getaffinity(0) == {one})
        seen.append(stay_on([100_000]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [True, True, False]
