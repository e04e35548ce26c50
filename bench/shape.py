"""What every case of the benchmark has beside its shape."""

from typing import Any, Self

from pallas_attn.core.arch import H100


class Shape:
    """A problem with a name: what no kernel on an H100 can beat, and what the fastest peer took."""

    name: str
    op: str
    layout: Any
    peers_us: tuple[tuple[str, float], ...] = ()

    @property
    def bytes(self) -> int:
        """The fewest bytes to move."""
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Multiply-adds, times two."""
        return 0

    @property
    def rate(self) -> float:
        """FLOP/s of the matrix unit for them."""
        return H100.bf16

    @property
    def floor_us(self) -> float:
        """What no kernel on an H100 can beat: the larger of bytes over bandwidth and FLOPs over the matrix units."""
        return 1e6 * max(self.bytes / H100.memory, self.flops / self.rate)

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """The fastest peer's name and microseconds."""
        return min(self.peers_us, key=lambda p: p[1], default=None)

    def small(self) -> Self:
        """The same kind of problem at a size for a CPU; without peers."""
        raise NotImplementedError
