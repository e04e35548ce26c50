"""What each backend of each op supports, asked of the backends themselves."""

from typing import NamedTuple

from pallas_attn.runtime.dispatch import OPS, missing, supports


class Row(NamedTuple):
    """One case of an op (one format, layout or option) and each backend's answer: None, or the reason for refusing."""

    op: str
    dimension: str
    case: str
    answers: dict[str, str | None]


class SupportTable(tuple[Row, ...]):
    """Rows of the table; `str()` is markdown with a line a case, `summary()` with a line an op and dimension.

    The answers are those of a machine that has all packages; `off` tells which backends lack theirs here, and why.
    """

    def __str__(self) -> str:
        names = self._backends()
        body = [[r.op, r.dimension, r.case, *(_cell(r, name) for name in names)] for r in self]
        notes = [f"{name} is off here: {reason}" for name, reason in self.off.items()]
        return "\n\n".join([_markdown(["op", "dimension", "case", *names], body), *notes])

    @property
    def off(self) -> dict[str, str]:
        """Backend -> what this installation lacks for it."""
        backends = [b for name in dict.fromkeys(r.op for r in self) for b in OPS[name].backends]
        return {b.name: reason for b in backends if (reason := missing(b.needs)) is not None}

    def summary(self) -> str:
        """Markdown: what each backend takes of each dimension, and what it refuses."""
        names = self._backends()
        groups = dict.fromkeys((r.op, r.dimension) for r in self)
        body = []
        for op, dimension in groups:
            rows = [r for r in self if (r.op, r.dimension) == (op, dimension)]
            cases = ", ".join(r.case for r in rows)
            body.append([op, f"{dimension}: {cases}", *(_count(rows, name) for name in names)])
        return _markdown(["op", "cases", *names], body)

    def _backends(self) -> list[str]:
        """Names, in the order of the op that has most of them."""
        answers = sorted((r.answers for r in self), key=len, reverse=True)
        return list(dict.fromkeys(name for of_row in answers for name in of_row))


def _markdown(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def _cell(row: Row, backend: str) -> str:
    return (row.answers[backend] or "yes") if backend in row.answers else ""


def _count(rows: list[Row], backend: str) -> str:
    if not all(backend in r.answers for r in rows):
        return ""
    refused = [r.case for r in rows if r.answers[backend] is not None]
    taken = [r.case for r in rows if r.answers[backend] is None]
    if not taken or not refused:
        return "all" if taken else "none"
    return f"all but {', '.join(refused)}" if len(refused) < len(taken) else f"only {', '.join(taken)}"


def support_table() -> SupportTable:
    """Every op x case (formats, layouts, options) x backend, computed without a device."""
    return SupportTable(
        Row(op.name, dimension, case, {b.name: supports(b, problem) for b in op.backends})
        for op in OPS.values()
        for dimension, case, problem in op.support_cases()
    )
