"""Configuration: what is read, from where, and what is refused with which words."""

import pickle
import re
from pathlib import Path

import pytest

from tiermem import config
from tiermem.config import Config, Gpu, Host, Nvme, Share
from tiermem.errors import ConfigError
from tiermem.policies import names

FULL = """\
# a comment with gpu.budget = 3 in it
[gpu]
budget = "40GiB"
page = "2MiB"
high = 0.95
low = 0.90

[host]
capacity = "64GiB"
read_in_place = false

[nvme]
path = "/mnt/nvme/tiermem"
capacity = "500GiB"
mode = "posix"
persist = true
write_budget = "400MiB/s"

[evict]
gpu = "classq"
nvme = "my_module:MyPolicy"
gpu_params = { decay = 0.5, probe = "a\\"b", strict = true, window = 3 }

[prefetch]
name = "queue"

[share]
floor = "8GiB"
cap = "30GiB"
weight = 2
"""


def written(folder: Path, toml: str) -> Path:
    file = folder / "tiermem.toml"
    file.write_text(toml)
    return file


def test_a_full_file_is_read_into_bytes_and_words(tmp_path: Path) -> None:
    cfg = config.load(written(tmp_path, FULL), env={})
    assert cfg.gpu.budget == 40 * 2**30
    assert cfg.gpu.page == 2 * 2**20
    assert cfg.host.capacity == 64 * 2**30
    assert cfg.nvme.path == Path("/mnt/nvme/tiermem")
    assert cfg.nvme.write_budget == 400 * 2**20
    assert (cfg.evict.gpu, cfg.evict.host, cfg.evict.nvme) == (
        "classq",
        "classq",
        "my_module:MyPolicy",
    )
    assert (cfg.share.floor, cfg.share.cap, cfg.share.weight) == (8 * 2**30, 30 * 2**30, 2.0)
    assert cfg.host.enabled
    assert cfg.nvme.enabled


def test_nothing_given_means_defaults_without_nvme() -> None:
    cfg = config.load(env={})
    assert cfg.settings() == Config().settings()
    assert not cfg.nvme.enabled
    assert {cfg.source(key) for key in config.KEYS} == {"default"}


def test_code_may_say_sizes_as_text() -> None:
    cfg = Config(
        gpu=Gpu(budget="64MiB", page="64KiB"), host=Host(capacity="0"), nvme=Nvme(path="/tmp/x")
    )
    assert (cfg.gpu.budget, cfg.gpu.page) == (64 * 2**20, 64 * 2**10)
    assert not cfg.host.enabled
    assert cfg.nvme.enabled
    assert cfg.source("gpu.budget") == "code"
    assert cfg.source("gpu.high") == "default"


def test_every_value_knows_its_source(tmp_path: Path) -> None:
    file = written(tmp_path, FULL)
    env = {"TIERMEM_CONFIG": str(file), "TIERMEM_LOG": "DEBUG", "PATH": "/bin"}
    cfg = config.load(env=env, overrides={"gpu.budget": "32GiB"})
    assert cfg.source("gpu.budget") == "override"
    assert cfg.source("gpu.page") == f"{file}:4"
    assert cfg.source("share.weight") == f"{file}:30"
    assert cfg.source("evict.host") == "default"
    assert cfg.source("log.level") == "$TIERMEM_LOG"
    assert cfg.log.level == "debug"
    lines = cfg.describe()
    assert len(lines) == len(config.KEYS)
    assert any(
        line.startswith('gpu.budget = "32GiB"') and line.endswith("# override") for line in lines
    )


