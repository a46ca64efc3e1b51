"""The plan of a fetch: under any order of arrivals, cuts and damage every byte comes, and no tensor
goes unchecked."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_actors.weights.fetch import TRIES, Chunk, WeightFetch
from zppo_actors.weights.layout import ALIGNMENT, whole_digest
from zppo_protocol.values import PolicyManifest, TensorEntry


def manifest_of(sizes: list[int]) -> PolicyManifest:
    """A version of byte tensors that lie as the trainer lays them."""
    entries: list[TensorEntry] = []
    end = 0
    for number, size in enumerate(sizes):
        start = end + -end % ALIGNMENT
        entries.append(
            TensorEntry(
                name=str(number), dtype="uint8", shape=[size], start=start, size=size, digest="?"
            )
        )
        end = start + size
    return PolicyManifest(version=3, path="/p", tensors=entries, digest=whole_digest(entries))


def covers(chunks: list[Chunk], size: int) -> bool:
    """Whether the chunks, by their start, are the file end to end."""
    ends = [0, *(chunk.start + chunk.size for chunk in chunks)]
    return [chunk.start for chunk in chunks] == ends[:-1] and ends[-1] == size


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=8).filter(any),
    chunk_bytes=st.sampled_from([64, 100, 512, 4096]),
    in_flight=st.integers(1, 4),
    data=st.data(),
)
def test_every_byte_comes_and_every_tensor_is_checked(
    sizes: list[int], chunk_bytes: int, in_flight: int, data: st.DataObject
) -> None:
    fetch = WeightFetch(manifest_of(sizes), chunk_bytes, in_flight)
    flying: list[Chunk] = []
    here: set[Chunk] = set()
    right: set[str] = set()
    wrongs: dict[str, int] = {}
    for _ in range(10_000):
        if fetch.done:
            break
        flying += fetch.requests()
        assert 0 < len(flying) <= in_flight and here.isdisjoint(flying)
        if data.draw(st.integers(0, 9)) == 0:
            flying.clear()
            fetch.cut()
            continue
        chunk = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
        here.add(chunk)
        for entry in fetch.arrived(chunk):
            may_be = entry.size > 0 and wrongs.get(entry.name, 0) < TRIES - 1
            damaged = may_be and data.draw(st.integers(0, 9)) == 0
            if not damaged:
                right.add(entry.name)
                continue
            wrongs[entry.name] = wrongs.get(entry.name, 0) + 1
            fetch.wrong(entry)
            last = max(entry.start, entry.start + entry.size - 1)
            here -= {c for c in here if c.start <= last and entry.start < c.start + c.size}
    assert covers(sorted(here, key=lambda chunk: chunk.start), fetch.size)
    assert right == {str(number) for number in range(len(sizes))}
    assert fetch.requests() == []


def test_a_tensor_that_stays_wrong_is_given_up() -> None:
    fetch = WeightFetch(manifest_of([10]))
    for attempt in range(1, TRIES + 1):
        [chunk] = fetch.requests()
        [entry] = fetch.arrived(chunk)
        if attempt < TRIES:
            fetch.wrong(entry)
            assert not fetch.done
    with pytest.raises(ValueError, match=r"^tensor '0' came with other bytes 3 times$"):
        fetch.wrong(entry)


def test_a_version_of_no_bytes_cannot_be_fetched() -> None:
    with pytest.raises(ValueError, match=r"^its tensors have no bytes$"):
        WeightFetch(manifest_of([0, 0]))


def test_bytes_that_nobody_asked_for() -> None:
    fetch = WeightFetch(manifest_of([1000]), chunk_bytes=256)
    with pytest.raises(ValueError, match=r"^bytes 0 to 256 were not asked for$"):
        fetch.arrived(Chunk(0, 256))
    asked = fetch.requests()
    with pytest.raises(ValueError, match=r"^bytes 0 to 255 were not asked for$"):
        fetch.arrived(Chunk(0, 255))
    fetch.arrived(asked[0])
    with pytest.raises(ValueError, match=r"^bytes 0 to 256 were not asked for$"):
        fetch.arrived(asked[0])
