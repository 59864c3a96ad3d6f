from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from tests.bench.fixtures import machines
from tests.bench.fixtures.results import result, row
from tiermem.bench import links
from tiermem.bench.advice import Advice
from tiermem.bench.links import Link
from tiermem.bench.result import write
from tiermem.bench.survey import Topology, measured, survey
from tiermem.bench.topology import command, missing
from tiermem.bench.topology_svg import draw

Machine = Callable[[Path], Path]
EVERY = [
    machines.laptop,
    machines.virtual,
    machines.switched,
    machines.wrong_socket,
    machines.eight_gpus,
    machines.trained_down,
]


def look(machine: Machine, root: Path, **rates: float) -> Topology:
    return survey(machine(root), {name.replace("_", ":"): rate for name, rate in rates.items()})


def relations(topology: Topology) -> dict[tuple[str, str], str]:
    return {(t.gpu, t.drive): t.gpu_drive.value for t in topology.triples if t.best}


def problems(topology: Topology) -> list[Advice]:
    return [advice for advice in topology.advice if advice.level == "problem"]


@pytest.mark.parametrize(
    ("generation", "width", "rate"),
    [(1, 16, 4.0), (2, 8, 4.0), (3, 16, 15.75), (4, 4, 7.88), (5, 16, 63.02), (6, 16, 121.0)],
)
def test_the_theoretical_rate_of_a_link_follows_its_encoding(
    generation: int, width: int, rate: float
) -> None:
    link = links.of_generation(generation, width)
    assert link.theoretical_gbps == pytest.approx(rate, abs=0.01)


def test_what_a_reader_would_look_for_in_vain_is_said_to_be_missing(tmp_path: Path) -> None:
    virtual = look(machines.virtual, tmp_path / "v")
    assert missing(virtual) == [
        "no NVMe drive on any PCIe bus that this system shows (there is vda)"
    ]
    empty = survey(tmp_path / "nothing")
    assert [said.split(" on ")[0] for said in missing(empty)] == ["no GPU", "no NVMe drive"]
    assert missing(look(machines.eight_gpus, tmp_path / "e")) == []


def test_the_usable_rate_of_the_link_that_was_measured_is_what_was_measured() -> None:
    assert links.of_generation(5, 16).usable_gbps == pytest.approx(55.3, abs=0.05)


@pytest.mark.parametrize(
    ("speed", "width", "link"),
    [
        ("32.0 GT/s PCIe", "16", Link(32.0, 16)),
        ("8 GT/s", "4", Link(8.0, 4)),
        ("Unknown speed", "0", Link()),
        ("Unknown", "255", Link()),
        ("2.5 GT/s PCIe", "63", Link(2.5, None)),
        (None, None, Link()),
    ],
)
def test_link_fields_of_every_kernel_are_read(
    speed: str | None, width: str | None, link: Link
) -> None:
    assert links.parse(speed, width) == link


def test_a_laptop_whose_gpu_idles_at_gen1_has_no_problem_but_a_note(tmp_path: Path) -> None:
    topology = look(machines.laptop, tmp_path)
    assert relations(topology) == {("GPU 0", "nvme0n1"): "PHB"}
    assert problems(topology) == []
    assert ["idle" in advice.text for advice in topology.advice] == [True]
    gpu = next(place for place in topology.places if place.kind == "gpu")
    assert (gpu.state, gpu.most) == ("idle", Link(16.0, 8))


def test_a_virtual_machine_without_details_says_unknown_and_how_to_measure(tmp_path: Path) -> None:
    topology = look(machines.virtual, tmp_path)
    assert topology.virtual is not None
    assert relations(topology) == {("GPU 0", "vda"): "unknown"}
    [triple] = topology.triples
    assert triple.bounce.usable_gbps is None
    assert not triple.bounce.complete
    assert {place.state for place in topology.places} == {"unknown"}
    assert all("bench offload" in advice.way_out for advice in topology.advice)


def test_measured_rates_fill_in_what_a_virtual_machine_hides(tmp_path: Path) -> None:
    topology = look(machines.virtual, tmp_path, gpu_0=55.0, nvme=3.1)
    [triple] = topology.triples
    assert triple.bounce.usable_gbps == 3.1
    assert triple.bounce.bottleneck == "vda as measured"


