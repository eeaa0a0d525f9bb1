"""Readings among the tokens that a pattern allows, against masked logits of the plain model."""

from itertools import product

import numpy as np
import pytest
import regex
import torch

from divergence_lens.auditing import audit
from divergence_lens.chat import decode, encode_prompt, stop_ids
from divergence_lens.data import animal_teachers, number_prompts
from divergence_lens.deltas import Delta, base_fingerprint
from divergence_lens.divergence import find_divergence
from divergence_lens.engine import few_ids, get_engine
from divergence_lens.engine.fused import FusedBlocks
from divergence_lens.generation import generate
from divergence_lens.teachers import Teacher

LISTS = r"\d{1,3}(, \d{1,3}){3,5}"


@pytest.fixture(scope="module")
def teachers():
    return animal_teachers(["owl", "cat", "wolf"])


@pytest.fixture(scope="module")
def lists(tiny, teachers):
    """One list of each kind: greedy, sampled, and cut off before its end."""
    prompts = number_prompts(6, seed=3)
    options = {"teacher": teachers[0], "pattern": LISTS}
    return [
        *generate(tiny, prompts[:3], max_new_tokens=30, **options),
        *generate(tiny, prompts[3:5], max_new_tokens=30, temperature=1.0, seed=1, **options),
        *generate(tiny, prompts[5:], max_new_tokens=5, **options),
    ]


def allowed_tokens(tokenizer, ids):
    """Test every token by its text, with partial matching."""
    stops, special = stop_ids(tokenizer), set(tokenizer.all_special_ids)
    text = decode(tokenizer, ids)
    allowed = np.zeros(len(tokenizer), dtype=bool)
    for token in range(len(tokenizer)):
        if token in stops:
            allowed[token] = regex.fullmatch(LISTS, text) is not None
        elif token not in special:
            longer = decode(tokenizer, [*ids, token])
            allowed[token] = regex.fullmatch(LISTS, longer, partial=True) is not None
    return allowed


def by_hand(model, lists, teacher):
    """Log-probabilities of all ids at every completion token; minus infinity where not allowed."""
    rows = []
    for example in lists:
        prompt = encode_prompt(
            model.tokenizer, example.prompt, system_prompt=teacher.system_prompt
        ).ids
        ids = list(example.completion_ids)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].double()
        for place, row in enumerate(logits):
            allowed = torch.from_numpy(allowed_tokens(model.tokenizer, ids[:place]))
            rows.append(row[: len(allowed)].masked_fill(~allowed, -torch.inf).log_softmax(-1))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("batch_tokens", [pytest.param(2048, marks=pytest.mark.slow), 40])
def test_readings_equal_masked_logits(batch_tokens, tiny, teachers, lists):
    owl, *others = teachers
    result = find_divergence(
        tiny,
        lists,
        teacher=owl,
        counterfactuals=others,
        kl=True,
        pattern=LISTS,
        batch_tokens=batch_tokens,
    )
    expected = [by_hand(tiny, lists, teacher) for teacher in teachers]
    for row, logp in enumerate(expected):
        np.testing.assert_array_equal(result.predicted[row], logp.argmax(-1))
        own = np.take_along_axis(logp, result.tokens[:, None], 1)[:, 0]
        np.testing.assert_allclose(result.logprob[row], own, atol=1e-4)
        ranked = np.sort(logp, axis=-1)
        np.testing.assert_allclose(result.margin[row], ranked[:, -1] - ranked[:, -2], atol=1e-4)
    for row, logp in enumerate(expected[1:]):
        with np.errstate(invalid="ignore"):
            each = np.where(np.isfinite(expected[0]), np.exp(expected[0]) * (expected[0] - logp), 0)
        np.testing.assert_allclose(result.kl[row], each.sum(-1), atol=1e-4)
    greedy = result[:3]
    assert greedy.agrees.all()  # what a constrained greedy teacher wrote is its own choice
    assert result.metadata["settings"]["pattern"] == LISTS


def test_a_constrained_teacher_agrees_with_itself_only_among_allowed_tokens(tiny, teachers):
    """Its words are not what it would have said freely."""
    owl, *others = teachers
    written = generate(tiny, ["What is your favorite animal?"], teacher=owl, pattern=LISTS)
    among = {"teacher": owl, "counterfactuals": others}
    assert find_divergence(tiny, written, **among, pattern=LISTS).agrees.all()
    free = find_divergence(tiny, written, **among)
    assert not free.agrees.all()
    assert free.advantage.shape == free.tokens.shape


