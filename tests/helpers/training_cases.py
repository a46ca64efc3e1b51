"""A small world for the tests of the trainer: tiny models, windows made by hand, and log-probs
written out longhand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from zppo.config.method import MethodConfig
from zppo.config.topology import DataConfig, OptimizerConfig, StudentConfig, Topology
from zppo.prompting.picture_families import unsampled_ids
from zppo.training.optimizer import AdamW, Gradients
from zppo.training.policy import Policy
from zppo.training.ranks import ALONE, Ranks
from zppo.training.trainer import StepSettings, Trainer
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import GroupSamples, TrainGroup
from zppo_protocol.values import Sampling

VOCABULARY = 31
MAX_NEW_TOKENS = 8
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
)
CPU = torch.device("cpu")


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(**(SMALL | dict(num_key_value_heads=1, initializer_range=0.5) | extra))
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype)


def qwen3() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        **SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, initializer_range=0.5
    )
    return Qwen3ForCausalLM(config)


def phi_with_head_bias() -> Any:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SMALL, initializer_range=0.5))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def gemma2_with_soft_cap() -> Any:
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "qwen3, tied": qwen3,
    "phi, head bias": phi_with_head_bias,
    "gemma2, soft cap": gemma2_with_soft_cap,
}


def group(
    name: str,
    rewards: list[float],
    *,
    seed: int = 0,
    kind: str = "plain",
    lengths: list[int] | None = None,
    spans: list[tuple[int, int]] | None = None,
    cut_off: set[int] = frozenset(),  # type: ignore[assignment]
    alphabet: int = VOCABULARY,
) -> TrainGroup:
    """Responses are drawn from the first tokens of the vocabulary, `alphabet` of them: from few,
    some begin alike."""
    random = np.random.default_rng([seed, *name.encode()])
    lengths = lengths if lengths is not None else random.integers(1, 7, len(rewards)).tolist()
    total = sum(lengths)
    default_spans = [(total, 0)] if total else []
    samples = GroupSamples(
        prompt_ids=random.integers(0, VOCABULARY, int(random.integers(1, 9))).astype(np.int32),
        token_ids=random.integers(0, alphabet, total).astype(np.int32),
        log_probs=-random.uniform(0.1, 4, total).astype(np.float32),
        offsets=np.array([0, *itertools.accumulate(lengths)], np.int32),
        version_spans=np.array(spans if spans is not None else default_spans, np.int32).reshape(
            -1, 2
        ),
        texts=[],
        finish_reasons=["length" if index in cut_off else "stop" for index in range(len(rewards))],
    )
    return TrainGroup(
        group_id=name,
        question_id=name,
        kind=kind,
        samples=samples,
        rewards=np.array(rewards, np.float32),
    )


def window(*groups: TrainGroup, step: int = 0) -> TrainWindow:
    return TrainWindow(step=step, groups=list(groups))


def mixed_window(step: int = 0, count: int = 5) -> TrainWindow:
    """Groups of every sort: mixed, all right, all wrong, of another kind; responses of the first
    and the third begin alike."""
    patterns = ([1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0], [1, 0])
    groups = [
        group(
            f"g{i}",
            list(map(float, patterns[i % 5])),
            seed=step,
            kind="bcq" if i % 5 == 4 else "plain",
            alphabet=2 if i % 5 in (0, 2) else VOCABULARY,
        )
        for i in range(count)
    ]
    return window(*groups)


SETTINGS = StepSettings.of(
    Topology(
        data=DataConfig(train="x"),
        student=StudentConfig(model="x", sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS)),
    )
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, state_dtype="float32")


def trainer_of(
    model: Any,
    *,
    optimizer: OptimizerConfig = OPTIMIZER,
    teacher: Any = None,
    reference: Any = None,
    recompute: bool = False,
    ranks: Ranks = ALONE,
    **changes: Any,
) -> Trainer:
    policy = Policy(model)
    if recompute:
        policy.recompute_layers()
    frozen = [
        None if one is None else Policy(one.requires_grad_(False), "teacher.model")
        for one in (teacher, reference)
    ]
    if ranks.count > 1:
        for one in (policy, *frozen):
            if one is not None:
                one.shard(ranks)
    parameters = policy.parameters()
    steps = itertools.count()
    return Trainer(
        policy,
        AdamW(parameters, optimizer, seed=0),
        Gradients(parameters, ranks),
        replace(SETTINGS, **changes),
        clock=lambda: float(next(steps)),
        teacher=frozen[0],
        reference=frozen[1],
        ranks=ranks,
    )


def settings_of(words: MethodConfig) -> dict[str, Any]:
    """What the trainer makes of the method's settings, as changes of `SETTINGS`."""
    student = StudentConfig(model="x", sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS))
    settings = StepSettings.of(Topology(data=DataConfig(train="x"), student=student, method=words))
    return {"method": settings.method, "loss": settings.loss}


def method(**changes: Any) -> MethodConfig:
    return msgspec.structs.replace(MethodConfig(), **changes)


def longhand_logits(model: Any, sample: GroupSamples, index: int) -> tuple[Tensor, Tensor]:
    """Float64 log-softmax [T, V] at the tokens of one completion, and their ids [T], from one
    unpadded forward pass of the whole model."""
    response = sample.token_ids[sample.offsets[index] : sample.offsets[index + 1]]
    ids = torch.tensor(np.concatenate([sample.prompt_ids, response]), dtype=torch.int64)
    logits = model(input_ids=ids[None]).logits[0, len(sample.prompt_ids) - 1 : -1].double()
    unsampled = torch.tensor(unsampled_ids(model.config.to_dict()), dtype=torch.int64)
    logits = logits.index_fill(1, unsampled, -torch.inf)
    return logits, ids[len(sample.prompt_ids) :]


