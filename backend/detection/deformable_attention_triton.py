"""Multi-scale deformable attention for a GPU: one Triton kernel from offsets and logits to the attention output.

No intermediate result reaches memory: the softmax, the bilinear weights and the weighted sum stay in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # queries per program


def sample(
    values: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, shapes: Tensor, starts: Tensor
) -> Tensor:
    """Returns the weighted sums (batch, queries, d) of the values (batch, tokens, d) at each query's samples.

    Equal to `deformable_attention.sample_rows` with `locate_samples`, which describes the other arguments. Accepts any
    float type; the width of a head (d / heads) has to be a power of two.
    """
    batch, tokens, width = values.shape
    _, queries, heads, levels, points, _ = offsets.shape
    output = torch.empty(batch, queries, width, dtype=values.dtype, device=values.device)
    _sample[(triton.cdiv(queries, BLOCK), heads, batch)](
        values.contiguous(),
        reference.contiguous(),
        offsets.contiguous(),
        logits.contiguous(),
        shapes,
        starts,
        output,
        tokens,
        queries,
        HEADS=heads,
        LEVELS=levels,
        POINTS=points,
        SAMPLES=triton.next_power_of_2(levels * points),
        WIDTH=width // heads,
        BLOCK=BLOCK,
    )
    return output


# Of `tokens` and `queries` Triton would compile a variant for multiples of 16: while serving, for one size in 16.
@triton.jit(do_not_specialize=["tokens", "queries"])  # type: ignore[untyped-decorator]
def _sample(  # type: ignore[no-untyped-def]
    values,
    reference,
    offsets,
    logits,
    shapes,
    starts,
    output,
    tokens,
    queries,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    SAMPLES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes BLOCK queries of one head and one image; all tensors are contiguous, in the layout of `sample`."""
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, image = tl.program_id(1), tl.program_id(2)
    is_query = query < queries  # the last block may reach beyond the last query
    row = image * queries + query
    first_sample = (row * HEADS + head) * LEVELS * POINTS
    channel = tl.arange(0, WIDTH)
    sample_number = tl.arange(0, SAMPLES)[None, :]
    is_sample = sample_number < LEVELS * POINTS
    scores = tl.load(logits + first_sample[:, None] + sample_number, mask=is_query[:, None] & is_sample, other=0.0)
    scores = tl.where(is_sample, scores.to(tl.float32), float("-inf"))
    highest = tl.max(scores, 1)
    total = tl.sum(tl.exp(scores - highest[:, None]), 1)
    sums = tl.zeros((BLOCK, WIDTH), tl.float32)
    for level in range(LEVELS):  # a loop: unrolled it needs 245 registers of a thread, and few programs run at once
        height = tl.load(shapes + 2 * level).to(tl.int32)
        width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        table = values + ((image * tokens + tl.load(starts + level)) * HEADS + head) * WIDTH
        centre = reference + (row * LEVELS + level) * 2
        centre_x = tl.load(centre, mask=is_query, other=0.0) * width - 0.5
        centre_y = tl.load(centre + 1, mask=is_query, other=0.0) * height - 0.5
        for point in tl.static_range(POINTS):
            sample_index = first_sample + level * POINTS + point
            attention = (
                tl.exp(tl.load(logits + sample_index, mask=is_query, other=0.0).to(tl.float32) - highest) / total
            )
            x = centre_x + tl.load(offsets + 2 * sample_index, mask=is_query, other=0.0).to(tl.float32)
            y = centre_y + tl.load(offsets + 2 * sample_index + 1, mask=is_query, other=0.0).to(tl.float32)
            left, top = tl.floor(x), tl.floor(y)
            for corner in tl.static_range(4):
                column, line = left + corner % 2, top + corner // 2
                inside = is_query & (column >= 0) & (column < width) & (line >= 0) & (line < height)
                weight = tl.where(inside, attention * (1 - tl.abs(x - column)) * (1 - tl.abs(y - line)), 0.0)
                token = tl.where(inside, line * width + column, 0.0).to(tl.int32)
                cells = table + token[:, None] * HEADS * WIDTH + channel[None, :]
                sums += weight[:, None] * tl.load(cells, mask=inside[:, None], other=0.0).to(tl.float32)
    output_cells = output + (row[:, None] * HEADS + head) * WIDTH + channel[None, :]
    tl.store(output_cells, sums.to(output.dtype.element_ty), mask=is_query[:, None])
