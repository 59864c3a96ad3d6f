"""Who waits for which layer of what is on its way, and what happens where SGLang does not ask."""

from __future__ import annotations

from tests.test_slices import Load
from tiermem.integrations.sglang_layers import LayerWaits
from tiermem.slices import Arriving, Sliced

LAYERS = 4
LAYER_BYTES = 100
STREAM = 5


def waits(arriving: Arriving) -> LayerWaits:
    return LayerWaits(arriving, lambda: STREAM, LAYERS, LAYER_BYTES)


def coming(arriving: Arriving) -> list[Load]:
    """A load in two slices, of two layers each."""
    loads = [Load(), Load()]
    arriving.add(Sliced([0, 2 * LAYER_BYTES], loads))
    return loads


def prefill(layers: LayerWaits, asks: list[int]) -> bool:
    layers.begin(True)
    for layer in asks:
        layers.wait_until(layer)
    return layers.end()


def ordered(loads: list[Load]) -> list[int]:
    """How many times a stream was made to wait for each."""
    assert all(stream == STREAM for load in loads for stream in load.streams)
    return [len(load.streams) for load in loads]


def test_a_layer_waits_for_the_slice_that_it_lies_in_and_for_no_later_one() -> None:
    arriving = Arriving()
    layers, loads = waits(arriving), coming(arriving)
    layers.begin(True)
    seen = []
    for layer in (0, 0, 1, 1, 2, 2, 3, 3):  # for its keys, and for its values
        layers.wait_until(layer)
        seen.append(ordered(loads))
    assert seen == [[1, 0]] * 4 + [[1, 1]] * 4
    assert layers.end()
    assert layers.overlapped == 1


def test_a_prefill_is_trusted_after_one_that_asked_for_every_layer_in_order() -> None:
    arriving = Arriving()
    layers = waits(arriving)
    assert not layers.trusted
    for asks, trusted in (
        ([0, 1, 3], False),
        ([0, 1, 2, 3], True),
        ([3, 2, 1, 0], False),
        ([0, 0, 1, 1, 2, 2, 3, 3], True),
        ([], False),
    ):
        assert prefill(layers, asks)
        assert layers.trusted == trusted


def test_a_step_between_two_prefills_changes_no_trust() -> None:
    layers = waits(Arriving())
    assert prefill(layers, [0, 1, 2, 3])
    layers.begin(False)
    assert layers.end()
    assert layers.trusted


def test_a_batch_that_did_not_ask_for_all_that_came_is_told_of_and_the_stream_waits() -> None:
    arriving = Arriving()
    layers = waits(arriving)
    assert prefill(layers, [0, 1, 2, 3])
    loads = coming(arriving)
    assert not prefill(layers, [0, 1])
    assert not layers.trusted
    assert ordered(loads) == [1, 1], "for whoever reads next"
    assert not len(arriving)


def test_whoever_asks_between_batches_waits_for_nothing_and_proves_nothing() -> None:
    layers = waits(Arriving())
    for layer in range(LAYERS):
        layers.wait_until(layer)
    layers.begin(False)
    assert layers.end()
    assert not layers.trusted