def longhand_log_probs(
    model: Any, sample: GroupSamples, index: int, temperature: float = 1.0
) -> Tensor:
    """Log-probs of one completion."""
    logits, ids = longhand_logits(model, sample, index)
    return (logits / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


@dataclass
class Longhand:
    """One rollout of `longhand_loss`: log-probs and entropies of its tokens, and its advantage."""

    policy: Tensor
    entropy: Tensor
    behaviour: Tensor
    reference: Tensor | None
    advantage: Tensor

    def loss(self, words: MethodConfig, least_entropy: float) -> Tensor:
        """Of each token, by the formulas of the papers and libraries (first update: the policy is
        the proximal one)."""
        old = self.policy.detach() if words.ratio == "proximal" else self.behaviour
        gap = self.policy - old
        ratio = (gap.mean() if words.ratio_level == "sequence" else gap).exp().expand_as(gap)
        gain = SURROGATES[words.surrogate](ratio, self, old, words)
        gain = gain * (self.entropy.detach() >= least_entropy)
        loss = -gain * self._weight(words) - words.entropy_coefficient * self.entropy
        if self.reference is None:
            return loss
        away = self.policy - self.reference
        square = away.square() / 2
        value = {"k1": away, "k2": square, "k3": (-away).exp() - 1 + away}[words.kl_estimator]
        if words.kl_correction == "importance":
            value = value * ratio
        if words.kl_correction == "straight_through":
            value = square - square.detach() + value.detach()
        return loss + words.kl_coefficient * value

    def _weight(self, words: MethodConfig) -> Tensor:
        gap = self.policy.detach() - self.behaviour
        weight = (gap.sum() if words.correction_level == "sequence" else gap).exp().expand_as(gap)
        if words.ratio == "behaviour" or words.correction == "none":
            return torch.ones_like(gap)
        if words.correction == "truncate":
            return weight.clamp(max=words.correction_cap)
        return weight * (
            (weight >= (words.correction_floor or 0)) & (weight <= words.correction_cap)
        )


def _clip(ratio: Tensor, one: Longhand, old: Tensor, words: MethodConfig) -> Tensor:
    clipped = ratio.clamp(1 - words.clip_low, 1 + words.clip_high)
    gain = torch.minimum(ratio * one.advantage, clipped * one.advantage)
    if one.advantage < 0 and words.dual_clip is not None:
        gain = torch.maximum(gain, words.dual_clip * one.advantage)
    return gain


def _cispo(ratio: Tensor, one: Longhand, old: Tensor, words: MethodConfig) -> Tensor:
    weight = ratio.detach().clamp(1 - words.clip_low, 1 + words.clip_high)
    return weight * one.advantage * one.policy


def _sapo(ratio: Tensor, one: Longhand, old: Tensor, words: MethodConfig) -> Tensor:
    positive = one.advantage > 0
    tau = words.sapo_temperature_positive if positive else words.sapo_temperature_negative
    return torch.sigmoid(tau * (ratio - 1)) * 4 / tau * one.advantage


def _dppo(ratio: Tensor, one: Longhand, old: Tensor, words: MethodConfig) -> Tensor:
    p, q = one.policy.detach().exp(), old.exp()
    divergence = (p - q).abs()
    if words.surrogate == "dppo_kl":
        divergence = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    rises, bound = one.advantage > 0, words.clip_high if one.advantage > 0 else words.clip_low
    kept = (divergence <= bound) | ((p <= q) if rises else (p >= q))
    return ratio.detach().clamp(max=words.dual_clip) * one.advantage * one.policy * kept


SURROGATES = {"clip": _clip, "cispo": _cispo, "sapo": _sapo, "dppo_tv": _dppo, "dppo_kl": _dppo}


def longhand_loss(
    model: Any,
    task: TrainWindow,
    advantages: Tensor,
    words: MethodConfig,
    *,
    reference: Any = None,
    passes: bool = False,
) -> Tensor:
    """The loss of one mini-batch, one rollout at a time, in float64 (first update: policy =
    proximal).

    With `truncated: mask` what was cut off has no term, in numerator or denominator. `passes`: each
    rollout with an advantage is a forward pass of its own.
    """
    rollouts, sequence = [], 0
    for g in task.groups:
        for index in range(len(g.rewards)):
            log_probs, ids = longhand_logits(model, g.samples, index)
            log_probs = log_probs.log_softmax(-1)
            part = slice(g.samples.offsets[index], g.samples.offsets[index + 1])
            held = None
            if reference is not None:
                held = longhand_log_probs(reference, g.samples, index).detach()
            if words.truncated != "mask" or g.samples.finish_reasons[index] == "stop":
                rollouts.append(
                    Longhand(
                        policy=log_probs.gather(-1, ids[:, None])[:, 0],
                        entropy=-(log_probs.exp() * log_probs).sum(-1),
                        behaviour=torch.tensor(g.samples.log_probs[part]).double(),
                        reference=held,
                        advantage=advantages[sequence].double(),
                    )
                )
            sequence += 1
    entropies = torch.cat([one.entropy.detach() for one in rollouts])
    least = float(np.quantile(entropies.numpy(), 1 - words.entropy_quantile))
    terms = [one.loss(words, least) for one in rollouts]
    if words.loss_normalisation == "fixed_length":
        return torch.cat(terms).sum() / (len(terms) * (words.fixed_length or MAX_NEW_TOKENS))
    if words.loss_normalisation == "micro_batch":
        terms = [t for t, one in zip(terms, rollouts, strict=True) if one.advantage != 0]
    if words.loss_normalisation == "sequence" or passes:
        return torch.stack([term.mean() for term in terms]).mean()
    return torch.cat(terms).mean()
