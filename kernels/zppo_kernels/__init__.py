"""Fused policy-gradient and distillation losses: Triton on a GPU, torch and numba on a CPU, one
function each.

Every loss takes flat, packed rows and a *global* token count, returns gradients through autograd,
and gives its metrics as sums and counts that add over chunks, micro-batches and ranks.
"""

from .advantages import (
    AdvantageStatistics,
    advantage_statistics,
    decoupled_advantages,
    group_advantages,
)
from .jsd_hidden import jsd_loss_from_hidden, jsd_loss_top_k_from_hidden
from .jsd_logits import jsd_loss_from_logits, jsd_loss_top_k_from_logits
from .jsd_reference import JsdLossOutput
from .log_probs import token_log_probs, token_log_probs_from_logits
from .metrics import combine_metrics, summarise_metrics
from .packing import balanced_partition, cu_seqlens_of, micro_batches, pack, sequence_ids_of, unpack
from .policy_hidden import policy_loss_from_hidden
from .policy_logits import policy_loss_from_logits
from .policy_reference import PolicyLossOutput
from .settings import PolicyLossSettings

__all__ = [
    "AdvantageStatistics",
    "JsdLossOutput",
    "PolicyLossOutput",
    "PolicyLossSettings",
    "advantage_statistics",
    "balanced_partition",
    "combine_metrics",
    "cu_seqlens_of",
    "decoupled_advantages",
    "group_advantages",
    "jsd_loss_from_hidden",
    "jsd_loss_from_logits",
    "jsd_loss_top_k_from_hidden",
    "jsd_loss_top_k_from_logits",
    "micro_batches",
    "pack",
    "policy_loss_from_hidden",
    "policy_loss_from_logits",
    "sequence_ids_of",
    "summarise_metrics",
    "token_log_probs",
    "token_log_probs_from_logits",
    "unpack",
]
