"""Help and usage errors answer at once: they import no heavy library."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import divergence_lens as dl
from divergence_lens import patching
from divergence_lens.cli import choices
from divergence_lens.cli.main import app
from divergence_lens.engine import SITES
from tests.support.figures import effects

ROOT = Path(__file__).resolve().parents[2]

# Modules of the library that the parsing of options may load; all others import torch.
LIGHT = ("divergence_lens.cli", "divergence_lens.__main__")
HEAVY = {
    *("torch", "transformers", "transformer_lens", "pandas", "plotly", "matplotlib", "scipy"),
    *("safetensors", "huggingface_hub", "jaxtyping", "einops", "pyarrow", "IPython"),
}
PROGRAM = """
import json, sys
from divergence_lens.__main__ import main
sys.argv = ["divergence-lens", *json.loads(sys.argv[1])]
try:
    main()
except SystemExit as end:
    print("\\nMODULES", end.code, json.dumps(sorted(sys.modules)))
"""

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)


def loaded(arguments: list[str], folder: Path) -> tuple[int, str, set[str]]:
    """Run a command in a process of its own: its exit code, its output, and its modules."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    output, _, end = done.stdout.rpartition("\nMODULES ")
    code, _, modules = end.partition(" ")
    return int(code) if code != "None" else 0, output + done.stderr, set(json.loads(modules))


def assert_light(modules: set[str]) -> None:
    assert not HEAVY & {name.partition(".")[0] for name in modules}
    own = {name for name in modules if name.startswith("divergence_lens.")}
    assert [name for name in own if not name.startswith(LIGHT)] == []


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "one", "completion": "two"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"clean": "a", "corrupted": "b"}\n')
    (tmp_path / "words.jsonl").write_text('{"clean": "a", "corrupted": "b", "answr": "c"}\n')
    (tmp_path / "text.safetensors").write_text("no tensors")
    return tmp_path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)], ids=str
)
def test_help_imports_no_heavy_library(arguments, tmp_path):
    code, output, modules = loaded(arguments, tmp_path)
    assert output
    assert code == (0 if arguments else 2)
    assert_light(modules)


PAIR = ["patch", "--clean", "a", "--corrupted", "b"]
FIND = ["find", "data.jsonl", "--teacher", "owl", "--counterfactual"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unknown"], "No such command 'unknown'"),
        (["find"], "Missing argument"),
        (["generate"], "either a file of prompts or --numbers N"),
        (["generate", "--numbers", "2", "--top-p", "2"], "--top-p"),
        (["generate", "--numbers", "2", "--out", "data.jsonl"], "data.jsonl exists"),
        (["generate", "--numbers", "2", "--teacher", "oowl"], "did you mean owl"),
        (["generate", "--numbers", "2", "--device", "gpu"], "'gpu' is no device"),
        (["generate", "--numbers", "2", "--model", "./no"], "no file or folder './no'"),
        ([*FIND, "cat", "--rule", "2"], "--rule is '2'"),
        ([*FIND, "owl"], "the teachers are owl, owl"),
        ([*FIND, "cat=@no.safetensors"], "no file or folder 'no.safetensors'"),
        ([*FIND, "cat", "--figure", "rate.gif"], "ends in .html, .png, .svg or .pdf"),
        ([*FIND, "cat", "--figure", "data.jsonl/a.svg"], "cannot be written"),
        (["patch"], "give --clean and --corrupted"),
        (["patch", "text.safetensors"], "not a result saved by divergence-lens"),
        (["patch", "pairs.jsonl"], "pair 0 has no answer"),
        (["patch", "words.jsonl"], "line 1: the unknown key 'answr'"),
        (["patch", "pairs.jsonl", "--clean", "a"], "not both"),
        (["patch", "--clean", "a"], "give --clean and --corrupted"),
        (["patch", "--clean", "a", "--corrupted", "a"], "same clean and corrupted prompt"),
        (PAIR, "pair 0 has no answer"),
        ([*PAIR, "--answer", "c"], "pair 0 has no foil"),
        ([*PAIR, "--metric", "kl", "--site", "resid"], "'resid_pre'"),
        ([*PAIR, "--metric", "kl", "--method", "guess"], "'integrated-inputs'"),
        ([*PAIR, "--metric", "kl", "--system", "You"], "--system needs --chat"),
        ([*PAIR, "--metric", "kl", "--verify", "3"], "--verify checks an approximation"),
        ([*PAIR, "--metric", "kl", "--pair", "1"], "there is no pair 1"),
        ([*PAIR, "--metric", "kl", "--teacher", "owl"], "prompts have no teachers"),
        (["finetune", "data.jsonl", "--layers", "x"], "--layers is 'x'"),
        (["finetune", "data.jsonl", "--complement"], "--complement needs --mask"),
        (["finetune", "data.jsonl", "--mask", "text.safetensors"], "not a result saved"),
        (["sweep", "data.jsonl", "--target", "unicorn"], "'unicorn' is no animal"),
        (["evaluate", "--target", "wolff"], "did you mean wolf"),
        (["evaluate", "--target", "oak", "--candidates", "elm,fir"], "elm, fir"),
        (["plot", "text.safetensors", "out.svg"], "not a result saved by divergence-lens"),
        (["study", "--seeds", "a"], "--seeds is 'a'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_import_no_heavy_library(arguments, message, folder):
    before = sorted(folder.iterdir())
    code, output, modules = loaded(arguments, folder)
    assert message in " ".join(output.replace("│", " ").split())
    assert code == 2
    assert_light(modules)
    assert sorted(folder.iterdir()) == before


def test_a_saved_result_is_drawn_without_transformer_lens(tmp_path):
    effects().save(tmp_path / "effects.safetensors")
    code, output, modules = loaded(["plot", "effects.safetensors", "figure.html"], tmp_path)
    assert (code, "Figure written" in output) == (0, True)
    assert "torch" in modules
    assert not {"transformer_lens", "transformers.modeling_utils", "scipy"} & modules


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda c: c.callback.__name__)
def test_paragraphs_of_help_have_no_line_breaks_of_the_source(command):
    paragraphs = command.help.split("\n\n")
    assert " ".join(paragraphs).split() == command.callback.__doc__.split()
    assert not any("\n" in paragraph for paragraph in paragraphs)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pa"], {"patch"}),
        (["patch", "--site", "resid"], {"resid_pre", "resid_mid", "resid_post"}),
        (["patch", "--corr"], {"--corrupted"}),
    ],
)
def test_the_shell_completes_commands_options_and_values(words, expected):
    """As bash asks the program."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "divergence_lens"],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT / "src"),
            "_DIVERGENCE_LENS_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(["divergence-lens", *words]),
            "COMP_CWORD": str(len(words)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(done.stdout.split()) == expected
    assert " torch" not in done.stderr


def test_the_choices_are_those_of_the_library():
    assert tuple(site.value for site in choices.Site) == SITES
    assert get_args(choices.Method) == ("exact", *get_args(patching.Method))
    hints = _literals(dl.causal_mediation)
    assert set(get_args(choices.Direction)) == hints["direction"]
    assert set(get_args(choices.Metric)) == hints["metric"]
    assert set(get_args(choices.Span)) == hints["span"]
    assert choices.CANDIDATES == {"animal": dl.ANIMALS, "tree": dl.TREES}


def _literals(function) -> dict[str, set[str]]:
    """The strings that each annotation of a function allows."""

    def strings(hint) -> set[str]:
        if isinstance(hint, str):
            return {hint}
        return {text for part in get_args(hint) for text in strings(part)}

    return {name: strings(hint) for name, hint in function.__annotations__.items()}
