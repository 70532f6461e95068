"""Imports go one way, from the facts at the bottom to the programs at the top, and heavy libraries stay out."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nanovlm_v2drop

PACKAGE = Path(nanovlm_v2drop.__file__).parent
# From the bottom to the top. A module may import from the modules before it in its room and from the rooms before its own.
ROOMS: dict[str, tuple[str, ...]] = {
    "models": (
        *("config", "attention", "memory", "linear", "linear_float32", "linear_widened", "linear_int8", "linear_int4"),
        *("kv_cache_int8", "kv_cache", "arrange", "parallel", "rotary", "decoder"),
        *("vision", "vision_qwen2", "vision_qwen2_5", "vision_qwen3"),
        *("vlm", "qwen2_vl", "qwen3_vl", "smolvlm", "language_model", "model_classes"),
    ),
    "dropping": (),
    "processing": (
        *("opening", "video_file", "video", "preprocessor", "image_settings"),
        *("images", "images_onevision", "images_qwen2", "images_qwen3", "images_smolvlm", "images_nanovlm"),
        *("tokenizer", "prompts", "chat_template"),
    ),
    "loading": (
        "specs", "precision", "device", "tensor_parallel", "uninitialised", "files", "checkpoint", "quantised", "families",
        "in_memory", "hub", "zoo", "saving", "text_model",
    ),
    "inference": ("prefill_loop", "decoding", "generation", "turn", "transcript", "conversation", "chat"),
    "demo": ("scenes", "clips", "data", "export", "warm_start", "recipe", "steps", "train_image", "train_video", "train"),
    "tasks": (),
    "evaluation": (
        "machine", "records", "method_names", "paper", "methods", "plans", "features", "batches", "fingerprints", "output",
        "position_bias", "bootstrap", "summary", "averages", "comparison", "answering", "workers", "evaluate", "loading",
        "lmms_eval",
    ),
    "benchmark": (
        "workload", "official_tokenizer", "official_llava", "official_smolvlm", "checkpoint", "contenders", "measure",
        "loading", "gguf_file", "llama_cpp", "memory", "run", "picture", "answer", "__main__",
    ),
    "research": (
        "ablations", "theory", "findings", "costs", "smollm2", "question_words", "text_questions", "text", "conversations",
        "claims", "claims_on_benchmarks", "calibration", "precision",
    ),
    "report": ("rows", "figures", "lettering", "gallery", "watch", "tables", "averages", "results_csv", "page"),
    "cli": (
        "choices", "arguments", "checks", "models", "paper", "planning", "progress", "earlier", "results", "runs", "ask",
        "chat", "conversations", "calibrate", "ledger", "text", "compare", "start",
    ),
    "__main__": (),
}
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def rank(module: str) -> tuple[int, int]:
    """Place of a module's room, and its place in that room; the files of a room without an order share one place."""
    room, _, name = module.partition(".")
    assert room in ROOMS, f"{module}: give its room a place in ROOMS"
    files = ROOMS[room]
    assert not name or not files or name.partition(".")[0] in files, f"{module}: give it a place in its room in ROOMS"
    last = len(files)  # the __init__ of a room may gather the names of its files
    return list(ROOMS).index(room), files.index(name.partition(".")[0]) if name and files else last


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


def test_no_module_imports_from_one_above_it() -> None:
    upward = []
    for module, file in MODULES.items():
        if module:  # the package itself gathers its public names from all rooms
            upward += upward_imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
    assert not upward


def test_every_room_and_file_of_the_table_is_there() -> None:
    named = {f"{room}.{file}" for room, files in ROOMS.items() for file in files}
    assert not named - set(MODULES)
    assert set(ROOMS) <= set(MODULES) | {module.partition(".")[0] for module in MODULES}


def test_the_package_has_no_circle() -> None:
    arrows = {
        module: {target for name, _ in imported(ast.parse(file.read_text()), module, file.name == "__init__.py")
                 if (target := own_module(name)) and target != module}
        for module, file in MODULES.items() if module
    }  # fmt: skip
    while free := {module for module, targets in arrows.items() if not targets & set(arrows)}:
        arrows = {module: targets for module, targets in arrows.items() if module not in free}
    assert not arrows


def test_an_upward_import_is_found_wherever_it_stands() -> None:
    late = "def late():\n    from ..inference import prefill"
    assert upward_imports(late, "processing.images") == ["processing.images:2 imports inference"]
    assert upward_imports("from ..demo import scenes", "dropping.v2drop") == ["dropping.v2drop:1 imports demo.scenes"]
    assert upward_imports("from ..loading import zoo", "tasks", is_package=True) == []
    assert upward_imports("import nanovlm_v2drop.loading.zoo", "models.config") == ["models.config:1 imports loading.zoo"]
    assert upward_imports("from .vlm import VLM", "models.decoder") == ["models.decoder:1 imports models.vlm"]
    assert upward_imports("from .. import load", "evaluation.evaluate") == ["evaluation.evaluate:1 imports the package itself"]
    assert upward_imports("if TYPE_CHECKING:\n    from .loading.zoo import load", "inference") == []
    assert upward_imports("from ..models.config import VLMConfig", "loading.zoo") == []


def heavy(tree: ast.AST) -> set[str]:
    """Which of the libraries that only serve as a comparison are imported."""
    return {name.partition(".")[0] for name, _ in imported(tree, "")} & {"transformers", "torchvision"}


def test_transformers_and_torchvision_are_never_imported_but_by_the_benchmark_that_compares_with_them() -> None:
    trees = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in MODULES.items()}
    comparing = {"benchmark.contenders", "benchmark.loading", "benchmark.picture"}
    assert {module for module, tree in trees.items() if heavy(tree)} <= comparing
    for module in comparing:
        outside_functions = [node for node in trees[module].body if not isinstance(node, ast.FunctionDef)]
        assert not heavy(ast.Module(outside_functions, []))


def test_lmms_eval_is_imported_by_its_plug_in_alone() -> None:
    trees = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in MODULES.items()}
    names = {module: {name.partition(".")[0] for name, _ in imported(tree, "")} for module, tree in trees.items()}
    importing = {module for module, own in names.items() if "lmms_eval" in own}
    assert importing == {"evaluation.lmms_eval", "evaluation.lmms_eval.model"}
    plug_in = trees["evaluation.lmms_eval"]  # its entry point is loaded whenever lmms-eval starts
    assert not any(isinstance(node, ast.ImportFrom) and node.module != "typing" for node in plug_in.body)


def test_every_public_name_is_there() -> None:
    assert {"load", "generate", "prefill", "watch", "DROPPERS", "Chain"} <= set(nanovlm_v2drop.__all__)
    for name in nanovlm_v2drop.__all__:
        assert getattr(nanovlm_v2drop, name) is not None


def test_importing_the_package_loads_no_optional_library() -> None:
    loaded = "sorted({name.partition('.')[0] for name in sys.modules})"
    script = f"import sys, nanovlm_v2drop.evaluation.evaluate\nprint({loaded})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    loaded = set(ast.literal_eval(done.stdout))
    assert "torch" in loaded
    assert not loaded & {"transformers", "torchvision", "pyarrow", "matplotlib", "av", "flash_attn", "lmms_eval"}


def test_loading_a_model_does_not_import_torchs_compiler() -> None:
    script = "import sys, nanovlm_v2drop\nnanovlm_v2drop.load('demo')\nprint({'torch._dynamo', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "set()"
