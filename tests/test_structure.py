"""The house rules that a machine can hold: imports point one way, the core is light, files and functions are short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pallas_attn"
FLOORS = {"core": 0, "runtime": 1, "ops": 2, "fusion": 3, "parallel": 3, "adapters": 4, "tables": 0}
TOP = 5  # __init__ and __main__
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Dotted names of everything that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module):
    parts = module.split(".")
    return FLOORS.get(parts[1], TOP) if len(parts) > 1 else TOP


def room(module):
    """The op, or the room of another floor, that a module belongs to."""
    parts = module.split(".")[1:3]
    return tuple(parts if parts[0] == "ops" else parts[:1])


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path):
    module = module_of(path)
    for name in imports(path):
        if name.split(".")[0] != "pallas_attn":
            continue
        assert floor(name) <= floor(module), f"{module} imports {name}, a floor above"
        if floor(module) in (2, 3) and floor(name) == floor(module):
            assert room(name) == room(module), f"{module} imports {name}: rooms of one floor do not know each other"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_are_declared(path):
    allowed = {"jax", "numpy", "jaxtyping", "pallas_attn", *sys.stdlib_module_names}
    if "core" not in path.parts:
        allowed |= {"absl"}
    if path.name.startswith("mosaic"):
        allowed |= {"jaxlib"}
    if path.name == "triton.py":
        allowed |= {"jax_triton", "triton"}
    if path.name.startswith("triton_"):
        allowed |= {"triton"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    kernel = path.name.startswith(("mosaic_", "triton"))
    assert len(text.splitlines()) <= (500 if kernel else 350)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            size = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert size <= (120 if kernel else 40), f"{node.name}: {size} lines"


def test_init_has_no_logic():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    assert not [ast.unparse(node) for node in tree.body if not isinstance(node, allowed)]


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_import_is_fast_and_needs_no_gpu_package():
    timed = "import time, sys, jax; t = time.perf_counter(); import pallas_attn; print(time.perf_counter() - t)"
    assert min(float(run(timed)) for _ in range(2)) < 1
    heavy = (
        "{m.split('.')[0] for m in set(sys.modules) - before} & {'triton', 'jax_triton', 'torch', 'jax_cuda13_plugin'}"
    )
    kernels = "[m for m in sys.modules if ('mosaic_' in m or 'triton_' in m) and m.startswith('pallas_attn')]"
    imports = "import sys, jax; before = set(sys.modules); import pallas_attn"
    assert run(f"{imports}; print({heavy}, {kernels})").strip() == "set() []"


def test_import_starts_no_backend():
    code = "import pallas_attn; from jax._src import xla_bridge; print(xla_bridge._backends)"
    assert run(code).strip() == "{}"


def test_support_table_command():
    done = subprocess.run([sys.executable, "-m", "pallas_attn"], check=True, capture_output=True, text=True, cwd=ROOT)
    assert all(word in done.stdout for word in ("paged_attention", "write_kv", "xla", "E4M3_TENSOR"))
