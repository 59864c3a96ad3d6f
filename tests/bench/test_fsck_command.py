"""`tiermem fsck`: its table, its JSON and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.nvme.fakes import slots
from tests.nvme.test_fsck import SLOT, made, spoil
from tiermem import cli
from tiermem.nvme.crypt import Cipher
from tiermem.nvme.kept import Persist
from tiermem.nvme.slab import Slab


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "nvme"
    path.mkdir(mode=0o700)
    return path


def run(*arguments: str | Path, code: int) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["fsck", *map(str, arguments)])
    assert (left.value.code or 0) == code


def test_a_good_slab_ends_with_zero_and_its_counts(
    where: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(where, slots(0, 5, 19))
    run(where, code=0)
    out = capsys.readouterr().out
    assert re.search(r"rank0\.slab .* 8\.0KiB .* 20 .* yes .* 3 .* good", out), out


def test_a_torn_page_ends_with_one_and_names_the_repair_which_mends_it(
    where: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(where, slots(0, 5, 19))
    spoil(where, 5)
    run(where, code=1)
    out = capsys.readouterr().out
    assert "damaged" in out
    assert "--repair drops" in out
    run(where, "--repair", code=1)
    assert "repaired" in capsys.readouterr().out
    run(where, code=0)


def test_json_has_every_count_and_nothing_else_on_standard_output(
    where: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(where, slots(0, 5, 19))
    spoil(where, 5)
    run(where, "--json", "-", code=1)
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "tiermem.fsck.v1"
    assert not found["good"]
    (slab,) = found["slabs"]
    assert (slab["readable"], slab["torn"], slab["slot_bytes"]) == (2, 1, SLOT)
    assert slab["fingerprint"] == {"model": "m"}


def test_a_slab_in_use_is_not_good_and_the_reason_is_printed(
    where: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Slab(where, SLOT, 20, prewrite=False, persist=Persist("rank0", {"model": "m"})):
        run(where, code=1)
    assert "in use" in capsys.readouterr().out


def test_an_encrypted_slab_is_opened_with_its_key_file(
    where: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cryptography")
    key = where / "rank0.key"
    made(where, slots(0, 5), Cipher.of_file(key))
    run(where, code=0)
    assert "--key-file" in capsys.readouterr().out
    spoil(where, 0)
    run(where, "--key-file", key, code=1)
    assert "--key-file" not in capsys.readouterr().out


def test_a_directory_without_slabs_is_an_error(
    where: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(where, code=2)
    assert "no slab at" in capsys.readouterr().err
