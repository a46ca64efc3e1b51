"""Values inside messages that hold no arrays: what is asked, what was decided, and where weights
lie.

Types of fields bound what a peer can make us hold; a text or a list beyond them is refused when it
is decoded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Annotated, Final, Literal, TypeAlias

from msgspec import Meta, Struct

from zppo_protocol.errors import ProtocolError

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=512)]
ACTOR_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What an actor may be called: fit for a file name, a log and a wire alike."""
ActorName: TypeAlias = Annotated[str, Meta(pattern=rf"^{ACTOR_NAME}\Z")]
BootName: TypeAlias = Annotated[str, Meta(max_length=64)]
Text: TypeAlias = Annotated[str, Meta(max_length=4_000_000)]
Reason: TypeAlias = Annotated[str, Meta(max_length=20_000)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
Positive: TypeAlias = Annotated[int, Meta(ge=1, le=2**53)]
Finite: TypeAlias = Annotated[float, Meta(ge=-1e300, le=1e300)]
Role: TypeAlias = Literal["rollout", "teacher", "grader", "trainer", "weights", "supervisor"]
SUPERVISOR: Final = "supervisor"
"""The one speaker that is no actor of the process table, by its name and its role."""
GroupKind: TypeAlias = Annotated[str, Meta(min_length=1, max_length=32)]
NewTokens: TypeAlias = Annotated[int, Meta(ge=1, le=1_048_576)]
Sha256: TypeAlias = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Side: TypeAlias = Annotated[int, Meta(ge=1, le=100_000_000)]
MAX_SECONDS = 1e9
Second: TypeAlias = Annotated[float, Meta(ge=0.0, le=MAX_SECONDS)]
TemplateValue: TypeAlias = bool | int | float | str | None

PART_BYTES = 2**20
"""The most that a message holds of a file. A part begins so early that its end is a `Count`."""

FROZEN = -1
"""The policy version of a model that is never updated, and of every token that it writes."""


MAX_MEDIA = 256
"""Pictures and videos of one prompt."""
MAX_FRAMES = 2048
"""Frames of one video."""


def seed_of(seed: int, where: str, size: int = 7) -> int:
    """A seed of `size` bytes that depends only on the run's seed and the place where it is used, so
    that order of arrival cannot matter."""
    digest = hashlib.blake2b(f"{seed}/{where}".encode(), digest_size=size).digest()
    return int.from_bytes(digest, "big")


def share_of(share: float, count: int) -> int:
    """⌊share·count⌋, forgiving the rounding of a product that should be whole."""
    return math.floor(share * count + 1e-9)


class Value(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the untagged values inside messages."""


class PictureReference(Value, frozen=True, tag_field="kind", tag="picture"):
    """A picture by reference: whoever needs its pixels reads the file, and takes them only if its
    bytes have this SHA-256 (hex), with `zppo.data.pictures.read_picture`. `width` and `height`, in
    pixels, are those that models are shown: turned as the file says, within the bounds of the
    data's settings."""

    path: Name
    sha256: Sha256
    width: Side
    height: Side

    @property
    def kind(self) -> str:
        """Its tag, which a sender's check reads as if it were a field."""
        return "picture"


class VideoReference(Value, frozen=True, tag_field="kind", tag="video"):
    """A video as it was sampled when the data was made: frames of one size, and when each is shown,
    in seconds from the beginning, in rising order."""

    frames: Annotated[tuple[PictureReference, ...], Meta(min_length=1, max_length=MAX_FRAMES)]
    seconds: tuple[Second, ...]

    @property
    def kind(self) -> str:
        """As in `PictureReference`."""
        return "video"

    def __post_init__(self) -> None:
        if len(self.seconds) != len(self.frames):
            raise ProtocolError(
                f"seconds must have one entry per frame ({len(self.frames)}), got "
                f"{len(self.seconds)}"
            )
        if any(later <= earlier for earlier, later in pairwise(self.seconds)):
            raise ProtocolError("seconds must rise from frame to frame")
        if len({(one.width, one.height) for one in self.frames}) > 1:
            raise ProtocolError("frames of a video must have one size")


Media: TypeAlias = PictureReference | VideoReference


def pictures_of(media: Iterable[Media]) -> Iterator[PictureReference]:
    """Every picture of `media`, those of videos frame by frame."""
    for one in media:
        yield from one.frames if isinstance(one, VideoReference) else (one,)


class ChatMessage(Value, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: Text


class ResponseStart(Value, frozen=True):
    """How every response must begin: with the first ⌊share·n⌋ of the n tokens of `text`.

    The engine that knows the tokens cuts them. They end `GroupSamples.prompt_ids`, so they are
    given and not sampled, and are part of `GroupSamples.texts`, so that the whole response is
    graded.
    """

    text: Text
    share: Annotated[float, Meta(ge=0.0, le=1.0)]


class Prompt(Value, frozen=True):
    """What an engine is asked: chat messages and the media they refer to, in order of appearance:
    at the places that these have in the messages, or before the words of the last message of the
    user (`zppo_protocol.places`).

    `chat_template_kwargs` are variables for the chat template of the model that reads it.
    """

    messages: list[ChatMessage]
    media: Annotated[list[Media], Meta(max_length=MAX_MEDIA)] = []
    start: ResponseStart | None = None
    chat_template_kwargs: dict[str, TemplateValue] = {}


class Sampling(Value, frozen=True):
    """Decoding settings of one task; `top_k` 0, `top_p` 1 and `min_p` 0 mean no truncation.
    `temperature` 0 is greedy, whatever the others say.

    The order is temperature, `min_p`, `top_k`, `top_p` of what is left. `min_p` and `top_k` look at
    single tokens; only `top_p` depends on what went before.
    `presence_penalty` is taken from the logits of tokens that the response holds already, before
    the temperature.
    """

    max_new_tokens: NewTokens
    """longest response, in tokens"""
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    """0 is greedy; above 0 for the student, or all responses of a group would be the same"""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """the most probable tokens that make up this share; 1 leaves the distribution as it is"""
    top_k: Annotated[int, Meta(ge=0, le=2**31)] = 0
    """so many most probable tokens; 0 leaves the distribution as it is"""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """tokens at least this share as probable as the most probable one; 0 leaves it as it is"""
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    """taken from the logits of tokens that the response holds already; 0 for the student, because
    training knows no penalty"""

    @property
    def truncates(self) -> bool:
        """Whether some tokens of the vocabulary cannot be sampled."""
        cut = self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0
        return self.temperature > 0.0 and cut


class Usage(Value, frozen=True):
    """What a server counted for so many consecutive completions of a group, all together; None
    where it did not say."""

    completions: Annotated[int, Meta(ge=1, le=65_536)]
    completion_tokens: Count | None = None
    prompt_tokens: Count | None = None


TIMED_OUT = "timed out"
"""The note of a grade on a response that took too long to grade."""


MAX_REWARD = 1e9
"""Largest reward on either side; its square is a float32 still."""
Earned: TypeAlias = Annotated[float, Meta(ge=-MAX_REWARD, le=MAX_REWARD)]


class Grade(Value, frozen=True, omit_defaults=True):
    """The verdict on one response: what it earns, the parsed final answer, and why if something
    went wrong. `parts`: what the reward is made of, by name. `failed`: the reward could not be had,
    so that the response is neither right nor wrong and is left out of its group. `undecided`:
    what it earns does not tell that its answer is wrong, because it was not graded to the end or
    not for its answer alone, so it is shown to nobody as a wrong one."""

    reward: Earned
    answer: Text | None = None
    note: Reason = ""
    parts: dict[Name, Earned] = {}
    failed: bool = False
    undecided: bool = False


class TensorEntry(Value, frozen=True):
    """Where one tensor lies in a weight file (`start`, `size` in bytes) and the xxh3-128 digest of
    its bytes."""

    name: Name
    dtype: Name
    shape: list[Count]
    start: Count
    size: Count
    digest: Name


class PolicyManifest(Value, frozen=True):
    """One published policy version: the file that holds it, its tensors, and the digest over all of
    them."""

    version: Count
    path: Name
    tensors: list[TensorEntry]
    digest: Name


class ActorOrder(Value, frozen=True):
    """A process that a host is to run: who it is, and what its environment adds."""

    name: Name
    role: Name
    incarnation: Count
    env: dict[Name, Reason]


class ActorReport(Value, frozen=True):
    """A process that a host runs or has run: its exit code, negative for a signal, once it has
    ended, and the processor seconds and bytes that it has used."""

    name: Name
    incarnation: Count
    pid: Count
    exit_code: Annotated[int, Meta(ge=-64, le=255)] | None
    seconds: Finite
    moved: Count


class FilePart(Value, frozen=True):
    """Bytes of a file of the run directory, e.g. `logs/rollout-0.log`, from `start` on. `number`
    rises when the file was written anew. Where `start` lies beyond what has come, the bytes between
    are not sent."""

    path: Name
    number: Count
    start: Annotated[int, Meta(ge=0, le=2**53 - PART_BYTES)]
    data: Annotated[bytes, Meta(max_length=PART_BYTES)]
