"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem import units


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("40GiB", 40 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5KiB", 1536),
        ("4096", 4096),
        (4096, 4096),
        ("0", 0),
        ("2mib", 2 * 2**20),
        (" 1 TB ", 10**12),
        ("3B", 3),
    ],
)
def test_sizes_with_units_are_read_as_bytes(text: str | int, nbytes: int) -> None:
    assert units.parse_bytes(text) == nbytes


@pytest.mark.parametrize(("text", "part"), [("25%", 0.25), (0.5, 0.5), ("0.5", 0.5), (1.0, 1.0)])
def test_fractions_stay_fractions(text: str | float, part: float) -> None:
    size = units.parse_size(text)
    assert isinstance(size, float)
    assert size == part


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("40G", "GiB .* or GB"),
        ("40 Gibi", "no unit 'Gibi'"),
        ("-1MiB", "negative"),
        (-1, "negative"),
        ("150%", "outside 0 to 1"),
        (40.0, "write '40GiB'"),
        (float("nan"), "outside 0 to 1"),
        ("", "not a size"),
        ("much", "not a size"),
        ("1 2MiB", "not a size"),
        (True, "not a size"),
    ],
)
def test_what_is_no_size_is_refused_with_a_way_out(text: str | float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        units.parse_size(text)


def test_a_fraction_is_no_number_of_bytes() -> None:
    with pytest.raises(ValueError, match="is a fraction"):
        units.parse_bytes("50%")


def test_rates_are_per_second() -> None:
    assert units.parse_rate("400MiB/s") == 400 * 2**20
    assert units.parse_rate(1000) == 1000
    for wrong in ("400MiB", "400MiB/min"):
        with pytest.raises(ValueError, match="per second"):
            units.parse_rate(wrong)


def test_people_see_one_decimal() -> None:
    assert units.format_bytes(2**30) == "1.0GiB"
    assert units.format_bytes(1536) == "1.5KiB"
    assert units.format_bytes(12) == "12B"
    assert units.format_rate(400 * 2**20) == "400.0MiB/s"


@given(st.integers(0, 2**60) | st.floats(0, 1))
def test_the_exact_form_reads_back_as_the_same_value(size: int | float) -> None:
    again = units.parse_size(units.format_exactly(size))
    assert again == size
    assert type(again) is type(size)
