"""What the kernels over rows of logits share: how a row is cut into tiles, read and written, and
the sums of its softmax.

A tile is `VECTORS` times one access of `WIDTH` entries (16 bytes) for each of `THREADS` threads.
Each thread keeps a running maximum and sums of its own, so the loop over a row has no barrier; the
threads' sums meet once, behind it.

All exponents are base 2 and in the form `fma(logit, scale, -anchor)`, rounded once, with `scale`
the inverse temperature times log2(e). An anchor is the running maximum *after* it was scaled and
rounded, and is a plain number from then on: how it was rounded cancels everywhere, however far the
logits are from 0.

ROWS says how rows lie, known before the launch (`rows_triton.lie_of`):
`aligned`: every row begins at a multiple of 16 bytes. `rotated`: rows of all matrices begin equally
far from one; the main loop starts at the first multiple, and what is before it comes last.
`narrow`: anything else; entries are read one by one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

# Kernels may only read globals that are constexpr.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# What stands for -inf as an anchor or as an exponent: 0 times it is 0, and no difference of two is
# NaN.
LOWEST = tl.constexpr(-1e30)
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def exp2(x):
    """2 ** x in one instruction: results below 2 ** -126 are 0, which `tl.exp2` spends three more
    on."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def log2(x):
    """Base-2 logarithm in one instruction, absolute error 2 ** -22 at most near 1; of a denormal
    -inf."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def scaled(x, scale, anchor):
    """x * scale - anchor, rounded once; the interpreter's own `fma` rounds twice."""
    if INTERPRETED:
        wide = x.to(tl.float64) * scale.to(tl.float64) - anchor.to(tl.float64)
        return wide.to(tl.float32)
    else:
        return tl.fma(x, scale + tl.zeros_like(x), -anchor + tl.zeros_like(x))


@triton.jit
def no_lower(x, bound):
    """max(x, bound), except that NaN stays NaN."""
    return tl.maximum(x, bound, propagate_nan=NAN_STAYS)


@triton.jit
def capped(x, logit_scale, SOFT_CAP: tl.constexpr):
    """The logit of a raw one as float32: cap * tanh(raw * logit_scale / cap) with a SOFT_CAP;
    without one it is left as it is, and `logit_scale` belongs to the scale of the exponent."""
    x = x.to(tl.float32)
    if SOFT_CAP > 0.0:
        return SOFT_CAP * _tanh(x * (logit_scale / SOFT_CAP))
    else:
        return x


@triton.jit
def _tanh(x):
    """tanh(x) = 1 - 2 / (exp(2 x) + 1), within 2 ** -23."""
    return 1.0 - 2.0 * _reciprocal(exp2(2.0 * x * LOG2_E) + 1.0)