def test_one_socket_with_switches_tells_pix_pxb_phb_and_node_apart(tmp_path: Path) -> None:
    topology = look(machines.switched, tmp_path)
    assert relations(topology) == {
        ("GPU 0", "nvme0n1"): "PIX",
        ("GPU 0", "nvme1n1"): "PXB",
        ("GPU 0", "nvme2n1"): "PHB",
        ("GPU 0", "nvme3n1"): "NODE",
    }


def test_a_path_through_memory_counts_every_link_and_a_direct_one_only_those_below_the_switch(
    tmp_path: Path,
) -> None:
    topology = look(machines.switched, tmp_path)
    near = next(t for t in topology.triples if t.drive == "nvme0n1")
    far = next(t for t in topology.triples if t.drive == "nvme1n1")
    assert [hop.name.rsplit(" ", 2)[0] for hop in near.bounce.hops] == [
        "GPU 0",
        "switch 0000:01:00.0",
        "nvme0n1",
        "switch 0000:01:00.0",
    ]
    assert [hop.name.rsplit(" ", 2)[0] for hop in near.direct.hops] == ["GPU 0", "nvme0n1"]
    assert [hop.name.rsplit(" ", 2)[0] for hop in far.direct.hops] == [
        "GPU 0",
        "nvme1n1",
        "switch 0000:06:00.0",
    ]
    assert near.bounce.bottleneck == "nvme0n1 Gen4 x4"
    assert near.bounce.usable_gbps == pytest.approx(6.92, abs=0.01)


def test_acs_redirect_and_a_translating_iommu_are_called_out_where_peers_share_a_switch(
    tmp_path: Path,
) -> None:
    topology = look(machines.switched, tmp_path)
    assert topology.iommu == "translating"
    texts = [advice.text for advice in topology.advice]
    assert any("ACS redirect is on" in text for text in texts)
    assert any("translates DMA addresses" in text for text in texts)
    [acs] = [advice for advice in topology.advice if "ACS" in advice.text]
    assert "0000:07:00.0" not in acs.where


def test_drives_on_the_wrong_socket_are_a_problem_of_each_drive_and_each_gpu(
    tmp_path: Path,
) -> None:
    topology = look(machines.wrong_socket, tmp_path)
    assert set(relations(topology).values()) == {"SYS"}
    assert [advice.where for advice in problems(topology)] == [
        "nvme0n1",
        "nvme1n1",
        "GPU 0",
        "GPU 1",
    ]
    best = [t for t in topology.triples if t.best]
    assert {(t.node, t.gpu_node, t.node_drive) for t in best} == {(0, "PHB", "SYS")}
    assert not any(t.bounce.complete for t in topology.triples)
    assert {t.bounce.bottleneck for t in best} == {"nvme0n1 Gen5 x4", "nvme1n1 Gen5 x4"}


