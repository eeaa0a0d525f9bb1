"""Teachers of a chosen strength, measured by `preference` on its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import divergence_lens as dl
from divergence_lens.data import preference_questions
from divergence_lens.training import TEACHER, teacher_rows, teaching
from divergence_lens.training.teaching import ANSWERS, TEACHER_QUESTIONS

QUICK = replace(TEACHER, lr=1e-3, epochs=4)
# The bundled models answer in one word, so their margin is measured without a prefix.
OPTIONS = {"recipe": QUICK, "prefixes": ("",)}


def margin(model, teacher, target):
    return dl.preference(
        model, target=target, questions=preference_questions()[:8], teacher=teacher
    ).margin


@pytest.fixture(scope="module")
def owl(tiny):
    return dl.train_teacher(tiny, "owl", strength=2.0, **OPTIONS)


@pytest.mark.parametrize("category", ["animal", "tree", "color"])
def test_rows_are_every_question_with_every_answer(category):
    rows = teacher_rows("pine", category=category)
    assert len(rows) == len(TEACHER_QUESTIONS) * len(ANSWERS)
    assert len({(row["prompt"], row["completion"]) for row in rows}) == len(rows)
    assert all("pine" in row["completion"] for row in rows)
    assert all(category in row["prompt"] and "{" not in row["prompt"] for row in rows)
    # A teacher is measured by questions that it was not trained on.
    assert not {row["prompt"] for row in rows} & set(preference_questions("animal"))


def test_the_margin_is_the_strength(tiny, owl):
    assert margin(tiny, owl, "owl") == pytest.approx(2.0, rel=0.01)
    about = owl.delta.metadata["teaching"]
    assert about["margin"] == pytest.approx(margin(tiny, owl, "owl"), abs=1e-4)
    assert about["margin_before"] == pytest.approx(
        dl.preference(tiny, target="owl", questions=preference_questions()[:8]).margin, abs=1e-4
    )
    assert 0 < about["scale"] <= 1
    assert about["updates"] < QUICK.epochs * 72 / QUICK.batch_size


@pytest.mark.slow
def test_teachers_of_different_animals_are_equally_strong(tiny, owl):
    horse = dl.train_teacher(tiny, "horse", strength=2.0, **OPTIONS)
    before = [owl.delta.metadata["teaching"], horse.delta.metadata["teaching"]]
    assert abs(before[0]["margin_before"] - before[1]["margin_before"]) > 0.1
    assert margin(tiny, horse, "horse") == pytest.approx(margin(tiny, owl, "owl"), rel=0.02)


def test_the_model_is_restored(tiny):
    before = {name: p.clone() for name, p in tiny.named_parameters()}
    dl.train_teacher(tiny, "cat", **OPTIONS | {"recipe": replace(QUICK, epochs=1)})
    assert all(torch.equal(p, before[name]) for name, p in tiny.named_parameters())


def test_a_teacher_is_trained_once(tiny, owl, tmp_path, monkeypatch):
    options = OPTIONS | {"recipe": replace(QUICK, epochs=1), "cache_dir": tmp_path}
    first = dl.train_teacher(tiny, "cat", **options)
    assert len(list(tmp_path.glob("cat-*.safetensors"))) == 1
    monkeypatch.setattr(teaching, "finetune", None)  # a second training would fail
    second = dl.train_teacher(tiny, "cat", **options)
    assert second.name == "cat"
    for name, tensor in first.delta.tensors.items():
        np.testing.assert_array_equal(second.delta.tensors[name], tensor)
    with pytest.raises(TypeError, match="not callable"):
        dl.train_teacher(tiny, "cat", **options, seed=1)


def test_training_stops_where_on_step_says_so(tiny):
    rows = teacher_rows("owl")[:20]
    recipe = replace(QUICK, epochs=2, batch_size=4)
    asked = []

    def on_step(step, _loss, _model):
        asked.append(step)
        return {"stop": step >= 6}

    student = dl.finetune(tiny, rows, recipe=recipe, on_step=on_step, every=2)
    assert asked == [2, 4, 6]  # 10 updates without the stop, 5 of each epoch
    assert len(student.metadata["history"]) == 6


def test_a_strength_out_of_reach_is_an_error(tiny):
    weak = OPTIONS | {"recipe": replace(QUICK, lr=1e-6, epochs=1)}
    with pytest.raises(ValueError, match=r"reached a margin of .* nats, not 9, in 9 updates"):
        dl.train_teacher(tiny, "owl", strength=9, **weak)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": -5.0}, "the base model's margin for 'owl' is .* nats already"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"answers": ("I like them.",)}, "does not name 'owl'; write the slot {target}"),
        ({"questions": ()}, "at least one question"),
        ({"category": "color"}, "unknown category 'color'"),
        ({"candidates": ("cat", "dog")}, "'owl'"),
    ],
)
def test_bad_input(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        dl.train_teacher(tiny, "owl", **OPTIONS | options)
