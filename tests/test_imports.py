"""Imports go one way, from the facts at the bottom to the programs at the top, and heavy libraries stay out."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nanovlm_v2drop

PACKAGE = Path(nanovlm_v2drop.__file__).parent
# From the bottom to the top: a module may import from its own row and from those before it.
ROWS: tuple[tuple[str, ...], ...] = (
    ("config",),
    ("attention", "arrange", "linear", "parallel"),
    ("dropping",),
    ("vision", "decoder"),
    ("vision_qwen2",),
    ("vlm",),
    ("checkpoint", "images"),
    ("video", "images_onevision", "images_qwen2"),
    ("prompts",),
    ("kv_cache",),
    ("inference",),
    ("zoo",),
    ("demo.scenes", "demo.clips"),
    ("tasks",),
    ("plans", "ablations", "bootstrap", "position_bias", "records"),
    ("evaluate", "benchmark", "theory", "lmms_adapter", "demo.data", "demo.export", "demo.warm_start", "demo.train"),
    ("claims",),
    ("report",),
)
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def rank(module: str) -> int:
    """The row of a module; a folder's files share the row of the folder, unless they have one of their own."""
    names = (module, module.partition(".")[0])
    found = [row for name in names for row, members in enumerate(ROWS) if name in members]
    assert found, f"{module}: give it a row in ROWS, and import only from that and the rows before it"
    return found[0]


def imported(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """(absolute name, line) of every import that runs, inside functions too; those for type checkers do not run."""
    package = ["nanovlm_v2drop", *module.split(".")] if module else ["nanovlm_v2drop"]
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + is_package - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)
        else:
            yield from imported(node, module, is_package)


def own_module(name: str) -> str | None:
    """The module of this package that an absolute name leads to, or None; the name's end may be a class or function."""
    package, _, path = name.partition(".")
    while package == "nanovlm_v2drop" and path and path not in MODULES:
        path = path.rpartition(".")[0]
    return path if package == "nanovlm_v2drop" else None


def upward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module imports from a row above its own."""
    targets = [(own_module(name), line) for name, line in imported(ast.parse(source), module, is_package)]
    own = [(target, line) for target, line in targets if target is not None]
    return [
        f"{module}:{line} imports {target or 'the package itself'}"
        for target, line in own
        if target == "" or rank(target) > rank(module)
    ]


def test_no_module_imports_from_a_row_above_its_own() -> None:
    upward = []
    for module, file in MODULES.items():
        if module not in ("", "demo"):  # the package gathers its public names from all rows, the demo's has none
            upward += upward_imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
    assert not upward


def test_an_upward_import_is_found_wherever_it_stands() -> None:
    assert upward_imports("def late():\n    from .inference import prefill", "images") == ["images:2 imports inference"]
    assert upward_imports("from ..demo import scenes", "dropping.v2drop") == ["dropping.v2drop:1 imports demo.scenes"]
    assert upward_imports("from .. import zoo", "tasks", is_package=True) == []
    assert upward_imports("import nanovlm_v2drop.zoo", "config") == ["config:1 imports zoo"]
    assert upward_imports("from . import load", "evaluate") == ["evaluate:1 imports the package itself"]
    assert upward_imports("if TYPE_CHECKING:\n    from .zoo import load", "inference") == []
    assert upward_imports("from .config import VLMConfig", "zoo") == []


def heavy(tree: ast.AST) -> set[str]:
    """Which of the libraries that only serve as a comparison are imported."""
    return {name.partition(".")[0] for name, _ in imported(tree, "")} & {"transformers", "torchvision"}


def test_transformers_and_torchvision_are_never_imported_but_by_the_benchmark_that_compares_with_them() -> None:
    trees = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in MODULES.items()}
    comparing = {"benchmark.contenders", "benchmark.loading"}
    assert {module for module, tree in trees.items() if heavy(tree)} <= comparing
    for module in comparing:
        outside_functions = [node for node in trees[module].body if not isinstance(node, ast.FunctionDef)]
        assert not heavy(ast.Module(outside_functions, []))


def test_importing_the_package_loads_no_optional_library() -> None:
    script = (
        "import sys, nanovlm_v2drop, nanovlm_v2drop.evaluate\nprint(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    loaded = set(ast.literal_eval(done.stdout))
    assert "torch" in loaded
    assert not loaded & {"transformers", "torchvision", "pyarrow", "matplotlib", "av", "flash_attn", "lmms_eval"}


def test_loading_a_model_does_not_import_torchs_compiler() -> None:
    script = "import sys, nanovlm_v2drop\nnanovlm_v2drop.load('demo')\nprint({'torch._dynamo', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "set()"
