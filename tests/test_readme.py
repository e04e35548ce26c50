"""What the README shows is run, and what it lists is generated."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pallas_attn as pa

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run():
    assert blocks("python")
    for block in blocks("python"):
        run = subprocess.run([sys.executable, "-W", "error", "-c", block], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "(32, 8, 128) bfloat16" in run.stdout


def test_example_is_short():
    (block,) = blocks("python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 16


def test_commands_are_those_of_the_makefile():
    """The commands themselves run in `.ci/run`; here make says what they would do."""
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    assert lines == ["make serve", "make test"]
    for line in lines:
        run = subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "-m bench.serve" in run.stdout or "-m pytest" in run.stdout
        assert line in (ROOT / ".ci/run").read_text()


def test_support_table_is_generated():
    start, end = README.index("summary() -->\n") + len("summary() -->\n"), README.index("\n<!-- end of support table")
    assert README[start:end] == pa.support_table().summary()


@pytest.fixture
def shims(tmp_path):
    """A PATH of python shims, and make's answer to it."""

    def make(target, **scripts):
        for name in ("bash", "sh", "make", "mkdir", "touch"):
            found = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
            (tmp_path / name).symlink_to(found)
        for name, script in scripts.items():
            shim = tmp_path / name.replace("_", ".")
            shim.write_text(f"#!/bin/sh\n{script}\n")
            shim.chmod(0o755)
        command = ["make", "-f", str(ROOT / "Makefile"), f"VENV={tmp_path / 'venv'}", target]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PATH": str(tmp_path)})

    return make


def test_make_without_a_python_fails_in_one_line(shims):
    run = shims("serve", python3="exit 127", python3_13="exit 1")
    assert run.returncode != 0
    lines = [line for line in run.stderr.splitlines() if not line.startswith("make: ")]
    assert lines == ["pallas_attn needs Python 3.12 or newer: none of python3, python3.13, python3.12 is one"]


def test_make_passes_over_shims_that_fail(shims):
    python = f'exec {os.path.realpath(sys.executable)} "$@"'
    assert shims("which-python", python3="exit 127", python3_13="exit 1", python3_12=python).stdout == "python3.12\n"
