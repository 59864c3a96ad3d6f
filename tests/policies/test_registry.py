"""Policies are found by name or by module:Class; everything else is a clear error."""

import pytest

from tiermem.errors import BadPolicy
from tiermem.policies import load, names
from tiermem.policies.lru import LRU

NOT_A_CLASS = 7


@pytest.mark.parametrize("name", [name for name in names() if name != "belady"])
def test_every_name_loads_a_policy_of_that_name(name: str) -> None:
    assert load(name, 10).name == name


def test_a_class_of_the_readers_own_is_loaded_by_module_and_class() -> None:
    assert isinstance(load("tiermem.policies.lru:LRU", 10, seed=3), LRU)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fifi", "did you mean 'fifo'"),
        ("zzzz", "known: "),
        ("belady", "must be told the future"),
        ("s3fifo(0.2)", "name\\(key=value"),
        ("s3fifo(small=", "cannot be read"),
        ("s3fifo(size=1)", "size"),
        ("no_such_module:Policy", "cannot import"),
        ("tiermem.policies.lru:Nothing", "cannot import"),
        (f"{__name__}:NOT_A_CLASS", "is a int, not a class"),
        ("builtins:object", "failed"),
        ("tiermem.policies.base:EvictionBase", "lacks victims"),
    ],
)
def test_a_policy_that_cannot_be_loaded_says_why(name: str, says: str) -> None:
    with pytest.raises(BadPolicy, match=says):
        load(name, 10)


def test_a_parameter_that_the_policy_does_not_take_is_refused_with_its_name() -> None:
    with pytest.raises(BadPolicy, match="colour"):
        load("lru", 10, params={"colour": 3})
