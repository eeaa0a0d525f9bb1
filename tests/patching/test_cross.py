"""Cross-patching: against a plain pass of each half, and what the halves must add up to."""

import numpy as np
import pytest
import torch

from divergence_lens.deltas.delta import Delta
from divergence_lens.engine.factory import get_engine
from divergence_lens.models import load_model
from divergence_lens.pairs import NO_TOKEN, Pairs
from divergence_lens.patching.cross import CrossPatch, cross_patch
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.patching_oracles import hand_set, logit_difference

ROWS = ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8], [1, 6, 1, 8, 0, 3, 3, 9, 8])


@torch.no_grad()
def crossed_logits(lower, upper, row, boundary):
    """The last logits: the residual of one model is written over the other's, everywhere."""
    below, above = get_engine(lower), get_engine(upper)
    row = row[None]
    if boundary == above.n_layers:
        state = below.activations(row, sites=("resid_post",))["resid_post"][-1]
        return above.unembed(above.norm(state))[0, -1]
    state = below.activations(row, sites=("resid_pre",))["resid_pre"][boundary]
    with above.hooked([(boundary, "resid_pre", lambda _: state)]):
        return above.unembed(above.final(row))[0, -1]


def crossed_margin(lower, upper, pairs, i, boundary):
    logits = crossed_logits(lower, upper, pairs.clean[i], boundary)
    return float(logit_difference(logits, pairs, i))


def crossed_answer_margin(lower, upper, pairs, i, boundary):
    """The difference of summed log-probabilities, one pass per token."""
    margin = 0.0
    for sign, side in ((1, pairs.answers[i]), (-1, pairs.foils[i])):
        tokens = side[side != NO_TOKEN]
        for j, token in enumerate(tokens):
            row = torch.cat([pairs.clean[i], tokens[:j]])
            log_p = crossed_logits(lower, upper, row, boundary).log_softmax(-1)
            margin += sign * float(log_p[token])
    return margin


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("batch_rows", [1, 9])
def test_margins_are_those_of_a_plain_pass_of_each_half(model_of, family, batch_rows):
    models = model_of(family), model_of(family, 1)
    pairs = Pairs.from_disagreements(*models, ROWS)
    crossed = cross_patch(*models, pairs, batch_rows=batch_rows)
    assert crossed.margins.shape == (len(pairs), models[0].cfg.n_layers + 1, 2, 2)
    for i in range(len(pairs)):
        for boundary in range(models[0].cfg.n_layers + 1):
            for lower in (0, 1):
                for upper in (0, 1):
                    expected = crossed_margin(models[lower], models[upper], pairs, i, boundary)
                    actual = crossed.margins[i, boundary, lower, upper]
                    assert actual == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batch_rows", [1, 128])
def test_margins_of_answers_of_several_tokens_are_those_of_a_pass_for_each_token(
    model_of, batch_rows
):
    models = model_of("qwen2"), model_of("qwen2", 1)
    pairs = Pairs.from_tokens(
        ROWS,
        ROWS,
        answers=[[1, 2, 3], 4, [5, 6]],
        foils=[[1, 7], 8, [9, 2, 1]],
        corrupted_teacher=Teacher("other", model=models[1]),
    )
    crossed = cross_patch(*models, pairs, batch_rows=batch_rows)
    for i in range(len(pairs)):
        for boundary in range(models[0].cfg.n_layers + 1):
            for lower, upper in ((0, 1), (1, 0), (1, 1)):
                expected = crossed_answer_margin(models[lower], models[upper], pairs, i, boundary)
                actual = crossed.margins[i, boundary, lower, upper]
                assert actual == pytest.approx(expected, abs=2e-4)


def test_a_model_crossed_with_itself_shows_no_effect_and_no_interaction(model_of):
    model = model_of("gpt2")
    twin = Teacher("twin", model=model_of("gpt2", 1))
    pairs = Pairs.from_tokens(ROWS, ROWS, answers=[1] * 3, foils=[2] * 3, corrupted_teacher=twin)
    crossed = cross_patch(model, model, pairs)
    for values in (crossed.interaction, crossed.upper_effect("a"), crossed.lower_effect("b")):
        np.testing.assert_allclose(values, 0, atol=1e-5)


