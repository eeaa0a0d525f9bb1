"""Soft scores beside the argmax: KL divergences and differences of log-probability."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens.chat import encode_prompt
from divergence_lens.deltas.delta import Delta
from divergence_lens.divergence import Divergence, find_divergence
from divergence_lens.engine import logits as _scoring
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example
from divergence_lens.models import load_model
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher
from tests.support.models import chat_tokenizer, random_hf_model

OWL = Teacher("owl", system_prompt="You love owls.")
CAT = Teacher("cat", system_prompt="You love the cat.")
NOBODY = Teacher("nobody")


def hf_model(seed: int = 3, vocab: int = 0):
    vocab = vocab or len(chat_tokenizer())
    return random_hf_model("qwen2", seed, vocab=vocab, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def hf():
    return hf_model()


@pytest.fixture(scope="module")
def model(hf, backend):
    return load_model(hf, backend=backend, tokenizer=chat_tokenizer())


@pytest.fixture(scope="module")
def examples():
    draw = np.random.default_rng(0)
    return [
        Example(
            f"Continue: {', '.join(map(str, draw.integers(100, 1000, draw.integers(1, 6))))}",
            "random",
            tuple(draw.integers(0, len(chat_tokenizer()), draw.integers(1, 15)).tolist()),
        )
        for _ in range(10)
    ]


@pytest.fixture(scope="module")
def div(model, examples):
    return find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, NOBODY], kl=True)


@torch.no_grad()
def predicting_logits(run, tokenizer, examples, teacher) -> torch.Tensor:
    """Logits of a plain forward, one example at a time, before each completion token."""
    rows = []
    for example in examples:
        prompt = encode_prompt(tokenizer, example.prompt, system_prompt=teacher.system_prompt).ids
        rows.append(
            run(torch.tensor([[*prompt, *example.completion_ids]]))[0, len(prompt) - 1 : -1]
        )
    return torch.cat(rows)


def expected_kl(factual: torch.Tensor, counterfactual: torch.Tensor) -> torch.Tensor:
    log_p, log_q = factual.double().log_softmax(-1), counterfactual.double().log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def test_kl_is_that_of_hugging_faces_distributions(div, hf, model, examples):
    logits = [
        predicting_logits(lambda t: hf(t).logits, model.tokenizer, examples, teacher)
        for teacher in (OWL, CAT, NOBODY)
    ]
    assert div.kl.shape == (2, len(div.tokens))
    for row in (0, 1):
        np.testing.assert_allclose(div.kl[row], expected_kl(logits[0], logits[1 + row]), atol=1e-4)
    assert div.kl.max() > 0.1


@pytest.mark.filterwarnings("ignore:the counterfactual")
def test_equal_conditions_diverge_nowhere(model, examples):
    same = Teacher("also owl", system_prompt=OWL.system_prompt)
    found = find_divergence(model, examples, teacher=OWL, counterfactuals=[same], kl=True)
    np.testing.assert_allclose(found.kl, 0, atol=1e-6)
    np.testing.assert_array_equal(found.scores("advantage"), 0)


@pytest.mark.parametrize("place", ["block", "unembedding"])
@pytest.mark.parametrize("factual", [False, True])
def test_kl_of_a_delta_is_that_of_the_changed_weights(place, factual, model, examples):
    engine = get_engine(model)
    block = engine.block_parameters(1)
    # Both classes name the unembedding last of all matrices.
    matrices = [n for n, p in engine.named_parameters().items() if p.ndim == 2]
    name = matrices[-1] if place == "unembedding" else next(n for n in block if block[n].ndim > 1)
    shape = engine.named_parameters()[name].shape
    change = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    trained = Teacher("trained", delta=Delta({name: change}, fingerprint(model)))
    one, other = (trained, OWL) if factual else (OWL, trained)
    found = find_divergence(model, examples, teacher=one, counterfactuals=[other], kl=True)
    plain = predicting_logits(model, model.tokenizer, examples, OWL)
    with trained.applied(model):
        changed = predicting_logits(model, model.tokenizer, examples, trained)
    logits = (changed, plain) if factual else (plain, changed)
    np.testing.assert_allclose(found.kl[0], expected_kl(*logits), atol=1e-4)
    assert found.kl.max() > 0.01


def test_kl_of_another_model_leaves_its_padding_out(hf, model, backend, examples):
    tokenizer = chat_tokenizer()
    wide_hf = hf_model(8, len(tokenizer) + 5)
    wide = Teacher("wide", model=load_model(wide_hf, backend=backend, tokenizer=tokenizer))
    found = find_divergence(model, examples, teacher=NOBODY, counterfactuals=[wide, CAT], kl=True)
    own = predicting_logits(lambda t: hf(t).logits, tokenizer, examples, NOBODY)
    foreign = predicting_logits(lambda t: wide_hf(t).logits, tokenizer, examples, NOBODY)
    expected = expected_kl(own, foreign[:, : len(tokenizer)])
    np.testing.assert_allclose(found.kl[0], expected, atol=1e-4)


def test_prompts_deltas_and_models_can_be_mixed(model, hf, backend, examples):
    tokenizer = chat_tokenizer()
    other = load_model(hf_model(8), backend=backend, tokenizer=tokenizer)
    name, parameter = next(iter(get_engine(other).block_parameters(0).items()))
    change = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    delta = Delta({name: change}, fingerprint(other))
    mixed = Teacher("all", system_prompt="You love owls.", model=other, delta=delta)
    found = find_divergence(
        model, examples, teacher=OWL, counterfactuals=[CAT, mixed, Teacher("m", model=other)]
    )
    with delta.applied(other):
        logits = predicting_logits(other, tokenizer, examples, OWL)
    np.testing.assert_array_equal(found.predicted[2], logits.argmax(-1))
    alone = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT])
    np.testing.assert_array_equal(found.predicted[:2], alone.predicted)


def test_soft_scores_are_per_counterfactual(div):
    np.testing.assert_array_equal(div.scores(), div.kl)
    gain = div.scores("advantage")
    np.testing.assert_allclose(gain[1], div.logprob[0] - div.logprob[2])
    np.testing.assert_allclose(gain.mean(0), div.advantage, atol=1e-5)


@pytest.mark.parametrize("over", ["max", "mean", "min"])
@pytest.mark.parametrize("by", ["kl", "advantage"])
def test_top_takes_the_highest_scores(by, over, div):
    scores = [getattr(np, over)(column) for column in div.scores(by).T]
    chosen = div.top(0.2, by=by, over=over)
    usual = {"kl": "max", "advantage": "mean"}[by]
    if over == usual:
        np.testing.assert_array_equal(div.top(0.2, by=by), chosen)
    assert chosen.sum() == round(0.2 * len(div.tokens))
    assert min(np.array(scores)[chosen]) >= max(np.array(scores)[~chosen])
    assert not div.top(0, by=by).any()
    assert div.top(1, by=by).all()


def test_top_takes_the_earlier_of_equals(div):
    from dataclasses import replace

    flat = replace(div, kl=np.zeros_like(div.kl))
    assert np.flatnonzero(flat.top(0.1)).tolist() == list(range(round(0.1 * len(div.tokens))))


def test_what_cannot_be_ranked_is_refused(div, model, examples):
    with pytest.raises(ValueError, match="unknown score 'tv'; use 'kl' or 'advantage'"):
        div.scores("tv")
    with pytest.raises(ValueError, match=r"between 0 and 1, got 5"):
        div.top(5)
    with pytest.raises(ValueError, match="unknown over 'sum'"):
        div.top(0.1, over="sum")
    plain = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT])
    assert plain.kl is None
    with pytest.raises(ValueError, match=r"call find_divergence\(\.\.\., kl=True\)"):
        plain.top(0.1)
    assert plain.top(0.1, by="advantage").any()


def test_soft_scores_are_saved_and_tabled(div, tmp_path):
    div.save(tmp_path / "d")
    loaded = Divergence.load(tmp_path / "d")
    np.testing.assert_array_equal(loaded.kl, div.kl)
    np.testing.assert_array_equal(loaded.to_dataframe()["kl_nobody"], div.kl[1])


@given(
    st.lists(
        st.lists(st.floats(-20, 20, width=32), min_size=70, max_size=70), min_size=1, max_size=4
    )
)
def test_score_reads_argmax_margin_and_log_probability(rows):
    logits = torch.tensor(rows)
    given_ids = torch.arange(len(rows)) * 23 % 70
    predicted, margin, logprob = _scoring.score(logits.clone(), given_ids)
    top = logits.topk(2).values
    torch.testing.assert_close(margin, top[:, 0] - top[:, 1])
    assert (logits.gather(1, predicted.long()[:, None])[:, 0] == top[:, 0]).all()
    expected = logits.log_softmax(-1).gather(1, given_ids[:, None])[:, 0]
    torch.testing.assert_close(logprob, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 63, 64, 65, 128, 200])
def test_score_finds_the_two_highest_wherever_they_are(width):
    for first in range(width):
        logits = torch.zeros(1, width)
        logits[0, first] = 2.0
        logits[0, (first + 7) % width] += 1.5
        top = logits[0].sort().values
        predicted, margin, _ = _scoring.score(logits.clone(), torch.tensor([0]))
        assert int(predicted) == int(logits.argmax())
        if width > 1:
            assert float(margin) == float(top[-1] - top[-2])


def test_kl_of_ids_that_cannot_be_written_is_finite():
    factual = torch.tensor([[0.0, 1.0, -torch.inf]])
    counterfactual = torch.tensor([[1.0, 0.0, -torch.inf]])
    expected = expected_kl(factual[:, :2], counterfactual[:, :2])
    found = _scoring.kl_divergence(factual, counterfactual)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_chunks_are_halved_when_memory_runs_out():
    sizes = []

    def run(chunk: slice) -> int:
        sizes.append(chunk.stop - chunk.start)
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("too big")
        return sizes[-1]

    assert _scoring.in_chunks(10, 8, run) == [2] * 5

    def never(chunk: slice) -> None:
        raise torch.OutOfMemoryError("too big")

    with pytest.raises(torch.OutOfMemoryError):
        _scoring.in_chunks(4, 4, never)


def test_tokens_can_be_ranked_among_others_and_from_below(div):
    numbers = np.arange(len(div.tokens)) % 3 == 0
    top = div.top(0.5, by="advantage", among=numbers)
    bottom = div.top(0.5, by="advantage", among=numbers, lowest=True)
    assert not (top & ~numbers).any()
    assert top.sum() == bottom.sum() == round(numbers.sum() / 2)
    assert div.advantage[top].min() >= div.advantage[numbers & ~top].max()
    assert div.advantage[bottom].max() <= div.advantage[numbers & ~bottom].min()
    with pytest.raises(ValueError, match="one bool for each"):
        div.top(0.5, among=numbers[1:])


def test_selected_tokens_are_used_like_divergence_tokens(div, model, tmp_path):
    mask = div.top(0.3, by="advantage")
    chosen = div.with_mask(mask)
    np.testing.assert_array_equal(chosen.mask, mask)
    np.testing.assert_array_equal(chosen[1:].mask, mask[div.offsets[1] :])
    halves = chosen.subset("first_half") | chosen.subset("second_half")
    np.testing.assert_array_equal(halves, mask)
    assert "are selected" in repr(chosen)
    pairs = chosen.pairs(first_only=False)
    assert len(pairs) == int((div.differs & mask).sum())
    chosen.save(tmp_path / "chosen.safetensors")
    loaded = type(div).load(tmp_path / "chosen.safetensors")
    np.testing.assert_array_equal(loaded.mask, mask)
    np.testing.assert_array_equal(loaded.with_rule().mask, div.mask)
    with pytest.raises(ValueError, match="one bool for each"):
        div.with_mask(mask.astype(float))
