"""The structure of the package, read from its folders: who may import whom, and how large files may be."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "copgen_fast"

# A room is a file or a folder of copgen_fast/. It imports only from rows above its own.
ROWS = (
    {"errors", "schema"},
    {"files", "options"},
    {"registry"},
    {"config", "kernels"},
    {"record", "presets"},
    {"ops"},
    {"runtime"},
    {"images"},
    {"generators", "positives", "augmentations", "encoders", "pairs"},
    {"methods", "training"},
    {"evals"},
    {"stages"},
    {"train", "verify", "convert", "doctor", "generators.fit"},
    {"evaluate", "statistics"},
    {"studies"},
    {"study"},
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}


def room_of(parts):
    """The room of a module, given as the parts of its name after copgen_fast."""
    return ".".join(parts[:2]) if ".".join(parts[:2]) in ROW_OF else parts[0]


def module_of(path):
    """Dotted name of a file of the repository."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Modules that a file imports anywhere in it, also behind TYPE_CHECKING and within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if exists(name) else node.module


def exists(module):
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("copgen_fast"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rows_above_its_own(path):
    if path == PACKAGE / "__init__.py":
        return
    room = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
    assert room in ROW_OF, f"{room} has no row: give it one here"
    for name in imported(path):
        if name.startswith("copgen_fast."):
            other = room_of(name.split(".")[1:])
            if other in ROW_OF:  # not a row: a name of copgen_fast/__init__.py, or a compiled extension
                above = ROW_OF[other] < ROW_OF[room]
                assert other == room or above, f"{room} imports {other}, which is not above it"


@pytest.mark.parametrize("folder", ["copgen_fast", "bench"])
def test_no_files_import_each_other_in_a_circle(folder):
    graph = {module_of(path): set(imported(path)) for path in files(folder)}
    graph = {module: {name for name in names if name in graph} - {module} for module, names in graph.items()}
    # A package's __init__ may import what is in the package, and its files names of that: one direction is enough.
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            path.append(module)
            for name in sorted(graph[module]):
                visit(name)
            path.pop()
            done.add(module)

    for module in graph:
        visit(module)


def test_the_listing_of_the_package_stays_short():
    assert len(list(PACKAGE.glob("*.py"))) <= 16


def test_sizes_stay_readable():
    lengths = []
    for path in files("copgen_fast", "bench", "kernels"):
        lengths.append(len(path.read_text().splitlines()))
        assert lengths[-1] <= 400, f"{path.name} is over 400 lines: split it"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None
                length = node.end_lineno - (node.body[0].end_lineno if documented else node.lineno)
                limit = 120 if path.parent.name == "kernels" else 60
                assert length <= limit, f"{path.name}: {node.name} has {length} lines"
    assert statistics.median(lengths) <= 150


def test_sources_of_the_extension_stay_readable():
    for path in (ROOT / "csrc").rglob("*.[ch]*"):
        assert len(path.read_text().splitlines()) <= 400, f"{path.name} is over 400 lines: split it"


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
