from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from tests.bench.fixtures import machines
from tiermem.bench.doctor import Diagnosis, command, examine, worst
from tiermem.bench.doctor_disk import disk_lines, mount_of, probed, try_direct
from tiermem.bench.doctor_engine import seam_lines
from tiermem.bench.doctor_gpu import (
    Cuda,
    driver_version,
    gpu_lines,
    placement_lines,
    topology_lines,
)
from tiermem.bench.doctor_host import host_lines, huge_bytes, pool_huge_bytes
from tiermem.bench.doctor_software import configuration_lines, engine_lines
from tiermem.bench.findings import Line
from tiermem.bench.survey import survey
from tiermem.config import Config, Gpu, Host, Nvme, load
from tiermem.errors import ConfigError
from tiermem.nvme.kvikio import Probe

GIB = 1 << 30
ABLE = Cuda(
    name="Made GPU",
    index=0,
    driver="580.65.06",
    cuda="13.0",
    missing=(),
    memory_bytes=80 * GIB,
    vmm=True,
    posix_fd=True,
    rdma=True,
    host_numa=True,
    calibration={"page_bytes": 2 << 20, "up_gbps": 54.0, "down_gbps": 54.5},
)


def levels(lines: list[Line]) -> dict[str, str]:
    """The worst level of each area."""
    return {line.area: worst(other for other in lines if other.area == line.area) for line in lines}


def runner() -> typer.Typer:
    app = typer.Typer()
    app.command()(command)
    return app


def test_every_check_runs_here_and_every_problem_and_most_notes_name_a_way_out() -> None:
    diagnosis = examine()
    areas = {line.area for line in diagnosis.lines}
    assert {"driver", "NUMA", "host memory", "memlock", "huge pages", "/dev/shm"} <= areas
    assert {"NVMe", "versions", "native code", "engine", "configuration"} <= areas
    assert all(line.way_out for line in diagnosis.lines if line.level == "problem")
    assert msgspec.json.decode(msgspec.json.encode(diagnosis), type=Diagnosis) == diagnosis


def test_a_bad_configuration_is_a_problem_exit_code_one_and_the_rest_still_runs(
    tmp_path: Path,
) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[gpu]\nbudgte = "4GiB"\n')
    ran = CliRunner().invoke(runner(), [str(file), "--json", "-"])
    assert ran.exit_code == 1
    found = json.loads(ran.stdout)
    assert found["worst"] == "problem"
    assert "budgte" in found["lines"][0]["text"]
    assert len(found["lines"]) > 8


