"""Regions on the CPU device, real bytes: addresses, units, accesses, errors, streams."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest

from tests.waiting import LONG_S, host_slots
from tiermem.config import Config, Evict, Gpu, Host, Nvme
from tiermem.errors import Closed, ConfigError, NotOurs, PageInUse, TierFull
from tiermem.gpu.emulated import EmulatedDevice
from tiermem.nvme.cap import bytes_for
from tiermem.region import NEXT, Pages, Region
from tiermem.space import Space
from tiermem.tier import Place

PAGE = 16384


def config(
    tmp_path: Path, gpu: int = 4, host: int = 4, nvme: int = 32, *, eager: bool = False
) -> Config:
    """Sizes in pages; marks at 1.0, so that nothing moves that nobody asks to move."""
    return Config(
        gpu=Gpu(
            device="cpu", budget=gpu * PAGE, page=PAGE, high=1.0, low=1.0,
            hide="eager" if eager else "lazy",
        ),
        host=Host(capacity=host * PAGE, high=1.0, low=1.0),
        nvme=Nvme(path=tmp_path / "slab", capacity=bytes_for(nvme, PAGE), high=1.0, low=1.0)
        if nvme else Nvme(),
    )  # fmt: skip


@pytest.fixture(params=[False, True], ids=["lazy", "eager"])
def space(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Space]:
    with Space.open(config(tmp_path, eager=request.param)) as space:
        host_slots(space, 4)  # else pages go straight to the drive
        yield space
        space.check()


@pytest.fixture
def region(space: Space) -> Region:
    return space.reserve(20 * PAGE, name="r")


def write(region: Region, pages: Pages) -> None:
    words = region.view(np.int64)
    for page in pages.tolist():
        with region.use([page], "fresh"):
            words[page] = 1000 + page


def verify(region: Region, pages: Pages) -> None:
    words = region.view(np.int64)
    for page in pages.tolist():
        with region.use(page):
            assert (words[page] == 1000 + page).all(), f"page {page}"


def filled(region: Region, n: int) -> Pages:
    """n pages, allocated and written one by one, so that they spread over the tiers."""
    pages = np.empty(0, np.int32)
    for _ in range(n):
        page = region.allocate(1)
        write(region, page)
        pages = np.concatenate([pages, page])
    return pages


def test_pages_keep_their_bytes_through_every_tier(space: Space, region: Region) -> None:
    pages = filled(region, 18)
    places = set(region.where(pages).tolist())
    assert places == {Place.GPU, Place.HOST, Place.NVME}
    for _ in range(3):
        verify(region, pages)
    statistics = space.statistics()
    assert statistics.counts["nvme_gpu"] > 0
    assert statistics.counts.get("lost", 0) == 0


def test_a_tensors_address_is_the_same_after_its_pages_went_to_disk_and_back(
    tmp_path: Path,
) -> None:
    torch = pytest.importorskip("torch")
    with Space.open(config(tmp_path, host=0)) as space:
        _check_tensor(space.reserve(20 * PAGE), torch)


def _check_tensor(region: Region, torch: ModuleType) -> None:
    tensor = region.tensor(torch.int64, (region.pages, PAGE // 8))
    before = tensor.data_ptr()
    assert before == region.address
    first = region.allocate(1)
    with region.use(first, "fresh"):
        tensor[int(first[0])] = 77
    filled(region, 14)
    assert region.where(first).tolist() == [Place.NVME]
    with region.use(first):
        assert tensor.data_ptr() == before
        assert bool((tensor[int(first[0])] == 77).all())
        assert (region.view(np.int64)[first] == 77).all()


STRAY = """
import resource, sys
from pathlib import Path
import numpy as np
from tests.test_region import config, filled
from tiermem.space import Space

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
space = Space.open(config(Path(sys.argv[1]), eager=True))
region = space.reserve("1MiB")
pages = filled(region, 8)
space.drain()
words = region.view(np.int64)
away = int(pages[region.where(pages) != 1][0])
with region.use([away]):
    assert words[away][0] == 1000 + away
