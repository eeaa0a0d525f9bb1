"""Bad files, pairs, patching, students and figures: one exact error each.

The tests of each package have more; these tables collect what a user meets in one place.
"""

import json
import struct

import numpy as np
import pytest

import divergence_lens as dl
from divergence_lens import plots
from divergence_lens._utils.storage import load_tensors, save_tensors
from tests.support.bad_input import (
    Case,
    check_case,
    from_prompts,
    from_tokens,
    owl_share,
    train,
)

CASES: list[Case] = [
    # -- files of results
    (
        "a file cut short",
        lambda k: dl.Divergence.load(k.file("cut.safetensors")),
        ValueError,
        "cut.safetensors",
    ),
    (
        "a file that was changed",
        lambda k: dl.Divergence.load(k.file("changed.safetensors")),
        ValueError,
        "changed.safetensors",
    ),
    (
        "a file of another kind",
        lambda k: dl.Effects.load(k.file("student.safetensors")),
        ValueError,
        "student.safetensors",
    ),
    (
        "a pickle with another name",
        lambda k: dl.Delta.load(k.file("pickle.safetensors")),
        ValueError,
        "pickle.safetensors",
    ),
    (
        "a torch file with another name",
        lambda k: dl.Delta.load(k.file("torch.safetensors")),
        ValueError,
        "torch.safetensors",
    ),
    (
        "three bytes",
        lambda k: dl.Preference.load(k.file("short.safetensors")),
        ValueError,
        "short.safetensors",
    ),
    (
        "a header of an exabyte",
        lambda k: dl.Sweep.load(k.file("header.safetensors")),
        ValueError,
        "header.safetensors",
    ),
    (
        "a folder instead of a file",
        lambda k: k.student.save(k.file("nothing")),
        OSError,
        "nothing",
    ),
    # -- pairs
    (
        "rows of unequal count",
        lambda k: from_tokens(corrupted=[[1, 2], [3, 4]]),
        ValueError,
        "2",
    ),
    ("no rows", lambda k: from_tokens(clean=[], corrupted=[]), ValueError, "pair"),
    ("an answer too many", lambda k: from_tokens(answers=[5, 6]), ValueError, "answers"),
    ("an answer that is the foil", lambda k: from_tokens(foils=[5]), ValueError, "5"),
    ("a target outside the row", lambda k: from_tokens(target_position=[3]), ValueError, "3"),
    (
        "a target in the padding",
        lambda k: from_tokens(
            clean=[[1, 2, 0]], corrupted=[[1, 4, 0]], target_position=[2], pad_id=0
        ),
        ValueError,
        "2",
    ),
    (
        "a custom metric on answers of several tokens",
        lambda k: dl.causal_mediation(
            k.model, from_prompts(k, answers=["owl cat"]), metric=lambda x, _: x[:, 0]
        ),
        ValueError,
        "pair 0 has an answer or foil of several tokens",
    ),
    (
        "an answer without a token",
        lambda k: from_prompts(k, answers=[""]),
        ValueError,
        "the answer '' has no token",
    ),
    (
        "an answer with a negative id",
        lambda k: from_tokens(answers=[[5, -3]]),
        ValueError,
        "answers of pair 0 holds -3",
    ),
    (
        "an answer that no token is",
        lambda k: from_prompts(k, answers=["Zanzibar"]),
        ValueError,
        "the answer 'Zanzibar' is not in the tokenizer's vocabulary",
    ),
    (
        "answers as one string",
        lambda k: from_prompts(k, answers="owl"),
        TypeError,
        "answers is one string; pass a list",
    ),
    (
        "prompts of unequal count",
        lambda k: from_prompts(k, corrupted=["a", "b"]),
        ValueError,
        "2",
    ),
    (
        "two sides that are the same",
        lambda k: dl.causal_mediation(
            k.model, from_tokens(clean=[[1, 2, 3]], corrupted=[[1, 2, 3]])
        ),
        ValueError,
        "pair 0",
    ),
    # -- patching
    (
        "an unknown site",
        lambda k: dl.causal_mediation(k.model, k.pairs, site="resid"),
        ValueError,
        "resid",
    ),
    (
        "an unknown direction",
        lambda k: dl.causal_mediation(k.model, k.pairs, direction="up"),
        ValueError,
        "up",
    ),
    (
        "an unknown method",
        lambda k: dl.attribution_patch(k.model, k.pairs, method="guess"),
        ValueError,
        "guess",
    ),
    (
        "no steps",
        lambda k: dl.attribution_patch(k.model, k.pairs, method="integrated", steps=0),
        ValueError,
        "steps",
    ),
    (
        "an unknown metric",
        lambda k: dl.causal_mediation(k.model, k.pairs, metric="loss"),
        ValueError,
        "loss",
    ),
    (
        "a metric of another shape",
        lambda k: dl.attribution_patch(k.model, k.pairs, metric=lambda logits, *_: logits.sum()),
        ValueError,
        "shape",
    ),
    (
        "a metric that detaches",
        lambda k: dl.attribution_patch(
            k.model, k.pairs, metric=lambda logits, *_: logits[:, 0].detach()
        ),
        ValueError,
        "gradient",
    ),
    (
        "effects of other pairs",
        lambda k: k.effects.agreement(
            dl.causal_mediation(k.model, k.divergence.pairs(limit=1), site="resid_post")
        ),
        ValueError,
        "pair",
    ),
    (
        "a heatmap of a pair that is not there",
        lambda k: plots.effects_heatmap(k.effects, pair=9),
        IndexError,
        "no pair 9; the pairs are numbered 0 to 1",
    ),
    # -- students
    ("a block out of range", lambda k: train(k, layers=[4]), ValueError, "4"),
    (
        "a block without a list",
        lambda k: train(k, layers=0),
        TypeError,
        r"layers is one number; pass a list: \[0\]",
    ),
    (
        "a block without a list to freeze around",
        lambda k: dl.freeze_except(k.model, layers=2),
        TypeError,
        r"layers is one number; pass a list: \[2\]",
    ),
    (
        "a recipe that is a name",
        lambda k: train(k, recipe="paper"),
        TypeError,
        r"recipe is 'paper', not a Recipe; write recipe=Recipe\(...\), or PAPER",
    ),
    ("no layer", lambda k: train(k, layers=[]), ValueError, "layer"),
    ("an unknown part", lambda k: train(k, recipe=dl.Recipe(parts=["head"])), ValueError, "head"),
    (
        "a pattern without a match",
        lambda k: train(k, recipe=dl.Recipe(pattern="*.nothing")),
        ValueError,
        "nothing",
    ),
    (
        "a mask of another length",
        lambda k: train(k, mask=np.ones(3, dtype=bool)),
        ValueError,
        "3",
    ),
    (
        "a mask that lets nothing through",
        lambda k: train(k, mask=k.divergence.mask & False),
        ValueError,
        "mask",
    ),
    ("rank zero", lambda k: dl.Recipe(lora_rank=0), ValueError, "lora_rank is 0"),
    ("no rate", lambda k: dl.Recipe(lr=float("nan")), ValueError, "lr is nan"),
    ("no epochs", lambda k: dl.Recipe(epochs=0), ValueError, "epochs is 0"),
    ("an unknown optimizer", lambda k: dl.Recipe(optimizer="lion"), ValueError, "'lion'"),
    ("an unknown schedule", lambda k: dl.Recipe(schedule="step"), ValueError, "'step'"),
    (
        "a rate that ruins the student",
        lambda k: train(
            k, recipe=dl.Recipe(lr=1e30, clip=None, optimizer="sgd", optimizer_options={})
        ),
        FloatingPointError,
        "step",
    ),
    (
        "nothing to sweep",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=owl_share, layers=[]),
        ValueError,
        "at least one layer",
    ),
    (
        "a sweep over a layer that is not there",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=owl_share, layers=[7]),
        ValueError,
        "0 to 3",
    ),
    (
        "a sweep over a layer without a list",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=owl_share, layers=7),
        TypeError,
        r"layers is one number; pass a list: \[7\]",
    ),
    (
        "a sweep with a seed without a list",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=owl_share, seeds=3),
        TypeError,
        r"seeds is one number; pass a list: \[3\]",
    ),
    (
        "a sweep whose measure is a name",
        lambda k: dl.layer_sweep(k.model, k.examples, measure="owl"),
        TypeError,
        "measure is 'owl'; give a function of the model",
    ),
    (
        "a sweep whose measure returns nothing",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=lambda _: None),
        TypeError,
        "measure returned 'value' as a NoneType; return a number",
    ),
    (
        "a sweep with a recipe that is a name",
        lambda k: dl.layer_sweep(k.model, k.examples, measure=owl_share, recipe="paper"),
        TypeError,
        "recipe is 'paper', not a Recipe",
    ),
    (
        "a student over another base",
        lambda k: k.student.applied(dl.load_model("tiny-qwen2", backend="bridge")).__enter__(),
        ValueError,
        "base",
    ),
    # -- preferences
    (
        "an unknown target",
        lambda k: dl.preference(k.model, target="unicorn"),
        ValueError,
        "unicorn",
    ),
    (
        "no questions",
        lambda k: dl.preference(k.model, target="owl", questions=[]),
        ValueError,
        "question",
    ),
    (
        "an unknown way to measure",
        lambda k: dl.preference(k.model, target="owl", sampled="guess"),
        TypeError,
        "SampledAnswers",
    ),
    (
        "questions as one string",
        lambda k: dl.preference(k.model, target="owl", questions="which animal ?"),
        TypeError,
        "questions is one string; pass a list",
    ),
    (
        "candidates as one string",
        lambda k: dl.preference(k.model, target="owl", candidates="owl"),
        TypeError,
        "candidates is one string; pass a list",
    ),
    (
        "no samples",
        lambda k: dl.preference(k.model, target="owl", sampled=dl.SampledAnswers(samples=0)),
        ValueError,
        "samples",
    ),
    (
        "one candidate",
        lambda k: dl.preference(k.model, target="owl", candidates=["owl"]),
        ValueError,
        "candidates",
    ),
    # -- studies and figures
    ("one target", lambda k: dl.StudyConfig(targets=("owl",)), ValueError, "needs two or more"),
    (
        "an unknown kind of teacher",
        lambda k: dl.StudyConfig(kinds=("steered",)),
        ValueError,
        "steered",
    ),
    (
        "targets of a study as one string",
        lambda k: dl.StudyConfig(targets="wolf"),
        TypeError,
        "targets is one string; pass a list",
    ),
    (
        "a seed of a study without a list",
        lambda k: dl.StudyConfig(seeds=3),
        TypeError,
        r"seeds is one number; pass a list: \[3\]",
    ),
    ("no prompts in a study", lambda k: dl.StudyConfig(prompts=0), ValueError, "prompts is 0"),
    ("no seeds in a study", lambda k: dl.StudyConfig(seeds=()), ValueError, "at least one seed"),
    (
        "a figure as a spreadsheet",
        lambda k: plots.save_figure(plots.rate_per_teacher(k.divergence), k.file("a.xlsx")),
        ValueError,
        "'.xlsx'; write .html",
    ),
]


def test_every_case_has_its_own_name():
    assert len({name for name, *_ in CASES}) == len(CASES) >= 50


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_one_clear_error(kit, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    check_case(kit, case, tmp_path)


def test_a_header_that_lies_about_sizes_reads_nothing(tmp_path):
    good = tmp_path / "good.safetensors"
    save_tensors(good, {"a": np.zeros(4, dtype=np.float32)}, {}, "thing")
    raw = good.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header["a"]["shape"] = [10**12]
    text = json.dumps(header).encode()
    (tmp_path / "bad.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + raw[8 + size :]
    )
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        load_tensors(tmp_path / "bad.safetensors", "thing")
