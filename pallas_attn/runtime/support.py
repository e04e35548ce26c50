"""What each backend of each op supports, asked of the backends themselves."""

from typing import NamedTuple

from pallas_attn.runtime.dispatch import OPS, supports


class Row(NamedTuple):
    """One case of an op and each backend's answer: None, or the reason for refusing."""

    op: str
    case: str
    answers: dict[str, str | None]


class SupportTable(tuple[Row, ...]):
    """Rows of the table; `str()` is markdown."""

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self for name in row.answers))
        head = ["op", "case", *names]
        body = [[row.op, row.case, *(_cell(row, name) for name in names)] for row in self]
        lines = [head, ["---"] * len(head), *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: Row, backend: str) -> str:
    if backend not in row.answers:
        return ""
    return row.answers[backend] or "yes"


def support_table() -> SupportTable:
    """Every op x case (formats, layouts, options) x backend, computed without a device."""
    return SupportTable(
        Row(op.name, label, {b.name: supports(b, problem) for b in op.backends})
        for op in OPS.values()
        for label, problem in op.support_cases()
    )
