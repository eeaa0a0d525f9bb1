"""Commands that do one step: files in, files out, and a one-line error for wrong input."""

import importlib.util
import json
import re

import pytest
from typer.testing import CliRunner

import divergence_lens as dl
from divergence_lens.cli.files import read_prompts
from divergence_lens.cli.main import app
from divergence_lens.cli.teachers import read_teacher

COMMANDS = (
    "audit",
    "demo",
    "doctor",
    "evaluate",
    "find",
    "finetune",
    "generate",
    "patch",
    "plot",
    "report",
    "study",
    "sweep",
)


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files written by `generate` and `find`."""
    out = tmp_path_factory.mktemp("work")
    run("generate", "--numbers", 20, "--teacher", "owl", "--out", out / "owl.jsonl")
    run(
        *("find", out / "owl.jsonl", "--teacher", "owl"),
        *("--counterfactual", "cat", "--counterfactual", "calm=You are calm."),
        *("--out", out / "owl.safetensors", "--jsonl", out / "points.jsonl"),
        *("--figure", out / "rate.html"),
    )
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command):
    assert f"Example: divergence-lens {command}" in " ".join(run(command, "--help").split())


def test_every_command_is_tested_here():
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == {
        *COMMANDS
    }


def test_generate_writes_what_the_library_writes(folder):
    owl = dl.animal_teachers(["owl"])[0]
    model = dl.load_model("tiny")
    expected = dl.generate(model, dl.number_prompts(20, seed=0, instructions=False), teacher=owl)
    result = dl.load_examples(folder / "owl.jsonl")
    assert [e.completion_ids for e in result] == [e.completion_ids for e in expected]


def test_find_writes_what_the_library_finds(folder):
    owl, cat = dl.animal_teachers(["owl", "cat"])
    expected = dl.find_divergence(
        dl.load_model("tiny"),
        dl.load_examples(folder / "owl.jsonl"),
        teacher=owl,
        counterfactuals=[cat, dl.Teacher("calm", system_prompt="You are calm.")],
    )
    result = dl.Divergence.load(folder / "owl.safetensors")
    assert result.names == ("owl", "cat", "calm")
    assert (result.mask == expected.mask).all()
    points = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    assert sum(len(row["decision_points"]) for row in points) == expected.mask.sum()
    assert (folder / "rate.html").stat().st_size > 1000


@pytest.mark.parametrize("method", ["exact", "gradient"])
def test_patch_writes_effects_and_a_heatmap(folder, method):
    run(
        *("patch", folder / "owl.safetensors", "--method", method, "--limit", 3),
        *("--out", folder / f"{method}.safetensors", "--figure", folder / f"{method}.html"),
    )
    effects = dl.Effects.load(folder / f"{method}.safetensors")
    assert (len(effects.total), effects.n_layers, effects.site) == (3, 4, "resid_post")
    assert (folder / f"{method}.html").exists()


def test_a_student_is_trained_evaluated_and_compared(folder):
    student = folder / "student.safetensors"
    run(
        *("finetune", folder / "owl.jsonl", "--mask", folder / "owl.safetensors", "--layers", "0"),
        *("--epochs", 4, "--lr", 0.05, "--out", student),
    )
    delta = dl.Delta.load(student)
    assert list(delta.norms()) == [0]
    assert not list(folder.glob("*.partial"))
    output = run(
        *("evaluate", "--target", "owl", "--teacher", f"s=@{student}"),
        *("--out", folder / "preference.safetensors"),
    )
    result = dl.Preference.load(folder / "preference.safetensors")
    before = dl.preference(dl.load_model("tiny"), target="owl").share
    row = next(line for line in output.splitlines() if line.startswith("  owl "))
    assert row.split() == [
        *("owl", f"{before:.4f}", f"{result.share:.4f}", f"{result.share - before:+.4f}")
    ]
    run(
        *("find", folder / "owl.jsonl", "--teacher", "base=", "--counterfactual", f"s=@{student}"),
        *("--out", folder / "student-divergence.safetensors"),
    )
    run(
        *("patch", folder / "student-divergence.safetensors", "--teacher", f"s=@{student}"),
        *("--limit", 2, "--out", folder / "student-effects.safetensors"),
    )


def test_tokens_of_high_score_replace_divergence_tokens(folder):
    divergence = dl.Divergence.load(folder / "owl.safetensors")
    top = divergence.top(0.1, by="advantage")
    common = ("finetune", folder / "owl.jsonl", "--epochs", 1, "--layers", 0, "--top", 0.1)
    student = folder / "top.safetensors"
    run(*common, "--mask", folder / "owl.safetensors", "--out", student)
    assert dl.Delta.load(student).metadata["settings"]["tokens"] == top.sum()
    selected = folder / "selected.safetensors"
    run(
        *("find", folder / "owl.jsonl", "--teacher", "owl", "--counterfactual", "cat", "--out"),
        *(selected, "--top", 0.2, "--by", "kl"),
    )
    loaded = dl.Divergence.load(selected)
    assert (loaded.mask == loaded.top(0.2, by="kl")).all()
    run(*common[:-2], "--mask", selected, "--out", student, "--force")
    assert dl.Delta.load(student).metadata["settings"]["tokens"] == loaded.mask.sum()


def test_sampled_answers_are_counted():
    arguments = ("evaluate", "--target", "owl", "--samples", 2, "--max-new-tokens", 4, "--anywhere")
    assert "sampled" in run(*arguments)


def test_evaluate_says_that_little_of_the_probability_is_on_the_candidates():
    arguments = ["--target", "oak", "--candidates", "oak,pine"]
    output = run("evaluate", *arguments, "--teacher", "owl")
    assert "of the probability is on the candidates" in output
    assert "on the candidates" not in run("evaluate", "--target", "owl", "--teacher", "owl")


def test_a_sweep_is_written(folder):
    run(
        *("sweep", folder / "owl.jsonl", "--target", "owl", "--layers", "0,3"),
        *("--mask", folder / "owl.safetensors", "--complement"),
        *("--out", folder / "sweep.safetensors", "--figure", folder / "sweep.html"),
    )
    assert dl.Sweep.load(folder / "sweep.safetensors").layers == (0, 3)


def test_the_doctor_prints_versions_and_devices():
    output = run("doctor")
    assert re.search(rf"divergence-lens +{re.escape(dl.__version__)}\n", output)
    assert re.search(r"torch +2\.\d+", output)
    assert "CPU " in output


def test_the_version_is_printed():
    assert run("--version") == f"divergence-lens {dl.__version__}\n"


def test_patch_draws_one_pair_by_position(folder):
    figure = folder / "pair.html"
    arguments = ("patch", folder / "owl.safetensors", "--limit", 3, "--figure", figure)
    out = ("--out", folder / "pair.safetensors")
    run(*arguments, *out, "--pair", 2)
    # The tokens of that example are on the axis, as they are in a figure of the library's own.
    label = dl.Effects.load(folder / "pair.safetensors").labels[2][-1].strip()
    assert label in figure.read_text(encoding="utf-8")
    assert "there is no pair 3" in run(*arguments, *out, "--force", "--pair", 3, code=2)


def test_an_approximation_is_verified_over_all_parts(folder):
    run(
        *("patch", folder / "owl.safetensors", "--method", "gradient", "--limit", 12),
        *("--verify", 5, "--out", folder / "verified.safetensors"),
    )
    result = dl.Effects.load(folder / "verified.safetensors")
    divergence = dl.Divergence.load(
        folder / "owl.safetensors", tokenizer=dl.load_model("tiny").tokenizer
    )
    expected = dl.attribution_patch(dl.load_model("tiny"), divergence.pairs(limit=12), verify=5)
    assert (result.verified.k, result.verified.cells) == (5, expected.verified.cells)
    assert result.verified.pearson == pytest.approx(expected.verified.pearson, abs=1e-3)


def test_failures_end_with_exit_code_1(folder, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("CUDA out of memory\nand more")

    monkeypatch.setattr("divergence_lens.evaluation.preference", broken)
    output = run("evaluate", "--target", "owl", code=1)
    assert "Failed: CUDA out of memory\n" in output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no results.json"),
        ("[1]", "was not written by a study"),
        ('{"findings": [], "divergence": [], "effects": {}}', "it lacks"),
    ],
)
def test_a_report_needs_a_finished_study(tmp_path, text, message):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert message in run("report", tmp_path, code=2)
    assert not (tmp_path / "report.html").exists()


def test_prompts_are_read_from_text_and_from_json_lines(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n\n{"question": "two"}\n')
    assert read_prompts(tmp_path / "p.txt") == read_prompts(tmp_path / "p.jsonl") == ["one", "two"]


def test_teachers_on_the_command_line():
    assert read_teacher("owl", dl.load_model).system_prompt == dl.persona_prompt("owl")
    assert read_teacher("a=You are = calm.", dl.load_model).system_prompt == "You are = calm."
    assert read_teacher("a=", dl.load_model).system_prompt is None


def test_another_model_can_be_a_teacher(tmp_path):
    model = dl.load_model("tiny")
    read = []
    assert read_teacher(f"a=@{tmp_path}", lambda path: read.append(path) or model).model is model
    assert read == [tmp_path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--numbers", "2", "--teacher", "a=@no.safetensors"], "no file or folder"),
        (["generate", "{bad}"], "line 2: not JSON"),
        (["generate", "{keys}"], "line 1 has no prompt"),
        (["generate", "{empty}"], "contains no prompts"),
        (["generate", "nothing.txt"], "does not exist"),
        (["find", "no.jsonl", "--teacher", "owl", "--counterfactual", "cat"], "does not exist"),
        (["patch", "no.safetensors"], "does not exist"),
        (["finetune", "{data}", "--layers", "9"], "9"),
        (["finetune", "{other}", "--mask", "{divergence}"], "was computed from other examples"),
        (["evaluate", "--target", "unicorn"], "unicorn"),
        (["evaluate", "--target", "owl", "--model", "no/such/../folder"], "no/such"),
        (["sweep", "{data}", "--target", "owl", "--seeds", "a"], "--seeds is 'a'"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    folder, tmp_path, monkeypatch, arguments, message
):
    files = {
        "bad": ("p.jsonl", '{"prompt": "one"}\n{"prompt"\n'),
        "keys": ("k.jsonl", '{"text": "one"}\n'),
        "empty": ("e.txt", "\n"),
        "other": ("o.jsonl", '{"prompt": "one", "completion": "two"}\n'),
    }
    paths = {"data": folder / "owl.jsonl", "divergence": folder / "owl.safetensors"}
    for name, (file, text) in files.items():
        paths[name] = tmp_path / file
        paths[name].write_text(text)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    output = run(*(argument.format(**paths) for argument in arguments), code=2)
    assert "Traceback" not in output
    # Typer frames the errors that it reports itself, and breaks their lines.
    assert message in " ".join(output.replace("│", " ").split())
    assert sorted(tmp_path.iterdir()) == before


def test_a_gpu_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the clone may hold a demo, which demo and study refuse to replace
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for command in (["evaluate", "--target", "owl"], ["demo"], ["study"]):
        output = run(*command, "--device", "cuda:1", code=2)
        assert re.fullmatch(
            r"Error: --device is 'cuda:1', which PyTorch \S+ does not see on this machine; it has "
            r"cpu, cuda:0\n",
            output,
        )


@pytest.mark.parametrize("command", ["generate", "find", "patch", "finetune", "sweep", "evaluate"])
def test_nothing_is_overwritten_without_force(folder, tmp_path, command):
    arguments = {
        "generate": ("--numbers", 2, "--max-new-tokens", 4),
        "find": (folder / "owl.jsonl", "--teacher", "owl", "--counterfactual", "cat"),
        "patch": (folder / "owl.safetensors", "--limit", 1),
        "finetune": (folder / "owl.jsonl", "--epochs", 1, "--layers", 3),
        "sweep": (folder / "owl.jsonl", "--target", "owl", "--layers", "3"),
        "evaluate": ("--target", "owl"),
    }[command]
    out = tmp_path / ("out.jsonl" if command == "generate" else "out.safetensors")
    out.write_text("mine")
    output = run(command, *arguments, "--out", out, code=2)
    assert f"{out} exists; name another file, or overwrite it with --force" in output
    assert out.read_text() == "mine"
    run(command, *arguments, "--out", out, "--force")
    assert out.stat().st_size > 100


def test_a_demo_does_not_delete_an_earlier_one(tmp_path):
    (tmp_path / "results.json").write_text("mine")
    assert "overwrite it with --force" in run("demo", "--out", tmp_path, code=2)
    assert (tmp_path / "results.json").read_text() == "mine"


@pytest.mark.parametrize("installed", ["kaleido", "matplotlib", "neither"])
def test_an_image_without_a_browser_is_drawn_or_an_error(folder, tmp_path, monkeypatch, installed):
    """Exit code 0 means that the file is there."""
    run("patch", folder / "owl.safetensors", "--limit", 1, "--out", tmp_path / "e.safetensors")
    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", _no_browser)
    missing = {"kaleido": ["matplotlib"], "matplotlib": ["kaleido"], "neither": None}[installed]
    missing = missing or ["kaleido", "matplotlib"]
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, find=importlib.util.find_spec: None if name in missing else find(name),
    )
    for module in ("divergence_lens.cli.files", "divergence_lens.plots.export"):
        monkeypatch.setattr(f"{module}.find_spec", importlib.util.find_spec)
    figure = tmp_path / "figure.svg"
    code = {"kaleido": 1, "matplotlib": 0, "neither": 2}[installed]
    output = run("plot", tmp_path / "e.safetensors", figure, code=code)
    assert figure.exists() == (code == 0)
    if installed == "kaleido":
        assert "figure.svg was not drawn: plotly could not draw it (Chrome is missing)" in output
    if installed == "neither":
        assert "pip install 'divergence-lens[images]'" in output


def _no_browser(*_arguments, **_options):
    raise RuntimeError("Chrome is missing\nand more")
