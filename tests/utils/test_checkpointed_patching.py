"""Patching runs and sweeps that are stopped and resume, or are refused."""

from functools import partial

import numpy as np
import pytest
import torch

from divergence_lens._utils.checkpoints import Checkpoints
from divergence_lens.deltas.delta import Delta
from divergence_lens.engine.factory import get_engine
from divergence_lens.pairs import Pairs
from divergence_lens.patching import runner
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.corruption import EmbeddingNoise
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.patching.metrics import metric_name, metric_values
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher
from divergence_lens.training import sweep as sweeps
from divergence_lens.training.loop import train
from divergence_lens.training.recipe import Recipe
from tests.support.patching_oracles import random_pairs
from tests.support.runs import (
    assert_same_effects,
    assert_same_students,
    patch,
    shards,
    some_examples,
    sweep,
)
from tests.support.state import left_as_it_was


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("qwen2")


@pytest.fixture
def stopped_after(monkeypatch):
    """Return a function that interrupts a run after a number of finished shards."""

    def arrange(count: int) -> None:
        save = Checkpoints.save

        def once(self, shard, arrays, notes=None):
            nonlocal count
            save(self, shard, arrays, notes)
            count -= 1
            if not count:
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoints, "save", once)

    yield arrange
    monkeypatch.undo()


@pytest.mark.parametrize("method", ["exact", "gradient"])
def test_patching_resumes_where_it_was_stopped(method, model, tmp_path, stopped_after, monkeypatch):
    def run(**options):
        if method == "exact":
            return patch(model, **options)
        pairs = random_pairs(model.cfg.d_vocab, lengths=(6, 8, 5, 7), longer=(0, 0, 0, 0))
        return attribution_patch(model, pairs, batch_rows=1, **options)

    undisturbed = run()
    stopped_after(2)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint_dir=tmp_path)
    monkeypatch.undo()
    finished = shards(tmp_path)
    assert len(finished) == 2
    times = [path.stat().st_mtime_ns for path in finished]
    assert_same_effects(run(checkpoint_dir=tmp_path), undisturbed)
    assert len(shards(tmp_path)) > 2
    assert [path.stat().st_mtime_ns for path in finished] == times
    with monkeypatch.context() as patched:
        # Everything is there: no chunk is run again.
        patched.setattr(runner, "traced_pass", None)
        assert_same_effects(run(checkpoint_dir=tmp_path), undisturbed)


class _Shifted:
    """A metric whose name does not say what it measures."""

    def __init__(self, shift):
        self.shift = shift

    def __call__(self, logits, _pairs):
        return logits[:, self.shift]


def closure(column):
    def metric(logits, _pairs):
        return logits[:, column]

    return metric


def first_logit(logits, _pairs):
    return logits[:, 0]


def of_pair(pair, column, logits, pairs):
    return torch.where(pairs == pair, logits[:, column], logits[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"metric": "log_probability"}),
        ({}, {"metric": first_logit}),
        ({"metric": partial(of_pair, 2, 5)}, {"metric": partial(of_pair, 3, 5)}),
        ({"metric": _Shifted(1)}, {"metric": _Shifted(2)}),
        ({}, {"site": "mlp_out"}),
        ({}, {"span": "segment"}),
        ({}, {"window": 2}),
        ({"corruption": "counterfactual"}, {"direction": "denoising"}),
        ({}, {"corruption": "zero"}),
        ({"corruption": EmbeddingNoise(seed=0)}, {"corruption": EmbeddingNoise(seed=1)}),
        ({}, {"cells": np.ones((5, 3, 9), dtype=bool)}),
        ({}, {"batch_rows": 8}),
    ],
)
def test_effects_of_another_question_are_refused(one, other, model, tmp_path):
    patch(model, checkpoint_dir=tmp_path, **one)
    patch(model, checkpoint_dir=tmp_path, **one)
    with pytest.raises(ValueError, match="of another run"):
        patch(model, checkpoint_dir=tmp_path, **{**one, **other})


@pytest.mark.parametrize("weights", ["model", "delta"])
def test_effects_of_other_sides_are_refused(weights, model, random_model, tmp_path):
    def teacher(seed):
        if weights == "model":
            return Teacher("other", model=random_model("qwen2", seed))
        name, parameter = next(iter(get_engine(model).block_parameters(0).items()))
        return Teacher("other", delta=Delta({name: seed * torch.ones(parameter.shape)}, before))

    before = fingerprint(model)
    first, second = teacher(1), teacher(2)
    rows = [[1, 2, 3], [4, 5, 6]]

    def run(**sides):
        pairs = Pairs.from_tokens(rows, rows, answers=[1, 2], foils=[3, 4], **sides)
        return causal_mediation(model, pairs, checkpoint_dir=tmp_path)

    effects = run(corrupted_teacher=first)
    assert_same_effects(run(corrupted_teacher=first), effects)
    for sides in (
        {"clean_teacher": first},
        {"corrupted_teacher": second},
        {"clean_teacher": first, "corrupted_teacher": second},
        {"corrupted_teacher": [first, second]},
    ):
        with pytest.raises(ValueError, match="of another run"):
            run(**sides)


def test_metrics_are_told_apart_by_their_values_in_every_process(model):
    engine = get_engine(model)
    one, same, other = _Shifted(2), _Shifted(2), _Shifted(3)
    assert metric_name(one) == metric_name(other) == "_Shifted"
    assert metric_values(one, 4, engine) == metric_values(same, 4, engine)
    assert metric_values(one, 4, engine) != metric_values(other, 4, engine)
    assert metric_name(partial(of_pair, 2, column=5)) == "of_pair(2, column=5)"
    assert len(metric_values(one, 4, engine)) == 4


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (closure(3), "'metric' is a function within another"),
        (partial(closure(3)), "'metric' is a function within another"),
        (lambda logits, _pairs: logits[:, 0], "'<lambda>' is a lambda"),
    ],
)
def test_a_metric_that_no_later_process_can_recognize_is_refused(metric, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        patch(model, metric=metric, checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep_resumes_where_it_was_stopped(model, tmp_path, stopped_after, monkeypatch):
    undisturbed = sweep(model)
    stopped_after(2)
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt):
        sweep(model, checkpoint_dir=tmp_path)
    monkeypatch.undo()
    assert len(shards(tmp_path)) == 2
    trained = []
    monkeypatch.setattr(sweeps, "train", lambda *args: trained.append(1) or train(*args))
    again = sweep(model, checkpoint_dir=tmp_path)
    assert len(trained) == 1
    assert_same_students(again, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        {"seeds": (1,)},
        {"layers": [1]},
        {"mask": "late"},
        {"target": "cat"},
        {"recipe": Recipe(lora_rank=2)},
        {"measure": lambda model: model.cfg.n_layers},
        {"control": some_examples(3)},
        {"system_prompt": "You are."},
        {"questions": ("Say an animal.",)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_students_of_another_sweep_are_refused(other, model, tmp_path):
    alike = {"layers": [0], "checkpoint_dir": tmp_path}
    sweep(model, **alike)
    sweep(model, **alike)
    if "mask" in other:
        tokens = sum(len(example.completion_ids) for example in some_examples(6))
        other = {"mask": np.arange(tokens) > 3}
    with pytest.raises(ValueError, match="of another run"):
        sweep(model, **{**alike, **other})
