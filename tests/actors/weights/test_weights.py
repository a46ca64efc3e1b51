"""Publishing and loading weights: round trips, and every kind of damage refused before a parameter
is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import xxhash
from engine_helpers import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unshared import MOUNTS, run_unshared

from zppo_actors.weights import NotFinite, PublicationRefused, shared_memory
from zppo_actors.weights.layout import whole_digest
from zppo_protocol.values import PolicyManifest

SHAPES = st.lists(st.integers(0, 5), max_size=3)
DTYPES = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: Any, tensors: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    layout=st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=6), seed=st.integers(0, 2**31)
)
def test_any_tensors_come_back_bit_for_bit(
    layout: list[tuple[list[int], torch.dtype]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{i}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for i, (shape, dtype) in enumerate(layout)
    }
    manifest = shared_memory.publish(tensors, 7, folder)
    found = shared_memory.open_policy(manifest)
    assert list(found) == list(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )
    assert all(entry.start % 64 == 0 for entry in manifest.tensors)
    assert [path.name for path in folder.iterdir()] == ["policy-7.bin"]


@pytest.mark.parametrize("tied", [True, False])
def test_load_into_gives_the_published_weights(tied: bool, tmp_path: Path) -> None:
    source, target = (make_model(seed=seed, tie_word_embeddings=tied) for seed in (1, 2))
    manifest = shared_memory.publish(source.state_dict(), 3, tmp_path)
    names = [entry.name for entry in manifest.tensors]
    assert ("lm_head.weight" in names) is not tied and "model.embed_tokens.weight" in names
    assert shared_memory.load_into(target, manifest) == manifest.digest
    assert same(target, snapshot(source))


def test_digest_follows_content_names_and_shapes(tmp_path: Path) -> None:
    def digest(tensors: dict[str, Tensor]) -> str:
        return shared_memory.publish(tensors, 0, tmp_path).digest

    base = digest({"a": torch.zeros(2, 3)})
    assert base == digest({"a": torch.zeros(2, 3)})
    others = [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.ones(2, 3)}]
    assert base not in {digest(tensors) for tensors in others}


def test_publish_casts_floating_tensors_only(tmp_path: Path) -> None:
    manifest = shared_memory.publish(
        {"w": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}, 0, tmp_path, torch.bfloat16
    )
    assert [entry.dtype for entry in manifest.tensors] == ["bfloat16", "int64"]


def test_failed_publication_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"tensor 'z' has dtype torch\.complex64"):
        shared_memory.publish(
            {"a": torch.ones(3), "z": torch.ones(1, dtype=torch.complex64)}, 0, tmp_path
        )
    assert list(tmp_path.iterdir()) == []


def test_removed_file_stays_readable_where_it_is_mapped(tmp_path: Path) -> None:
    manifest = shared_memory.publish({"a": torch.arange(9)}, 4, tmp_path)
    found = shared_memory.open_policy(manifest)
    shared_memory.remove(tmp_path, 4)
    shared_memory.remove(tmp_path, 4)
    assert not Path(manifest.path).exists() and torch.equal(found["a"], torch.arange(9))


# ---- damage --------------------------------------------------------------------------------------


def flip(manifest: PolicyManifest) -> PolicyManifest:
    with open(manifest.path, "r+b") as file:
        file.seek(manifest.tensors[1].start + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return manifest


def truncate(manifest: PolicyManifest) -> PolicyManifest:
    with open(manifest.path, "r+b") as file:
        file.truncate(manifest.tensors[-1].start)
    return manifest


def lose(manifest: PolicyManifest) -> PolicyManifest:
    Path(manifest.path).unlink()
    return manifest


def edited(**changes: Any) -> Callable[[PolicyManifest], PolicyManifest]:
    """A manifest whose first entry is changed, with a whole digest that fits again."""

    def edit(manifest: PolicyManifest) -> PolicyManifest:
        first = msgspec.structs.replace(manifest.tensors[0], **changes)
        tensors = [first, *manifest.tensors[1:]]
        return msgspec.structs.replace(manifest, tensors=tensors, digest=whole_digest(tensors))

    return edit


def twice(manifest: PolicyManifest) -> PolicyManifest:
    last = manifest.tensors[-1]
    again = msgspec.structs.replace(last, start=last.start + last.size + -last.size % 64)
    tensors = [*manifest.tensors, again]
    return msgspec.structs.replace(manifest, tensors=tensors, digest=whole_digest(tensors))


DAMAGE: dict[str, tuple[Callable[[PolicyManifest], PolicyManifest], str]] = {
    "a flipped bit": (flip, "has digest .* where the manifest says"),
    "a torn file": (truncate, "the file has .* bytes where the manifest needs"),
    "a lost file": (lose, "No such file"),
    "another whole digest": (
        lambda m: msgspec.structs.replace(m, digest="0" * 32),
        "the manifest's digest is 000",
    ),
    "no tensors": (lambda m: msgspec.structs.replace(m, tensors=[]), "it holds no tensors"),
    "a forbidden dtype": (edited(dtype="object"), "has dtype 'object'; allowed are float32"),
    "a wrong size": (edited(shape=[1, 1]), "bytes, which is not float32"),
    "an odd start": (edited(start=1), "starts at 1, not at a free multiple of 64"),
    "an overlap": (edited(start=64), "not at a free multiple of 64|the file has"),
    "a strange name": (
        edited(name="model.layers.9.up"),
        "the model has no tensor 'model.layers.9.up'",
    ),
    "a tensor twice": (twice, "comes twice"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_with_the_old_weights_in_place(damage: str, tmp_path: Path) -> None:
    spoil, sentence = DAMAGE[damage]
    model = make_model(seed=2)
    before = snapshot(model)
    manifest = spoil(shared_memory.publish(make_model(seed=1).state_dict(), 5, tmp_path))
    with pytest.raises(PublicationRefused, match=sentence) as caught:
        shared_memory.load_into(model, manifest)
    assert str(caught.value).startswith(f"policy version 5 ({manifest.path}) is refused: ")
    assert same(model, before)


def without_last(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def of_other_dtype(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


def of_other_shape(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(31)


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (without_last, r"tensor 'model.norm.weight' is missing \(1 in all\)"),
    "dtype": (of_other_dtype, "has dtype torch.float16, the model wants torch.float32"),
    "shape": (of_other_shape, r"has shape \[31\], the model wants \[32\]"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_whole_files_that_do_not_fit_are_refused(misfit: str, tmp_path: Path) -> None:
    spoil, sentence = MISFITS[misfit]
    tensors = dict(make_model(seed=1).state_dict())
    spoil(tensors)
    model = make_model(seed=2)
    before = snapshot(model)
    with pytest.raises(PublicationRefused, match=sentence):
        shared_memory.load_into(model, shared_memory.publish(tensors, 0, tmp_path))
    assert same(model, before)


# ---- values that are not finite ------------------------------------------------------------------


def is_finite(tensor: Tensor) -> bool:
    raw = memoryview(tensor.view(torch.uint8).numpy())
    return shared_memory.is_finite(raw, tensor.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_of_16_bits_is_told_apart_as_torch_does(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[torch.isfinite(patterns)]
    assert is_finite(finite)
    for value in patterns[~torch.isfinite(patterns)]:
        assert not is_finite(torch.stack([finite[0], value, finite[-1]]))


@pytest.mark.parametrize(
    "bits", [0x7F800000, 0x7F800001, 0x7FFFFFFF, -0x00800000, -0x007FFFFF, -1], ids=hex
)
def test_infinities_and_nans_of_32_bits_are_not_published_wherever_they_are(
    bits: int, tmp_path: Path
) -> None:
    greatest = torch.finfo(torch.float32).max
    block = shared_memory.BLOCK // 4
    tensor = torch.tensor([greatest, -greatest, 0.0, -0.0]).repeat(block // 2)
    shared_memory.publish({"a": tensor}, 1, tmp_path)
    for place in (0, block - 1, block, len(tensor) - 1):
        broken = tensor.clone()
        broken.view(torch.int32)[place] = bits
        assert not torch.isfinite(broken).all()
        with pytest.raises(NotFinite):
            shared_memory.publish({"b": torch.ones(3), "a": broken}, 2, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["policy-1.bin"]


def test_what_is_not_finite_once_it_is_cast_is_named(tmp_path: Path) -> None:
    tensors = {"n": torch.full((3,), -1), "w": torch.tensor([1.0, 1e38, -1e38])}
    shared_memory.publish(tensors, 0, tmp_path, torch.bfloat16)
    with pytest.raises(NotFinite) as caught:
        shared_memory.publish(tensors, 1, tmp_path, torch.float16)
    assert str(caught.value) == "tensor 'w' holds values that are not finite"


def test_a_file_that_is_being_written_over_is_given_up_with_what_is_not_finite(
    tmp_path: Path,
) -> None:
    """Its old bytes are gone by then."""
    shared_memory.publish({"a": torch.ones(9)}, 1, tmp_path)
    shared_memory.remove(tmp_path, 1)
    with pytest.raises(NotFinite):
        shared_memory.publish({"a": torch.ones(9), "b": torch.tensor(torch.nan)}, 2, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensor", [torch.full((3,), -1, dtype=torch.int32), torch.zeros(0, 2)])
def test_whole_numbers_and_tensors_without_values_are_finite(
    tensor: Tensor, tmp_path: Path
) -> None:
    manifest = shared_memory.publish({"a": tensor}, 0, tmp_path)
    assert torch.equal(shared_memory.open_policy(manifest)["a"], tensor)


def test_tensors_of_several_blocks_come_back_bit_for_bit(tmp_path: Path) -> None:
    """With the digest of all their bytes, which others take in one go."""
    tensor = torch.arange(2 * shared_memory.BLOCK + 5, dtype=torch.int32).view(torch.uint8)
    manifest = shared_memory.publish({"a": tensor}, 0, tmp_path)
    assert manifest.tensors[0].digest == xxhash.xxh3_128_hexdigest(tensor.numpy().data)
    assert torch.equal(shared_memory.open_policy(manifest)["a"], tensor)


FULL = """
import subprocess, sys
from pathlib import Path
import torch
from zppo_actors.weights import shared_memory

folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
manifests = [shared_memory.publish({"a": torch.ones(20_000)}, 1, folder)]
for count in (60_000, 20_000):
    try:
        manifests.append(shared_memory.publish({"a": torch.ones(count)}, 2, folder))
    except OSError as error:
        print(error)
print([shared_memory.open_policy(one)["a"].sum().item() for one in manifests])
print(sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.slow
def test_memory_that_is_full_is_said_and_costs_no_earlier_version(tmp_path: Path) -> None:
    done = run_unshared(MOUNTS, FULL, str(tmp_path))
    assert done.stdout == (
        f"{tmp_path} has no room for policy version 2 (No space left on device); set "
        "ZPPO_RUNTIME_DIR to a larger folder, or lower scheduler.max_staleness\n"
        "[20000.0, 20000.0]\n['policy-1.bin', 'policy-2.bin']\n"
    ), done.stderr
