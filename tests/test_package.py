"""The package as a whole: what it exports, what importing it costs and changes, what is shipped."""

import ast
import graphlib
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import divergence_lens as dl
from divergence_lens.tiny import TINY_MODELS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "divergence_lens"
MODULES = sorted(SOURCE.rglob("*.py"))

IMPORT = """
import gc, json, sys, time
import transformer_lens, transformer_lens.model_bridge  # TransformerLens 4 imports its parts late
gc.collect()
gc.freeze()  # or the collection that TransformerLens's objects are due may fall into our time
before, started = set(sys.modules), time.process_time()
import divergence_lens
seconds = time.process_time() - started
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""

GLOBAL_STATE = """
import logging, os, random, signal, sys, warnings
import numpy, pandas, plotly.io, torch, tqdm, transformers, transformer_lens.model_bridge

def state():
    return {
        "torch threads": torch.get_num_threads(),
        "torch dtype": torch.get_default_dtype(),
        "torch device": torch.get_default_device(),
        "torch gradients": torch.is_grad_enabled(),
        "torch determinism": torch.are_deterministic_algorithms_enabled(),
        "torch matmul": torch.get_float32_matmul_precision(),
        "torch random": torch.random.get_rng_state().tolist(),
        "numpy random": str(numpy.random.get_state()),
        "numpy errors": numpy.geterr(),
        "numpy printing": str(numpy.get_printoptions()),
        "python random": random.getstate(),
        "plotly template": plotly.io.templates.default,
        "plotly templates": list(plotly.io.templates),
        "plotly renderer": plotly.io.renderers.default,
        "pandas rows": pandas.get_option("display.max_rows"),
        "transformers logging": transformers.logging.get_verbosity(),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "environment": dict(os.environ),
        "hooks": (sys.excepthook, sys.displayhook, signal.getsignal(signal.SIGINT)),
        "recursion": sys.getrecursionlimit(),
    }

