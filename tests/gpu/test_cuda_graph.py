"""CUDA graphs over a region whose pages leave and return between replays; needs torch and a GPU."""

from __future__ import annotations

from typing import Literal

import pytest

from tests.gpu.device_contract import LONG_S
from tiermem.config import Config, Gpu, Host
from tiermem.space import Space
from tiermem.tier import Place

pytestmark = pytest.mark.gpu

PAGE = 2 << 20
PAGES = 8
FRAMES = 12
ROUNDS = 20


@pytest.mark.parametrize("hide", ["lazy", "eager"])
def test_a_graph_gives_right_answers_while_its_pages_leave_and_return(
    hide: Literal["lazy", "eager"],
) -> None:
    torch = pytest.importorskip("torch")
    gpu = Gpu(device="cuda:0", budget=FRAMES * PAGE, page=PAGE, high=1.0, low=1.0, hide=hide)
    with Space.open(Config(gpu=gpu, host=Host(capacity=64 * PAGE))) as space:
        region, other = space.reserve(PAGES * PAGE), space.reserve(FRAMES * PAGE)
        pages = region.allocate(PAGES)
        words = PAGE // 8
        data = region.tensor(torch.int64, (PAGES, words))
        sums = torch.zeros(PAGES, dtype=torch.int64, device="cuda")
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), region.use(pages, "write", stream.cuda_stream):
            data.copy_(torch.arange(PAGES, device="cuda").unsqueeze(1).expand(PAGES, words))
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with region.use(pages, "write"), torch.cuda.graph(graph, stream=stream):
            data.add_(1)
            sums.copy_(data.sum(dim=1))
        places = set()
        for turn in range(1, ROUNDS + 1):
            region.hint(pages[turn % 3 :], "cold")
            assert space.drain(LONG_S)
            if turn % 2:  # their frames become others'
                taken = other.allocate(FRAMES - 3)
                with other.use(taken, "write"):
                    pass
                other.free(taken)
            places.update(region.where(pages).tolist())
            with region.use(pages, "write", stream.cuda_stream), torch.cuda.stream(stream):
                graph.replay()
            expected = [(page + turn) * words for page in range(PAGES)]
            stream.synchronize()
            assert sums.tolist() == expected, f"replay {turn}"
        assert Place.HOST in places
        space.drain(LONG_S)
        space.check()