def test_the_command_ends_with_zero_when_nothing_that_was_asked_for_fails(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[gpu]\ndevice = "cpu"\nbudget = "64MiB"\n[host]\ncapacity = "64MiB"\n')
    ran = CliRunner().invoke(runner(), [str(file)])
    assert ran.exit_code == 0, ran.output
    said = " ".join(ran.output.split())
    assert "gpu.device = cpu" in said
    assert "0 problem" in said


def test_a_gpu_that_can_do_everything_gives_good_lines_only() -> None:
    lines = list(gpu_lines(Config(), ABLE))
    assert {line.level for line in lines} == {"ok"}
    assert "to the GPU 54.0 GB/s" in lines[-1].text


@pytest.mark.parametrize(
    ("config", "found", "area", "level"),
    [
        (Config(), replace(ABLE, vmm=False), "CUDA virtual memory", "problem"),
        (Config(), replace(ABLE, missing=("cuMemcpyBatchAsync",)), "CUDA copies", "note"),
        (Config(), replace(ABLE, host_numa=False), "read in place", "note"),
        (
            Config(host=Host(read_in_place=True)),
            replace(ABLE, host_numa=False),
            "read in place",
            "problem",
        ),
        (Config(gpu=Gpu(budget=100 * GIB)), ABLE, "driver", "problem"),
        (Config(), replace(ABLE, calibration=None), "calibration", "ok"),
        (Config(), "no driver here", "driver", "note"),
        (Config(gpu=Gpu(device="cpu")), "no driver here", "driver", "ok"),
        (Config(gpu=Gpu(device="cuda:0")), "no driver here", "driver", "problem"),
    ],
)
def test_what_a_gpu_lacks_weighs_by_what_the_configuration_asks_for(
    config: Config, found: Cuda | str, area: str, level: str
) -> None:
    assert levels(list(gpu_lines(config, found)))[area] == level


def test_advice_on_the_topology_is_repeated_with_its_level(tmp_path: Path) -> None:
    lines = list(topology_lines(survey(machines.trained_down(tmp_path))))
    assert [line.level for line in lines] == ["problem", "note"]
    assert "trained down" in lines[0].text


def test_a_process_kept_off_the_cores_of_its_gpu_is_told_the_node(tmp_path: Path) -> None:
    topology = survey(machines.wrong_socket(tmp_path))
    far = list(placement_lines(topology, frozenset(range(32, 64))))
    near = list(placement_lines(topology, frozenset({5, 40})))
    assert [line.level for line in far] == ["note", "note"]
    assert "--cpunodebind=0" in far[0].way_out
    assert [line.level for line in near] == ["ok", "ok"]


def captured(root: Path, shmem: str = "advise", maps: int = 65530) -> Path:
    thp = root / "sys/kernel/mm/transparent_hugepage"
    thp.mkdir(parents=True)
    modes = ["always", "within_size", "advise", "never"]
    (thp / "shmem_enabled").write_text(" ".join(f"[{m}]" if m == shmem else m for m in modes))
    (root / "proc/sys/vm").mkdir(parents=True)
    (root / "proc/sys/vm/max_map_count").write_text(f"{maps}\n")
    (root / "dev/shm").mkdir(parents=True)
    return root


SMAPS = """\
7f0000000000-7f0000400000 rw-s 00000000 00:01 5 /memfd:tiermem-host (deleted)
Size:               4096 kB
ShmemPmdMapped:     2048 kB
7f0000400000-7f0000800000 rw-s 00400000 00:01 5 /memfd:tiermem-host (deleted)
ShmemPmdMapped:     4096 kB
7f0000800000-7f0000c00000 rw-s 00000000 00:01 6 /memfd:other (deleted)
ShmemPmdMapped:     4096 kB
"""


def test_huge_pages_of_a_range_are_those_of_its_mappings_only() -> None:
    start = 0x7F0000000000
    assert huge_bytes(SMAPS, start, start + (8 << 20)) == 6 << 20
    assert huge_bytes(SMAPS, start, start + (4 << 20)) == 2 << 20
    assert huge_bytes("", start, start + (8 << 20)) is None


def test_on_this_machine_the_pool_itself_is_tried() -> None:
    [line] = [line for line in host_lines(Config()) if line.area == "huge pages"]
    tried = pool_huge_bytes()
    if tried is None:
        pytest.skip("the kernel shows no smaps here")
    assert line.level == ("ok" if tried[0] == tried[1] else "note")
    assert tried[1] == 8 << 20


def test_the_version_of_the_driver_is_read_from_its_kernel_module(tmp_path: Path) -> None:
    file = tmp_path / "proc/driver/nvidia/version"
    file.parent.mkdir(parents=True)
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)\n"
        "GCC version:  gcc version 12.2.0\n"
    )
    assert driver_version(tmp_path) == "580.65.06"
    assert driver_version(tmp_path / "absent") is None


