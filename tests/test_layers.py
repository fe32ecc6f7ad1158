"""A module imports only from rows above its own, and ops needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "copgen_fast"

ROWS = [
    {"errors", "checks", "config", "seeds"},
    {"registry", "interrupts", "kernels", "roll_call"},
    {
        "ops",
        "artifacts",
        "distributed",
        "latents",
        "devices",
        "figures",
        "flows",
        "inert",
        "memory",
        "optimizers",
        "quality",
    },
    {"metrics", "pictures", "generators", "positives", "augmentations", "encoders", "losses", "pairs", "data"}
    | {"batch_norm", "gradients"},
    {"accumulation", "loop", "views", "unpickle"},
    {"evals", "gan", "graphs", "encoder_names"},
    {"stages"},
    {"diagnosis"},
    {"train", "verify", "convert", "fit_generator", "fit_flow", "fit_gan", "doctor"},
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}


def imported_rooms(path):
    """First-level modules of copgen_fast that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "copgen_fast":
            names = [f"copgen_fast.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "copgen_fast" and len(parts) > 1:
                yield parts[1]


def files():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ROW_OF, f"{room} has no row: give it one here"
    for other in imported_rooms(path):
        if other in ROW_OF:  # not a row: a name of copgen_fast/__init__.py
            assert other == room or ROW_OF[other] < ROW_OF[room], f"{room} imports {other}, which is not above it"


def test_sizes_stay_readable():
    root = PACKAGE.parent
    for path in [*files(), *root.glob("bench/**/*.py"), *root.glob("kernels/*.py")]:
        assert len(path.read_text().splitlines()) <= 400, f"{path.name} is over 400 lines: split it"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None
                length = node.end_lineno - (node.body[0].end_lineno if documented else node.lineno)
                limit = 120 if path.parent.name == "kernels" else 60
                assert length <= limit, f"{path.name}: {node.name} has {length} lines"


def test_ops_need_torch_only():
    script = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import copgen_fast.ops\n"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(added & {'torchvision', 'triton', 'sklearn', 'scipy', 'PIL', 'tyro', 'matplotlib', 'lightly'}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_sources_of_the_extension_stay_readable():
    for path in (PACKAGE.parent / "csrc").glob("*.[ch]*"):
        assert len(path.read_text().splitlines()) <= 400, f"{path.name} is over 400 lines: split it"
