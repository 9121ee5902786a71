"""The top classes of an output, against a plain sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoynet.server.errors import InvalidRequest
from convoynet.server.protocol import classification
from convoynet.server.protocol.classification import classify

TYPES = ("INT8", "UINT8", "INT32", "UINT64", "INT64", "FP16", "FP32", "FP64")
DTYPES = dict(zip(TYPES, ("i1", "u1", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"), strict=True))


def _indices(text: np.ndarray) -> list[int]:
    return [int(element.split(b":")[1]) for element in text.ravel()]


@given(st.lists(st.integers(0, 9) | st.none(), min_size=1, max_size=300), st.integers(1, 400), st.sampled_from(TYPES))
def test_best_first_ties_by_lower_index_nan_last(values: list[int | None], count: int, datatype: str) -> None:
    floats = datatype.startswith("FP")
    scores = np.array([(np.nan if floats else 0) if v is None else v for v in values], DTYPES[datatype])
    numbers = [-1 if v is None and floats else v or 0 for v in values]
    expected = sorted(range(len(values)), key=lambda i: (-numbers[i], i))[:count]
    assert _indices(classify(scores[None], datatype, count, (), batched=True)) == expected


@pytest.mark.parametrize("datatype", ["INT8", "UINT64", "INT64"])
def test_the_extremes_of_integers_are_in_order(datatype: str) -> None:
    limits = np.iinfo(np.dtype(DTYPES[datatype]))
    scores = np.array([limits.min, limits.max - 1, limits.max], DTYPES[datatype])
    text = classify(scores, datatype, 3, ("low", "high"), batched=False)
    assert _indices(text) == [2, 1, 0]
    assert text.tolist() == [
        f"{limits.max}:2".encode(), f"{limits.max - 1}:1:high".encode(), f"{limits.min}:0:low".encode(),
    ]  # fmt: skip


def test_infinities_stand_at_the_ends_and_maps_count_as_one_list() -> None:
    scores = np.array([[[np.nan, -np.inf], [np.inf, 0.5]]], np.float16)
    text = classify(scores, "FP16", 4, (), batched=True)
    assert text.tolist() == [[b"inf:2", b"0.500000:3", b"-inf:1", b"nan:0"]]


@pytest.mark.parametrize("datatype", ["BOOL", "BYTES"])
def test_what_has_no_order_is_refused(datatype: str) -> None:
    scores = np.zeros((1, 2), np.bool_ if datatype == "BOOL" else np.object_)
    with pytest.raises(InvalidRequest, match=f"class result not available for output due to .* '{datatype}'"):
        classify(scores, datatype, 1, (), batched=True)


def test_the_number_of_elements_is_bounded() -> None:
    scores = np.zeros((2, classification.MAX_ELEMENTS // 2 + 1), np.uint8)
    with pytest.raises(InvalidRequest, match="it has 1000002 elements, the most is 1000000"):
        classify(scores, "UINT8", 1, (), batched=True)
    assert _indices(classify(scores[:1], "UINT8", 2, (), batched=True)) == [0, 1]
