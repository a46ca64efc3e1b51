"""What can be known of a model folder without loading it: its size, its context, and whether it can
be trained on.

Only JSON is read: `config.json`, the tokenizer's files, and the headers of the safetensors files.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from zppo.errors import UserError, first_line, nearest
from zppo.plan.architecture import (
    attending_layers,
    bounded,
    caches_otherwise,
    context_of,
    delta_widths,
    listed_layers,
    other_state,
    refuse_no_decoder,
    setting,
    slots_window_of,
    state_numbers,
)
from zppo.plan.model_class import SEEING, AutoClass, auto_class
from zppo.plan.model_defaults import completed

FOLDER_EXPECTED = (
    "expected a folder with config.json, a tokenizer and *.safetensors, as save_pretrained or "
    "`hf download` writes it"
)
MAX_HEADER_BYTES = 100 << 20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXT_SECTION = "text_config"
"""Models that also see pictures keep the numbers of their language part in this section."""
LANGUAGE_PARTS = frozenset({"language_model", "text_model", "text_decoder", "lm_head"})
"""Parts of the names of weights of such a model's language part and head; all else is its tower."""
BARE_LANGUAGE = ("model.embed_tokens.", "model.layers.", "model.norm.")
"""What they begin with in folders that name no part (Qwen2-VL's as they were published)."""


class ModelFacts(Struct, frozen=True, kw_only=True):
    """Counts of a causal language model. `context` and `window` are in tokens, as
    `zppo.plan.architecture` has them, the latter for slots; `parameters` counts tied weights once,
    and so many of them are the `tower`'s, which sees pictures. `quantised_bytes`: what the weights
    take as they are stored, where an engine keeps them so; None where it casts
    them. `tied`: the input embedding is the head as well. `bounded`: the context ends before the
    model's positions do. `caches_otherwise`: an engine keeps something else than full keys and
    values. `state`: what layers carry that slots do not hold. `opened_by`: the class
    of transformers that opens the folder, None if it has none. `states`: numbers that a sequence
    carries in recurrent states; `without_keys`: layers that keep no keys and values;
    `delta_widths`: of a key and a value in its gated delta rule. `family` is the kind of the
    language part, `kind` that of the whole folder."""

    parameters: int
    tower: int = 0
    context: int
    hidden: int
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    quantised_bytes: int | None = None
    tied: bool = True
    family: str = ""
    kind: str = ""
    window: int | None = None
    bounded: bool = False
    state: str | None = None
    opened_by: AutoClass | None = None
    states: int = 0
    without_keys: int = 0
    delta_widths: tuple[int, int] | None = None
    caches_otherwise: bool = False

    @property
    def slots_context(self) -> int:
        """Longest sequence in the engine 'transformers'."""
        return min(self.context, self.window or self.context)


def inspect_model(folder: Path, where: str) -> ModelFacts:
    """Read the facts. Raises UserError, naming `where` and what is missing, for a folder that is no
    usable model."""
    if not os.path.isdir(folder):  # false, not an error, for a path that cannot be
        if os.path.isfile(folder):
            raise UserError(f"{where}: {str(folder)!r} is a file; {FOLDER_EXPECTED}")
        raise UserError(
            f"{where}: there is no model folder {str(folder)!r}{_nearest_folder(folder)}"
        )
    config = read_json(folder / "config.json", where)
    with settings_of_their_kind(folder, where):
        refuse_no_decoder(config, folder, where)
        sizes = _sizes(folder, where)
        elements = {name: count for file, _ in sizes for name, count in file.items()}
        stored = sum(stored for _, stored in sizes)
        tower = tower_numbers(elements) if TEXT_SECTION in config else 0
        facts = facts_of(config, sum(elements.values()), stored, folder, where, tower)
    _check_tokenizer(folder, where)
    return facts


@contextmanager
def settings_of_their_kind(folder: Path, where: str) -> Iterator[None]:
    """Raises UserError for what a setting of another kind in config.json leads to."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{where}: {str(folder / 'config.json')!r} has a setting that is not of its kind "
            f"({first_line(error)}); expected a file as save_pretrained writes it"
        ) from None


def facts_of(
    config: dict[str, Any],
    parameters: int,
    stored: int,
    folder: Path,
    where: str,
    tower: int = 0,
) -> ModelFacts:
    """Facts of a model with this config.json, so many parameters, of which the tower has `tower`,
    and weights of `stored` bytes. Raises UserError, and what a setting of another kind leads
    to."""
    text = completed(config.get(TEXT_SECTION, config))
    heads, hidden = (
        _number(text, "num_attention_heads", folder, where),
        _number(text, "hidden_size", folder, where),
    )
    layers = listed_layers(text) or _number(text, "num_hidden_layers", folder, where)
    attending, opened_by = attending_layers(text, layers), auto_class(config)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    if min(kv_heads, head_dim) < 1 or not 0 <= attending <= layers:
        raise ValueError(
            f"{kv_heads} heads of {head_dim} numbers in {attending} of {layers} layers keep keys"
        )
    return ModelFacts(
        parameters=parameters,
        tower=tower if opened_by == SEEING else 0,
        quantised_bytes=stored if _quantised(config, text) else None,
        context=context_of(text),
        family=str(text.get("model_type", "")),
        kind=str(config.get("model_type", "")),
        window=slots_window_of(text),
        bounded=bounded(text),
        state=other_state(text),
        opened_by=opened_by,
        hidden=hidden,
        layers=layers,
        states=state_numbers(text, layers),
        delta_widths=delta_widths(text),
        without_keys=layers - attending,
        caches_otherwise=attending < layers or caches_otherwise(config.get(TEXT_SECTION, config)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=_number(text, "vocab_size", folder, where),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))),
    )


def tower_numbers(elements: Mapping[str, int]) -> int:
    """How many numbers of a model that sees pictures, by the names of its weights, are its
    tower's."""
    language = {name for name in elements if not LANGUAGE_PARTS.isdisjoint(name.split("."))}
    if all(name.endswith("lm_head.weight") for name in language):
        language |= {name for name in elements if name.startswith(BARE_LANGUAGE)}
    return sum(count for name, count in elements.items() if name not in language)


