"""Work that is done once, left out or stored gives the same student."""

import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example
from divergence_lens.models import load_model
from divergence_lens.training import finetune
from divergence_lens.training import prefix as _prefix
from divergence_lens.training import variables as _variables
from divergence_lens.training.rows import training_rows
from tests.support.models import FAMILIES, chat_tokenizer, random_hf_model
from tests.support.training import (
    SGD,
    SHORT,
    largest_difference,
    number_lists,
    random_mask,
    reference_loss,
    same_bits,
)


@pytest.mark.parametrize("layers", [[0], [2], None])
def test_cached_recomputed_and_spilled_residuals_give_the_same_student(random_model, layers):
    model, examples = random_model("qwen2"), number_lists(10)
    cached, recomputed, spilled = (
        finetune(model, examples, layers=layers, recipe=replace(SHORT, cache_bytes=cache_bytes))
        for cache_bytes in (2**30, 0, 1)
    )
    assert same_bits(cached, spilled)
    assert largest_difference(cached, recomputed) < 1e-6


def test_spilled_residuals_are_in_a_file_that_is_deleted_afterwards(
    random_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def look(step, loss, model):
        seen.append([path.stat().st_size for path in tmp_path.rglob("residuals")])

    model = random_model("gpt2")
    finetune(model, number_lists(6), layers=[2], recipe=replace(SHORT, cache_bytes=1), on_step=look)
    rows = training_rows(model, number_lists(6))
    # The tokens that all rows begin with are held once, in memory.
    assert rows.shared > 4
    assert seen[0] == [int((rows.lengths - rows.shared).sum()) * 32 * 4]
    assert not list(tmp_path.iterdir())


def test_frozen_layers_run_once_and_not_in_every_epoch(random_model):
    model, calls = random_model("gpt2"), []
    recipe = replace(SHORT, epochs=5, batch_size=10)
    with get_engine(model).hooked([(1, "resid_pre", lambda x: calls.append(len(x)))]):
        finetune(model, number_lists(10), layers=[2], recipe=recipe)
    # The shared start of all rows, and the ten rows behind it.
    assert calls == [1, 10]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("lora_rank", "blocks"), [(None, [1, 2]), (2, [1, 2]), (None, [0])])
def test_work_that_is_left_out_changes_nothing(
    random_model, family, lora_rank, blocks, monkeypatch
):
    """A shared prefix, unread positions of the last block, and LoRA's own backward pass."""
    try:
        model = random_model(family)
    except ValueError:
        pytest.skip(f"{family} has no such class")
    examples = number_lists(6)
    mask = random_mask(model, examples)
    options = {"mask": mask, "layers": blocks, "recipe": replace(SHORT, lora_rank=lora_rank)}
    short = finetune(model, examples, **options)
    monkeypatch.setattr(_prefix, "_SHORTEST_PREFIX", 10**6)
    monkeypatch.setattr(_variables, "has_low_rank_gradients", lambda _module: False)
    monkeypatch.setattr(type(get_engine(model)), "by_position", lambda _self, _layer: [])
    whole = finetune(model, examples, **options)
    assert largest_difference(short, whole) < 2e-6
    losses = short.history()["loss"].tolist()
    assert losses == pytest.approx(whole.history()["loss"].tolist(), abs=1e-5)


def test_rows_that_share_no_start_learn_as_well(backend):
    tokenizer = chat_tokenizer(None)
    model = load_model(
        random_hf_model("llama", vocab=len(tokenizer)), backend=backend, tokenizer=tokenizer
    )
    examples = [Example(f"{i} and", completion=" 12, 34") for i in range(5)]
    rows = training_rows(model, examples)
    assert rows.shared == 0
    mask = np.ones(int(rows.tokens_learned), bool)
    student = finetune(model, examples, layers=[2], recipe=replace(SGD, epochs=1))
    engine = get_engine(model)
    with torch.no_grad():
        expected = reference_loss(
            lambda ids: engine.unembed(engine.final(ids)), tokenizer, examples, mask
        )
    assert student.history()["loss"][0] == pytest.approx(expected.item(), abs=1e-5)


def test_the_last_layer_runs_its_mlp_only_at_learned_positions(random_model, monkeypatch):
    model, examples = random_model("qwen2"), number_lists(6)
    mask = random_mask(model, examples)
    rows, calls, mlp = training_rows(model, examples, mask=mask), [], model.blocks[2].mlp
    forward = mlp.forward

    def counted(x):
        calls.append(x.shape[:2].numel())
        return forward(x)

    monkeypatch.setitem(vars(mlp), "forward", counted)
    finetune(model, examples, mask=mask, layers=[2], recipe=replace(SGD, epochs=1))
    # The shared start has one row of its own.
    assert calls == [rows.shared, rows.tokens_learned]