def test_the_interaction_is_zero_where_halves_only_add_up():
    models = []
    for seed in (0, 1):
        model = hand_set()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # blocks add constants, whatever they read
            model.W_U.copy_(
                torch.randn(model.W_U.shape, generator=torch.Generator().manual_seed(9))
            )
            model.W_E.normal_(generator=generator)
            for block in model.blocks:
                block.attn.b_O.normal_(generator=generator)
        models.append(model)
    twin = Teacher("twin", model=models[1])
    pairs = Pairs.from_tokens(
        [[1, 2, 3]], [[1, 2, 3]], answers=[1], foils=[2], corrupted_teacher=twin
    )
    crossed = cross_patch(*models, pairs)
    assert np.abs(crossed.upper_effect("a")[0, 0]) > 0.1
    np.testing.assert_allclose(crossed.interaction, 0, atol=1e-4)
    # What the two halves add makes up the whole difference.
    whole = crossed.margin("a", "a") - crossed.margin("b", "b")
    np.testing.assert_allclose(
        crossed.upper_effect("b") + crossed.lower_effect("a"), whole, atol=1e-4
    )


def test_a_delta_stands_for_the_second_model_and_is_taken_out_again(model_of):
    model = model_of("qwen2")
    other = model_of("qwen2", 1)
    mine, theirs = (get_engine(m).named_parameters() for m in (model, other))
    before = {name: parameter.detach().clone() for name, parameter in mine.items()}
    tensors = {name: (theirs[name] - mine[name]).detach() for name in mine}
    delta = Delta(tensors, fingerprint(model), {})
    pairs = Pairs.from_disagreements(model, other, ROWS)
    crossed = cross_patch(model, delta, pairs)
    np.testing.assert_allclose(crossed.margins, cross_patch(model, other, pairs).margins, atol=1e-3)
    assert all(torch.equal(before[name], parameter) for name, parameter in mine.items())


def test_from_disagreements_are_where_the_greedy_choices_part(model_of):
    models = model_of("gpt2"), model_of("gpt2", 1)
    pairs = Pairs.from_disagreements(*models, ROWS, start=2)
    for i, prefix in enumerate(pairs.clean):
        row = next(r for r in ROWS if r[: len(prefix)] == prefix.tolist())
        with torch.no_grad():
            choices = [
                model(
                    torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.int64)
                )[0].argmax(-1)
                for model in models
            ]
        first = next(p for p in range(1, len(row)) if choices[0][p] != choices[1][p])
        assert len(prefix) == first + 1
        assert int(pairs.answers[i]) == int(choices[0][first])
        assert int(pairs.foils[i]) == int(choices[1][first])
    with pytest.raises(ValueError, match="same tokens in all 3 rows"):
        Pairs.from_disagreements(models[0], models[0], ROWS)


def test_models_that_read_other_ids_are_refused(random_model, backend):
    model, same = random_model("gpt2"), random_model("gpt2", 1)
    tokenizer = chat_tokenizer("gemma")
    hf_model = random_hf_model("gpt2", 1, vocab=model.cfg.d_vocab)
    other = load_model(hf_model, backend=backend, tokenizer=tokenizer)
    pairs = Pairs.from_disagreements(model, same, ROWS)
    with pytest.raises(ValueError, match="another tokenizer"):
        Pairs.from_disagreements(model, other, ROWS)
    with pytest.raises(ValueError, match="another tokenizer"):
        cross_patch(model, other, pairs)


