"""`patch` from two prompts or a file of pairs, its heatmap in the terminal, and `plot`."""

import json
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import divergence_lens as dl
from divergence_lens.cli import terminal
from divergence_lens.cli.main import app
from divergence_lens.plots import style

CLEAN, CORRUPTED = "Here are numbers: 412, 467, 530.", "Here are numbers: 412, 530, 467."
PROMPTS = ("--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", " 1", "--foil", " 9")


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def model():
    return dl.load_model("tiny")


def from_prompts(model, **options):
    return dl.Pairs.from_prompts(model, clean=[CLEAN], corrupted=[CORRUPTED], **options)


@pytest.mark.parametrize(
    ("options", "metric"),
    [
        ((), "logit_difference"),
        (("--direction", "denoising", "--site", "attn_out"), "probability_difference"),
        (("--span", "segment"), "log_probability"),
        (("--method", "integrated"), "kl"),
        (("--site", "z"), "logit_difference"),
    ],
)
def test_two_prompts_are_patched_as_in_the_library(model, tmp_path, options, metric):
    out = tmp_path / "effects.safetensors"
    output = run("patch", *PROMPTS, *options, "--metric", metric, "--out", out)
    named = {name.removeprefix("--"): value for name, value in zip(options[::2], options[1::2])}  # noqa: B905
    pairs = from_prompts(model, answers=[" 1"], foils=[" 9"], chat=False)
    function = dl.attribution_patch if "method" in named else dl.causal_mediation
    expected = function(model, pairs, metric=metric, **named)
    np.testing.assert_array_equal(dl.Effects.load(out).values, expected.values)
    assert repr(expected) in output


def test_an_effect_equals_a_hand_written_patch(model, tmp_path):
    """The oracle is a hook of TransformerLens, on the ids of the plain tokenizer."""
    out = tmp_path / "effects.safetensors"
    run("patch", *PROMPTS, "--out", out)
    effects = dl.Effects.load(out)
    tokenizer = model.tokenizer
    clean, corrupted = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (CLEAN, CORRUPTED))
    answer, foil = (
        tokenizer.convert_tokens_to_ids(effects.answer_labels[0][0].strip()),
        tokenizer.convert_tokens_to_ids(effects.foil_labels[0][0].strip()),
    )
    layer, position = 1, int(np.flatnonzero(effects.differs[0])[0])
    name = f"blocks.{layer}.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(corrupted, names_filter=name)

        def patch(state, hook):
            state[:, position] = cache[name][:, position]
            return state

        patched = model.run_with_hooks(clean, fwd_hooks=[(name, patch)])[0, -1]
        plain = model(clean)[0, -1]
    expected = (patched[answer] - patched[foil]) - (plain[answer] - plain[foil])
    assert abs(float(expected)) > 1e-3
    assert effects.values[0, layer, position] == pytest.approx(float(expected), abs=1e-4)


def test_words_that_the_tiny_model_does_not_know_are_reported_with_the_remedy():
    france, italy = "The capital of France is", "The capital of Italy is"
    words = ("--clean", france, "--corrupted", italy, "--answer", " Paris", "--foil", " Rome")
    output = run("patch", *words, code=2)
    assert "' Paris' is not in the tokenizer's vocabulary; the bundled model 'tiny'" in output
    assert "choose another with --model" in output


def test_a_chat_template_and_a_system_prompt(model, tmp_path):
    out = tmp_path / "effects.safetensors"
    run("patch", *PROMPTS, "--chat", "--system", "You love owls.", "--out", out)
    pairs = from_prompts(model, answers=[" 1"], foils=[" 9"], system_prompt="You love owls.")
    assert dl.Effects.load(out).labels == pairs.labels


def test_pairs_are_read_from_json_lines(model, tmp_path):
    rows = [
        {"clean": CLEAN, "corrupted": CORRUPTED, "answer": " 1", "foil": " 9"},
        {"clean": CORRUPTED, "corrupted": CLEAN, "answer": " 9", "foil": " 1"},
        {"clean": CLEAN, "corrupted": CORRUPTED, "answer": " 2", "foil": " 3"},
    ]
    path, out = tmp_path / "pairs.jsonl", tmp_path / "effects.safetensors"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    output = run("patch", path, "--limit", 2, "--out", out)
    assert len(dl.Effects.load(out)) == 2
    assert "mean of 2 of 2 pairs" in output
    run("patch", path, "--force", "--out", out)
    assert len(dl.Effects.load(out)) == 3
    assert "of 3 pairs" not in run("patch", path, "--pair", 1, "--force", "--out", out)


