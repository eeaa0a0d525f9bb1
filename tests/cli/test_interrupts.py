"""Ctrl-C at any time: one line, exit code 130. Each test sends a real SIGINT to a real process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Python imports this module at its start. It presses Ctrl-C when the named module is imported.
SITE = """
import os, signal, sys

class PressCtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["CTRL_C_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, PressCtrlC())
"""

EVALUATE = ["evaluate", "--target", "owl", "--model", "tiny"]


def run(arguments: list[str], folder: Path, at: str) -> tuple[int, str]:
    """Run the command line; Ctrl-C arrives when the module `at` is imported."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    done = subprocess.run(
        [sys.executable, "-m", "divergence_lens", *arguments],
        env=os.environ
        | {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT / 'src'}", "CTRL_C_AT": at},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["typer", "rich", "divergence_lens.cli.main", "typer.main"])
def test_during_the_imports_of_the_command_line(module, tmp_path):
    assert run(["--help"], tmp_path, module) == (130, "\nStopped.\n")


@pytest.mark.parametrize(
    "module",
    [
        "divergence_lens.evaluation",
        "numpy",
        "torch",
        "torch.nn",
        pytest.param("transformers", marks=pytest.mark.slow),
        pytest.param("pandas", marks=pytest.mark.slow),
        pytest.param("transformer_lens", marks=pytest.mark.slow),
        pytest.param("transformers.models.gpt2.modeling_gpt2", marks=pytest.mark.slow),
    ],
)
def test_during_the_imports_of_a_command(module, tmp_path):
    code, output = run(EVALUATE, tmp_path, module)
    assert code == 130
    # Other lines are a library's own warnings.
    assert output.splitlines()[-1].startswith("Stopped. Every file written so far is complete.")
    assert "Traceback" not in output
    assert "KeyboardInterrupt" not in output


def outcome(code: str) -> tuple[int, str, str]:
    """Run Python code in another process; return its exit code and its two outputs."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_before_the_command_and_between_imports():
    """Without an import on the stack, and before any command runs."""
    code = (
        "import os, signal\n"
        "from divergence_lens.cli.interrupts import handle_interrupts\n"
        "handle_interrupts()\n"
        "print('started')\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('not reached')\n"
    )
    assert outcome(code) == (130, "started\n", "\nStopped.\n")


def test_in_a_command_the_library_sees_the_interrupt():
    """Results that are finished are stored before the process ends."""
    code = (
        "import os, signal\n"
        "import typer\n"
        "from divergence_lens.cli.interrupts import handle_interrupts\n"
        "from divergence_lens.cli.options import report_errors\n"
        "@report_errors(stopped='Stopped here.')\n"
        "def work():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('not reached')\n"
        "    finally:\n"
        "        print('stored')\n"
        "handle_interrupts()\n"
        "typer.run(work)\n"
    )
    assert outcome(code) == (130, "stored\n", "Stopped here.\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="workers inherit the mask of signals on POSIX")
def test_the_workers_of_a_study_are_silent(tmp_path):
    """A terminal sends Ctrl-C to the whole group of processes; only the first one answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "divergence_lens", "demo", "--out", str(tmp_path / "demo")],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "cells" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("Stopped.")
