"""Live progress of the engine on a terminal; a few plain lines anywhere else."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bench.serve.engine import Request, Server
from bench.serve.text import printable

FRAME = 0.1  # seconds between two pictures
LINE = 10.0  # seconds between two plain lines
SNIPPET = 64  # bytes of a request that are shown


def snippet(request: Request) -> Text:
    """The end of what was read and written: the prompt dim, what was generated bright."""
    generated = printable(request.output)[-SNIPPET:]
    read = printable(request.prompt[: request.cached])
    prompt = read[-(SNIPPET - len(generated)) :] if len(generated) < SNIPPET else ""
    return Text.assemble((prompt, "dim"), (generated, "bold green"))


class Display:
    """Shows what a server does; pass it as the `watch` of `Server.serve`."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.title, self.progress, self.last = "", "", 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def phase(self, title: str, progress: str = "") -> None:
        """Names what comes next."""
        self.title, self.progress, self.last = title, progress, time.monotonic()
        if self.console.is_terminal:
            self.live.update(Panel(Text("compiling ...", "dim"), title=self.title, subtitle=progress), refresh=True)

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True)

    def __call__(self, server: Server) -> None:
        """Shows the server's state, if the last picture is old enough."""
        wait = FRAME if self.console.is_terminal else LINE
        if time.monotonic() - self.last < wait:
            return
        self.last = time.monotonic()
        if self.console.is_terminal:
            self.live.update(self.picture(server), refresh=True)
        else:
            self.line(f"  {self.title}: {summary(server)}")

    def picture(self, server: Server) -> Panel:
        """The scheduler, the pages and the requests that run now."""
        scheduler, limits = server.scheduler, server.limits
        pages = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=limits.pages, completed=scheduler.pages_in_use, width=40)
        pages.add_row("pages", bar, f"{scheduler.pages_in_use}/{limits.pages}")
        rows = Table.grid(padding=(0, 1))
        for request in scheduler.running:
            reading = "prefill" if request.max_new else "score"
            state = Text(reading if request.cached < len(request.prompt) else "decode", "yellow")
            rows.add_row(state, f"{request.cached:3d}/{request.target}", snippet(request))
        return Panel(Group(Text(summary(server), "bold"), pages, rows), title=self.title, subtitle=self.progress)


def summary(server: Server) -> str:
    """One line on the state of a server."""
    scheduler, stats = server.scheduler, server.stats
    fed = stats.fed / max(stats.seconds, 1e-9)
    return (
        f"step {stats.steps}, {len(scheduler.running)} running, {scheduler.arrived} waiting, "
        f"{len(scheduler.finished)} finished, {scheduler.pages_in_use} pages, {fed:,.0f} tokens/s fed, "
        f"{stats.tokens_per_second:,.0f} generated"
    )