def test_the_terminal_shows_every_number_if_it_has_no_colors(model, tmp_path):
    out = tmp_path / "effects.safetensors"
    output = run("patch", *PROMPTS, "--out", out)
    effects = dl.Effects.load(out)
    shares = effects.normalized().values[0]
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    assert lines[start].split() == ["layer", "0", "1", "2", "3"]
    for position, line in enumerate(lines[start + 1 : start + 1 + shares.shape[1]]):
        assert line.startswith("*") == effects.differs[0][position]
        numbers = [float(number) for number in line.split()[-4:]]
        np.testing.assert_allclose(numbers, shares[:, position], atol=0.0051)


def test_a_narrow_terminal_shows_colors_without_numbers(model, monkeypatch):
    effects = dl.causal_mediation(model, from_prompts(model, answers=[" 1"], foils=[" 9"]))
    narrow = Console(width=30, color_system="truecolor", force_terminal=True, record=True)
    monkeypatch.setattr(terminal, "Console", lambda **_: narrow)
    terminal.print_heatmaps([effects], 0)
    text = narrow.export_text(clear=False)
    styled = narrow.export_text(styles=True)
    # Only the caption and the header hold numbers of the heatmap.
    assert "0." not in "".join(text.splitlines()[3:])
    assert all(len(line) <= 30 for line in text.splitlines()[2:])
    # The strongest cell has the color at the end of the scale.
    assert re.search(r"48;2;(102;44;0|5;48;97)m", styled)
    assert terminal.SCALE == style.DIVERGING


def test_several_sites_have_their_files_their_heatmaps_and_one_figure(model, tmp_path):
    out, figure = tmp_path / "e.safetensors", tmp_path / "sites.html"
    sites = ("--site", "attn_out", "--site", "z", "--site", "attn_out")
    output = run("patch", *PROMPTS, *sites, "--out", out)
    pairs = from_prompts(model, answers=[" 1"], foils=[" 9"], chat=False)
    for site in ("attn_out", "z"):
        expected = dl.causal_mediation(model, pairs, site=site)
        loaded = dl.Effects.load(tmp_path / f"e-{site}.safetensors")
        # Sites that are patched together share batches, which changes the rounding.
        np.testing.assert_allclose(loaded.values, expected.values, atol=1e-5)
        assert f"{site}, exact, noising, in shares of the total effect" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "e-attn_out.safetensors",
        "e-z.safetensors",
    ]
    assert output.count("layer  ") == 2
    output = run("patch", *PROMPTS, *sites, "--figure", figure)
    assert "layer  " not in output
    assert "summed over heads (z)" in figure.read_text()


def test_a_figure_replaces_the_heatmap(tmp_path):
    figure = tmp_path / "out.svg"
    output = run("patch", *PROMPTS, "--figure", figure)
    assert figure.read_text().lstrip().startswith("<")
    assert "layer  " not in output
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.fixture(scope="module")
def results(tmp_path_factory, model):
    """One saved result of each kind."""
    folder = tmp_path_factory.mktemp("results")
    owl, cat = dl.animal_teachers(["owl", "cat"])
    examples = dl.generate(model, dl.number_prompts(12, seed=0, instructions=False), teacher=owl)
    divergence = dl.find_divergence(model, examples, teacher=owl, counterfactuals=[cat])
    pairs = divergence.pairs(limit=3)
    student = dl.finetune(
        model, examples, layers=[0], every=4, on_step=lambda *_: {"preference": 0.5}
    )
    saved = {
        "effects": dl.causal_mediation(model, pairs),
        "gradient": dl.attribution_patch(model, pairs),
        "heads": dl.causal_mediation(model, pairs[:1], site="z"),
        "divergence": divergence,
        "preference": dl.preference(model, target="owl"),
        "sweep": dl.layer_sweep(
            model, examples, layers=[0], measure=lambda m: dl.preference(m, target="owl")
        ),
        "cross_patch": dl.cross_patch(
            model, student, dl.Pairs.from_disagreements(model, student, pairs.clean)
        ),
        "student": student,
        "plain": dl.finetune(model, examples[:2], layers=[0]),
        "attention": dl.causal_mediation(model, pairs, site="attn_out"),
    }
    saved["edges"] = dl.edge_scores(model, pairs, method="gradient", span="position")
    saved["summed"] = dl.edge_scores(model, pairs, method="gradient")
    saved["circuit"] = saved["summed"].circuit(top=20)
    saved["curve"] = dl.faithfulness_curve(model, pairs[:1], saved["summed"], shares=(0.1, 1))
    saved["patterns"] = dl.attention_patterns(model, pairs, heads=[(0, 1)])
    saved["audit"] = dl.audit(model, examples, candidates=["owl", "cat", "wolf"])
    for name, result in saved.items():
        result.save(folder / f"{name}.safetensors")
    return folder