def test_from_disagreements_with_a_delta_are_those_with_its_model(model_of):
    model, other = model_of("gpt2"), model_of("gpt2", 1)
    base, moved = (get_engine(m).named_parameters() for m in (model, other))
    delta = Delta({n: moved[n].detach() - base[n].detach() for n in base}, fingerprint(model))
    before = fingerprint(model)
    pairs, expected = (Pairs.from_disagreements(model, b, ROWS) for b in (delta, other))
    assert fingerprint(model) == before
    assert [row.tolist() for row in pairs.clean] == [row.tolist() for row in expected.clean]
    assert pairs.foils.tolist() == expected.foils.tolist()
    assert pairs.corrupted_teacher[0].delta is delta


def test_tables_files_and_figure_hold_the_margins(model_of, tmp_path):
    models = model_of("gpt2"), model_of("gpt2", 1)
    crossed = cross_patch(*models, Pairs.from_disagreements(*models, ROWS))
    table = crossed.by_boundary()
    np.testing.assert_allclose(table["ab"], crossed.margins[:, :, 0, 1].mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        table["interaction"], table["aa"] - table["ab"] - table["ba"] + table["bb"], atol=1e-5
    )
    assert (table["low"] <= table["interaction"] + 1e-6).all()
    assert (table["high"] >= table["interaction"] - 1e-6).all()
    rows = crossed.to_dataframe()
    assert len(rows) == crossed.margins[..., 0, 0].size
    crossed.save(tmp_path / "c.safetensors")
    loaded = CrossPatch.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(loaded.margins, crossed.margins)
    assert (loaded.names, loaded.metadata) == (crossed.names, crossed.metadata)
    assert len(crossed.plot().data) == 6
    assert "interaction" in crossed._repr_html_()


def test_it_prints_as_one_line_with_the_margins_of_the_whole_models():
    margins = np.zeros((7, 4, 2, 2), np.float32)
    margins[:, :, 0, 0], margins[:, :, 1, 1] = 3, -2
    shown = repr(CrossPatch(margins, ("owl", "cat"), {"seed": [0] * 10_000}))
    assert shown == (
        "CrossPatch('owl' (a) and 'cat' (b): 7 pairs, 4 boundaries; mean margins of a and b "
        "themselves 3.000, -2.000)"
    )


def test_refuses_models_and_pairs_that_cannot_be_crossed(model_of, unchecked):
    models = model_of("gpt2"), model_of("gpt2", 1)
    pairs = Pairs.from_disagreements(*models, ROWS)
    other = Pairs.from_tokens([[1, 2]], [[2, 2]], answers=[1], foils=[2])
    with pytest.raises(ValueError, match="shared prefix"):
        cross_patch(*models, other)
    with pytest.raises(ValueError, match="batch_rows is 0"):
        cross_patch(*models, pairs, batch_rows=0)
    with pytest.raises(ValueError, match="start is 0"):
        Pairs.from_disagreements(*models, ROWS, start=0)
    with pytest.raises(ValueError, match="row 1 has 6 tokens"):
        Pairs.from_disagreements(*models, ROWS, start=6)
    with pytest.raises(ValueError, match='"a" or "b"'):
        cross_patch(*models, pairs).margin("a", "c")
    models[1].train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            cross_patch(*models, pairs)
    finally:
        models[1].eval()


def test_margins_that_are_not_finite_name_the_pair(model_of, monkeypatch):
    models = model_of("gpt2"), model_of("gpt2", 1)
    pairs = Pairs.from_disagreements(*models, ROWS)
    engine = get_engine(models[1])
    unembed = engine.unembed
    monkeypatch.setattr(engine, "unembed", lambda hidden: unembed(hidden) * torch.nan)
    with pytest.raises(ValueError, match=r"pair \d is nan in a's lower under b's upper half"):
        cross_patch(*models, pairs)


def test_refuses_models_of_other_shapes():
    twin = Teacher("twin", model=hand_set(n_layers=3))
    pairs = Pairs.from_tokens([[1, 2]], [[1, 2]], answers=[1], foils=[2], corrupted_teacher=twin)
    with pytest.raises(ValueError, match="same shape"):
        cross_patch(hand_set(), hand_set(n_layers=3), pairs)
