"""Answers from the cache: equal requests only, never changed, never more than there is room for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoynet.server.scheduling.response_cache import ModelCache, ResponseCache
from convoynet.server.types import Tensor

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def of_bytes(*elements: bytes) -> Tensor:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def test_an_answer_is_found_by_an_equal_request() -> None:
    cache = ResponseCache(2**20).model("m", "1")
    key = cache.key({"x": X, "y": X[:1]}, ["a", "b"])
    assert cache.get(key) is None
    cache.put(key, {"a": X, "t": of_bytes(b"1:2", b"")})
    found = cache.get(cache.key({"y": X[:1].copy(), "x": np.asfortranarray(X)}, ["b", "a"]))
    assert found is not None
    assert np.array_equal(found["a"], X)
    assert found["t"].tolist() == [b"1:2", b""]
    assert (cache.hits, cache.misses) == (1, 1)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ({"x": X + 1}, ["a"]),
        ({"y": X}, ["a"]),
        ({"x": X.reshape(4, 2)}, ["a"]),
        ({"x": X.view(np.int32)}, ["a"]),
        ({"x": X}, ["b"]),
        ({"x": X}, []),
        ({"x": X, "y": X}, ["a"]),
        ({"x": of_bytes(b"ab", b"c")}, ["a"]),
        ({"x": of_bytes(b"a", b"bc")}, ["a"]),
        ({"x": of_bytes(b"a", b"bc", b"")}, ["a"]),
    ],
)
def test_any_difference_is_another_request(inputs: dict[str, Tensor], outputs: list[str]) -> None:
    cache = ResponseCache(2**20)
    model = cache.model("m", "1")
    others = [model.key({"x": X}, ["a"]), model.key({"x": of_bytes(b"abc", b"")}, ["a"])]
    assert model.key(inputs, outputs) not in others
    assert cache.model("m", "2").key(inputs, outputs) != model.key(inputs, outputs)


def test_nobody_can_change_an_answer() -> None:
    cache = ResponseCache(2**20).model("m", "1")
    mine = X.copy()
    cache.put(b"k", {"a": mine, "t": of_bytes(b"x"), "none": np.zeros((0, 3))})
    mine[:] = 0
    found = cache.get(b"k")
    assert found is not None
    for tensor in found.values():
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            tensor.flags.writeable = True
    found.clear()
    again = cache.get(b"k")
    assert again is not None
    assert np.array_equal(again["a"], X)
    assert again["none"].shape == (0, 3)


def test_a_closed_version_leaves_nothing_and_takes_nothing() -> None:
    cache = ResponseCache(2**20)
    old, other = cache.model("m", "1"), cache.model("n", "1")
    old.put(b"k", {"a": X})
    other.put(b"o", {"a": X})
    old.close()
    old.close()
    assert len(cache) == 1
    old.put(b"k", {"a": X})  # the answer of a request that was still running
    assert old.get(b"k") is None
    assert len(cache) == 1
    assert cache.model("m", "1").key({"x": X}) != old.key({"x": X}), "loaded again it may answer otherwise"
    assert other.get(b"o") is not None


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from("gp"), st.integers(0, 1), st.integers(0, 2), st.sampled_from([0, 1000, 1500, 6000])),
        min_size=10,
        max_size=40,
    )
)
def test_the_least_recently_used_go_first_and_the_bound_holds(steps: list[tuple[str, int, int, int]]) -> None:
    """Beside a list that is searched from its end."""
    cache = ResponseCache(6000)
    models: list[ModelCache] = [cache.model("m", str(i)) for i in range(2)]
    kept: list[tuple[bytes, int]] = []
    for what, index, number, size in steps:
        key = b"%d %d" % (index, number)
        found = next((one for one in kept if one[0] == key), None)
        if what == "g":
            answer = models[index].get(key)
            assert (answer is not None) == (found is not None)
            if found is not None:
                assert answer is not None
                assert len(answer["a"]) == found[1]
                kept.remove(found)
                kept.append(found)
            continue
        models[index].put(key, {"a": np.zeros(size, np.uint8)})
        if size + 512 > 6000:
            continue
        if found is not None:
            kept.remove(found)
        kept.append((key, size))
        while sum(s + 512 for _, s in kept) > 6000:
            kept.pop(0)
        assert cache.nbytes == sum(s + 512 for _, s in kept)
        assert len(cache) == len(kept) == sum(len(m.keys) for m in models)


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = ResponseCache(2000)
    model = cache.model("m", "1")
    model.put(b"k", {"a": np.zeros(100, np.uint8)})
    model.put(b"l", {"a": np.zeros(2000, np.uint8)})
    assert len(cache) == 1
    assert cache.evictions == 0
