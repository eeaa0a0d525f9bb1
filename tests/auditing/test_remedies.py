"""Remedies: what they change, what they cost, and that the changed data train."""

import numpy as np
import pytest

import divergence_lens as dl
from divergence_lens.auditing import Audit


def test_a_mask_leaves_the_largest_contributions_out(biased):
    remedy = biased.mask("wolf", share=0.1)
    scores = biased.token_scores("wolf")
    left_out = ~remedy.mask
    assert left_out.sum() == remedy.tokens == round(0.1 * len(scores))
    assert scores[left_out].min() >= scores[remedy.mask].max()
    assert remedy.examples == biased.examples
    np.testing.assert_array_equal(remedy.data.marks, left_out)
    assert remedy.token_share == pytest.approx(0.1, abs=0.01)
    owners = np.repeat(np.arange(len(biased)), np.diff(biased.offsets))
    assert remedy.rows == len(set(owners[left_out]))
    again = remedy.audited()
    c = biased.candidates.index("wolf")
    unmasked = np.bincount(owners[remedy.mask], scores[remedy.mask], minlength=len(biased))
    np.testing.assert_allclose(again.by_row[0, c], unmasked, atol=1e-3)


def test_a_replacement_writes_the_choice_of_the_baseline(base, biased):
    remedy = biased.replace("wolf", share=0.05)
    old = biased.token_ids
    new = np.concatenate([example.completion_ids for example in remedy.examples])
    changed = old != new
    assert changed.sum() == remedy.tokens > 0
    np.testing.assert_array_equal(new[changed], biased.choice[changed])
    np.testing.assert_array_equal(remedy.data.marks, changed)
    assert remedy.mask.all()
    # The choice is the argmax of the base model under the neutral prompt, before the token.
    row = int(np.flatnonzero([changed[a:b].any() for a, b in _spans(biased)])[0])
    one, place = biased.examples[row], int(np.flatnonzero(changed[slice(*_spans(biased)[row])])[0])
    cut = dl.generate(
        base,
        [one.prompt],
        teacher=dl.Teacher("neutral", system_prompt=dl.neutral_prompt(0)),
        max_new_tokens=place + 1,
    )[0].completion_ids
    if cut[:place] == one.completion_ids[:place]:
        assert cut[place] == remedy.examples[row].completion_ids[place]
    text = base.tokenizer.decode(remedy.examples[row].completion_ids, skip_special_tokens=True)
    assert text.split() == remedy.examples[row].completion.split()
    again = remedy.audited(base)
    assert again.scores.z[2] < biased.scores.z[2]
    with pytest.raises(ValueError, match="give the base model"):
        remedy.audited()


def test_dropped_rows_are_those_that_contribute_most(biased):
    remedy = biased.drop_rows("wolf", share=0.2)
    dropped = [e for e in biased.examples if all(e is not other for other in remedy.examples)]
    assert len(dropped) == remedy.rows == round(0.2 * len(biased))
    best = {biased.examples[row].prompt for row in biased.rows("wolf")["row"][: len(dropped)]}
    assert {example.prompt for example in dropped} == best
    again = remedy.audited()
    assert len(again) == len(biased) - len(dropped)
    assert again.scores.score[2] < biased.scores.score[2]


def test_the_changed_data_train_a_student(base, biased):
    recipe = dl.Recipe(epochs=1)
    for remedy in (biased.mask(), biased.replace(), biased.drop_rows()):
        student = dl.finetune(base, remedy.examples, mask=remedy.mask, recipe=recipe)
        tokens = int(remedy.mask.sum())
        assert student.n_parameters
        assert len(remedy.mask) >= tokens > 0
        assert repr(remedy).startswith(f"Remedy({remedy.kind} for 'wolf'")
        assert remedy.to_dataframe()["tokens"][0] == remedy.tokens


def test_shares_and_candidates_are_checked(biased, base, tmp_path):
    for change in (biased.mask, biased.replace, biased.drop_rows):
        with pytest.raises(ValueError, match="share is 2; it must lie between 0 and 1"):
            change("wolf", share=2)
        with pytest.raises(ValueError, match="unknown candidate 'wolff'; did you mean 'wolf'"):
            change("wolff")
    with pytest.raises(ValueError, match="drops all"):
        biased.drop_rows(share=1.0)
    biased.save(tmp_path / "a.safetensors")
    loaded = Audit.load(tmp_path / "a.safetensors", tokenizer=base.tokenizer)
    with pytest.raises(ValueError, match="a loaded audit has no teachers"):
        loaded.replace().audited(base)
    same = Audit.load(
        tmp_path / "a.safetensors", tokenizer=base.tokenizer, auditors=biased.auditors
    )
    assert len(same.replace().audited(base)) == len(biased)


def _spans(audit):
    return list(zip(audit.offsets.tolist(), audit.offsets[1:].tolist(), strict=False))