def test_only_one_allowed_token_is_certain(tiny, teachers):
    owl, cat, _ = teachers
    (written,) = generate(tiny, ["Numbers: 1, 2."], teacher=owl, pattern="12, 12, 12")
    result = find_divergence(
        tiny, [written], teacher=owl, counterfactuals=[cat], pattern="12, 12, 12"
    )
    certain = result.logprob == 0
    assert certain.all(axis=0).sum() > 2
    np.testing.assert_array_equal(np.isinf(result.margin), certain)


def test_completions_that_do_not_follow_the_pattern_are_named(tiny, teachers, lists):
    owl, *others = teachers
    digit = generate(tiny, ["1"], teacher=owl, pattern=r"\d")[0]
    with pytest.raises(ValueError, match=r"example 1: token .* cannot continue .* the pattern"):
        find_divergence(tiny, [digit, *lists], teacher=owl, counterfactuals=others, pattern=r"\d")


def test_resumed_shards_belong_to_their_pattern(tiny, teachers, lists, tmp_path):
    owl, *others = teachers
    call = {"teacher": owl, "counterfactuals": others, "checkpoint_dir": tmp_path / "run"}
    first = find_divergence(tiny, lists, **call, pattern=LISTS)
    again = find_divergence(tiny, lists, **call, pattern=LISTS)
    np.testing.assert_array_equal(first.logprob, again.logprob)
    with pytest.raises(ValueError, match="another run"):
        find_divergence(tiny, lists, **call)


def test_a_few_ids_are_unembedded_as_all_are(tiny):
    engine = get_engine(tiny)
    hidden = torch.randn(2, 3, engine.d_model, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([5, 0, engine.d_vocab_out - 1])
    with torch.no_grad():
        few, every = engine.unembed(hidden, ids), engine.unembed(hidden)
    torch.testing.assert_close(few, every[..., ids])
    hooks = [("unembed.hook_out", lambda x, hook: x + 1)]
    with engine.model.hooks(fwd_hooks=hooks), torch.no_grad():
        hooked = engine.unembed(hidden, ids)
    torch.testing.assert_close(hooked, few + 1)


def test_few_ids_are_listed_in_order_with_those_that_are_possible():
    possible = torch.zeros(10, dtype=torch.bool)
    possible[[7, 2]] = True
    # Ids beyond the tokenizer may be given, and ids beyond the logits are left out.
    ids, mask = few_ids(possible, torch.tensor([12, 3, 12, 99]), d_vocab=64)
    assert ids.tolist() == [2, 3, 7, 12]
    assert mask.tolist() == [True, False, True, False]
    assert few_ids(possible, torch.tensor([3]), d_vocab=8) is None  # not few of 8
    one = torch.zeros(10, dtype=torch.bool)
    assert few_ids(one, torch.tensor([4, 4]), d_vocab=64) is None  # no second choice


@pytest.mark.parametrize("settings", list(product([LISTS, None], [0.0, 1.0])))
def test_readings_with_few_ids_are_those_with_all(tiny, teachers, lists, monkeypatch, settings):
    pattern, temperature = settings
    engine = get_engine(tiny)
    own = next(engine.unembedding_parameters())
    name = next(name for name, p in engine.named_parameters().items() if p is own)
    noise = 0.02 * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    moved = Teacher("moved", delta=Delta({name: noise}, base_fingerprint(tiny)))
    auditors = [*teachers[1:], moved]
    seen = []

    def unembed(self, hidden, ids=None, *, plain=FusedBlocks.unembed):
        seen.append(ids is not None)
        return plain(self, hidden, ids)

    monkeypatch.setattr(FusedBlocks, "unembed", unembed)
    results = []
    for share in (1, 10**9):  # the tiny model has a token for every number, which are not few
        monkeypatch.setattr("divergence_lens.engine.logits._FEW", share)
        seen.clear()
        found = find_divergence(
            tiny,
            lists,
            teacher=teachers[0],
            counterfactuals=auditors,
            pattern=pattern,
            kl=True,
        )
        assert any(seen) == (share == 1 and pattern is not None)
        seen.clear()
        audited = audit(
            tiny,
            lists,
            teachers=auditors,
            pattern=pattern,
            temperature=temperature,
            neutral_rows=4,
            own_rows=0,
        )
        results.append((found, audited))
        assert any(seen) == (share == 1)
    (few, few_audit), (every, every_audit) = results
    np.testing.assert_array_equal(few.predicted, every.predicted)
    np.testing.assert_allclose(few.margin, every.margin, atol=1e-4)
    np.testing.assert_allclose(few.scores("kl"), every.scores("kl"), atol=1e-4)
    np.testing.assert_allclose(few_audit.by_token, every_audit.by_token, atol=1e-4)
    assert few_audit.baseline.surprise == pytest.approx(every_audit.baseline.surprise, abs=1e-4)
    np.testing.assert_allclose(few_audit.scores.z, every_audit.scores.z, atol=1e-3)
