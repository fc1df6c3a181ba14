"""Philox4x32-10 against Random123, and the addressing of words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import PHILOX_ANSWERS

from teacher_cache.fingerprint import key_digest, key_digests
from teacher_cache.views import philox
from teacher_cache.views.philox import below, chance, philox4x32, unit, view_words

U64 = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    """`kat_vectors` of the Random123 distribution, philox4x32 with 10 rounds."""
    words = np.array([[int(word, 16) for word in counter.split()]], np.uint32)
    k0, k1 = (int(word, 16) for word in key.split())
    assert " ".join(f"{word:08x}" for word in philox4x32(words, (k0, k1))[0]) == answer


@given(counters=st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), min_size=1, max_size=6), key=U64)
def test_rows_do_not_see_each_other(counters: list[tuple[int, ...]], key: int) -> None:
    """A vector of addresses gives what each gives alone."""
    words = np.array(counters, np.uint32)
    pair = (key & 0xFFFFFFFF, key >> 32)
    together = philox4x32(words, pair)
    assert (together == np.concatenate([philox4x32(row[None], pair) for row in words])).all()


Address = tuple[int, int, int, int]
ADDRESSES: st.SearchStrategy[Address] = st.tuples(
    U64, st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1), st.integers(0, 4)
)


def counter_of(address: Address, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """The counter that `view_words` makes for one block."""
    seen: list[Any] = []

    def spy(counter: Any, key: tuple[int, int]) -> Any:
        seen.append(counter)
        return philox4x32(counter, key)

    digest, view, operation, block = address
    with monkeypatch.context() as patch:
        patch.setattr(philox, "philox4x32", spy)
        view_words(np.array([digest], np.uint64), view, operation, block + 1, 5)
    return tuple(seen[0][block].tolist())


@given(first=ADDRESSES, second=ADDRESSES)
def test_addresses_are_injective(first: Address, second: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different (sample, view, operation, block) have different counters; the counter is the documented one."""
    one, other = counter_of(first, monkeypatch), counter_of(second, monkeypatch)
    assert (one == other) == (first == second)
    digest, view, operation, block = first
    assert one == (digest & 0xFFFFFFFF, digest >> 32, view, operation * 2**16 + block)


@given(address=ADDRESSES, near=st.integers(0, 3))
def test_neighbours_differ(address: Address, near: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that differ by one in one place (where collisions hide) have different counters."""
    limits = (2**64, 2**32, 2**16, 5)
    moved = tuple((v + 1) % limits[i] if i == near else v for i, v in enumerate(address))
    assert counter_of(address, monkeypatch) != counter_of(moved, monkeypatch)  # type: ignore[arg-type]


@given(digest=U64, seed=U64, other=U64)
def test_the_seed_is_the_key(digest: int, seed: int, other: int) -> None:
    """All 64 bits of the seed count."""
    digests = np.array([digest], np.uint64)
    same = (view_words(digests, 1, 2, 3, seed) == view_words(digests, 1, 2, 3, other)).all()
    assert same == (seed == other)


def test_more_blocks_begin_with_fewer() -> None:
    """An operation that draws more words keeps its first ones."""
    digests = key_digests(["a", "b"])
    assert (view_words(digests, 3, 1, 5, 9)[:, :8] == view_words(digests, 3, 1, 2, 9)).all()
    assert view_words(digests, 3, 1, 0, 9).shape == (2, 0)


@pytest.mark.parametrize(
    "wrong", [{"view": 2**32}, {"view": -1}, {"operation": 2**16}, {"blocks": 2**16}, {"seed": 2**64}]
)
def test_an_address_outside_its_range_is_refused(wrong: dict[str, int]) -> None:
    """Never wrapped: a wrapped address is another sample's."""
    with pytest.raises(ValueError, match="outside its range"):
        view_words(np.zeros(1, np.uint64), **{"view": 0, "operation": 0, "blocks": 1, "seed": 0, **wrong})


@given(word=st.integers(0, 2**32 - 1), bound=st.integers(1, 2**31))
def test_below_is_in_range_and_even(word: int, bound: int) -> None:
    """[0, bound), by multiply and shift."""
    found = int(below(np.array([word], np.uint32), bound)[0])
    assert found == word * bound >> 32
    assert 0 <= found < bound


def test_below_and_unit_reach_their_ends() -> None:
    words = np.array([0, 2**32 - 1], np.uint32)
    assert below(words, 9).tolist() == [0, 8]
    assert unit(words)[0] == 0
    assert 1 - 2.0**-31 < unit(words)[1] < 1


def test_chance_is_exact_at_its_ends() -> None:
    words = np.array([0, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    assert chance(words, 0).tolist() == [False] * 4
    assert chance(words, 1).tolist() == [True] * 4
    assert chance(words, 0.5).tolist() == [True, True, False, False]


def test_key_digests_are_frozen() -> None:
    """A changed digest would silently move every view: these numbers are part of the format."""
    assert key_digest("digits/0000") == 0x4A11B10AF0916298
    assert key_digests(["a", "b"]).tolist() == [key_digest("a"), key_digest("b")]
    assert key_digest("a") != key_digest("a ")
