"""GPU generations and the peaks that rooflines are drawn from."""

import dataclasses
import enum


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Dense peaks of one GPU: memory in bytes/s, matrix units in FLOP/s."""

    memory: float
    bf16: float
    fp8: float


H100 = Peaks(memory=3.35e12, bf16=989e12, fp8=1979e12)


class Arch(enum.IntEnum):
    """An NVIDIA generation: its compute capability times ten."""

    AMPERE = 80
    ADA = 89
    HOPPER = 90
    BLACKWELL = 100

    @property
    def has_fp8(self) -> bool:
        """Whether tensor cores take FP8 operands."""
        return self >= Arch.ADA

    @property
    def sm(self) -> str:
        """The compiler's name, e.g. `sm_90`."""
        return f"sm_{self.value}"


def arch_of(compute_capability: str | float) -> Arch | None:
    """The generation of a compute capability such as "9.0", or None for one that is not known."""
    number = round(float(compute_capability) * 10)
    known = [a for a in Arch if a <= number and a // 10 == number // 10]
    return max(known, default=None)
