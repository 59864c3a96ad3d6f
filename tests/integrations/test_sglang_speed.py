"""How fast prompts are computed, from when they were launched and when their results came."""

from tiermem.integrations.sglang_speed import PrefillSpeed


def speed_of(*prefills: tuple[int, float]) -> float | None:
    """(tokens, seconds) one after the other."""
    clock = [0.0]
    speed = PrefillSpeed(lambda: clock[0])
    for tokens, took_s in prefills:
        speed.launched(tokens)
        clock[0] += took_s
        speed.finished()
    model = speed.model()
    return None if model is None else model.prefill_tokens_per_s


def test_nothing_is_known_before_a_prefill_that_says_something() -> None:
    assert speed_of() is None
    assert speed_of((16, 0.001)) is None


def test_the_best_of_late_counts_because_waits_only_slow_down() -> None:
    assert speed_of((1000, 0.1), (1000, 5.0)) == 1000 / 0.1 * 0.98
    slower = speed_of((1000, 0.1), *[(1000, 0.2)] * 200)
    assert slower is not None
    assert 4999 < slower < 5200


def test_results_belong_to_the_oldest_launch() -> None:
    clock = [0.0]
    speed = PrefillSpeed(lambda: clock[0])
    speed.launched(1000)
    clock[0] = 1.0
    speed.launched(1000)
    clock[0] = 2.0
    speed.finished()
    clock[0] = 2.5
    speed.finished()
    speed.finished()  # a result that nobody launched changes nothing
    model = speed.model()
    assert model is not None
    assert model.prefill_tokens_per_s == 1000 / 1.5
