"""RaggedBatch: which tokens and which pages belong to which sequence in one step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from pallas_attn.core.errors import is_concrete, require
from pallas_attn.core.leaf import Leaf

TILE = 64  # tokens of one unit of work of a schedule


def padded(seqs: int) -> int:
    """Length of `Schedule.before`: B + 1, rounded up to 128."""
    return (seqs // 128 + 1) * 128


def tiles_of(kv_lens, q_lens, pages: int, window=None):
    """Tiles that the query tokens of a sequence see, for numbers or vectors of int32; inside of kernels too.

    pages: width of the page table: longer lengths mean nothing, and kernels take no page of more than 256 tokens.
    window: static or traced; it spares the tiles that no query of the step sees.
    """
    kv_lens = jnp.clip(kv_lens, 0, pages * 256)
    tiles = lax.div(kv_lens + (TILE - 1), jnp.int32(TILE))
    if window is not None:
        unseen = jnp.maximum(kv_lens - q_lens - window + 1, 0) * jnp.int32(window > 0)
        tiles = jnp.maximum(tiles - lax.div(unseen, jnp.int32(TILE)), 0)
    return jnp.where(q_lens > 0, tiles, 0)


def before_each(tiles) -> Int[Array, "P"]:
    """`Schedule.before` of sequences that have so many tiles [B]."""
    spare = padded(len(tiles)) - len(tiles) - 1
    before = jnp.pad(jnp.cumsum(tiles).astype(jnp.int32), (1, 0))
    return jnp.pad(before, (0, spare), constant_values=np.iinfo(np.int32).max)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("before",), meta_fields=("window",))
@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much there is to read of each sequence: what kernels divide between the cores of a GPU.

    before: int32 [B + 1, rounded up to 128], the tiles of TILE tokens of all sequences before each one, then the total;
      the rest is the largest int32.
    window: the static sliding window that it counts for, None for whole contexts.
    """

    before: Leaf
    window: int | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("page_table", "kv_lens", "cu_q_lens", "num_seqs", "schedule"),
    meta_fields=("max_q_len",),
)
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """One step over B sequences: prefill, decode and mixes.

    page_table: int32 [B, M], the pages of each sequence in order; entries past its length are never followed.
    kv_lens: int32 [B], cached tokens of each sequence, this step's query tokens included.
    cu_q_lens: int32 [B + 1], sequence b has the query tokens cu_q_lens[b] to cu_q_lens[b + 1]; they are its last ones.
    num_seqs: int32 [], the first so many sequences are real (default B); the rest, and the tokens past
      cu_q_lens[num_seqs], are padding: they cost little, write nothing and come out as zeros.
    max_q_len: static bound on the query tokens of a sequence if known; 1 tells a jitted decode that it is one.
    schedule: see `with_schedule`.
    """

    page_table: Leaf
    kv_lens: Leaf
    cu_q_lens: Leaf
    num_seqs: Leaf = None
    max_q_len: int | None = None
    schedule: Schedule | None = None

    @classmethod
    def from_csr(
        cls, indptr, indices, last_page_len=None, *,
        page_size=1, cu_q_lens=None, num_seqs=None, max_pages=None, max_q_len=None,
    ) -> "RaggedBatch":  # fmt: skip
        """The batch of a CSR page list, as FlashInfer, SGLang and aiter keep it.

        Args:
          indptr: int32 [B + 1], sequence b owns the pages indices[indptr[b] : indptr[b + 1]].
          indices: int32 [nnz] page numbers.
          last_page_len: int32 [B], tokens in the last page of each sequence; None means full pages, so page size 1
            needs none. A sequence without pages is empty whatever this says.
          page_size: tokens of a page, static.
          cu_q_lens: int32 [B + 1]; None means one query token per sequence.
          max_pages: static bound M on the pages of a sequence; needed when indptr is traced.
        Raises: InvalidInput when max_pages is needed, or too small where indptr is known.
        """
        if not is_concrete(indptr):
            require(max_pages is not None, "max_pages", None, "give a static bound: indptr is traced")
        else:
            most = int(np.max(np.diff(np.asarray(indptr)), initial=0))
            max_pages = max(most, 1) if max_pages is None else max_pages
            require(max_pages >= most, "max_pages", max_pages, f"a sequence has {most} pages: use at least that")
        indptr, indices = jnp.asarray(indptr, jnp.int32), jnp.asarray(indices, jnp.int32)
        pages = indptr[1:] - indptr[:-1]
        at = indptr[:-1, None] + jnp.arange(max_pages, dtype=jnp.int32)
        table = jnp.where(at < indptr[1:, None], indices.at[at].get(mode="fill", fill_value=0), 0)
        last = page_size if last_page_len is None else jnp.asarray(last_page_len, jnp.int32)
        kv_lens = jnp.where(pages > 0, (pages - 1) * page_size + last, 0)
        if cu_q_lens is None:
            cu_q_lens, max_q_len = jnp.arange(pages.shape[0] + 1, dtype=jnp.int32), 1
        return cls(table, kv_lens, jnp.asarray(cu_q_lens, jnp.int32), num_seqs, max_q_len)

    def with_schedule(self, window: int | None = None) -> "RaggedBatch":
        """The batch with its schedule, computed on the device: once per step, before the loop over layers.

        Kernels that need one compute it themselves where it is missing, or made for another window: each of their CTAs
        for up to 255 sequences, and for more by a few small launches in every layer.

        Args:
          window: the static sliding window of the layers it is for; None for those that see whole contexts.
        """
        require(window is None or isinstance(window, int), "window", window, "it is a static int or None")
        return dataclasses.replace(self, schedule=Schedule(self.tiles_before(window), window))

    def tiles_before(self, window=None, most: int | None = None) -> Int[Array, "P"]:
        """`Schedule.before`. A window, static or traced, spares the tiles that no query of the step sees; of sequences
        with more than `most` query tokens none count."""
        seqs, pages = self.page_table.shape
        q_lens = (self.cu_q_lens[1:] - self.cu_q_lens[:-1]).astype(jnp.int32)
        q_lens = q_lens if most is None else jnp.where(q_lens > most, 0, q_lens)
        tiles = tiles_of(self.kv_lens.astype(jnp.int32), q_lens, pages, window)
        return before_each(jnp.where(jnp.arange(seqs) < self.live, tiles, 0))

    @property
    def live(self) -> Array:
        """int32 [], the number of real sequences."""
        b = self.page_table.shape[0]
        return jnp.clip(jnp.asarray(b if self.num_seqs is None else self.num_seqs, jnp.int32), 0, b)

    @property
    def known_live(self) -> int | None:
        """The number of real sequences where it can be seen while tracing."""
        b = self.page_table.shape[0]
        if self.num_seqs is None:
            return b
        return min(max(int(self.num_seqs), 0), b) if is_concrete(self.num_seqs) else None

    def bounds(self, num_tokens: int) -> tuple[Array, Array]:
        """(start, length) int32 [B] of each sequence's query tokens, kept inside the step; padding has length 0."""
        cu = self._starts(num_tokens)
        return cu[:-1], jnp.maximum(cu[1:] - cu[:-1], 0)

    def _starts(self, num_tokens: int) -> Array:
        """cu_q_lens kept inside the step; whatever stands past num_seqs becomes the end of the last real sequence."""
        cu = jnp.clip(self.cu_q_lens.astype(jnp.int32), 0, num_tokens)
        return jnp.where(jnp.arange(cu.shape[0]) <= self.live, cu, cu[self.live])

    def tokens(self, num_tokens: int) -> tuple[Array, Array, Array]:
        """(sequence, position, real) of every query token, each [num_tokens]; positions are those in the sequence."""
        start, length = self.bounds(num_tokens)
        t = jnp.arange(num_tokens, dtype=jnp.int32)
        cu = self._starts(num_tokens)
        seq = jnp.searchsorted(cu, t, side="right", method="compare_all").astype(jnp.int32) - 1
        seq = jnp.clip(seq, 0, start.shape[0] - 1)
        offset = t - start[seq]
        real = (offset >= 0) & (offset < length[seq])
        return seq, self.kv_lens[seq].astype(jnp.int32) - length[seq] + offset, real

    def slot_mapping(self, num_tokens: int, page_size: int) -> Int[Array, "T"]:
        """What `write_kv` takes: the slot (page * page_size + slot in page) of every query token, -1 for padding."""
        seq, position, real = self.tokens(num_tokens)
        column = position // page_size
        real &= (position >= 0) & (column < self.page_table.shape[1])
        page = self.page_table.astype(jnp.int32)[seq, jnp.clip(column, 0, self.page_table.shape[1] - 1)]
        return jnp.where(real & (page >= 0), page * page_size + position % page_size, -1)


