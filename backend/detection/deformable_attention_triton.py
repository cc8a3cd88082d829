"""Multi-scale deformable attention on a GPU: one Triton kernel from raw offsets and logits to what each query sees.

Nothing lies between in memory: the softmax, the bilinear weights and the weighted sum stay in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16  # queries of one program


def sample(
    values: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, shapes: Tensor, starts: Tensor
) -> Tensor:
    """As `deformable_attention.sample_rows`, for any float type; the heads' width is a power of two."""
    batch, tokens, width = values.shape
    _, queries, heads, levels, points, _ = offsets.shape
    seen = torch.empty(batch, queries, width, dtype=values.dtype, device=values.device)
    _sample[(triton.cdiv(queries, BLOCK), heads, batch)](
        values.contiguous(),
        reference.contiguous(),
        offsets.contiguous(),
        logits.contiguous(),
        shapes,
        starts,
        seen,
        tokens,
        queries,
        HEADS=heads,
        LEVELS=levels,
        POINTS=points,
        SAMPLES=triton.next_power_of_2(levels * points),
        WIDTH=width // heads,
        BLOCK=BLOCK,
    )
    return seen


@triton.jit  # type: ignore[untyped-decorator]
def _sample(  # type: ignore[no-untyped-def]
    values,
    reference,
    offsets,
    logits,
    shapes,
    starts,
    seen,
    tokens,
    queries,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SAMPLES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK queries, one head, one picture; everything lies in memory as `sample` has it."""
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, picture = tl.program_id(1), tl.program_id(2)
    real = query < queries
    row = picture * queries + query
    first_sample = (row * HEADS + head) * LEVELS * POINTS
    column = tl.arange(0, WIDTH)
    sample_number = tl.arange(0, SAMPLES)[None, :]
    present = sample_number < LEVELS * POINTS
    scores = tl.load(logits + first_sample[:, None] + sample_number, mask=real[:, None] & present, other=0.0)
    scores = tl.where(present, scores.to(tl.float32), float("-inf"))
    highest = tl.max(scores, 1)
    total = tl.sum(tl.exp(scores - highest[:, None]), 1)
    sums = tl.zeros((BLOCK, WIDTH), tl.float32)
    for level in tl.static_range(LEVELS):
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        table = values + ((picture * tokens + tl.load(starts + level)) * HEADS + head) * WIDTH
        centre = reference + (row * LEVELS + level) * 2
        centre_x = tl.load(centre, mask=real, other=0.0) * width - 0.5
        centre_y = tl.load(centre + 1, mask=real, other=0.0) * height - 0.5
        for point in tl.static_range(POINTS):
            place = first_sample + level * POINTS + point
            share = tl.exp(tl.load(logits + place, mask=real, other=0.0).to(tl.float32) - highest) / total
            x = centre_x + tl.load(offsets + 2 * place, mask=real, other=0.0).to(tl.float32)
            y = centre_y + tl.load(offsets + 2 * place + 1, mask=real, other=0.0).to(tl.float32)
            left, top = tl.floor(x), tl.floor(y)
            for corner in tl.static_range(4):
                across, down = left + corner % 2, top + corner // 2
                inside = real & (across >= 0) & (across < width) & (down >= 0) & (down < height)
                weight = tl.where(inside, share * (1 - tl.abs(x - across)) * (1 - tl.abs(y - down)), 0.0)
                token = tl.where(inside, down * width + across, 0.0).to(tl.int32)
                cells = table + token[:, None] * HEADS * WIDTH + column[None, :]
                sums += weight[:, None] * tl.load(cells, mask=inside[:, None], other=0.0).to(tl.float32)
    out = seen + (row[:, None] * HEADS + head) * WIDTH + column[None, :]
    tl.store(out, sums.to(seen.dtype.element_ty), mask=real[:, None])
