"""FlashAttention's flash_attn.bert_padding: from padded batches to packed tokens and back, with gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_tensor, fail, shape_of

__all__ = ["index_first_axis", "pad_input", "unpad_input"]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a mask keeps, one sequence after the other.

        hidden_states   [batch, seq, ...], any dtype
        attention_mask  [batch, seq], bool or 0 and 1: which tokens there are
        unused_mask     [batch, seq], the same: which others get room in the result

    Returns five values, as flash_attn 2.7 and newer do (before: the first four):
        tokens          [total, ...]
        indices         int64 [total], where each token lay in hidden_states.flatten(0, 1); what `pad_input` needs
        cu_seqlens      int32 [batch + 1], where each sequence begins in tokens, for flash_attn_varlen_func
        max_seqlen      int, the longest sequence
        seqused         int32 [batch], how many tokens attention_mask keeps in each sequence
    Waits for the GPU, to know the total.

    Raises ValueError where the masks do not have hidden_states' first two dimensions.
    """
    check_tensor("hidden_states", hidden_states)
    check_mask("attention_mask", attention_mask, hidden_states)
    room = attention_mask
    if unused_mask is not None:
        check_mask("unused_mask", unused_mask, hidden_states)
        room = attention_mask + unused_mask
    seqused = attention_mask.sum(dim=-1, dtype=torch.int32)
    lengths = room.sum(dim=-1, dtype=torch.int32)
    indices = room.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, max(lengths.tolist(), default=0), seqused


def check_mask(name, mask, hidden_states):
    check_tensor(name, mask)
    if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
        fail(name, f"{shape_of(hidden_states)[:2]}, the first two dimensions of hidden_states", shape_of(mask))


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: [batch, seqlen, ...], with zeros where there is no token.

    hidden_states  [total, ...]
    indices        [total], where each token goes in the result's first two dimensions, flattened
    """
    rest = hidden_states.shape[1:]
    padded = hidden_states.new_zeros(batch * seqlen, *rest)
    return padded.index_copy(0, indices.long(), hidden_states).view(batch, seqlen, *rest)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices], [total, ...], for a 1-dimensional indices of int32 or int64."""
    return input.index_select(0, indices)
