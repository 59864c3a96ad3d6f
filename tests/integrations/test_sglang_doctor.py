"""What the doctor says of SGLang, where it is not installed: stand-ins for its functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tiermem.config import Config, Host, Nvme
from tiermem.integrations.sglang_doctor import seam_lines, setting_lines
from tiermem.integrations.sglang_releases import (
    ALLOCATOR,
    RELEASES,
    Release,
    Unsupported,
    release_of,
    seams,
)


@pytest.fixture(params=RELEASES, ids=lambda r: ".".join(map(str, r.version)))
def release(request: pytest.FixtureRequest) -> Iterator[Release]:
    """Modules with every function that a release is hooked at."""
    found: Release = request.param
    with pytest.MonkeyPatch.context() as patch:
        for target in [ALLOCATOR, *(seam.target for seam in seams(found))]:
            _plant(patch, target)
        yield found


def _plant(patch: pytest.MonkeyPatch, target: str) -> None:
    parts = target.split(".")
    first_class = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    names = [".".join(parts[: i + 1]) for i in range(first_class)]
    for name in names:
        if name not in sys.modules:
            patch.setitem(sys.modules, name, ModuleType(name))
        above, _, last = name.rpartition(".")
        if above:
            patch.setattr(sys.modules[above], last, sys.modules[name], raising=False)
    module = sys.modules[names[-1]]
    if target == ALLOCATOR:
        patch.setattr(module, parts[-1], type(parts[-1], (), {}), raising=False)
    elif first_class == len(parts) - 1:
        patch.setattr(module, parts[-1], lambda: None, raising=False)
    else:
        if not hasattr(module, parts[-2]):
            patch.setattr(module, parts[-2], type(parts[-2], (), {}), raising=False)
        patch.setattr(getattr(module, parts[-2]), parts[-1], lambda self: None, raising=False)


def test_all_seams_are_there(release: Release) -> None:
    [line] = seam_lines(release)
    assert line.level == "ok"


def test_a_seam_that_is_gone_is_named(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = sys.modules["sglang.srt.managers.scheduler"]
    monkeypatch.delattr(scheduler.Scheduler, "run_batch")
    [line] = seam_lines(release)
    assert line.level == "problem"
    assert "Scheduler.run_batch" in line.text


def test_every_seam_has_a_hook_of_its_own_name() -> None:
    from tiermem.integrations import sglang_hooks

    for release in RELEASES:
        for seam in seams(release):
            assert callable(getattr(sglang_hooks, seam.hook))
            assert seam.kind in ("before", "after", "around")


@pytest.mark.parametrize("version", ["0.5.17", "0.5.17.post1", "0.5.17+cpu"])
def test_a_release_is_known_by_its_numbers(version: str) -> None:
    assert release_of(version).version == (0, 5, 17)


@pytest.mark.parametrize("version", ["0.5.16", "0.5.9", "0.6.0", "1.0"])
def test_another_release_is_refused_with_those_that_are_not(version: str) -> None:
    with pytest.raises(Unsupported, match=r"0\.5\.17"):
        release_of(version)


@pytest.mark.parametrize(
    ("config", "env", "says"),
    [
        (Config(), {"TIERMEM": "1", "SGLANG_PLUGINS": "other"}, "leaves tiermem out"),
        (Config(), {}, "TIERMEM is off"),
        (Config(host=Host(capacity=0)), {"TIERMEM": "1"}, "nothing can leave the GPU"),
        (Config(nvme=Nvme(path="/mnt/x")), {"TIERMEM": "1"}, "nvme.persist is off"),
    ],
)
def test_settings_that_would_surprise_are_named(
    config: Config, env: dict[str, str], says: str
) -> None:
    assert any(says in line.text for line in setting_lines(config, env))


def test_a_plain_configuration_needs_no_word() -> None:
    env = {"TIERMEM": "1", "SGLANG_PLUGINS": "other, tiermem"}
    assert list(setting_lines(Config(), env)) == []
