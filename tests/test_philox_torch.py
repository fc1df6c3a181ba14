"""Philox4x32-10 on torch tensors against Random123 and against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import PHILOX_ANSWERS

from teacher_cache.views.philox import philox4x32
from teacher_cache.views.philox_torch import philox4x32_torch

# Words whose products touch the sign bit of int64, and those that fill 32 bits, beside ordinary ones.
WORDS = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
COUNTERS = st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS), max_size=6)
KEYS = st.tuples(WORDS, WORDS)


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    """`kat_vectors` of the Random123 distribution, philox4x32 with 10 rounds."""
    words = torch.tensor([[int(word, 16) for word in counter.split()]])
    k0, k1 = (int(word, 16) for word in key.split())
    assert " ".join(f"{word:08x}" for word in philox4x32_torch(words, (k0, k1))[0].tolist()) == answer


def check_equal(counters: list[tuple[int, ...]], key: tuple[int, int], device: str) -> None:
    given = torch.tensor(counters, dtype=torch.int64, device=device).reshape(-1, 4)
    before = given.clone()
    found = philox4x32_torch(given, key)
    assert found.dtype == torch.int64
    assert found.device == given.device
    assert found.is_contiguous()
    assert torch.equal(given, before)
    expected = philox4x32(np.array(counters, np.uint32).reshape(-1, 4), key)
    assert found.tolist() == expected.tolist()


@given(counters=COUNTERS, key=KEYS)
@example(counters=[], key=(0, 0))
def test_numpy_gives_the_same_integers(counters: list[tuple[int, ...]], key: tuple[int, int]) -> None:
    """For any addresses, none too; the addresses are left as they were."""
    check_equal(counters, key, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@given(counters=COUNTERS, key=KEYS)
def test_a_gpu_gives_the_same_integers(counters: list[tuple[int, ...]], key: tuple[int, int]) -> None:
    check_equal(counters, key, "cuda")


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)],
    ids=["int32", "three words", "one address"],
)
def test_other_tensors_are_refused(wrong: torch.Tensor) -> None:
    """A 32-bit product of 32-bit words has lost its upper half."""
    with pytest.raises(ValueError, match=r"int64 \[B, 4\]"):
        philox4x32_torch(wrong, (0, 0))
