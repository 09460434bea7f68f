"""Ragged batches without padding: the tokens of all images end to end, and attention of each image on its own.

Shapes: B images, N tokens of the longest, T tokens of all together, H heads, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunefront.ops.dot_product import dot_product_attention


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the tokens of a packed batch stand in the padded one.

    Attributes:
        present: False for padding, (B, N).
        index: Positions of the real tokens in the padded batch laid end to end, (T,).
        lengths: Tokens of each image.
        offsets: Where each image begins, and T, (B + 1,) in int32.
    """

    present: Tensor
    index: Tensor
    lengths: tuple[int, ...]
    offsets: Tensor

    @classmethod
    def of(cls, present: Tensor) -> Packing:
        """The packing that leaves out what is not ``present`` (B, N)."""
        lengths = present.sum(dim=1)
        return cls(
            present=present,
            index=present.flatten().nonzero().squeeze(1),
            lengths=tuple(lengths.tolist()),
            offsets=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        )

    def pack(self, padded: Tensor) -> Tensor:
        """(B, N, ...) to (1, T, ...)."""
        return padded.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def pad(self, packed: Tensor, value: float = 0) -> Tensor:
        """(1, T, ...) to (B, N, ...), with ``value`` for padding."""
        slots = packed.new_full((self.present.numel(), *packed.shape[2:]), value)
        return slots.index_copy_(0, self.index, packed[0]).reshape(*self.present.shape, *packed.shape[2:])


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, fused: bool = True) -> Tensor:
    """Attention inside each image of a packed batch, without dropout: queries, keys, values and result (1, H, T, D).

    On CPUs image by image, ``fused`` or not; on GPUs by torch's kernel for sequences of different lengths. What that
    kernel does not take (fp32, old GPUs, torch before 2.10) is padded for the attention alone.
    """
    if q.device.type == "cpu":
        return _image_by_image(q, k, v, packing, fused)
    kernel = _varlen_kernel(q)
    return _padded(q, k, v, packing) if kernel is None else _by_kernel(kernel, q, k, v, packing)


def _image_by_image(q: Tensor, k: Tensor, v: Tensor, packing: Packing, fused: bool) -> Tensor:
    images = zip(*(torch.split(t, list(packing.lengths), dim=2) for t in (q, k, v)), strict=True)
    # Heads last but one, as the projection that follows wants them: nothing is copied twice.
    outputs = [dot_product_attention(q_, k_, v_, fused=fused).transpose(1, 2) for q_, k_, v_ in images]
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _by_kernel(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    # Contiguous: the kernel's documentation promises nothing for views into a joint projection.
    heads = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
    longest = max(packing.lengths)
    out: Tensor = kernel(*heads, packing.offsets, packing.offsets, longest, longest)
    return out.transpose(0, 1).unsqueeze(0)


def _padded(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    q, k, v = (packing.pad(t.transpose(1, 2)).transpose(1, 2) for t in (q, k, v))
    out = dot_product_attention(q, k, v, bias=packing.present[:, None, None, :])
    return packing.pack(out.transpose(1, 2)).transpose(1, 2)


def _varlen_kernel(q: Tensor) -> Callable[..., Any] | None:
    """torch's kernel where it takes such queries (FlashAttention's limits), else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
    return varlen_attn if takes else None
