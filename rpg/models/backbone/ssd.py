"""State-space duality: the recurrence of Mamba-2 in chunks, in plain PyTorch.

Inside a chunk the recurrence is a masked attention, between chunks it carries one state (arXiv 2405.21060,
section 6). B and C are shared by all heads, which keeps their products free of a head dimension; this is what
makes it faster and smaller than forms that repeat them for every head.
Shape letters: B examples, L tokens of a checkpoint; A heads, P width of a head, S width of the state,
K chunks, Q tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def chunked_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_size: int) -> Tensor:
    """Compute y_i = c_i · h_i with the states h_i = exp(dt_i a) h_{i-1} + dt_i b_i x_iᵀ and h_{-1} = 0, per head.

    Decays, their logarithms and the states are fp32 under autocast too; the matrix products follow autocast.

    Args:
        x: inputs ``[B, L, A, P]``.
        dt: step sizes ``[B, L, A]``, positive, fp32.
        a: decay rates ``[A]``, negative, fp32.
        b: input projections ``[B, L, S]``.
        c: output projections ``[B, L, S]``.
        chunk_size: Q; any positive number gives the same result, and L need not be a multiple.

    Returns:
        ``[B, L, A, P]`` in fp32 (autocast's precision where both terms are products under autocast).
    """
    length, num_heads, head_width = x.shape[1:]
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length
    if padding:
        # A padded token has dt = 0: it neither decays the state nor adds to it.
        x, dt, b, c = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) for t in (x, dt, b, c))
    x, dt, b, c = (t.unflatten(1, (num_chunks, chunk_size)) for t in (x, dt, b, c))  # [B, K, Q, …]
    log_decay = (dt * a).cumsum(dim=2)  # [B, K, Q, A]: since the start of the chunk

    y = _within_chunks(x * dt[..., None], log_decay, b, c)  # [B, K, Q, A, P]
    if num_chunks > 1:
        to_end = (log_decay[:, :, -1:] - log_decay).exp() * dt  # [B, K, Q, A]
        inputs = (x * to_end[..., None]).flatten(3)  # [B, K, Q, A·P]
        added = (b.transpose(2, 3) @ inputs).unflatten(3, (num_heads, head_width))  # [B, K, S, A, P]
        states = _before_chunks(added, log_decay[:, :, -1].exp())  # [B, K, S, A, P]
        carried = (c @ states.flatten(3)).unflatten(3, (num_heads, head_width))  # [B, K, Q, A, P]
        y = torch.addcmul(y, carried, log_decay.exp()[..., None])  # [B, K, Q, A, P]
    return y.flatten(1, 2)[:, :length]  # [B, L, A, P]


def _within_chunks(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """What a chunk's own tokens contribute: attention with the decay as its mask.

    Takes ``[B, K, Q, A, P]`` (times dt), ``[B, K, Q, A]`` and twice ``[B, K, Q, S]``; returns ``[B, K, Q, A, P]``.
    """
    scores = c @ b.transpose(2, 3)  # [B, K, Q, Q]
    log_decay = log_decay.transpose(2, 3)  # [B, K, A, Q]
    size = log_decay.shape[-1]
    future = torch.full((size, size), -torch.inf, device=x.device).triu(1)  # [Q, Q]
    decay = (log_decay[..., :, None] - log_decay[..., None, :]).add_(future).exp_()  # [B, K, A, Q, Q]
    y = (scores[:, :, None] * decay) @ x.transpose(2, 3)  # [B, K, A, Q, P]
    return y.transpose(2, 3)  # [B, K, Q, A, P]


def _before_chunks(added: Tensor, decay: Tensor) -> Tensor:
    """The state before each chunk, from what each adds ``[B, K, S, A, P]`` and its decay ``[B, K, A]``."""
    state = torch.zeros_like(added[:, 0], dtype=torch.float32)  # [B, S, A, P]
    states = [state]
    for addend, factor in zip(added[:, :-1].unbind(1), decay[:, :-1].unbind(1), strict=True):
        state = torch.addcmul(addend, state, factor[:, None, :, None])  # [B, S, A, P]
        states.append(state)
    return torch.stack(states, dim=1)  # [B, K, S, A, P]
