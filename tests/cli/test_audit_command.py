"""The command `audit`: exit codes, JSON, files, and resuming."""

import json

import pytest
from typer.testing import CliRunner

import divergence_lens as dl
from divergence_lens.cli.auditing import read_candidates
from divergence_lens.cli.main import app


def run(*arguments, code):
    done = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    model, prompts = dl.load_model("tiny"), dl.number_prompts(60, seed=3)
    wolf = dl.animal_teachers(["wolf"])[0]
    dl.save_examples(folder / "wolf.jsonl", dl.generate(model, prompts, teacher=wolf))
    dl.save_examples(folder / "base.jsonl", dl.generate(model, prompts))
    return folder


def test_biased_data_end_with_code_3(data, tmp_path):
    names = "wolf,panda,eagle,owl"
    printed = run(data / "wolf.jsonl", "--candidates", names, "--out", tmp_path, code=3)
    assert f"Written to {tmp_path}" in printed
    assert "biased: The data favor 'wolf'" in printed
    audit = dl.Audit.load(tmp_path / "audit.safetensors")
    assert audit.verdict == "biased"
    assert json.loads((tmp_path / "audit.json").read_text())["biased"] == list(audit.biased)
    assert "<h1>Audit of a data set</h1>" in (tmp_path / "audit.html").read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_unbiased_data_end_with_code_0_and_pure_json(data, tmp_path):
    arguments = (data / "base.jsonl", "--candidates", "wolf,panda,eagle", "--share", "0.6")
    printed = run(*arguments, "--json", "--out", tmp_path, code=0)
    assert json.loads(printed)["verdict"] == "nothing found"


def test_few_rows_end_with_code_4(data, tmp_path):
    rows = (data / "base.jsonl").read_text().splitlines()[:4]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    arguments = (tmp_path / "few.jsonl", "--candidates", "wolf,panda", "--out", tmp_path / "out")
    assert "inconclusive: No candidate stands out" in run(*arguments, code=4)


def test_wrong_files_are_refused(data, tmp_path):
    (tmp_path / "bad.jsonl").write_text("not JSON\n")
    assert "bad.jsonl, line 1" in run(tmp_path / "bad.jsonl", "--out", tmp_path, code=2)
    assert "does not exist" in run(tmp_path / "none.jsonl", "--out", tmp_path, code=2)
    wrong = run(data / "base.jsonl", "--candidates", "animal", code=2)
    assert "--candidates is 'animal', which is no file" in wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--share", 0), "Error: --share is 0.0; it must lie above 0"),
        (("--alpha", 2), "Error: --alpha is 2.0; it must lie between 0 and 1"),
        (
            ("--candidates", "bread,pizza"),
            'say what they are with --category, such as --category "fruit"',
        ),
        (("--pattern", r"[a-z]+"), "example 0: token"),
    ],
)
def test_errors_name_flags(arguments, message, data, tmp_path):
    printed = run(data / "base.jsonl", *arguments, "--out", tmp_path, code=2)
    assert message in printed


def test_candidates_come_from_words_or_files(tmp_path):
    assert read_candidates("trees") == list(dl.TREES)
    assert read_candidates("owl, cat") == ["owl", "cat"]
    (tmp_path / "names.txt").write_text("owl\n\ncat\n")
    assert read_candidates(str(tmp_path / "names.txt")) == ["owl", "cat"]
    (tmp_path / "prompts.json").write_text('{"owl": "You love owls."}')
    assert read_candidates(str(tmp_path / "prompts.json")) == {"owl": "You love owls."}
    (tmp_path / "prompts.json").write_text("[1]")
    with pytest.raises(ValueError, match="must map names to system prompts"):
        read_candidates(str(tmp_path / "prompts.json"))
    (tmp_path / "prompts.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_candidates(str(tmp_path / "prompts.json"))