def arguments(call, out):
    """The results that begin a call, the figure, and the options after them."""
    named = [word for word in call if not str(word).startswith("--")]
    options = next((i for i, word in enumerate(call) if word not in named), len(call))
    return [*(f"{name}.safetensors" for name in call[:options]), out, *call[options:]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["effects"], "mean of 3 pairs"),
        (["effects", "--item", 1], "pair 1 of 3"),
        (["effects", "--kind", "segments"], "by layer and segment"),
        (["effects", "--kind", "segments", "--orientation", "layers_across"], "segment"),
        (["effects", "--kind", "layers"], "layer by layer"),
        (["gradient", "--kind", "agreement", "--other", "effects.safetensors"], "Pearson"),
        (["heads", "--kind", "heads"], "by layer and head"),
        (["divergence"], "counterfactual"),
        (["divergence", "--kind", "positions"], "position"),
        (["divergence", "--kind", "tokens", "--item", 2], "owl"),
        (["preference"], "owl"),
        (["preference", "--other", "preference.safetensors"], "after"),
        (["sweep"], "layer"),
        (["cross_patch"], "crossed at every boundary"),
        (["student"], "Preference over training"),
        (["student", "--measure", "loss"], "Loss over training"),
        (["plain"], "Loss over training"),
        (["effects", "attention"], "attn_out"),
        (["effects", "attention", "--kind", "segments"], "attn_out"),
        (["effects", "attention", "--kind", "layers", "--item", 0], "attn_out"),
        (["effects", "gradient"], "gradient"),
        (["audit"], "Audit: "),
        (["edges", "--item", 2], "edges of pair 2"),
        (["circuit"], "Circuit of 20 edges"),
        (["curve"], "Faithfulness over circuit size"),
        (["patterns", "--item", 1], "clean"),
    ],
)
def test_any_saved_result_is_drawn_again(results, tmp_path, monkeypatch, call, words):
    monkeypatch.chdir(results)
    out = tmp_path / "figure.html"
    run("plot", *arguments(call, out))
    assert words in out.read_text(encoding="utf-8")


def test_files_of_one_name_in_two_folders_are_both_drawn(results, tmp_path):
    for name in ("gradient", "effects"):
        (tmp_path / name).mkdir()
        copy = tmp_path / name / "same.safetensors"
        copy.write_bytes((results / f"{name}.safetensors").read_bytes())
    out = tmp_path / "figure.html"
    run("plot", *(tmp_path / name / "same.safetensors" for name in ("gradient", "effects")), out)
    text = out.read_text(encoding="utf-8")
    assert text.count('"type":"heatmap"') == 2


def test_the_title_the_caption_and_the_width_are_chosen(results, tmp_path):
    sizes, texts = [], []
    for options in ((), ("--no-title", "--no-caption"), ("--width", 180)):
        out = tmp_path / f"{len(sizes)}.svg"
        run("plot", results / "effects.safetensors", out, *options)
        text = out.read_text(encoding="utf-8")
        sizes.append(float(re.search(r'<svg[^>]* width="([\d.]+)', text)[1]))
        texts.append("Effect of a patch" in text)
    assert texts == [True, False, True]
    assert sizes[2] / sizes[0] == pytest.approx(180 / 80, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["effects", "--kind", "tokens"], "effects has no figure 'tokens'"),
        (["effects", "--kind", "agreement"], "belong together"),
        (["effects", "--item", 7], "there is no pair 7"),
        (["edges", "--item", 7], "pair is 7"),
        (["summed"], "summed over positions"),
        (["effects", "--kind", "agreement", "--other", "sweep.safetensors"], "holds sweep"),
        (["student", "--measure", "accuracy"], "has no column 'accuracy'"),
        (["effects", "preference"], "holds preference; only effects are drawn in one figure"),
        (["effects", "heads", "--kind", "heads"], "--kind heads draws one result"),
        (["effects", "heads"], "'z' are not of the same pairs"),
    ],
)
def test_a_figure_that_does_not_exist_is_refused(results, tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(results)
    out = tmp_path / "figure.html"
    assert message in run("plot", *arguments(call, out), code=2)
    assert not list(tmp_path.iterdir())
