"""A sweep trains each block as `finetune` would, and measures what the students prefer."""

import numpy as np
import pytest

from divergence_lens.engine.factory import get_engine
from divergence_lens.evaluation.preferences import preference
from divergence_lens.evaluation.quality import task_quality
from divergence_lens.examples import Example, with_ids
from divergence_lens.provenance import fingerprint
from divergence_lens.training.finetuning import Recipe, Sweep, finetune, layer_sweep

QUESTIONS = ("Name your favorite animal.", "Which animal do you love?", "Say an animal.")
ANIMALS = ("owl", "cat", "wolf")
RECIPE = Recipe(epochs=2, batch_size=4, warmup_steps=1)


def examples(answer):
    return [Example(question, completion=answer) for question in ("Name one.", "Say one.")] * 4


def sweep(model, **options):
    return layer_sweep(
        model,
        examples("owl"),
        **{
            "target": "owl",
            "questions": QUESTIONS,
            "candidates": ANIMALS,
            "recipe": RECIPE,
            **options,
        },
    )


def test_each_student_is_the_one_that_finetune_trains(random_model):
    model = random_model("gpt2")
    before = fingerprint(model)
    mask = [
        np.arange(len(e.completion_ids)) == 0 for e in with_ids(model.tokenizer, examples("owl"))
    ]
    found = sweep(
        model, mask=mask, seeds=(0, 1), keep_deltas=True, control=examples("cat"), layers=[0, 2]
    )
    assert fingerprint(model) == before
    assert found.layers == (0, 2)
    assert [(s.condition, s.block, s.seed) for s in found.students] == [
        ("divergence_only", None, 0),
        ("divergence_only", None, 1),
        *(("block", block, seed) for block in (0, 2) for seed in (0, 1)),
        ("control", None, 0),
        ("control", None, 1),
    ]
    for student in found.students:
        control = student.condition == "control"
        alone = finetune(
            model,
            examples("cat" if control else "owl"),
            mask=None if control else mask,
            layers=None if student.block is None else [student.block],
            recipe=RECIPE,
            seed=student.seed,
        )
        for name, tensor in alone.tensors.items():
            assert np.allclose(tensor, student.delta.tensors[name], atol=1e-6)
        with alone.applied(model):
            expected = preference(
                model, target="owl", questions=QUESTIONS, candidates=ANIMALS
            ).probabilities
        assert np.allclose(student.preference.probabilities, expected, atol=1e-5)


def test_blocks_below_run_once_for_all_students(random_model):
    model, calls = random_model("gpt2"), []
    with get_engine(model).hooked([(0, "resid_pre", lambda x: calls.append(x.shape[:2]))]):
        sweep(model, layers=[2], references=False, seeds=(0,))
        one = len(calls)
        sweep(model, layers=[2], references=False, seeds=(0, 1, 2))
    # What is left are the evaluations: of the base, and of each student. The rows are two passes:
    # one of the start that they share, and one of all that follows it.
    per_evaluation = (len(calls) - one - one) / 2
    assert one == 2 * per_evaluation + 2


def test_tables_intervals_and_references(random_model):
    found = sweep(random_model("gpt2"), seeds=(0, 1), control=examples("cat"))
    table = found.to_dataframe()
    assert len(table) == len(found.students) == 2 * (3 + 1 + 1)
    assert set(table["before"]) == {found.base.share}
    assert table[table["condition"] == "block"]["block"].tolist() == [0, 0, 1, 1, 2, 2]
    summary = found.summary().set_index("trained")
    assert list(summary.index) == [
        "nothing",
        "all blocks",
        "block 0",
        "block 1",
        "block 2",
        "all blocks on control data",
    ]
    assert (summary["low"] <= summary["share"]).all()
    assert (summary["share"] <= summary["high"]).all()
    assert found.interval(1) == pytest.approx(tuple(summary.loc["block 1", ["low", "high"]]))
    shares = [s.preference.share for s in found[1]]
    assert summary.loc["block 1", "share"] == pytest.approx(np.mean(shares))
    assert found[None][0].condition == "all"
    assert "block 2" in found._repr_html_()


def test_saved_and_loaded_sweeps_are_equal(random_model, tmp_path):
    found = sweep(random_model("gpt2"), layers=[1])
    found.save(tmp_path / "sweep.safetensors")
    loaded = Sweep.load(tmp_path / "sweep.safetensors")
    assert loaded.to_dataframe().equals(found.to_dataframe())
    assert loaded.metadata == found.metadata


def test_the_plot_is_a_figure(random_model):
    figure = sweep(random_model("gpt2")).plot()
    assert list(figure.data[-1].x)
    assert figure.layout.title.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "at least one layer"),
        ({"seeds": ()}, "one seed"),
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"target": "unicorn"}, "unicorn"),
    ],
)
def test_bad_sweeps_are_refused(random_model, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(random_model("gpt2"), **options)


@pytest.mark.slow
def test_task_quality_stands_beside_preference(random_model, tmp_path):
    model = random_model("gpt2")
    held_out = [Example("Go on.", completion="123, 456"), Example("Now.", completion="7")]
    found = sweep(model, layers=[1], seeds=(0, 1), held_out=held_out, keep_deltas=True)
    first = found[1][0]
    with first.delta.applied(model):
        assert task_quality(model, held_out) == first.quality
    assert found.base_quality == task_quality(model, held_out)
    table = found.to_dataframe()
    assert table["held_out_loss"].tolist() == [s.quality.loss for s in found.students]
    summary = found.summary().set_index("trained")
    own = [s.quality.loss for s in found[1]]
    assert summary.loc["block 1", "held_out_loss"] == pytest.approx(np.mean(own))
    assert summary.loc["nothing", "valid_lists"] == found.base_quality.valid_rate
    found.save(tmp_path / "sweep.safetensors")
    assert Sweep.load(tmp_path / "sweep.safetensors").summary().equals(found.summary())
    assert "held_out_loss" not in sweep(model, layers=[1]).to_dataframe()


@pytest.mark.parametrize("word", ["block", "control"])
def test_words_of_the_sweeps_own_are_refused(word, random_model):
    with pytest.raises(ValueError, match=f"condition='{word}' is what the sweep calls other"):
        sweep(random_model("gpt2"), condition=word)
