from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.fixtures import machines
from tiermem.bench.ends import link_gbps, place_of, relation
from tiermem.bench.nvml import Gpu
from tiermem.bench.survey import survey


@pytest.mark.parametrize(
    ("src", "dst", "named", "rate"),
    [
        ("gpu:0", "host:node0", "PHB", 55.33),
        ("host:node1", "gpu:0", "SYS", 55.33),
        ("gpu:0", "host", "unknown", 55.33),
        ("nvme:nvme5n1", "host:node1", "PHB", 13.83),
        ("nvme:nvme5n1", "gpu:5", "PIX", 13.83),
        ("nvme:nvme5n1", "gpu:4", "NODE", 13.83),
        ("gpu:3", "nvme:nvme7n1", "SYS", 13.83),
        ("gpu:0", "gpu:7", "NVLink", 396.45),
        ("nvme", "host:node0", "unknown", None),
        ("gpu:9", "host:node0", "unknown", None),
    ],
)
def test_ends_of_rows_find_their_relation_and_their_link(
    tmp_path: Path, src: str, dst: str, named: str, rate: float | None
) -> None:
    topology = survey(machines.eight_gpus(tmp_path))
    assert relation(topology, src, dst) == named
    found = link_gbps(topology, src, dst)
    assert (found is None) == (rate is None)
    assert rate is None or found == pytest.approx(rate, abs=0.01)


def test_an_uplink_that_is_slower_than_the_device_counts(tmp_path: Path) -> None:
    tree = machines.Tree(tmp_path)
    tree.node(0, "0-15", 0)
    port = tree.bridge("pci0000:00", "0000:00:01.0", machines.link(4, 8))
    up = tree.bridge(port, "0000:01:00.0", machines.link(4, 8))
    lower = tree.bridge(up, "0000:02:00.0", machines.link(4, 16))
    tree.gpu(lower, "0000:03:00.0", machines.link(4, 16))
    topology = survey(tmp_path)
    assert link_gbps(topology, "gpu", "host") == pytest.approx(13.83, abs=0.01)
    assert relation(topology, "gpu", "host") == "PHB"


def test_in_a_virtual_machine_only_the_link_of_the_device_itself_counts(tmp_path: Path) -> None:
    """A hypervisor's switch is no limit: it says Gen1 x1 and carries whatever it is given."""
    tree = machines.Tree(tmp_path)
    tree.node(0, "0-15", 0)
    port = tree.bridge("pci0000:00", "0000:00:01.0", machines.link(1, 1))
    up = tree.bridge(port, "0000:01:00.0", machines.link(1, 1))
    lower = tree.bridge(up, "0000:02:00.0", machines.link(1, 1))
    tree.gpu(lower, "0000:03:00.0", None)
    disk = tree.device("pci0000:00", "0000:00:02.0", 0x018000, ids=(0x1AF4, 0x1042))
    tree.write(f"devices/{disk}/virtio0/block/vda/size", "1000000")
    gpu = Gpu(0, "Made GPU", "0000:03:00.0", 80 << 30, 5, 5, 16, 16)
    tree.nvml([gpu])
    topology = survey(tmp_path)
    assert topology.virtual
    assert link_gbps(topology, "gpu:0", "host") == pytest.approx(55.33, abs=0.01)


def test_an_end_without_a_name_is_the_only_one_of_its_kind(tmp_path: Path) -> None:
    topology = survey(machines.virtual(tmp_path))
    disk = place_of(topology, "nvme")
    assert disk is not None
    assert disk.title == "vda"
    assert link_gbps(topology, "nvme", "host") is None
    assert relation(topology, "nvme", "gpu:0") == "unknown"