def check_batch(batch: RaggedBatch) -> None:
    """Refuse a batch whose arrays do not fit each other."""
    require(isinstance(batch, RaggedBatch), "batch", type(batch).__name__, "pass a pa.RaggedBatch")
    for name, rank in (("page_table", 2), ("kv_lens", 1), ("cu_q_lens", 1)):
        x = getattr(batch, name)
        require(x.ndim == rank, f"batch.{name}", f"shape {x.shape}", f"it has {rank} axes")
        require(jnp.issubdtype(x.dtype, jnp.integer), f"batch.{name}", x.dtype, "use int32")
    seqs = batch.page_table.shape[0]
    fix = f"page_table has {seqs} rows, so it needs ({seqs},)"
    require(batch.kv_lens.shape == (seqs,), "batch.kv_lens", f"shape {batch.kv_lens.shape}", fix)
    fix = f"page_table has {seqs} rows, so it needs {seqs + 1}"
    require(batch.cu_q_lens.shape == (seqs + 1,), "batch.cu_q_lens", f"shape {batch.cu_q_lens.shape}", fix)


def check_kv_lens(batch: RaggedBatch, page_size: int) -> None:
    """Refuse more cached tokens than the pages hold where the lengths of real sequences can be seen; at run time they
    are clamped."""
    live, width = batch.known_live, batch.page_table.shape[1]
    if live is not None and is_concrete(batch.kv_lens):
        most = int(np.max(np.asarray(batch.kv_lens)[:live], initial=0))
        fix = f"page_table has {width} pages of {page_size}: widen it to {-(-most // page_size)}"
        require(most <= width * page_size, "batch.kv_lens", most, fix)


def check_queries(batch: RaggedBatch, tokens: int) -> None:
    """Refuse what can be seen of the real sequences' query tokens and does not fit; at run time they are clamped."""
    live = batch.known_live
    if live is None:
        return
    if is_concrete(batch.cu_q_lens):
        cu = np.asarray(batch.cu_q_lens)[: live + 1]
        rising = bool(np.all(np.diff(cu) >= 0) and cu[0] >= 0)
        require(
            rising, "batch.cu_q_lens", cu if cu.size < 9 else "a falling sequence", "it must not fall nor be negative"
        )
        require(int(cu[-1]) <= tokens, "batch.cu_q_lens", int(cu[-1]), f"q has only {tokens} tokens")
        if batch.max_q_len is not None and live:
            most = int(np.max(np.diff(cu), initial=0))
            require(most <= batch.max_q_len, "batch.max_q_len", batch.max_q_len, f"a sequence has {most} query tokens")