@triton.jit
def _reciprocal(x):
    """1 / x in one instruction, to the last place."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def cap_slope(x, SOFT_CAP: tl.constexpr):
    """Derivative of a capped logit by what it was before: 1 without a soft cap."""
    if SOFT_CAP > 0.0:
        bounded = x * (1.0 / SOFT_CAP)
        return 1.0 - bounded * bounded
    else:
        return 1.0


@triton.jit
def exponent_scale(logit_scale, inverse_temperature, SOFT_CAP: tl.constexpr):
    """What a logit is multiplied by in an exponent of base 2."""
    if SOFT_CAP > 0.0:
        return inverse_temperature * LOG2_E
    else:
        return logit_scale * inverse_temperature * LOG2_E


@triton.jit
def tile_columns(VECTORS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [VECTORS, THREADS, WIDTH] of a tile: neighbouring threads read neighbouring
    vectors."""
    vector = tl.arange(0, VECTORS)[:, None, None] * (THREADS * WIDTH)
    thread = tl.arange(0, THREADS)[None, :, None] * WIDTH
    return vector + thread + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def lead_of(row, vocabulary, ROWS: tl.constexpr):
    """How many entries of this row come before its first multiple of 16 bytes."""
    if ROWS == "rotated":
        SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
        behind = (row.to(tl.int64) % 16).to(tl.int32)
        return tl.minimum((16 - behind) % 16 // SIZE, vocabulary)
    else:
        return 0


@triton.jit
def row_of(matrix, index, stride, ROWS: tl.constexpr):
    """Pointer to a row; the compiler learns here (not from an argument of the function it is handed
    to) that it is a multiple of 16 bytes, where it is."""
    row = matrix + index * stride
    if ROWS == "aligned":
        row = tl.multiple_of(row, (16,))
    return row


@triton.jit
def body_of(row, lead, ROWS: tl.constexpr):
    """Where the tiles of a row begin: at a multiple of 16 bytes unless rows are `narrow`."""
    if ROWS == "rotated":
        return tl.multiple_of(row + lead, (16,))
    else:
        return row


@triton.jit
def rest_size(VECTORS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Entries of a tile behind the full ones: one vector a thread, because each entry has a mask
    and perhaps an address of its own, which take registers."""
    return THREADS * (VECTORS if WIDTH == 1 else WIDTH)


@triton.jit
def rest_columns(
    start,
    lead,
    vocabulary,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Columns of a tile of `rest_size` behind the full ones, and which of them exist: to the row's
    end, then those before its body."""
    columns = start + tile_columns(VECTORS if WIDTH == 1 else 1, THREADS, WIDTH)
    inside = columns < vocabulary
    if ROWS == "rotated":
        columns += lead
        columns = tl.where(columns < vocabulary, columns, columns - vocabulary)
    return columns, inside


@triton.jit
def _add_tile(x, anchor, total, weighted, scale, HAS_ENTROPY: tl.constexpr):
    """Each thread's sums of exp2(y) and exp2(y) * y, y = x * scale - anchor, with one more tile."""
    raised = tl.maximum(anchor, tl.max(tl.max(x, axis=2), axis=0) * scale)
    shift = anchor - raised
    keep = exp2(shift)
    y = no_lower(scaled(x, scale, raised[None, :, None]), LOWEST)
    p = exp2(y)
    if HAS_ENTROPY:
        weighted = keep * (weighted + total * shift) + tl.sum(tl.sum(p * y, axis=0), axis=1)
    total = keep * total + tl.sum(tl.sum(p, axis=0), axis=1)
    return raised, total, weighted


@triton.jit
def row_sums(
    row,
    vocabulary,
    logit_scale,
    scale,
    SOFT_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Anchor, and the sums of exp2(y) and of exp2(y) * y over the row; 0 for a row of -inf alone.

    A tile is loaded while the one before it is summed.
    """
    TILE: tl.constexpr = VECTORS * THREADS * WIDTH
    columns = tile_columns(VECTORS, THREADS, WIDTH)
    anchor = tl.full((THREADS,), LOWEST, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    lead = lead_of(row, vocabulary, ROWS)
    body = body_of(row, lead, ROWS)
    full = (vocabulary - lead) // TILE * TILE
    if full > 0:
        tile = tl.load(body + columns)
        for start in range(TILE, full, TILE):
            ahead = tl.load(body + start + columns)
            anchor, total, weighted = _add_tile(
                capped(tile, logit_scale, SOFT_CAP), anchor, total, weighted, scale, HAS_ENTROPY
            )
            tile = ahead
        anchor, total, weighted = _add_tile(
            capped(tile, logit_scale, SOFT_CAP), anchor, total, weighted, scale, HAS_ENTROPY
        )
    for start in range(full, vocabulary, rest_size(VECTORS, THREADS, WIDTH)):
        column, inside = rest_columns(start, lead, vocabulary, ROWS, VECTORS, THREADS, WIDTH)
        x = capped(tl.load(row + column, mask=inside), logit_scale, SOFT_CAP)
        anchor, total, weighted = _add_tile(
            tl.where(inside, x, float("-inf")), anchor, total, weighted, scale, HAS_ENTROPY
        )
    highest = tl.max(anchor, axis=0)
    shift = anchor - highest
    keep = exp2(shift)
    weighted = tl.sum(keep * (weighted + total * shift), axis=0)
    return highest, tl.sum(keep * total, axis=0), weighted


@triton.jit
def target_exponent(row, target, vocabulary, logit_scale, scale, anchor, SOFT_CAP: tl.constexpr):
    """y of the target; NaN for an id out of the vocabulary, so that the loss says so."""
    inside = (target >= 0) & (target < vocabulary)
    x = tl.load(row + target, mask=inside, other=float("nan"))
    return scaled(capped(x, logit_scale, SOFT_CAP), scale, anchor)


@triton.jit
def fill_zero(
    row,
    vocabulary,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Zeros over one row. Where it is the memory of logits whose values are still needed, a barrier
    comes before."""
    TILE: tl.constexpr = VECTORS * THREADS * WIDTH
    columns = tile_columns(VECTORS, THREADS, WIDTH)
    zeros = tl.zeros((VECTORS, THREADS, WIDTH), tl.float32).to(row.dtype.element_ty)
    lead = lead_of(row, vocabulary, ROWS)
    body = body_of(row, lead, ROWS)
    full = (vocabulary - lead) // TILE * TILE
    for start in range(0, full, TILE):
        tl.store(body + start + columns, zeros)
    for start in range(full, vocabulary, rest_size(VECTORS, THREADS, WIDTH)):
        column, inside = rest_columns(start, lead, vocabulary, ROWS, VECTORS, THREADS, WIDTH)
        tl.store(row + column, tl.zeros_like(column).to(zeros.dtype), mask=inside)


@triton.jit
def _gradient_tile(
    raw,
    logit_scale,
    scale,
    anchor,
    factor,
    slope,
    SOFT_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """p * (factor + slope * y), through the soft cap to the raw logits."""
    x = capped(raw, logit_scale, SOFT_CAP)
    y = scaled(x, scale, anchor)
    if HAS_ENTROPY:
        # -inf becomes a finite exponent: its p is 0, and 0 times it stays 0.
        y = no_lower(y, LOWEST)
        values = exp2(y) * (factor + slope * y)
    else:
        values = exp2(y) * factor
    return values * cap_slope(x, SOFT_CAP)


@triton.jit
def write_gradient(
    source,
    destination,
    vocabulary,
    logit_scale,
    scale,
    anchor,
    factor,
    slope,
    target,
    label,
    SOFT_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    SHARES_STORAGE: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """destination = exp2(y) * (factor + slope * y), and then `label` at the target.

    The first barrier lets every thread read the target's logit before one overwrites it, where both
    are the same memory. With SHARES_STORAGE a destination row half as wide begins where the source
    row does: tile k is written over what tile k // 2 was read from. So behind a barrier at tile b,
    which all threads have read by then, tiles b to 2 b + 1 are written without another.
    """
    TILE: tl.constexpr = VECTORS * THREADS * WIDTH
    columns = tile_columns(VECTORS, THREADS, WIDTH)
    lead = lead_of(source, vocabulary, ROWS)
    body, target_body = body_of(source, lead, ROWS), body_of(destination, lead, ROWS)
    full = (vocabulary - lead) // TILE * TILE
    tl.debug_barrier()
    if full > 0:
        tile = tl.load(body + columns)
        begin = 0
        while begin < full:
            end = full
            if SHARES_STORAGE:
                tl.debug_barrier()
                end = tl.minimum(full, 2 * begin + 2 * TILE)
            for start in range(begin, end, TILE):
                # The last tile is loaded twice, which is cheaper than to ask in every turn.
                ahead = tl.load(body + tl.minimum(start + TILE, full - TILE) + columns)
                values = _gradient_tile(
                    tile, logit_scale, scale, anchor, factor, slope, SOFT_CAP, HAS_ENTROPY
                )
                tl.store(target_body + start + columns, values.to(destination.dtype.element_ty))
                tile = ahead
            begin = end
    for start in range(full, vocabulary, rest_size(VECTORS, THREADS, WIDTH)):
        column, inside = rest_columns(start, lead, vocabulary, ROWS, VECTORS, THREADS, WIDTH)
        raw = tl.load(source + column, mask=inside, other=0.0)
        values = _gradient_tile(
            raw, logit_scale, scale, anchor, factor, slope, SOFT_CAP, HAS_ENTROPY
        )
        if SHARES_STORAGE:
            tl.debug_barrier()
        tl.store(destination + column, values.to(destination.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    inside = (target >= 0) & (target < vocabulary)
    tl.store(destination + target, label.to(destination.dtype.element_ty), mask=inside)