def _nearest_folder(folder: Path) -> str:
    siblings = (
        [path.name for path in folder.parent.iterdir() if path.is_dir()]
        if os.path.isdir(folder.parent)
        else []
    )
    close = difflib.get_close_matches(folder.name, siblings, n=1)
    return (
        nearest(folder.name, close)
        if close
        else "; expected one as save_pretrained or `hf download` writes it"
    )


def _of_another_kind(folder: Path) -> str:
    """What to say of a folder for another program; nothing of others."""
    return f" but *.gguf; {FOLDER_EXPECTED}" if any(folder.glob("*.gguf")) else ""


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object of a model folder. Raises UserError."""
    if not path.is_file():  # a named pipe would be waited for
        raise UserError(
            f"{where}: {str(path.parent)!r} is not a model folder: it has no {path.name}"
            f"{_of_another_kind(path.parent)}"
        )
    try:
        data = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {str(path)!r} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: {str(path)!r} does not hold a JSON object")
    return data


class _Token(Struct):
    content: str
    special: bool = False


class _Tokenizer(Struct):
    added_tokens: list[_Token] = []


def special_tokens(folders: Iterable[Path]) -> set[str]:
    """Special tokens of the tokenizers in these folders, as text; of a folder that has none,
    nothing. Words (a few tokenizers have them as tokens) do not count."""
    found = set[str]()
    for file in (folder / "tokenizer.json" for folder in folders):
        if file.is_file():
            try:
                tokens = msgspec.json.decode(file.read_bytes(), type=_Tokenizer).added_tokens
            except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{str(file)!r} cannot be read: {error}") from None
            found |= {one.content for one in tokens if one.special}
    return {token for token in found if len(token.strip()) > 2 and not token.isalnum()}


def _number(config: dict[str, Any], key: str, folder: Path, where: str) -> int:
    value = setting(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"{where}: {str(folder / 'config.json')!r} has no {key}; expected a causal language "
            "model"
        )
    return value


def _quantised(*sections: Mapping[str, Any]) -> bool:
    """Whether the weights are stored as an engine computes with them: FP8, AWQ and the like."""
    keys = ("quantization_config", "compression_config")
    return any(section.get(key) for section in sections for key in keys)


def _sizes(folder: Path, where: str) -> list[tuple[dict[str, int], int]]:
    """Elements by tensor, and bytes, of each file that transformers would read: one, or those of an
    index, which must all be there. Some folders hold the same weights in other files as well."""
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        files = _indexed(folder, where)
    else:
        files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not files:
        raise UserError(
            f"{where}: {str(folder)!r} is not a model folder: it has no weights (*.safetensors)"
        )
    return [_tensors(file, where) for file in files]


def _indexed(folder: Path, where: str) -> list[Path]:
    """The files of the index, each with the tensors that it should have."""
    places = read_json(folder / INDEX, where).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(one, str) for one in places.values()):
        raise UserError(f"{where}: {str(folder / INDEX)!r} has no weight_map")
    files = [folder / name for name in sorted(set(places.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{where}: {str(folder)!r} is not whole: {file.name} is missing, which {INDEX} "
                "names"
            )
        elements, _ = _tensors(file, where)
        here = (tensor for tensor, name in places.items() if folder / name == file)
        if lacking := next((tensor for tensor in here if tensor not in elements), None):
            raise UserError(f"{where}: {str(file)!r} lacks {lacking}, which {INDEX} names")
    return files


def _tensors(file: Path, where: str) -> tuple[dict[str, int], int]:
    """Elements of each tensor of a safetensors file, and the bytes of all, from its header."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = msgspec.json.decode(stream.read(size if size <= MAX_HEADER_BYTES else 0))
        header.pop("__metadata__", None)
        elements = {name: math.prod(entry["shape"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        whole = file.stat().st_size == 8 + size + end
    except (
        OSError,
        msgspec.DecodeError,
        UnicodeDecodeError,
        AttributeError,
        KeyError,
        TypeError,
        IndexError,
    ) as error:
        raise UserError(f"{where}: {str(file)!r} is not a safetensors file: {error}") from None
    if not whole:
        raise UserError(f"{where}: {str(file)!r} is cut short; expected {8 + size + end} bytes")
    return elements, end


def _check_tokenizer(folder: Path, where: str) -> None:
    """A tokenizer without an end token would never end a response."""
    names = ("tokenizer_config.json", "tokenizer.json")
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{where}: {str(folder)!r} has no tokenizer: {name} is missing")
    configs = [read_json(folder / "tokenizer_config.json", where)]
    if (folder / "special_tokens_map.json").is_file():
        configs.append(read_json(folder / "special_tokens_map.json", where))
    if not any(config.get("eos_token") for config in configs):
        raise UserError(
            f"{where}: the tokenizer of {str(folder)!r} has no end token, so no response would "
            "ever stop; "
            "set eos_token in its tokenizer_config.json"
        )
