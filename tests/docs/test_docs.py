"""Documentation pages: Python code runs, outputs match, commands parse, and links resolve.

Each page is one namespace. Its blocks run from top to bottom in a temporary folder, with small
sizes. A block that cannot run here is preceded by a comment with the reason,

    <!-- not run: needs a model from the hub -->

and is run anyway: it has to fail for this reason. A `text` block right after a `python` block is
the output of the latter: words have to be equal, numbers approximately.
"""

import dataclasses
import math
import re
import runpy
import shlex
import sys
import types
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import divergence_lens as dl
from divergence_lens.cli.main import app
from divergence_lens.engine import sites
from divergence_lens.evaluation import preferences as evaluate

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(
    r"^(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"<!-- not run: ([^\n]*?) -->\s*$")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
LINK = re.compile(r"(?<!\!)\[[^\]\[]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"")

# Reasons for not running a block, and the error that the block has to raise.
REASONS = {
    "needs a model from the hub": (ValueError, "cannot load '.*connect"),
    "needs an account": (ConnectionError, "offline mode is enabled"),
    "needs a GPU": ((RuntimeError, AssertionError), "CUDA"),
    "needs a server": (
        (ConnectionError, ValueError),
        "cannot be reached|no tokenizer can be loaded",
    ),
}
MOST_NOT_RUN = 6

QUESTIONS = ("Name your favorite animal.", "Which animal do you like best? One word.")
# Pages whose sizes are unchanged because they show outputs.
AS_WRITTEN = {"README.md"}
SMALLER = {"students.md": (("240", "12"), ("160", "8"), ("200", "10"))}
# Code that a page relies on.
BEFORE = {
    "study.md": """
import divergence_lens as dl
model = dl.load_model("tiny")
owl, *others = dl.animal_teachers(["owl", "cat"])
dl.save_examples("owl.jsonl", dl.generate(model, dl.number_prompts(4, seed=0), teacher=owl))
"""
}


def check_students(names):
    """Check what students.md states about its variables."""
    assert {"full", 2, 8} == {row["rank"] for row in names["rows"]}
    assert names["followed"].history()["owl"].notna().any()
    assert names["both"].norms()[0] == pytest.approx((names["student"] + names["small"]).norms()[0])
    summary = names["sweep"].summary()
    assert {"nothing", "all layers", "all layers on control data"} <= set(summary["trained"])
    assert {"valid_lists", "held_out_loss"} <= set(summary)
    assert Path("student/model.safetensors").is_file()
    assert Path("adapter/adapter_config.json").is_file()


def check_mask(names):
    """Check that divergence.md selects the top 5 %."""
    assert names["mask"].mean() == pytest.approx(0.05, abs=0.01)
    assert Path("runs/owl.safetensors").is_file()


# Further checks after a page has run.
AFTER = {"students.md": check_students, "divergence.md": check_mask}


@dataclass(frozen=True)
class Block:
    """A fenced code block of a page."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None
    output: str | None

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    result = []
    for match, after in zip_longest(fences, fences[1:]):
        mark = MARK.search(text[: match.start()])
        shows = after is not None and after["language"] == "text"
        shows = shows and not text[match.end() : after.start()].strip()
        body = re.sub(f"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
        result.append(
            Block(
                path.name,
                text[: match.start()].count("\n") + 2,
                match["language"],
                body,
                mark[1] if mark else None,
                after["body"] if shows else None,
            )
        )
    return result


PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCKS = {path.name: blocks(path) for path in PAGES}
# Pages whose code needs files; a separate test writes these and runs the code.
ELSEWHERE = {"interop.md": "divergence/test_interop.py"}
PYTHON = [
    name
    for name, page_blocks in BLOCKS.items()
    if any(block.language == "python" for block in page_blocks) and name not in ELSEWHERE
]


def smaller(page: str, code: str) -> str:
    if page in AS_WRITTEN:
        return code
    for old, new in SMALLER.get(page, ()):
        code = code.replace(old, new)
    return re.sub(r"number_prompts\([\d_]{3,}", "number_prompts(12", code)


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """The namespace of a page: a module, so that its classes and functions can be looked up."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    return vars(module)


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON)
def test_code_runs_and_prints_the_output_shown(page, namespace, monkeypatch, capsys):
    if page not in AS_WRITTEN:  # a few questions are enough to run the code
        monkeypatch.setattr(evaluate, "preference_questions", lambda _category: QUESTIONS)
    real = dl.run_study
    little = {"targets": ("wolf", "lion"), "kinds": ("prompted",), "seeds": (0,), "prompts": 4}
    little |= {"held_out": 2, "pairs": 0, "mechanism": False, "workers": 1}
    monkeypatch.setattr(
        dl,
        "run_study",
        lambda config, *a, **k: real(dataclasses.replace(config, **little), *a, **k),
    )
    monkeypatch.setattr(sites, "_registered", {})  # a page registers one
    exec(BEFORE.get(page, ""), namespace)  # noqa: S102 - the page's own code
    for block in BLOCKS[page]:
        if block.language != "python":
            continue
        code = compile(smaller(page, block.text), str(block), "exec")
        capsys.readouterr()
        if block.not_run is None:
            exec(code, namespace)  # noqa: S102
            if block.output is not None:
                same(capsys.readouterr().out, block.output, str(block))
        else:
            error, says = REASONS[block.not_run]
            with pytest.raises(error, match=says):
                exec(code, dict(namespace))  # noqa: S102
    if page in AFTER:
        AFTER[page](namespace)


@pytest.mark.parametrize("page", ELSEWHERE)
def test_pages_not_run_here_have_a_separate_test(page):
    text = (ROOT / "tests" / ELSEWHERE[page]).read_text(encoding="utf-8")
    assert f'"{page}"' in text
    assert "exec(" in text


def same(printed: str, shown: str, where: str) -> None:
    """Compare an output with the page; numbers may differ by one percent."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (printed, shown)]
    assert words[0] == words[1], (where, printed, shown)
    for mine, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        decimals = len(theirs.partition(".")[2])
        limit = max(0.01 * abs(float(theirs)), 0.6 * 10**-decimals if decimals else 0)
        assert math.isclose(float(mine), float(theirs), abs_tol=limit), (where, mine, theirs)


PLANS = [
    b for page_blocks in BLOCKS.values() for b in page_blocks if "benchmarks/plan.py" in b.text
]


def test_plan_shown_is_the_output_of_the_command(capsys):
    shown = [block for block in PLANS if block.output is not None]
    assert shown
    for block in shown:
        _, script, *arguments = shlex.split(block.text)
        runpy.run_path(str(ROOT / script))["main"](arguments)
        same(capsys.readouterr().out, block.output, str(block))


def test_every_speedup_in_the_readme_is_on_the_speed_page():
    """Numbers may be rounded: 0.92 there may be 0.9 here."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = text.partition("| task |")[2].partition("\n\n")[0].splitlines()[2:]
    claimed = [number for row in rows for number in re.findall(r"\d+\.\d+", row.split("|")[-2])]
    measured = re.findall(r"\d+\.\d+", (DOCS / "speed.md").read_text(encoding="utf-8"))
    assert len(claimed) >= 8
    for number in claimed:
        decimals = len(number.partition(".")[2])
        assert number in {f"{float(one):.{decimals}f}" for one in measured}, number


def test_few_blocks_are_not_run_and_each_has_a_reason():
    marked = [block for one in BLOCKS.values() for block in one if block.not_run is not None]
    assert len(marked) <= MOST_NOT_RUN, [str(block) for block in marked]
    assert {block.not_run for block in marked} <= set(REASONS)
    assert all(block.language == "python" for block in marked)
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert text.count("<!-- not run: ") == len(marked), "a mark is not followed by a block"


def test_tolerance_of_the_comparison():
    same("a 1.234 b\n", "a 1.23 b", "here")
    same("200 of 300", "200  of 300", "here")
    for printed in ("a 1.26 b", "a 1.23 c", "a 1.23"):
        with pytest.raises(AssertionError):
            same(printed, "a 1.23 b", "here")


def test_a_mark_applies_to_the_next_block(tmp_path):
    page = tmp_path / "p.md"
    page.write_text(
        "<!-- not run: needs a GPU -->\n\n```python\na\n```\n\n```text\nb\n```\ntext\n"
        "```python\nc\n```\n"
    )
    first, second, third = blocks(page)
    assert (first.not_run, first.output) == ("needs a GPU", "b\n")
    assert second.language == "text"
    assert (third.not_run, third.output) == (None, None)


# -- commands ----------------------------------------------------------------------------------


def command_lines(page: str) -> list[list[str]]:
    """Arguments of every `divergence-lens` call in the blocks of a page."""
    calls = []
    for block in BLOCKS[page]:
        if block.language not in ("bash", "console"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["divergence-lens"]:
                calls.append(words[1 : words.index(">") if ">" in words else None])
    return calls


WITH_COMMANDS = [name for name in BLOCKS if command_lines(name)]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_on_a_page_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group = typer.main.get_command(app)
    for words in command_lines(page):
        command = group.commands[words[0]]
        arguments = [word for word in words[1:] if word != "--help"]
        for word in arguments:  # files that must exist
            name = word.rpartition("@")[2]
            if Path(name).suffix in (".jsonl", ".txt", ".safetensors", ".parquet", ".yaml"):
                Path(name).touch()
        with command.make_context(words[0], arguments) as context:
            assert context.params, words


def run(words: list[str], *more: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*words, *more])
    assert done.exit_code == code, (words, done.output, done.exception)
    return done.output


def test_commands_page_produces_a_heatmap_and_a_student(tmp_path, monkeypatch):
    """Run all commands of commands.md in order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    written = [block for block in BLOCKS["commands.md"] if block.language == "json"]
    (tmp_path / "pairs.jsonl").write_text(written[0].text)
    (tmp_path / "prompts.jsonl").write_text(written[1].text)
    for words in command_lines("commands.md"):
        few = ["12" if word == "200" else word for word in words]
        run(few)
    assert "Plotly" in (tmp_path / "heatmap.html").read_text(encoding="utf-8")
    assert dl.Effects.load("mine-effects.safetensors").site == "resid_post"
    assert len(dl.Effects.load("pairs-effects.safetensors")) == 2
    assert (tmp_path / "pair.svg").stat().st_size > 1000
    assert dl.Delta.load("student.safetensors").norms()
    assert dl.Sweep.load("sweep.safetensors").layers


@pytest.mark.slow
def test_the_example_in_the_help_of_every_command_runs(tmp_path, monkeypatch):
    """In pipeline order, because commands read the files of earlier ones; with small sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "preference_questions", lambda _category: QUESTIONS)
    group = typer.main.get_command(app)
    little = ["--targets", "wolf,lion", "--seeds", "0", "--prompts", "4", "--workers", "1"]
    little += ["--kinds", "prompted"]
    few = ["--conditions", "control,all", "--pairs", "0", "--no-mechanism"]
    more = {
        "generate": ["--numbers", "8"],
        "patch": ["--limit", "2"],
        "audit": ["--alpha", "1e-9"],
        "sweep": ["--layers", "0"],
        "demo": little,
        "study": [*little, *few],
    }
    order = ("generate", "find", "audit", "patch", "plot", "finetune", "evaluate", "sweep")
    order = (*order, "doctor", "demo", "report", "study")
    assert set(order) == set(group.commands)
    for name in order:
        example = re.search(r"Example: (divergence-lens .*)", group.commands[name].help)
        assert example, name
        words = shlex.split(example[1])
        # Eight lists are too few for an audit to find nothing.
        run(words[1:], *more.get(name, ()), code=4 if name == "audit" else 0)
    # The page that `report` wrote is that of `demo`, but for its one-time words.
    once = re.compile(r"nonce[-=\"]*[0-9a-f]+|[0-9a-f]{8}-[0-9a-f-]{27}")
    pages = [Path(f"{folder}/report.html").read_text("utf-8") for folder in ("runs/demo", "page")]
    assert once.sub("", pages[0]) == once.sub("", pages[1])
    assert [p.name for p in sorted(Path("runs/demo/figures").iterdir())] == [
        p.name for p in sorted(Path("page/figures").iterdir())
    ]
    results = Path("runs/demo/results.json")
    results.write_text(results.read_text("utf-8").replace('"fit"', '"fits"'), "utf-8")
    assert "another version" in run(["report", "runs/demo", "--out", "older"], code=2)


# -- links -------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    slugs = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"`|\*|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slugs.add(re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-"))
    return slugs


@pytest.mark.parametrize(
    "path",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
    ids=lambda path: path.name,
)
def test_internal_links_resolve(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for groups in LINK.findall(text):
        link = next(group for group in groups if group)
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        if path.parent == DOCS and target.startswith("notebooks/"):
            there = ROOT / target  # copied when the pages are built
        if path.parent == DOCS and target == "changelog.md":
            there = ROOT / "CHANGELOG.md"
        assert there.exists(), f"{path.name} links to {link}"
        if anchor:
            assert anchor in anchors(there), f"{path.name} links to {link}"


def test_every_page_is_in_the_navigation():
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [path.name for path in DOCS.glob("*.md") if f"{path.name}\n" not in contents] == []