def test_dotted_and_inline_keys_have_lines_too(tmp_path: Path) -> None:
    file = written(tmp_path, 'gpu.budget = "1GiB"\nhost = {capacity = 0}\n')
    cfg = config.load(file, env={})
    assert cfg.source("gpu.budget") == f"{file}:1"
    assert cfg.source("host.capacity") == f"{file}:2"


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('[evict]\ngpu_params = "x"', r"must be a table .* such as \{ decay = 0\.5 \}"),
        ("[evict.gpu_params]\ndecay = [1]", "must be a table of numbers"),
        ('[gpu]\nbudgte = "1GiB"', r"toml:2: unknown key gpu\.budgte; did you mean gpu\.budget\?"),
        (
            '[gpu]\n\ncapacity = "1GiB"',
            r"toml:3: unknown key gpu\.capacity; did you mean .*capacity",
        ),
        ('budget = "1GiB"', r"toml:1: unknown key budget; did you mean gpu\.budget\?"),
        ('[gpuu]\npage = "auto"', r"unknown key gpuu\.page; did you mean gpu\.page\?"),
        ("[hosts]", r"toml:1: unknown section \[hosts\]; did you mean host\?"),
        ("[gpu]\nlow = 0.97", r"gpu\.low = 0\.97 \(.*toml:2\): above gpu\.high = 0\.95"),
        ("[gpu]\nhigh = 0", r"gpu\.high = 0 .*above 0, up to 1"),
        ("[host]\nhigh = 1.5", r"host\.high = 1\.5 .*toml:2.*above 0, up to 1"),
        ("[nvme]\nlow = -0.1", "above 0, up to 1"),
        ("[gpu]\nbudget = 0", "less than one page"),
        ("[gpu]\nbudget = 40", r"gpu\.budget = 40 .*less than one page \(4KiB\)"),
        ("[gpu]\nbudget = 40.0", "fraction outside 0 to 1"),
        ('[gpu]\nbudget = "-1GiB"', "negative"),
        ('[gpu]\nbudget = "40G"', "GiB .* or GB"),
        ('[gpu]\nbudget = ["1GiB"]', "is not a size"),
        ('[gpu]\nbudget = "1MiB"\npage = "2MiB"', r"less than gpu\.page = 2097152"),
        ('[gpu]\npage = "5000"', "multiple of 4KiB"),
        ("[gpu]\npage = 0.5", "is a fraction"),
        ('[gpu]\npage = "64KiB"\ndevice = "cuda:0"', "multiple of 2MiB"),
        ('[gpu]\ndevice = "gpu0"', "auto, cpu, cuda:0"),
        ('[gpu]\nhide = "lazzy"', "did you mean 'lazy'"),
        ('[gpu]\nguard = "maybe"', "true or false"),
        ('[nvme]\nmode = "posix"', r"nvme\.mode = \"posix\" .*needs nvme\.path"),
        ("[nvme]\npersist = true", r"needs nvme\.path"),
        ('[nvme]\ncapacity = "1GiB"', r"needs nvme\.path"),
        ('[nvme]\npath = ""', "must be a path"),
        ("[nvme]\nverify = false", "always verified"),
        ('[nvme]\nwrite_budget = "400MiB"', "per second"),
        ("[nvme]\nwrite_budget = 0", "would never write"),
        ('[evict]\ngpu = ""', "my_module:MyPolicy"),
        ('[gpu]\nbudget = "1GiB"\n[share]\ncap = "2GiB"', r"toml:4\): above gpu\.budget = 1GiB"),
        ('[share]\nfloor = "2GiB"\ncap = "1GiB"', r"share\.floor = .*above share\.cap = 1GiB"),
        ("[share]\nweight = 0", "above 0"),
        ("[metrics]\nport = 70000", "1 to 65535"),
        ('[log]\nlevel = "loud"', "debug, info, warning, error"),
        ("[gpu]\nbudget 3", "is not TOML: .*line 2"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_place(
    tmp_path: Path, toml: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        config.load(written(tmp_path, toml), env={})


def test_a_file_that_is_not_there_is_named_with_who_named_it(tmp_path: Path) -> None:
    absent = tmp_path / "absent.toml"
    with pytest.raises(
        ConfigError, match=r"absent\.toml \(argument\) cannot be read: No such file"
    ):
        config.load(absent, env={})
    with pytest.raises(ConfigError, match=r"\(\$TIERMEM_CONFIG\) cannot be read"):
        config.load(env={"TIERMEM_CONFIG": str(absent)})


def test_overrides_and_variables_are_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match=r"override: unknown key gpu\.bugdet; did you mean gpu\."):
        config.load(env={}, overrides={"gpu.bugdet": 1})
    with pytest.raises(ConfigError, match=r"log\.level = \"loud\" \(\$TIERMEM_LOG\)"):
        config.load(env={"TIERMEM_LOG": "loud"})
    with pytest.raises(ConfigError, match=r"TIERMEM_CONFG is unknown; did you mean TIERMEM_CONFIG"):
        config.load(env={"TIERMEM_CONFG": "x"})


def test_one_variable_turns_it_on() -> None:
    assert config.enabled({"TIERMEM": "1"})
    assert not config.enabled({})
    assert not config.enabled({"TIERMEM": "0"})
    with pytest.raises(ConfigError, match="write 1 to turn tiermem on"):
        config.enabled({"TIERMEM": "yess"})


def test_fractions_become_whole_pages_of_the_totals() -> None:
    cfg = Config(
        gpu=Gpu(budget=0.5), host=Host(capacity="25%"), share=Share(floor=0.125, cap="50%")
    )
    sizes = cfg.resolve(page_bytes=4096, gpu_total=1_000_000, host_total=100_000)
    assert (sizes.gpu, sizes.host, sizes.nvme) == (499_712, 24_576, 0)
    assert (sizes.floor, sizes.cap) == (125_000, 500_000)


def test_without_a_cap_the_budget_is_the_cap() -> None:
    sizes = Config(gpu=Gpu(budget="1MiB"), host=Host(capacity=0)).resolve(
        page_bytes=4096, gpu_total=2**30
    )
    assert (sizes.gpu, sizes.host, sizes.cap) == (2**20, 0, 2**20)


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (Config(gpu=Gpu(budget="2GiB")), r"gpu\.budget = .2GiB.: 2147483648 bytes of 1073741824"),
        (Config(host=Host(capacity="2GiB")), r"host\.capacity = .2GiB.: 2147483648 bytes of "),
        (Config(host=Host(capacity="4KiB")), "4096 bytes, less than one page of 65536"),
        (Config(nvme=Nvme(path="/x", capacity="1TiB")), r"nvme\.capacity"),
        (Config(gpu=Gpu(budget="512MiB"), share=Share(cap=0.9)), r"share\.cap .*above gpu\.budget"),
        (Config(gpu=Gpu(budget=0.5), share=Share(floor="800MiB")), r"share\.floor"),
    ],
)
def test_sizes_beyond_the_machine_are_refused_with_numbers(cfg: Config, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cfg.resolve(page_bytes=65536, gpu_total=2**30, host_total=2**30, nvme_total=2**30)


def test_a_written_file_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    before = config.load(written(tmp_path, FULL), env={})
    again = tmp_path / "again.toml"
    again.write_text(before.toml())
    assert config.load(again, env={}).settings() == before.settings()


def test_a_policy_takes_arguments_from_a_table_of_its_own(tmp_path: Path) -> None:
    cfg = config.load(written(tmp_path, "[evict.nvme_params]\ndecay = 0.25\n"), env={})
    assert cfg.evict.nvme_params == {"decay": 0.25}
    assert cfg.evict.gpu_params == {}


def test_a_configuration_travels_to_another_process(tmp_path: Path) -> None:
    cfg = config.load(written(tmp_path, FULL), env={})
    again: Config = pickle.loads(pickle.dumps(cfg))
    assert again == cfg
    assert again.source("gpu.page") == cfg.source("gpu.page")


def test_the_default_policies_exist() -> None:
    evict = Config().evict
    assert {evict.gpu, evict.host, evict.nvme} <= set(names())


def test_a_written_file_says_every_key_even_at_its_default(tmp_path: Path) -> None:
    uncommented = re.sub(r"(?m)^# (\w+ = )", r"\1", Config().toml())
    cfg = config.load(written(tmp_path, uncommented), env={})
    assert cfg.settings() == Config().settings()
    assert "default" not in {cfg.source(key) for key in config.KEYS}


def test_marks_and_policies_may_change_while_running_but_sizes_may_not() -> None:
    old = Config(gpu=Gpu(budget="1GiB"))
    retuned = Config(gpu=Gpu(budget="1GiB", high=0.8, low=0.7), evict=config.Evict(gpu="fifo"))
    assert config.changed(old, retuned) == ("gpu.high", "gpu.low", "evict.gpu")
    with pytest.raises(ConfigError, match=r"gpu\.budget \(code\) cannot change"):
        config.changed(old, Config(gpu=Gpu(budget="2GiB")))


def test_the_documentation_lists_every_key_with_its_default() -> None:
    text = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    for name, section in Config().sections():
        for key in section.keys:
            value = section.written(key).partition(" = ")[2]
            assert f"| `{name}.{key}` | `{value}` |" in text
