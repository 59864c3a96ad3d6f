"""Names of content: what changes them, and what must not."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tiermem.integrations import sglang_compat as compat
from tiermem.integrations.sglang_keys import KeyChain, digest, weights_identity


def test_a_key_names_all_tokens_up_to_its_page() -> None:
    tokens = list(range(100))
    keys = KeyChain(16, None).keys(tokens, 6)
    assert keys.shape == (6, 2)
    assert len(np.unique(keys, axis=0)) == 6
    other = [*tokens[:20], 7, *tokens[21:]]
    differs = (KeyChain(16, None).keys(other, 6) != keys).any(axis=1)
    assert differs.tolist() == [False, True, True, True, True, True]


def test_a_chain_that_grows_step_by_step_gives_the_same_keys() -> None:
    tokens = list(range(1000, 1100))
    chain = KeyChain(16, "lora-1")
    chain.keys(tokens[:40], 2)
    assert (chain.keys(tokens, 6) == KeyChain(16, "lora-1").keys(tokens, 6)).all()
    assert (chain.keys(tokens, 1) == KeyChain(16, "lora-1").keys(tokens, 1)).all()


def test_adapters_and_salts_tell_equal_tokens_apart() -> None:
    tokens = list(range(16))
    made = {KeyChain(16, extra).keys(tokens, 1).tobytes() for extra in (None, "", "a", "b")}
    assert len(made) == 4


def test_keys_do_not_depend_on_how_tokens_are_kept() -> None:
    from array import array

    tokens = list(range(32))
    assert (
        KeyChain(16, None).keys(array("q", tokens), 2) == KeyChain(16, None).keys(tokens, 2)
    ).all()


def test_weights_are_told_apart_by_their_files(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1" * 100)
    before = weights_identity(str(tmp_path), None, "auto", 1)
    assert weights_identity(str(tmp_path), None, "auto", 2) == before
    weights.write_bytes(b"2" * 101)
    after = weights_identity(str(tmp_path), None, "auto", 1)
    assert after != before
    os.utime(weights, ns=(1, 1))
    assert weights_identity(str(tmp_path), None, "auto", 1) != after


def test_random_weights_are_told_apart_by_their_seed() -> None:
    assert weights_identity("m", None, "dummy", 1) != weights_identity("m", None, "dummy", 2)
    assert weights_identity("m", "a", "auto", 1) != weights_identity("m", "b", "auto", 1)


def test_a_fingerprint_has_one_digest_in_any_order() -> None:
    assert digest({"a": "1", "b": "2"}) == digest({"b": "2", "a": "1"})
    assert digest({"a": "1"}) != digest({"a": "2"})


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("model_path", "b"),
        ("revision", "main"),
        ("quantization", "fp8"),
        ("quantization_param_path", "scales.json"),
        ("attention_backend", "fa3"),
        ("json_model_override_args", '{"rope_theta": 1}'),
    ],
)
def test_kv_of_another_model_has_another_fingerprint(field: str, other: str) -> None:
    given = {
        "model_path": "a", "revision": None, "load_format": "auto", "random_seed": 1,
        "quantization": None, "quantization_param_path": None, "attention_backend": "triton",
        "json_model_override_args": "{}",
    }  # fmt: skip
    assert field in given
    mine = compat.model_facts(SimpleNamespace(**given))
    assert mine == compat.model_facts(SimpleNamespace(**given))
    assert mine != compat.model_facts(SimpleNamespace(**{**given, field: other}))