def test_the_limit_of_a_cgroup_is_said_with_what_is_left_of_it(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    (tmp_path / "proc/self/mountinfo").write_text(
        "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    )
    box = tmp_path / "sys/fs/cgroup/box"
    box.mkdir(parents=True)
    (box / "memory.max").write_text(str(16 * GIB))
    (box / "memory.current").write_text(str(4 * GIB))
    [line] = [line for line in host_lines(Config(), tmp_path) if line.area == "cgroup"]
    assert "16.0GiB, 12.0GiB of it left" in line.text
    (box / "memory.max").write_text("max")
    [line] = [line for line in host_lines(Config(), tmp_path) if line.area == "cgroup"]
    assert "no memory limit" in line.text


@pytest.mark.parametrize(
    ("found", "mode", "level", "says"),
    [
        (Probe("gds", 5.0, 6.0), "auto", "ok", "GPUDirect Storage works: 5.0 GB/s written"),
        (Probe("compat", 3.0, 3.5, "gds: refused; "), "auto", "ok", "compat path"),
        (Probe("none", reason="gds: x; compat: y"), "auto", "ok", "posix O_DIRECT"),
        (Probe("none", reason="gds: x; compat: y"), "kvikio", "problem", "compat: y"),
    ],
)
def test_the_path_that_a_probe_found_is_said(
    found: Probe, mode: str, level: str, says: str
) -> None:
    line = probed(found, "nvidia-fs is not loaded", mode)
    assert line.level == level
    assert says in line.text


def test_a_drive_can_be_examined_without_a_configuration(tmp_path: Path) -> None:
    ran = CliRunner().invoke(runner(), ["--nvme-path", str(tmp_path), "--json", "-"])
    lines = json.loads(ran.stdout)["lines"]
    assert {"O_DIRECT", "NVMe room", "GDS"} <= {line["area"] for line in lines}
    assert list(tmp_path.iterdir()) == []


def test_an_engine_says_through_its_hook_which_seams_are_live() -> None:
    def hook(config: Config) -> list[Line]:
        return [Line("ok", "vllm seams", f"connector, {config.gpu.device}")]

    def broken(config: Config) -> list[Line]:
        raise ImportError("no module named vllm.v1.kv")

    versions = {"vllm": "0.33.0"}
    said = list(seam_lines("vllm", Config(), hook, versions))
    assert said[-1] == Line("ok", "vllm seams", "connector, auto")
    failed = list(seam_lines("vllm", Config(), broken, versions))[-1]
    assert failed.level == "problem"
    assert "ImportError: no module named vllm.v1.kv" in failed.text
    [absent] = seam_lines("sglang", Config(), None, {})
    assert (absent.level, absent.way_out) == ("problem", "pip install sglang")
    with pytest.raises(ConfigError, match="vllm or sglang"):
        list(seam_lines("lmcache", Config()))


@pytest.mark.parametrize(("mode", "level"), [("never", "note"), ("advise", "ok"), ("always", "ok")])
def test_huge_pages_of_shared_memory_decide(tmp_path: Path, mode: str, level: str) -> None:
    lines = list(host_lines(Config(), captured(tmp_path, mode)))
    assert levels(lines)["huge pages"] == level


def test_few_mappings_are_a_note_for_the_cpu_device_only(tmp_path: Path) -> None:
    root = captured(tmp_path)
    assert levels(list(host_lines(Config(gpu=Gpu(device="cpu")), root)))["mappings"] == "note"
    assert levels(list(host_lines(Config(), root)))["mappings"] == "ok"


def test_a_host_tier_larger_than_the_machine_is_a_problem_with_numbers() -> None:
    config = Config(host=Host(capacity=1 << 60))
    [line] = [line for line in host_lines(config) if line.area == "host memory"]
    assert line.level == "problem"
    assert "host.capacity" in line.text


def mounts(root: Path, *lines: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    text = [f"{20 + i} 1 {line}" for i, line in enumerate(lines)]
    (root / "proc/self/mountinfo").write_text("\n".join(text))
    return root


@pytest.mark.parametrize(
    ("mount", "level", "word"),
    [
        ("259:1 / {at} rw - ext4 /dev/nvme0n1p1 rw", "ok", "ext4"),
        ("259:1 / {at} rw - xfs /dev/nvme0n1p1 rw", "ok", "xfs"),
        ("259:1 / {at} ro,noatime - ext4 /dev/nvme0n1p1 ro", "problem", "read-only"),
        ("0:40 / {at} rw - tmpfs tmpfs rw", "problem", "memory"),
        ("0:41 / {at} rw - nfs4 server:/x rw", "problem", "not a local drive"),
        ("0:42 / {at} rw - fuse.sshfs x rw", "problem", "not a local drive"),
        ("0:43 / {at} rw - overlay overlay rw", "note", "copies on write"),
    ],
)
def test_the_file_system_of_the_path_is_judged(
    tmp_path: Path, mount: str, level: str, word: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    root = mounts(
        tmp_path / "m", "8:1 / / rw - ext4 /dev/sda1 rw", mount.format(at=folder.resolve())
    )
    config = Config(nvme=Nvme(path=folder / "tiermem", capacity=1 << 20))
    [line] = [line for line in disk_lines(config, root) if line.area == "NVMe"]
    assert (line.level, word in line.text) == (level, True)


def test_the_innermost_and_last_mount_holds_a_folder(tmp_path: Path) -> None:
    root = mounts(
        tmp_path,
        "0:1 / /srv rw - tmpfs t rw",
        "259:1 / /srv rw - xfs /dev/nvme0n1p1 rw",
        "0:2 / /srv/deep rw - tmpfs t rw",
        "8:1 / / rw - ext4 /dev/sda1 rw",
    )
    found = [mount_of(Path(path), root) for path in ("/srv/x", "/srv/deep/y", "/srvx")]
    assert [mount.kind if mount else None for mount in found] == ["xfs", "tmpfs", "ext4"]


def test_the_drive_behind_the_mount_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    root = mounts(tmp_path / "m", f"259:1 / {folder.resolve()} rw - ext4 /dev/x rw")
    disk = root / "sys/devices/pci0000:00/nvme/nvme0/nvme0n1"
    (disk / "queue").mkdir(parents=True)
    (disk / "queue/rotational").write_text("0\n")
    (disk / "nvme0n1p1").mkdir()
    (root / "sys/dev/block").mkdir(parents=True)
    (root / "sys/dev/block/259:1").symlink_to(disk / "nvme0n1p1")
    config = Config(nvme=Nvme(path=folder, capacity=1 << 20))
    [line] = [line for line in disk_lines(config, root) if line.area == "NVMe"]
    assert line.text.endswith(f"ext4 at {folder.resolve()} on nvme0n1")


def test_direct_io_is_tried_where_the_path_will_be_and_nothing_stays_behind(
    tmp_path: Path,
) -> None:
    path = tmp_path / "not" / "there"
    lines = list(disk_lines(Config(nvme=Nvme(path=path, capacity=1 << 20))))
    [tried] = [line for line in lines if line.area == "O_DIRECT"]
    assert tried.level in ("ok", "problem")
    assert str(tmp_path) in tried.text
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_refuses_direct_io_is_told_from_one_that_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(nvme=Nvme(path=tmp_path, capacity=1 << 20))
    plain = os.open

    def refuse(path: str, flags: int, *args: int, **more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return plain(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    [line] = [line for line in disk_lines(config) if line.area == "O_DIRECT"]
    assert (line.level, "Invalid argument" in line.text) == ("problem", True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: 64 << 10)
    assert not try_direct(tmp_path)


def test_more_than_the_drive_has_left_is_a_problem_with_both_numbers(tmp_path: Path) -> None:
    config = Config(nvme=Nvme(path=tmp_path, capacity=1 << 60))
    [line] = [line for line in disk_lines(config) if line.area == "NVMe room"]
    assert line.level == "problem"
    assert "free of" in line.text


def test_without_a_path_the_tier_is_off_which_is_a_note() -> None:
    [line] = disk_lines(Config())
    assert line.level == "note"


def test_engines_are_judged_by_version_and_by_our_entry_point() -> None:
    [none] = engine_lines({"python": "3.12"})
    assert none.level == "note"
    [old] = engine_lines({"vllm": "0.20.1"})
    assert (old.level, "outside 0.27 to 0.34" in old.text) == ("note", True)
    [beyond] = engine_lines({"sglang": "0.6.0"})
    assert beyond.level == "note"


def test_what_was_set_is_listed_with_its_source_and_what_was_not_is_counted(
    tmp_path: Path,
) -> None:
    file = tmp_path / "t.toml"
    file.write_text("[share]\nweight = 2.0\n")
    config = load(file, env={})
    lines = list(configuration_lines(config, {"TIERMEM": "1"}))
    assert lines[0].text == f"share.weight = 2.0 ({file}:2)"
    assert f"{len(config.settings()) - 1} settings at their defaults" in lines[1].text
    assert "on" in lines[2].text
    off = list(configuration_lines(config, {}))
    assert off[-1].level == "note"
    bad = list(configuration_lines(config, {"TIERMEM": "maybe"}))
    assert bad[-1].level == "problem"
