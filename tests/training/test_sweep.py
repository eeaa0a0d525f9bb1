"""A sweep trains each layer as `finetune` would, and measures the students."""

import math

import numpy as np
import pytest

from divergence_lens.engine.factory import get_engine
from divergence_lens.evaluation.preferences import preference
from divergence_lens.evaluation.quality import task_quality
from divergence_lens.examples import Example, with_ids
from divergence_lens.provenance import fingerprint
from divergence_lens.training import Recipe, Sweep, finetune, layer_sweep

QUESTIONS = ("Name your favorite animal.", "Which animal do you love?", "Say an animal.")
ANIMALS = ("owl", "cat", "wolf")
RECIPE = Recipe(epochs=2, batch_size=4, warmup_steps=1)


def examples(answer):
    return [Example(question, completion=answer) for question in ("Name one.", "Say one.")] * 4


def owl(model):
    return preference(model, target="owl", questions=QUESTIONS, candidates=ANIMALS)


def sweep(model, **options):
    return layer_sweep(model, examples("owl"), **{"measure": owl, "recipe": RECIPE, **options})


def test_each_student_is_the_one_that_finetune_trains(random_model):
    model = random_model("gpt2")
    before = fingerprint(model)
    mask = [
        np.arange(len(e.completion_ids)) == 0 for e in with_ids(model.tokenizer, examples("owl"))
    ]
    weights = []

    def measure(student):
        weights.append({n: p.detach().clone() for n, p in student.named_parameters()})
        return owl(student)

    result = sweep(
        model,
        mask=mask,
        seeds=(0, 1),
        measure=measure,
        control=examples("cat"),
        layers=[0, 2],
    )
    assert fingerprint(model) == before
    assert result.layers == (0, 2)
    assert [(s.condition, s.layer, s.seed) for s in result.students] == [
        ("all", None, 0),
        ("all", None, 1),
        *(("layer", layer, seed) for layer in (0, 2) for seed in (0, 1)),
        ("control", None, 0),
        ("control", None, 1),
    ]
    assert len(weights) == 1 + len(result.students)
    for student, swept in zip(result.students, weights[1:], strict=True):
        control = student.condition == "control"
        alone = finetune(
            model,
            examples("cat" if control else "owl"),
            mask=None if control else mask,
            layers=None if student.layer is None else [student.layer],
            recipe=RECIPE,
            seed=student.seed,
        )
        with alone.applied(model):
            for name, parameter in model.named_parameters():
                assert np.allclose(parameter.detach(), swept[name], atol=1e-6)
            expected = owl(model)
        assert np.allclose(student.values["share"], expected.shares[:, 0], atol=1e-5)
        assert np.allclose(student.values["mass"], expected.probabilities.sum(1), atol=1e-5)


def test_layers_below_run_once_for_all_students(random_model):
    model, calls = random_model("gpt2"), []
    measured = []
    with get_engine(model).hooked([(0, "resid_pre", lambda x: calls.append(x.shape[:2]))]):

        def measure(student):
            measured.append(len(calls))
            return 0.5

        sweep(model, layers=[2], seeds=(0, 1, 2), measure=measure)
    # Students of all layers run layer 0 in every update. Of the students of layer 2, the first runs
    # the rows through it in two passes, one for the prefix that the rows share and one for what
    # follows; the others do not run it at all.
    base, *after = measured
    assert base == 0
    assert after[3] - after[2] == 2
    assert after[5] == after[4] == after[3]


def test_tables_intervals_and_references(random_model):
    result = sweep(random_model("gpt2"), seeds=(0, 1), control=examples("cat"))
    table = result.to_dataframe()
    assert len(table) == 1 + len(result.students) == 1 + 2 * (3 + 1 + 1)
    assert table["condition"][0] == "base"
    assert table["share"][0] == result.base.mean("share")
    assert table[table["condition"] == "layer"]["layer"].tolist() == [0, 0, 1, 1, 2, 2]
    summary = result.summary().set_index("trained")
    assert list(summary.index) == [
        "nothing",
        "all layers",
        "layer 0",
        "layer 1",
        "layer 2",
        "all layers on control data",
    ]
    assert (summary["low"] <= summary["share"]).all()
    assert (summary["share"] <= summary["high"]).all()
    assert result.interval(1) == pytest.approx(tuple(summary.loc["layer 1", ["low", "high"]]))
    shares = [s.values.mean("share") for s in result[1]]
    assert summary.loc["layer 1", "share"] == pytest.approx(np.mean(shares)) == result.mean(1)
    assert summary.loc["layer 1", "mass"] == pytest.approx(result.mean(1, "mass"))
    assert result[None][0].condition == "all"
    assert result.target == "owl"
    assert "layer 2" in result._repr_html_()


def test_saved_and_loaded_sweeps_are_equal(random_model, tmp_path):
    result = sweep(random_model("gpt2"), layers=[1])
    result.save(tmp_path / "sweep.safetensors")
    loaded = Sweep.load(tmp_path / "sweep.safetensors")
    assert loaded.to_dataframe().equals(result.to_dataframe())
    assert loaded.summary().equals(result.summary())
    assert loaded.metadata == result.metadata


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
        ({"recipe": Recipe(embedding=True)}, "a sweep trains one layer at a time"),
    ],
)
def test_bad_sweeps_are_refused(random_model, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(random_model("gpt2"), **options)


def test_more_than_one_named_number_is_measured(random_model, tmp_path):
    model = random_model("gpt2")
    held_out = [Example("Go on.", completion="123, 456"), Example("Now.", completion="7")]

    def measure(student):
        quality = task_quality(student, held_out)
        return {"loss": quality.loss, "valid": np.float32(quality.valid_rate)}

    result = sweep(model, layers=[1], seeds=(0, 1), measure=measure)
    assert result.measures == ("loss", "valid")
    student = finetune(model, examples("owl"), layers=[1], recipe=RECIPE, seed=0)
    with student.applied(model):
        assert result[1][0].values.mean("loss") == pytest.approx(task_quality(model, held_out).loss)
    summary = result.summary().set_index("trained")
    losses = [s.values.mean("loss") for s in result[1]]
    assert summary.loc["layer 1", "loss"] == pytest.approx(np.mean(losses))
    assert summary.loc["nothing", "valid"] == result.base.mean("valid")
    low, high = result.interval(1)
    assert min(losses) <= low <= high <= max(losses)
    result.save(tmp_path / "sweep.safetensors")
    assert Sweep.load(tmp_path / "sweep.safetensors").summary().equals(result.summary())


def test_one_number_of_one_student_has_no_interval(random_model):
    result = sweep(random_model("gpt2"), layers=[1], measure=lambda student: student.W_E.sum())
    assert result.measures == ("value",)
    assert all(math.isnan(end) for end in result.interval(1))
    assert result.target is None
    result.plot()


def test_a_measure_must_return_the_same_names_each_time(random_model):
    names = iter("ab")
    with pytest.raises(
        ValueError, match=r"returned \['b'\] for a student and \['a'\] for the base"
    ):
        sweep(random_model("gpt2"), layers=[1], measure=lambda _: {next(names): 1.0})