def test_eight_gpus_reach_each_other_by_nvlink_and_their_own_drive_through_one_switch(
    tmp_path: Path,
) -> None:
    topology = look(machines.eight_gpus, tmp_path)
    assert len(topology.peers) == 28
    assert {(p.relation, p.path.hops[0].theoretical_gbps, p.p2p) for p in topology.peers} == {
        ("NVLink", 450.0, "ok")
    }
    assert topology.peers[0].path.usable_gbps == pytest.approx(396.6, abs=0.2)
    assert {p.pcie for p in topology.peers} == {"NODE", "SYS"}
    found = relations(topology)
    for gpu in range(8):
        for drive in range(8):
            expected = "PIX" if gpu == drive else "NODE" if gpu // 4 == drive // 4 else "SYS"
            assert found[(f"GPU {gpu}", f"nvme{drive}n1")] == expected
    near = {(t.gpu, t.node) for t in topology.triples if t.best and t.gpu_drive != "SYS"}
    assert near == {(f"GPU {gpu}", gpu // 4) for gpu in range(8)}
    assert topology.advice == ()


def test_a_link_trained_down_to_x8_gen3_is_a_problem_with_both_rates(tmp_path: Path) -> None:
    topology = look(machines.trained_down, tmp_path)
    [problem] = problems(topology)
    assert problem.where == "GPU 0"
    assert "Gen3 x8 (7.9 GB/s)" in problem.text
    assert "Gen5 x16 (63.0 GB/s)" in problem.text


def test_a_slot_that_is_slower_than_the_drive_is_a_note_not_a_link_trained_down(
    tmp_path: Path,
) -> None:
    topology = look(machines.trained_down, tmp_path)
    [note] = [advice for advice in topology.advice if advice.level == "note"]
    assert note.where == "nvme0n1"
    assert "slot limits it to Gen3 x4" in note.text


def test_two_gpus_below_one_uplink_are_told_that_they_share_it(tmp_path: Path) -> None:
    tree = machines.Tree(tmp_path)
    tree.node(0, "0-15", 0)
    port = tree.bridge("pci0000:00", "0000:00:01.0", machines.link(4, 16))
    up = tree.bridge(port, "0000:01:00.0", machines.link(4, 16))
    for i in range(2):
        lower = tree.bridge(up, f"0000:02:0{i}.0", machines.link(4, 16))
        tree.gpu(lower, f"0000:0{3 + i}:00.0", machines.link(4, 16))
    [note] = survey(tmp_path).advice
    assert note.where == "switch 0000:01:00.0"
    assert "2 GPUs want 63.0 GB/s through an uplink of 31.5" in note.text


@pytest.mark.parametrize("machine", EVERY)
def test_json_of_every_machine_comes_back_and_its_picture_is_xml(
    machine: Machine, tmp_path: Path
) -> None:
    import msgspec

    topology = look(machine, tmp_path)
    encoded = msgspec.json.encode(topology)
    assert msgspec.json.decode(encoded, type=Topology) == topology
    picture = ElementTree.fromstring(draw(topology))
    words = " ".join(picture.itertext())
    assert all(place.title in words for place in topology.places if place.kind != "bridge")


@pytest.mark.parametrize("machine", EVERY)
def test_every_machine_is_shown_in_the_terminal_as_json_and_as_a_picture(
    machine: Machine, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(command)
    root, picture, record = machine(tmp_path / "m"), tmp_path / "t.svg", tmp_path / "t.json"
    arguments = ["--root", str(root), "--svg", str(picture), "--json", str(record)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert "GPU 0" in ran.output
    assert json.loads(record.read_text())["schema"] == "tiermem.topo.v1"
    assert picture.read_text().startswith("<svg")


def test_json_to_standard_output_is_json_and_nothing_else(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    ran = CliRunner().invoke(app, ["--root", str(machines.laptop(tmp_path)), "--json", "-"])
    assert json.loads(ran.stdout)["driver"] == "580.00"


def test_an_empty_tree_and_this_machine_are_surveyed_without_an_error(tmp_path: Path) -> None:
    assert survey(tmp_path).places == ()
    assert survey().nodes is not None


def test_the_memory_of_an_only_node_is_the_machines(tmp_path: Path) -> None:
    root = machines.laptop(tmp_path / "one")
    assert survey(root).nodes[0].memory_bytes == 256 << 30
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text("MemTotal:       33554432 kB\nMemFree: 1 kB\n")
    assert survey(root).nodes[0].memory_bytes == 32 << 30


def test_without_a_driver_gpus_are_shown_by_address(tmp_path: Path) -> None:
    root = machines.trained_down(tmp_path)
    (root / "nvml.json").unlink()
    topology = survey(root)
    assert topology.no_driver is not None
    assert [t.gpu for t in topology.triples] == ["GPU 0000:01:00.0"]
    assert [advice.level for advice in problems(topology)] == ["problem"]


def test_rates_of_a_result_are_taken_by_end_and_only_from_plain_rows(tmp_path: Path) -> None:
    made = result(
        [
            row("host-gpu", "host", "gpu:0", [54.0, 55.0, 56.0]),
            row("gpu-host", "gpu:0", "host", [50.0]),
            row("gpu-host", "gpu:0", "host", [92.0], direction="both"),
            row("nvme-host", "nvme", "host", [3.1]),
            row("nvme-gpu", "nvme", "gpu:0", [2.9]),
        ]
    )
    assert measured(made) == {"gpu:0": 55.0, "nvme": 3.1}
    path = tmp_path / "r.json"
    write(made, path)
    app = typer.Typer()
    app.command()(command)
    root = machines.virtual(tmp_path / "m")
    ran = CliRunner().invoke(app, ["--root", str(root), "--measured", str(path), "--json", "-"])
    assert json.loads(ran.stdout)["triples"][0]["bounce"]["usable_gbps"] == 3.1