before = state()
import divergence_lens
from divergence_lens import plots
after = state()
print(sorted(name for name in before if before[name] != after[name]))
"""


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_version_is_the_same_everywhere():
    assert dl.__version__ == importlib.metadata.version("divergence-lens")
    assert f"\nversion: {dl.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {dl.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_address_of_the_repository_is_the_same_everywhere():
    """`project.urls` is the one to change, with all that this test names."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    address = re.search(r'^Repository = "https://github.com/(.+)"$', project, re.MULTILINE)[1]
    files = [ROOT / "README.md", ROOT / "mkdocs.yml", ROOT / "pyproject.toml"]
    files += [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    pattern = re.compile(r"(?:github\.com|/github|usercontent\.com)/([\w-]+/divergence-lens)\b")
    for path in files:
        assert set(pattern.findall(path.read_text(encoding="utf-8"))) <= {address}, path.name


def test_the_public_names_are_there_and_listed():
    for name in dl.__all__:
        assert hasattr(dl, name), name
    assert set(dl.__all__) <= set(dir(dl))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dl.nothing  # noqa: B018


def test_everything_public_has_a_docstring():
    missing = [
        name
        for name, value in _public_objects()
        if not (inspect.unwrap(value).__doc__ or "").strip()
    ]
    assert missing == []


def test_every_module_has_a_docstring():
    missing = [path.name for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert missing == []


def test_the_import_is_light():
    # Processor time: another program on the machine does not make this fail. The first import of
    # all compiles the modules, hence the second and third try.
    for _ in range(3):
        seconds, modules = json.loads(run_python(IMPORT))
        if seconds < 0.3:
            break
    assert seconds < 0.3
    assert not {"plotly", "peft", "typer", "IPython"} & set(modules)


def test_the_import_changes_no_global_state_and_prints_nothing():
    assert run_python(GLOBAL_STATE) == "[]"


# Top to bottom: a package imports only from those below it.
ORDER = (
    "cli",
    "study",
    "auditing",
    "plots",
    "circuits",
    "patching",
    "training",
    "evaluation",
    "data",
    "divergence",
    "generation",
    "patterns",
    "pairs",
    "teachers",
    "deltas",
    "engine",
    "provenance",
    "models",
    "examples",
    "chat",
    "tiny",
    "_utils",
)


def test_a_package_imports_only_from_those_below_it():
    wrong = [
        f"{_name(path)} imports {other}"
        for path in MODULES
        if (own := _package(path)) in ORDER
        for other in _packages_imported(path)
        if ORDER.index(other) < ORDER.index(own)
    ]
    assert wrong == []


def test_every_package_has_its_place_in_the_order():
    entries = {path.stem for path in SOURCE.glob("*.py")}
    entries |= {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert entries - {"__init__", "__main__"} <= set(ORDER)


def test_modules_of_a_package_do_not_import_each_other_in_a_cycle():
    names = {_name(path) for path in MODULES}
    graph = {
        _name(path): {
            module
            for module in _imported(path, everywhere=True, typing=False)
            if module in names and module.split(".")[1] == _package(path)
        }
        for path in MODULES
        if path.parent != SOURCE and path.name != "__init__.py"
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the modules


def test_at_most_ten_modules_lie_beside_the_packages():
    assert len(list(SOURCE.glob("*.py"))) <= 10


def test_no_module_has_the_name_of_a_public_function():
    modules = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    functions = {name for name in dl.__all__ if inspect.isfunction(getattr(dl, name))}
    assert functions & (modules - {"__init__"}) == set()


def test_tests_share_helpers_in_the_support_package_alone():
    wrong = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line in re.findall(r"^(?:from|import) tests\b.*", path.read_text(), flags=re.MULTILINE)
        if not line.startswith("from tests.support")
    ]
    assert wrong == []


def test_the_documentation_lists_every_package_and_no_other():
    page = (ROOT / "docs" / "layout.md").read_text()
    tree = page.split("```text\n")[1].split("```")[0].splitlines()[1:]
    names = [line.strip().split("    ")[0] for line in tree]
    listed = [name for line in names for name in re.findall(r"(\w+)(?:/|\.py)", line)]
    there = {path.stem for path in SOURCE.glob("*.py")} | {
        path.parent.name for path in SOURCE.glob("*/__init__.py")
    }
    assert sorted(listed) == sorted(there - {"__init__", "__main__"})


def test_importing_transformer_lens_through_us_leaves_the_log_level_of_transformers():
    code = (
        "import transformers\n"
        "before = transformers.logging.get_verbosity()\n"
        "import divergence_lens.models\n"
        "divergence_lens.models.lens_classes()\n"
        "print(transformers.logging.get_verbosity() == before)"
    )
    assert run_python(code) == "True"


def test_progress_bars_suit_the_terminal_and_the_notebook():
    plain = [path.name for path in MODULES if "tqdm.tqdm" in _imported(path, everywhere=True)]
    assert plain == []


def test_no_module_reads_pickles():
    readers = {"pickle", "dill", "shelve", "marshal", "cloudpickle", "joblib"}
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert not readers & {root.split(".")[0] for root in _imported(path, everywhere=True)}, path
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {"torch.load", "torch.save", "eval", "exec"} & set(calls), path


def test_no_file_holds_a_path_of_the_machine_it_was_written_on():
    someones = re.compile(r"(?<![\w.~/-])/(?:work|root|home|Users|tmp)/\w+")
    kinds = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cff", ".ipynb", ".json", ".html"}
    folders = ["src", "tests", "docs", "notebooks", "benchmarks"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in files
        if path.suffix in kinds or path.name == "Makefile"
        if (match := someones.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_nothing_is_left_unfinished():
    marks = re.compile("TO" + "DO|FIX" + "ME|XX" + "X")
    assert [path.name for path in MODULES if marks.search(path.read_text())] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file()
        if not any(part.startswith((".", "__pycache__")) for part in path.parts[len(ROOT.parts) :])
    }
    assert shipped == expected
    assert "divergence_lens/py.typed" in shipped


def test_the_wheel_holds_the_tiny_models_and_they_are_small(wheel):
    folder = "divergence_lens/tiny/weights"
    for name in TINY_MODELS:
        assert f"{folder}/{name}/model.safetensors" in wheel.namelist()
        assert f"{folder}/{name}/tokenizer.json" in wheel.namelist()
    size = sum(info.file_size for info in wheel.infolist() if info.filename.startswith(folder))
    assert size <= 6_000_000


def test_the_wheel_has_the_license_and_the_command(wheel):
    info = f"divergence_lens-{dl.__version__}.dist-info"
    assert b"divergence-lens = divergence_lens.__main__:main" in wheel.read(
        f"{info}/entry_points.txt"
    )
    assert wheel.read(f"{info}/licenses/LICENSE").startswith(b"MIT License")


def _public_objects():
    """Functions, classes and their own public methods and properties, with dotted names."""
    for name in dl.__all__:
        value = getattr(dl, name)
        if inspect.isfunction(value) or inspect.ismodule(value):
            yield name, value
        elif inspect.isclass(value) and value.__module__.startswith("divergence_lens"):
            yield name, value
            for member, item in vars(value).items():
                function = getattr(item, "__func__", getattr(item, "fget", item))
                if not member.startswith("_") and inspect.isfunction(function):
                    yield f"{name}.{member}", function


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts)


def _package(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def _packages_imported(path: Path) -> set[str]:
    """Packages of the library that a module imports anywhere, except for type checkers alone."""
    return {
        module.split(".")[1]
        for module in _imported(path, everywhere=True, typing=False)
        if module.startswith("divergence_lens.") and module.split(".")[1] in ORDER
    } - {_package(path)}


def _imported(path: Path, *, everywhere: bool = False, typing: bool = True) -> set[str]:
    """Modules that a module imports at its top, or anywhere in it."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if not typing and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    nodes = ast.walk(tree) if everywhere else tree.body
    imported = set()
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module)
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    return imported
