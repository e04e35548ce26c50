"""What Triton kernels share: where a cache keeps a row of keys or values, and its scale."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def places(
    page, slot, head, d, PAGE: tl.constexpr, HEAD: tl.constexpr, SLOT: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BY_SLOT: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Elements of the buffer, [rows, dims], of rows at (page, slot in page, head); page is 64 bits wide. Where there
    are blocks, slots are cut into them, else dims."""
    along = slot * SLOT if BLOCK == 0 or not BY_SLOT else (slot // BLOCK) * BLOCKS + slot % BLOCK
    across = d * DIM if BLOCK == 0 or BY_SLOT else (d // BLOCK) * BLOCKS + d % BLOCK
    return (page * PAGE + along + head * HEAD + BASE)[:, None] + across[None, :]


@triton.jit
def scale_place(page, slot, head, K: tl.constexpr, S: tl.constexpr, HEAD_MAJOR: tl.constexpr):
    """Element of a scale per token and head."""
    return page * (S * K) + (head * S + slot if HEAD_MAJOR else slot * K + head)