region.hint([away], "cold")
space.drain()
print("away", flush=True)
words[away][0]
print("still here", flush=True)
"""


STRAY = """
import resource, sys
from pathlib import Path
import numpy as np
from tests.test_region import config, filled
from tiermem.space import Space

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
space = Space.open(config(Path(sys.argv[1]), eager=True))
region = space.reserve("1MiB")
pages = filled(region, 8)
space.drain()
words = region.view(np.int64)
away = int(pages[region.where(pages) != 1][0])
with region.use([away]):
    assert words[away][0] == 1000 + away
region.hint([away], "cold")
space.drain()
print("away", flush=True)
words[away][0]
print("still here", flush=True)
"""


def test_a_stray_access_to_a_page_that_is_not_shown_ends_the_process(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", STRAY, str(tmp_path)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.stdout == "away\n", child.stderr
    assert child.returncode == -11


def test_a_page_is_an_int_a_list_or_an_array(region: Region) -> None:
    pages = region.allocate(3)
    write(region, pages)
    for given in (int(pages[0]), pages[0], [int(p) for p in pages], pages, tuple(pages.tolist())):
        with region.use(given):
            pass
    with region.use([]):
        pass


def test_pages_that_are_not_ours_are_refused_by_number(region: Region) -> None:
    pages = region.allocate(2)
    with pytest.raises(NotOurs, match=r"region r has pages 0\.\.19; 1 of 2 are not.*first: 20"):
        region.use([int(pages[0]), 20])
    with pytest.raises(NotOurs, match="first: -1"):
        region.use(-1)
    with pytest.raises(NotOurs, match="named twice among 2"):
        region.use([int(pages[0])] * 2)
    vacant = next(p for p in range(20) if p not in pages)
    with pytest.raises(NotOurs, match="1 of 2 pages not allocated"), region.use([pages[0], vacant]):
        pass
    with pytest.raises(NotOurs):
        region.free([vacant])
    with pytest.raises(NotOurs):
        region.hint([99], "cold")
    region.free(pages)


def test_a_mistyped_access_or_hint_is_refused(region: Region) -> None:
    pages = region.allocate(1)
    with pytest.raises(ConfigError, match="access 'reed': one of read, write, fresh"):
        region.use(pages, "reed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warm"):
        region.hint(pages, "warm")
    with pytest.raises(ConfigError, match="at least 1"):
        region.allocate(0)


def test_pages_in_use_cannot_be_freed_and_nothing_is(region: Region) -> None:
    pages = region.allocate(3)
    with region.use(pages[:1]), pytest.raises(PageInUse, match="1 of 3 pages are pinned"):
        region.free(pages)
    assert (region.where(pages) == Place.GPU).all()
    region.free(pages)


def test_all_pages_pinned_is_tier_full_with_numbers_and_nothing_is_lost(region: Region) -> None:
    pages = filled(region, 4)
    refusal = pytest.raises(TierFull, match=r"gpu: need 1 pages, .* 4 of 4 pinned; host")
    with region.use(pages), refusal:
        region.allocate(1)
    verify(region, pages)
    assert len(region.allocate(1)) == 1


def test_more_pages_at_once_than_the_gpu_holds_is_tier_full(region: Region) -> None:
    pages = filled(region, 8)
    with pytest.raises(TierFull, match="use fewer pages at once"), region.use(pages):
        pass
    verify(region, pages)


def test_a_region_without_vacant_pages_says_so(space: Space) -> None:
    region = space.reserve(2 * PAGE, name="small")
    region.allocate(2)
    with pytest.raises(TierFull, match="region small: 1 units wanted, 0 of 2 are vacant"):
        region.allocate(1)


def test_a_refused_allocation_gives_its_pages_back(region: Region) -> None:
    pages = filled(region, 4)
    with region.use(pages):
        for _ in range(30):
            with pytest.raises(TierFull):
                region.allocate(2)
    region.free(pages)
    everything = filled(region, 20)
    assert sorted(everything.tolist()) == list(range(20))


def test_freed_pages_are_allocated_again_each_once(space: Space, region: Region) -> None:
    for _ in range(5):
        pages = filled(region, 18)
        assert len(set(pages.tolist())) == 18
        verify(region, pages)
        region.free(pages)
        space.drain()
        space.check()
    assert {t.used for t in space.statistics().tiers} == {0}


def test_units_of_several_pages_are_used_moved_and_freed_as_one(space: Space) -> None:
    region = space.reserve(12 * PAGE, unit_pages=2)
    pages = region.allocate(4)
    assert pages.tolist() == [0, 1, 2, 3]
    words = region.view(np.int64)
    with region.use(pages, "fresh"):
        words[pages] = 5
    region.hint(pages[:1], "cold")
    space.drain()
    assert (region.where(pages[:2]) == Place.HOST).all()
    assert (region.where(pages[2:]) == Place.GPU).all()
    with region.use(pages[1:2]):
        assert (words[pages[:2]] == 5).all()
    region.free(pages[:1])
    space.drain()
    assert (region.where(pages[:2]) == Place.NONE).all()
    assert len(region.allocate(1)) == 2, "a page stands for its unit"


def test_hints_move_pages_without_anyone_waiting(space: Space, region: Region) -> None:
    pages = filled(region, 2)
    region.hint(pages, "cold")
    space.drain()
    assert (region.where(pages) == Place.HOST).all()
    region.hint(pages, "soon")
    space.drain()
    assert (region.where(pages) == Place.GPU).all()
    verify(region, pages)


# ---------------------------------------------------------------- streams


@pytest.fixture
def device(space: Space) -> EmulatedDevice:
    assert isinstance(space.device, EmulatedDevice)
    return space.device


def hold(device: EmulatedDevice, stream: int) -> Callable[[], None]:
    """Keep a stream busy until the function that is returned is called."""
    latch = threading.Event()

    def kernel() -> None:
        assert latch.wait(LONG_S)

    device.launch(stream, kernel)
    return latch.set


def test_a_page_with_a_kernel_queued_stays_until_the_kernel_has_run(
    space: Space, region: Region, device: EmulatedDevice
) -> None:
    stream, seen = device.new_stream(), []
    pages = filled(region, 4)
    words = region.view(np.int64)
    let_go = hold(device, stream)
    with region.use(pages[:1], stream=stream):
        device.launch(stream, lambda: seen.append(words[pages[0]].copy()))
    more = filled(region, 3)  # takes the three other frames
    timer = threading.Thread(target=filled, args=(region, 4))
    timer.start()  # needs the frame behind the kernel
    let_go()
    timer.join(LONG_S)
    assert not timer.is_alive()
    space.drain()
    verify(region, more)
    assert (seen[0] == 1000 + pages[0]).all()


def test_freed_pages_with_a_kernel_queued_become_vacant_after_it(
    space: Space, region: Region, device: EmulatedDevice
) -> None:
    stream, seen = device.new_stream(), []
    pages = filled(region, 4)
    words = region.view(np.int64)
    let_go = hold(device, stream)
    with region.use(pages, stream=stream):
        device.launch(stream, lambda: seen.append(words[pages].copy()))
    region.free(pages)
    assert not space.drain(0.0)
    let_go()
    assert space.drain(LONG_S)
    assert (seen[0] == 1000 + pages[:, None]).all()
    assert (region.where(pages) == Place.NONE).all()


def test_a_stream_waits_for_the_load_and_its_kernel_reads_the_bytes(
    region: Region, space: Space, device: EmulatedDevice
) -> None:
    stream, seen = device.new_stream(), []
    pages = filled(region, 4)
    region.hint(pages, "cold")
    space.drain()
    filled(region, 4)
    words = region.view(np.int64)
    for page in pages.tolist():
        with region.use(page, stream=stream):
            device.launch(stream, lambda p=page: seen.append((p, words[p].copy())))  # type: ignore[misc]
    space.drain()
    let_go = hold(device, stream)
    let_go()
    region.close()
    assert [p for p, _ in seen] == pages.tolist()
    assert all((found == 1000 + p).all() for p, found in seen)


def test_an_ordered_load_counts_as_an_access_of_the_whole_request(tmp_path: Path) -> None:
    given = msgspec.structs.replace(config(tmp_path), evict=Evict(gpu="lru"))
    with Space.open(given) as space:
        host_slots(space, 4)
        region = space.reserve(20 * PAGE)
        chain = region.allocate(4, parents=[NEXT, NEXT, NEXT, -1], depths=[3, 2, 1, 0])
        with region.use(chain, "fresh"):
            pass
        region.hint(chain[:2], "cold")
        space.drain()
        region.free(region.allocate(2))  # takes the two frames that still show the leaves
        assert isinstance(space.device, EmulatedDevice)
        with region.use(chain, stream=space.device.new_stream()):
            assert (region.where(chain[2:]) == Place.GPU).all()
        space.drain()
        assert space.statistics().counts["host_gpu"] == 2
        region.allocate(2)
        space.drain()
        # Leaves leave first, as they would after any other access to the chain.
        assert region.where(chain).tolist() == [Place.HOST] * 2 + [Place.GPU] * 2
        space.check()


# ---------------------------------------------------------------- closing


def test_a_closed_region_refuses_everything_and_closes_twice(region: Region) -> None:
    pages = filled(region, 6)
    region.close()
    region.close()
    for verb in (
        lambda: region.allocate(1),
        lambda: region.use(pages),
        lambda: region.free(pages),
        lambda: region.hint(pages, "cold"),
        lambda: region.use(0).__enter__(),
    ):
        with pytest.raises(Closed, match="region r is closed"):
            verb()


def test_a_region_with_pinned_pages_does_not_close(space: Space, region: Region) -> None:
    pages = filled(region, 2)
    with region.use(pages):
        with pytest.raises(PageInUse, match="region r: 2 pages are pinned"):
            region.close()
        assert (region.view(np.int64)[pages[0]] == 1000 + pages[0]).all()
    region.close()


def test_a_region_closes_behind_queued_kernels(
    space: Space, region: Region, device: EmulatedDevice
) -> None:
    stream, seen = device.new_stream(), []
    pages = filled(region, 4)
    words = region.view(np.int64)
    let_go = hold(device, stream)
    with region.use(pages, stream=stream):
        device.launch(stream, lambda: seen.append(words[pages].copy()))
    closing = threading.Thread(target=region.close)
    closing.start()
    let_go()
    closing.join(LONG_S)
    assert not closing.is_alive()
    assert (seen[0] == 1000 + pages[:, None]).all()
    assert {t.used for t in space.statistics().tiers} == {0}


def test_closing_one_region_leaves_the_others_alone(space: Space, region: Region) -> None:
    other = space.reserve(10 * PAGE, name="other")
    mine, theirs = filled(region, 6), filled(other, 6)
    region.close()
    verify(other, theirs)
    assert len(mine) == 6
    again = space.reserve(20 * PAGE)
    verify(again, filled(again, 8))
    verify(other, theirs)


# ---------------------------------------------------------------- tenants, on_gone


def test_pages_of_another_tenant_are_zeroed_before_they_are_seen(space: Space) -> None:
    first, second = space.reserve(8 * PAGE, tenant=1), space.reserve(8 * PAGE, tenant=2)
    first.free(filled(first, 8))
    space.drain()
    words = second.view(np.int64)
    for _ in range(4):
        page = second.allocate(1)
        with second.use(page):
            assert (words[page] == 0).all()


def test_the_owner_is_told_before_a_dropped_page_is_vacant_again(tmp_path: Path) -> None:
    gone: list[tuple[list[int], str]] = []
    with Space.open(config(tmp_path, gpu=2, host=2, nvme=0)) as space:
        region = space.reserve(
            8 * PAGE, on_gone=lambda pages, why: gone.append((pages.tolist(), why))
        )
        first = filled(region, 4)
        more = filled(region, 2)
        space.drain()
        assert gone == [([int(first[0])], "evicted"), ([int(first[1])], "evicted")]
        lost = [p for p in first[:2] if p not in more]
        assert (region.where(lost) == Place.NONE).all()
        verify(region, more)
        for page in lost:
            with pytest.raises(NotOurs), region.use(int(page)):
                pass
        space.check()


# ---------------------------------------------------------------- pages that the owner numbers


def test_the_owner_of_a_numbered_region_says_which_pages_it_allocates(space: Space) -> None:
    region = space.reserve(20 * PAGE, numbered=True)
    pages = np.array([17, 3, 8], np.int32)
    assert region.allocate(3, pages=pages).tolist() == [17, 3, 8]
    write(region, pages)
    region.free(pages[1:])
    region.allocate(2, pages=[3, 4])
    assert np.flatnonzero(region.where()).tolist() == [3, 4, 17]
    verify(region, pages[:1])
    for taken in ([3], [17]):
        with pytest.raises(NotOurs):
            region.allocate(1, pages=taken)
    with pytest.raises(NotOurs):
        region.allocate(1)


def test_pages_are_named_in_numbered_regions_only(space: Space, region: Region) -> None:
    with pytest.raises(NotOurs):
        region.allocate(1, pages=[3])
    numbered = space.reserve(4 * PAGE, numbered=True)
    with pytest.raises(NotOurs):
        numbered.allocate(2, pages=[3])


def test_a_freed_page_is_allocated_again_once_its_queued_work_has_ended(tmp_path: Path) -> None:
    with Space.open(config(tmp_path, gpu=4)) as space:
        device = space.device
        assert isinstance(device, EmulatedDevice)
        stream = device.new_stream()
        region = space.reserve(8 * PAGE, numbered=True)
        region.allocate(1, pages=[5])
        gate = threading.Event()
        with region.use([5], "write", stream):
            device.launch(stream, lambda: _await(gate))
        region.free([5])
        again = threading.Thread(target=lambda: region.allocate(1, pages=[5]))
        again.start()
        again.join(0.05)
        assert again.is_alive()
        gate.set()
        again.join(LONG_S)
        assert region.where([5]).tolist() == [Place.GPU]


def _await(gate: threading.Event) -> None:
    assert gate.wait(LONG_S)


def test_a_page_is_held_until_it_is_given_up_not_until_its_work_has_ended(tmp_path: Path) -> None:
    with Space.open(config(tmp_path, gpu=4)) as space:
        device = space.device
        assert isinstance(device, EmulatedDevice)
        stream = device.new_stream()
        region = space.reserve(8 * PAGE, numbered=True)
        region.allocate(2, pages=[5, 6])
        gate = threading.Event()
        with region.use([5], "write", stream):
            device.launch(stream, lambda: _await(gate))
        region.free([5])
        assert region.held([4, 5, 6]).tolist() == [False, False, True]
        gate.set()


def test_pins_are_given_back_in_any_grouping(space: Space, region: Region) -> None:
    pages = region.allocate(4)
    region.pin(pages[:3])
    region.pin(pages[2:], "write")
    region.unpin(pages[1:])
    region.free(pages[[1, 3]])
    for held in (pages[0], pages[2]):
        with pytest.raises(PageInUse):
            region.free([held])
    region.unpin(pages[[0, 2]])
    region.free(pages[[0, 2]])
    with pytest.raises(ConfigError, match="access"):
        region.pin(pages, "read-only")  # type: ignore[arg-type]


def test_the_budget_of_a_space_follows_its_limit(tmp_path: Path) -> None:
    with Space.open(config(tmp_path, gpu=4)) as space:
        assert space.budget() == 4
        space.limit(3 * PAGE)
        assert space.budget() == 3
