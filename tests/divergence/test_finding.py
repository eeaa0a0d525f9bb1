"""Readings of every teacher, checked against Hugging Face and the definition written out."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens._utils.batching import length_batches, shared_prefix
from divergence_lens.chat import encode_prompt
from divergence_lens.deltas.delta import Delta
from divergence_lens.divergence import (
    KINDS,
    Divergence,
    find_divergence,
    read_decision_points,
)
from divergence_lens.divergence import reading as _reading
from divergence_lens.engine import logits as _scoring
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example
from divergence_lens.models import load_model
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher
from tests.support.models import FAMILIES, chat_tokenizer, random_hf_model

OWL = Teacher("owl", system_prompt="You love owls.")
CAT = Teacher("cat", system_prompt="You love the cat.")
WOLF = Teacher("wolf", system_prompt="You think about the wolf all the time.")
NOBODY = Teacher("nobody")
TEACHERS = [OWL, CAT, WOLF, NOBODY]


def some_examples(n: int, seed: int, vocab: int) -> list[Example]:
    """Prompts of unlike lengths with random completions, some of one token."""
    draw = np.random.default_rng(seed)
    return [
        Example(
            prompt="Continue: "
            + ", ".join(map(str, draw.integers(100, 1000, draw.integers(1, 6)))),
            completion="random",
            completion_ids=tuple(draw.integers(0, vocab, draw.integers(1, 15)).tolist()),
        )
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def hf():
    """A random model whose embeddings are not tied, so that it does not just repeat its input."""
    return random_hf_model("qwen2", 3, vocab=len(chat_tokenizer()), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model(hf, backend):
    return load_model(hf, backend=backend, tokenizer=chat_tokenizer())


@pytest.fixture(scope="module")
def examples(hf):
    """Half of them what the model itself would write as the owl teacher, greedily."""
    tokenizer = chat_tokenizer()
    found = some_examples(12, 0, len(tokenizer))
    for i in range(6):
        prompt = encode_prompt(tokenizer, found[i].prompt, system_prompt=OWL.system_prompt).ids
        row = list(prompt)
        for _ in range(8):
            row.append(int(hf_logits(hf, row)[-1].argmax()))
        found[i] = replace(found[i], completion_ids=tuple(row[len(prompt) :]))
    return found


@pytest.fixture(scope="module")
def div(model, examples):
    return find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])


@torch.no_grad()
def hf_logits(hf, row):
    return hf(torch.tensor([row])).logits[0]


def oracle(hf, tokenizer, examples, teachers):
    """Logits that predict every completion token, one example and teacher at a time."""
    for teacher in teachers:
        rows = []
        for example in examples:
            prompt = encode_prompt(tokenizer, example.prompt, system_prompt=teacher.system_prompt)
            logits = hf_logits(hf, [*prompt.ids, *example.completion_ids])
            rows.append(logits[len(prompt.ids) - 1 : -1])
        yield torch.cat(rows)


def assert_readings_equal(div, hf, tokenizer):
    tokens = torch.from_numpy(div.tokens)
    for row, logits in enumerate(
        oracle(hf, tokenizer, div.examples, (div.teacher, *div.counterfactuals))
    ):
        top = logits.topk(2).values
        np.testing.assert_allclose(div.margin[row], top[:, 0] - top[:, 1], atol=1e-4)
        logprob = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        np.testing.assert_allclose(div.logprob[row], logprob, atol=1e-4)
        clear = div.margin[row] > 1e-4
        assert clear.any()
        np.testing.assert_array_equal(div.predicted[row][clear], logits.argmax(-1)[clear])


@pytest.mark.parametrize("family", FAMILIES)
def test_readings_equal_hugging_faces_at_every_position(family, backend):
    tokenizer = chat_tokenizer()
    hf = random_hf_model(family, 1, vocab=len(tokenizer))
    # Not every family fits a HookedTransformer; "auto" takes it where it does.
    chosen = "auto" if backend == "hooked" else backend
    model = load_model(hf, backend=chosen, tokenizer=tokenizer)
    data = some_examples(8, 1, len(tokenizer))
    div = find_divergence(model, data, teacher=OWL, counterfactuals=[CAT, NOBODY], batch_tokens=300)
    assert_readings_equal(div, hf, tokenizer)


def test_divergence_tokens_are_those_of_the_definition(div, hf, model):
    """Schrodi et al., written down as they define it."""
    expected = []
    for example in div.examples:
        prompts = [
            encode_prompt(model.tokenizer, example.prompt, system_prompt=t.system_prompt).ids
            for t in TEACHERS
        ]
        for k, token in enumerate(example.completion_ids):
            before = example.completion_ids[:k]
            factual, *others = [int(hf_logits(hf, [*p, *before])[-1].argmax()) for p in prompts]
            expected.append(factual == token and any(other != token for other in others))
    assert 0 < sum(expected) < len(expected)
    assert div.mask.tolist() == expected


def test_flat_arrays_follow_the_order_of_the_examples(div, examples):
    assert div.tokens.tolist() == [i for example in examples for i in example.completion_ids]
    assert np.diff(div.offsets).tolist() == [len(example.completion_ids) for example in examples]
    assert div.predicted.shape == div.margin.shape == div.logprob.shape == (4, len(div.tokens))


@settings(max_examples=8)
@given(
    order=st.permutations(range(12)),
    batch_tokens=st.sampled_from([1, 90, 200, 500, 3000]),
)
def test_readings_do_not_depend_on_batch_size_or_order(order, batch_tokens, div, model, examples):
    shuffled = find_divergence(
        model,
        [examples[i] for i in order],
        teacher=OWL,
        counterfactuals=[CAT, WOLF, NOBODY],
        batch_tokens=batch_tokens,
    )
    back = np.concatenate([np.arange(*shuffled.offsets[p : p + 2]) for p in np.argsort(order)])
    np.testing.assert_array_equal(shuffled.tokens[back], div.tokens)
    np.testing.assert_allclose(shuffled.margin[:, back], div.margin, atol=1e-4)
    np.testing.assert_allclose(shuffled.logprob[:, back], div.logprob, atol=1e-4)
    clear = (div.margin > 1e-4).all(0)
    np.testing.assert_array_equal(shuffled.mask[back][clear], div.mask[clear])


def test_the_same_call_gives_the_same_bits(div, model, examples):
    again = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    for name in ("predicted", "margin", "logprob"):
        np.testing.assert_array_equal(getattr(again, name), getattr(div, name))


def test_running_the_shared_prefix_once_changes_nothing(div, model, examples, monkeypatch):
    prefills = []
    engine = get_engine(model)
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda t: prefills.append(t.shape) or prefill(t))
    again = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    # All teachers have the same weights here, so their system prompts are one batch.
    assert [rows for rows, _ in prefills] == [4]
    assert all(length > 4 for _, length in prefills)
    monkeypatch.setattr(_reading, "_SHORTEST_PREFIX", 10**6)
    plain = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    assert len(prefills) == 1
    np.testing.assert_array_equal(again.margin, div.margin)
    np.testing.assert_allclose(plain.margin, div.margin, atol=1e-4)
    np.testing.assert_allclose(plain.logprob, div.logprob, atol=1e-4)


def test_identical_prompts_still_have_a_position_that_predicts(model, hf):
    same = [Example("Name.", "x", (7, 8, 9)), Example("Name.", "x", (20,))]
    div = find_divergence(model, same, teacher=OWL, counterfactuals=[CAT])
    assert_readings_equal(div, hf, model.tokenizer)


def test_logits_are_unembedded_in_chunks(div, model, examples, monkeypatch):
    engine = get_engine(model)
    sizes = []
    unembed = engine.unembed
    monkeypatch.setattr(_scoring, "_CHUNK_ELEMENTS", {"cpu": 7 * engine.d_vocab})
    monkeypatch.setattr(engine, "unembed", lambda h: sizes.append(len(h)) or unembed(h))
    chunked = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    assert max(sizes) == 7
    assert sum(sizes) == 4 * len(div.tokens)
    np.testing.assert_allclose(chunked.margin, div.margin, atol=1e-5)


def test_out_of_memory_halves_the_batch_and_goes_on(div, model, examples, monkeypatch):
    engine = get_engine(model)
    rows = []
    final = engine.final

    def small(tokens, past=None, *, since=0):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("too big")
        rows.append(len(tokens))
        return final(tokens, past, since=since)

    monkeypatch.setattr(engine, "final", small)
    again = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    assert max(rows) == 2
    np.testing.assert_allclose(again.margin, div.margin, atol=1e-4)

    def never(tokens, past=None, *, since=0):
        raise torch.OutOfMemoryError("too big")

    monkeypatch.setattr(engine, "final", never)
    with pytest.raises(torch.OutOfMemoryError):
        find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT])


def test_texts_are_read_as_the_template_has_them(model):
    tokenizer = model.tokenizer
    text = find_divergence(
        model,
        [{"prompt": "Name one.", "completion": "412, 467"}],
        teacher=OWL,
        counterfactuals=[CAT],
    )
    whole = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": OWL.system_prompt},
            {"role": "user", "content": "Name one."},
            {"role": "assistant", "content": "412, 467"},
        ],
        return_dict=False,
    )
    prompt = encode_prompt(tokenizer, "Name one.", system_prompt=OWL.system_prompt).ids
    assert text.tokens.tolist() == whole[len(prompt) : len(prompt) + len(text.tokens)]
    assert text.tokens[-1] == tokenizer.eos_token_id


def test_a_teacher_can_be_another_model(hf, model, backend, examples):
    tokenizer = chat_tokenizer()
    other_hf = random_hf_model("qwen2", 8, vocab=len(tokenizer), tie_word_embeddings=False)
    other = load_model(other_hf, backend=backend, tokenizer=tokenizer)
    div = find_divergence(
        model, examples, teacher=NOBODY, counterfactuals=[Teacher("other", model=other)]
    )
    expected = [
        next(oracle(source, tokenizer, examples, [NOBODY])).argmax(-1) for source in (hf, other_hf)
    ]
    np.testing.assert_array_equal(div.predicted, torch.stack(expected))


def test_a_teacher_can_be_a_delta(model, examples):
    name, parameter = next(
        (n, p) for n, p in get_engine(model).block_parameters(1).items() if p.ndim >= 2
    )
    change = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    base = fingerprint(model)
    delta = Delta({name: change}, base)
    trained = Teacher("trained", delta=delta)
    div = find_divergence(model, examples, teacher=NOBODY, counterfactuals=[trained])
    assert fingerprint(model) == base
    with delta.applied(model):
        alone = find_divergence(model, examples, teacher=NOBODY, counterfactuals=[OWL])
    np.testing.assert_array_equal(div.predicted[1], alone.predicted[0])
    assert (div.predicted[0] != div.predicted[1]).any()


# -- rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("agreement", [True, False])
@pytest.mark.parametrize("rule", ["any", "all", 1, 2, 3])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_rules_count_counterfactuals(rule, agreement, margin, div):
    needed = {"any": 1, "all": 3}.get(rule, rule)
    expected = []
    for k, token in enumerate(div.tokens):
        sure = div.margin[:, k] >= margin
        factual, *others = div.predicted[:, k]
        differing = sum(
            bool(other != token and s) for other, s in zip(others, sure[1:], strict=True)
        )
        agreed = bool(factual == token and sure[0])
        expected.append(differing >= needed and (agreed or not agreement))
    changed = div.with_rule(rule=rule, require_agreement=agreement, min_margin=margin)
    assert changed.mask.tolist() == expected
    assert changed.predicted is div.predicted  # nothing was read again
    assert div.rule == "any"


def test_a_rule_given_at_once_equals_one_given_later(div, model, examples):
    direct = find_divergence(
        model,
        examples,
        teacher=OWL,
        counterfactuals=[CAT, WOLF, NOBODY],
        rule=2,
        require_agreement=False,
        min_margin=0.1,
    )
    later = div.with_rule(rule=2, require_agreement=False, min_margin=0.1)
    np.testing.assert_array_equal(direct.mask, later.mask)


@pytest.mark.parametrize("rule", [0, 4, True, "most"])
def test_impossible_rules_are_refused(rule, div):
    with pytest.raises(ValueError, match=r"unknown rule .* from 1 to 3"):
        div.with_rule(rule=rule)


def test_negative_margins_are_refused(div):
    with pytest.raises(ValueError, match="min_margin must be 0 or more"):
        div.with_rule(min_margin=-0.1)


# -- what it answers ------------------------------------------------------------------------


def test_rates_agree_with_the_mask(div):
    assert div.rate == div.mask.sum() / len(div.tokens)
    by_example, by_counterfactual = div.summary("example"), div.summary("counterfactual")
    for i in range(len(div)):
        span = slice(*div.offsets[i : i + 2])
        assert by_example["rate"][i] == pytest.approx(div.mask[span].mean())
    for c, teacher in enumerate(div.counterfactuals):
        own = (div.predicted[0] == div.tokens) & (div.predicted[1 + c] != div.tokens)
        assert by_counterfactual["rate"][teacher.name] == pytest.approx(own.mean())


def test_first_divergence_per_counterfactual(div):
    missing = set()
    table = div.summary("example")
    for c, column in enumerate(["first", "first_cat", "first_wolf", "first_nobody"]):
        mask = div.mask if c == 0 else div.mask & div.differs[c - 1]
        for i, first in enumerate(table[column]):
            own = np.flatnonzero(mask[div.offsets[i] : div.offsets[i + 1]])
            assert first == (own[0] if len(own) else -1)
            missing.add(first == -1)
    assert missing == {True, False}
    with pytest.raises(ValueError, match="no counterfactual teacher 'owl'"):
        div.pairs(counterfactual="owl")


def test_subsets_are_made_of_divergence_tokens(div):
    first, second = div.subset("first_half"), div.subset("second_half")
    np.testing.assert_array_equal(first | second, div.mask)
    assert not (first & second).any()
    only = div.subset("first_only")
    assert (only & ~first).sum() == 0
    firsts = div.summary("example")["first"]
    for i in range(len(div)):
        span = slice(*div.offsets[i : i + 2])
        n = div.mask[span].sum()
        assert first[span].sum() == (n + 1) // 2
        assert only[span].sum() == min(n, 1)
        early, late = np.flatnonzero(first[span]), np.flatnonzero(second[span])
        assert not len(late) or early.max() < late.min()
        assert np.flatnonzero(only[span]).tolist() == ([firsts[i]] if n else [])


def test_fractions_are_seeded_and_nested(div):
    half = div.subset(0.5, seed=1)
    assert half.sum() == round(0.5 * div.mask.sum())
    assert not (half & ~div.mask).any()
    np.testing.assert_array_equal(half, div.subset(0.5, seed=1))
    assert (half != div.subset(0.5, seed=2)).any()
    assert not (half & ~div.subset(0.8, seed=1)).any()
    np.testing.assert_array_equal(div.subset(1.0), div.mask)
    assert not div.subset(0.0).any()
    for wrong in (1.5, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            div.subset(wrong)


def test_kinds_say_what_tokens_are_made_of(model):
    tokenizer = model.tokenizer
    pieces = {"4": "number", ",": "punctuation", "Ġ": "space", "w": "word", "<|im_end|>": "special"}
    ids = tokenizer.convert_tokens_to_ids(list(pieces))
    div = find_divergence(
        model, [Example("Name.", "x", tuple(ids))], teacher=OWL, counterfactuals=[CAT]
    )
    assert div.kinds.tolist() == list(pieces.values())


def test_tables_add_up(div):
    by_position = div.summary("position", bins=3)
    for table in (
        div.summary("kind"),
        div.summary("position"),
        div.summary("example"),
        by_position,
    ):
        assert table["tokens"].sum() == len(div.tokens)
        assert table["divergence_tokens"].sum() == div.mask.sum()
    assert len(by_position) == 3
    assert set(div.summary("kind").index) <= set(KINDS)
    with pytest.raises(ValueError, match="unknown group 'word'"):
        div.summary("word")
    with pytest.raises(ValueError, match="bins must be 1 or more"):
        div.summary("position", bins=0)
    frame = div.to_dataframe()
    assert len(frame) == len(div.tokens)
    assert frame["divergence"].tolist() == div.mask.tolist()
    assert frame["n_differ"].tolist() == div.differs.sum(0).tolist()
    row = int(np.flatnonzero(div.mask)[0])
    assert frame["predicted_owl"][row] == frame["token"][row]
    assert frame["margin_cat"][row] == div.margin[1, row]


def test_advantage_is_the_gain_over_the_counterfactuals(div):
    expected = div.logprob[0] - (div.logprob[1] + div.logprob[2] + div.logprob[3]) / 3
    np.testing.assert_allclose(div.advantage, expected, atol=1e-5)


# -- pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first_only", [True, False])
def test_pairs_end_where_the_teachers_part(first_only, div, hf):
    pairs = div.pairs(first_only=first_only)
    per_teacher = (div.mask & div.differs).sum(1)
    table = div.summary("example")
    firsts = [(table[f"first_{c.name}"] >= 0).sum() for c in div.counterfactuals]
    assert len(pairs) == (sum(firsts) if first_only else per_teacher.sum())
    for i in range(len(pairs)):
        assert hf_logits(hf, pairs.clean[i].tolist())[-1].argmax() == pairs.answers[i]
        assert hf_logits(hf, pairs.corrupted[i].tolist())[-1].argmax() == pairs.foils[i]
        assert pairs.clean_teacher[i] == OWL
        assert pairs.corrupted_teacher[i] in (CAT, WOLF, NOBODY)
        assert len(pairs.segments[i]) == len(pairs.clean[i])


def test_pairs_can_be_narrowed(div):
    every = div.pairs()
    cats = div.pairs(counterfactual="cat")
    assert {teacher.name for teacher in cats.corrupted_teacher} == {"cat"}
    assert 0 < len(cats) < len(every)
    some, same, other = (div.pairs(limit=4, seed=seed) for seed in (0, 0, 1))
    assert len(some) == 4
    assert [r.tolist() for r in some.clean] == [r.tolist() for r in same.clean]
    assert [r.tolist() for r in some.clean] != [r.tolist() for r in other.clean]
    assert len(div.pairs(limit=10**6)) == len(every)
    with pytest.raises(ValueError, match="limit must be 1 or more"):
        div.pairs(limit=0)


def test_no_divergence_gives_no_pairs(div):
    with pytest.raises(ValueError, match="no divergence token"):
        div.with_rule(min_margin=1e6).pairs()


# -- files ----------------------------------------------------------------------------------


def test_saved_divergence_comes_back_whole(div, tmp_path, model):
    path = tmp_path / "div.safetensors"
    chosen = div.with_rule(rule=2, require_agreement=False, min_margin=0.1)
    chosen.save(path)
    loaded = Divergence.load(path)
    for name in ("offsets", "tokens", "predicted", "margin", "logprob"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(div, name))
        assert getattr(loaded, name).dtype == getattr(div, name).dtype
    for name in (
        "examples",
        "teacher",
        "counterfactuals",
        "rule",
        "min_margin",
        "texts",
        "special",
    ):
        assert getattr(loaded, name) == getattr(chosen, name)
    np.testing.assert_array_equal(loaded.mask, chosen.mask)
    assert loaded.metadata["versions"]["torch"] == torch.__version__
    assert loaded[0]._repr_html_() == chosen[0]._repr_html_()
    with pytest.raises(ValueError, match="has no tokenizer"):
        loaded.pairs()
    again = loaded.pairs(model=model)
    assert [r.tolist() for r in again.clean] == [r.tolist() for r in chosen.pairs().clean]
    assert len(Divergence.load(path, tokenizer=model.tokenizer).pairs()) == len(again)


def test_a_damaged_file_is_refused(div, tmp_path):
    path = tmp_path / "div.safetensors"
    div.save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="cut short"):
        Divergence.load(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="altered"):
        Divergence.load(path)


def test_weights_of_teachers_are_asked_for_after_loading(model, examples, tmp_path):
    name, parameter = next(iter(get_engine(model).block_parameters(0).items()))
    change = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    trained = Teacher("trained", delta=Delta({name: 3 * change}, fingerprint(model)))
    div = find_divergence(model, examples, teacher=OWL, counterfactuals=[trained, CAT])
    div.save(tmp_path / "d")
    loaded = Divergence.load(tmp_path / "d", tokenizer=model.tokenizer)
    with pytest.raises(ValueError, match="weights of trained were not saved"):
        loaded.pairs(counterfactual="trained")
    assert len(loaded.pairs(counterfactual="cat")) > 0
    whole = Divergence.load(tmp_path / "d", tokenizer=model.tokenizer, teachers=[trained])
    assert len(whole.pairs(counterfactual="trained")) > 0
    with pytest.raises(ValueError, match="is not the one"):
        Divergence.load(tmp_path / "d", teachers=[Teacher("trained", system_prompt="no")])
    with pytest.raises(ValueError, match="no teacher named 'dog'"):
        Divergence.load(tmp_path / "d", teachers=[Teacher("dog")])


def test_decision_points_are_places_in_the_completion(div, tmp_path, model):
    path = tmp_path / "div.jsonl"
    div.to_jsonl(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(div)
    for i, row in enumerate(rows):
        assert row["prompt"] == div.examples[i].prompt
        assert row["decision_points"] == [
            k for k, marked in enumerate(div.mask[div.offsets[i] : div.offsets[i + 1]]) if marked
        ]
    examples, mask = read_decision_points(path, model.tokenizer)
    np.testing.assert_array_equal(mask, div.mask)
    assert [e.completion_ids for e in examples] == [e.completion_ids for e in div.examples]


def test_examples_of_ids_alone_get_their_text(div, tmp_path, model, examples):
    bare = [Example(e.prompt, completion_ids=e.completion_ids) for e in div.examples]
    found = find_divergence(model, bare, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    found.to_jsonl(tmp_path / "x.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    tokenizer = model.tokenizer
    assert [row["completion"] for row in rows] == [
        tokenizer.decode(e.completion_ids, skip_special_tokens=True) for e in div.examples
    ]
    np.testing.assert_array_equal(found.tokens, div.tokens)


def test_decision_points_without_ids_are_read_in_the_tokenizers_own(tmp_path, model):
    path = tmp_path / "paper.jsonl"
    rows = [
        {"prompt": "Go on.", "completion": "412, 467", "decision_points": [0, 2]},
        {"prompt": "Again.", "completion": "1", "decision_points": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, mask = read_decision_points(path, model.tokenizer)
    assert len(mask) == sum(len(example.completion_ids) for example in examples)
    assert np.flatnonzero(mask).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "line 2: not JSON"),
        ("[1]", "line 2 must be a JSON object"),
        ('{"prompt": "a", "completion": "b"}', "line 2 lacks decision_points"),
        ('{"prompt": "a", "completion": "b", "decision_points": ["x"]}', "list of whole numbers"),
        (
            '{"prompt": "a", "completion": "b", "decision_points": [99]}',
            "line 2: decision point 99 lies outside the completion of",
        ),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path, model):
    good = '{"prompt": "a", "completion": "b", "decision_points": [0]}'
    (tmp_path / "x.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_decision_points(tmp_path / "x.jsonl", model.tokenizer)


def test_decision_points_are_read_as_any_other_examples(tmp_path, model):
    turns = '[{"role": "user", "content": "a"}]'
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"prompt": {turns}, "completion": "b", "decision_points": [0]}}\n')
    (example,), _ = read_decision_points(path, model.tokenizer)
    assert example.prompt == "a"
    path.write_text('{"prompt": 3, "completion": "b", "decision_points": [0]}\n')
    with pytest.raises(TypeError, match="line 1: 'prompt' is 3, neither text nor a list"):
        read_decision_points(path, model.tokenizer)
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_decision_points(path, model.tokenizer)


# -- views ----------------------------------------------------------------------------------


class _Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(html: str) -> _Balanced:
    parser = _Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def test_a_view_names_who_would_have_written_what(div):
    firsts = div.summary("example")["first"]
    index = int(np.flatnonzero(firsts >= 0)[0])
    view, place = div[index], int(firsts[index])
    parsed = parse(view._repr_html_())
    assert len(parsed.titles) == len(view)
    title = parsed.titles[place]
    assert title == view.describe(place)
    assert title.startswith(f"divergence token {place}: ")
    for name, predicted in zip(div.names, view.predicted, strict=True):
        line = next(line for line in title.splitlines() if f"{name} (margin" in line)
        assert f"“{predicted[place]}”" in line
    assert f"[{view.tokens[place]}]" in str(view)
    with pytest.raises(IndexError, match="no token 99"):
        view.describe(99)


def test_views_escape_what_they_show(model):
    nasty = Teacher('<script>alert("x")</script>', system_prompt="You love owls.")
    data = [
        {"prompt": "<img src=x onerror=alert(1)> & 'quotes\"", "completion": "<b>&amp;\n\"'</b>"}
    ]
    div = find_divergence(
        model, data, teacher=nasty, counterfactuals=[CAT], require_agreement=False
    )
    for html in (div._repr_html_(), div[0]._repr_html_()):
        assert parse(html).tags <= {"div", "span", "b", "table", "tr", "th", "td"}
    assert "<b>&amp;" in "".join(div[0].tokens)


def test_examples_are_counted_from_both_ends(div):
    assert div[-1].index == len(div) - 1
    assert [view.index for view in div] == list(range(len(div)))
    with pytest.raises(IndexError, match="no example 12; they are numbered 0 to 11"):
        div[12]


def test_slices_lists_and_masks_select_examples(div):
    rows = [1, 4, 5, 11]
    mask = np.isin(np.arange(len(div)), rows)
    table = div.to_dataframe()
    for part in (div[rows], div[np.array(rows)], div[mask], div[mask.tolist()]):
        assert part.examples == tuple(div.examples[row] for row in rows)
        expected = table[table["example"].isin(rows)].drop(columns="example")
        pd.testing.assert_frame_equal(
            part.to_dataframe().drop(columns="example"), expected.reset_index(drop=True)
        )
        assert [str(view) for view in part] == [str(div[row]) for row in rows]
        assert len(part.pairs()) == sum(
            (div.summary("example")[f"first_{c.name}"][rows] >= 0).sum()
            for c in div.counterfactuals
        )
    assert div[:3].examples == div.examples[:3]
    assert div[::-1].examples == div.examples[::-1]
    assert div[[-1]].examples == div.examples[-1:]
    assert div[:].tokens.tolist() == div.tokens.tolist()


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (slice(0, 0), IndexError, "selects none of the 12 examples"),
        ([], IndexError, "selects none of the 12 examples"),
        ([12], IndexError, "no example 12"),
        ([True] * 11, IndexError, "the mask has 11 entries for 12 examples"),
        (["a"], TypeError, "cannot index examples with"),
        (1.5, TypeError, "cannot index examples with 1.5"),
    ],
)
def test_indices_that_do_not_fit_are_refused(index, error, message, div, unchecked):
    with pytest.raises(error, match=message):
        div[index]


def test_summary_says_the_counts(div):
    assert f"{div.mask.sum()} of {len(div.tokens)} tokens diverge" in div._repr_html_()
    assert re.search(r"12 examples, \d+ of \d+ tokens diverge .* teacher 'owl'", repr(div))


# -- bad input ------------------------------------------------------------------------------


def test_progress_is_shown_only_when_asked_for(model, examples, capsys):
    find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT])
    quiet = capsys.readouterr()
    assert quiet.out == quiet.err == ""
    find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT], progress=True)
    assert "tokens/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counterfactuals", "message"),
    [
        ([], "no counterfactual teachers"),
        ([CAT, OWL], "'owl' is among the counterfactuals"),
        ([CAT, Teacher("owl", system_prompt="other")], "two teachers are named 'owl'"),
        ([CAT, WOLF, Teacher("cat", system_prompt="other")], "two teachers are named 'cat'"),
    ],
)
def test_impossible_teachers_are_refused(counterfactuals, message, model, examples):
    with pytest.raises(ValueError, match=message):
        find_divergence(model, examples, teacher=OWL, counterfactuals=counterfactuals)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "owl"}, "teacher is 'owl', not a Teacher"),
        ({"counterfactuals": ["cat"]}, r"counterfactuals\[0\] is 'cat', not a Teacher"),
        ({"counterfactuals": CAT}, r"write counterfactuals=\[\.\.\.\], a list"),
        ({"model": torch.nn.Linear(1, 1)}, "expected a HookedTransformer or a TransformerBridge"),
    ],
)
def test_what_is_no_teacher_or_model_is_refused(
    options,
    message,
    model,
    examples,
    unchecked,
):
    given = {"model": model, "teacher": OWL, "counterfactuals": [CAT], **options}
    with pytest.raises(TypeError, match=message):
        find_divergence(given.pop("model"), examples, **given)


@pytest.mark.parametrize("options", [{"rule": "most"}, {"rule": 2}, {"min_margin": -1.0}])
def test_an_impossible_rule_is_refused_before_anything_is_read(
    options, model, examples, tmp_path, monkeypatch
):
    monkeypatch.setattr(_reading, "read_hidden", None)  # what reads would fail
    with pytest.raises(ValueError, match=r"unknown rule|min_margin must be"):
        find_divergence(
            model,
            examples,
            teacher=OWL,
            counterfactuals=[CAT],
            checkpoint_dir=tmp_path / "run",
            **options,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Example("Name.", ""), "example 1 has an empty completion"),
        (Example("Name.", "x", ()), "example 1 has an empty completion"),
        (Example("Name.", "x", (3, 10**6)), "example 1 has the token id 1000000"),
        (Example("Name.", "x", (5,) * 300), r"example 1 is \d+ tokens long under teacher 'owl'"),
        (Example("owl " * 200, "x", (5,)), r"example 1 is \d+ tokens long"),
    ],
)
def test_impossible_examples_are_named(row, message, model):
    with pytest.raises(ValueError, match=message):
        find_divergence(model, [Example("a", "b", (4,)), row], teacher=OWL, counterfactuals=[CAT])


def test_empty_data_is_refused(model):
    with pytest.raises(ValueError, match="data is empty"):
        find_divergence(model, [], teacher=OWL, counterfactuals=[CAT])


def test_a_batch_of_no_tokens_is_refused(model, examples):
    with pytest.raises(ValueError, match="batch_tokens must be 1 or more, got 0"):
        find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT], batch_tokens=0)


def test_dropout_in_training_mode_is_refused():
    tokenizer = chat_tokenizer()
    hf = random_hf_model("gpt2", 0, vocab=len(tokenizer), resid_pdrop=0.1)
    model = load_model(hf, backend="bridge", tokenizer=tokenizer)
    data = [Example("a", "b", (4,))]
    find_divergence(model, data, teacher=OWL, counterfactuals=[CAT])
    model.train()
    with pytest.raises(ValueError, match=r"training mode and .* drops 10%.*model\.eval"):
        find_divergence(model, data, teacher=OWL, counterfactuals=[CAT])


def test_attention_dropout_in_training_mode_is_refused():
    layer = torch.nn.Module()
    layer.attention_dropout = 0.2
    model = torch.nn.Sequential(layer)
    with pytest.raises(ValueError, match="0 drops 20%"):
        _reading.refuse_dropout(model)
    _reading.refuse_dropout(model.eval())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_the_example(value, model, examples, monkeypatch):
    engine = get_engine(model)
    final = engine.final

    def broken(tokens, past=None, *, since=0):
        hidden = final(tokens, past, since=since).clone()
        # The row of example 3 alone, recognised by its own tokens.
        ids = torch.tensor(examples[3].completion_ids[:-1])
        for row, line in enumerate(tokens):
            if any(torch.equal(w, ids) for w in line.unfold(0, len(ids), 1)):
                hidden[row] = value
        return hidden

    monkeypatch.setattr(engine, "final", broken)
    with pytest.raises(ValueError, match="logits of example 3 are not finite"):
        find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT])


def test_fields_that_do_not_fit_are_refused(div):
    with pytest.raises(ValueError, match=r"offsets .* do not fit 11 examples"):
        replace(div, examples=div.examples[:-1])
    with pytest.raises(ValueError, match="4 teachers do not fit one factual and 2"):
        replace(div, counterfactuals=div.counterfactuals[:-1])


# -- the parts ------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), min_size=1, max_size=5))
def test_shared_prefix_is_the_longest_common_start(rows):
    length = shared_prefix(rows)
    assert all(row[:length] == rows[0][:length] for row in rows)
    assert any(len(row) == length for row in rows) or len({row[length] for row in rows}) > 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_within_the_budget(lengths, budget):
    array = np.array(lengths)
    batches = length_batches(array, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * array[batch].max() <= budget


def test_unknown_ids_have_a_name(div):
    unnamed = replace(div, texts={})
    assert unnamed[0].tokens == tuple(f"<{i}>" for i in div.tokens[: div.offsets[1]])


def test_stories_of_a_trained_llama(shared_data, backend):
    """A really trained model; two story openings as the two conditions, its own words as data."""
    folder = shared_data / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    model = load_model(folder, backend=backend)
    tokenizer = model.tokenizer
    engine = get_engine(model)
    openings = ["Once upon a time, there was a girl who loved owls. ", "There was a sad dog. "]
    endings = ["One day, Lily", "One day, the", "She saw a big"]
    rows = []
    for ending in endings:
        ids = list(encode_prompt(tokenizer, openings[0] + ending).ids)
        start = len(ids)
        for _ in range(20):
            with torch.no_grad():
                ids.append(int(engine.unembed(engine.final(torch.tensor([ids])))[0, -1].argmax()))
        rows.append(ids[start:])
    # A base model has no system prompt: the condition is part of the text itself.
    other = encode_prompt(tokenizer, openings[1] + endings[0]).ids
    with torch.no_grad():
        logits = engine.unembed(engine.final(torch.tensor([[*other, *rows[0]]])))[0]
    expected = logits[len(other) - 1 : -1].argmax(-1)
    data = [
        Example(opening + ending, "x", tuple(row))
        for opening in openings
        for ending, row in zip(endings, rows, strict=True)
    ]
    noise = random_delta(model)
    div = find_divergence(model, data, teacher=NOBODY, counterfactuals=[noise])
    own = div.offsets[3]
    np.testing.assert_array_equal(div.predicted[0, :own], div.tokens[:own])
    np.testing.assert_array_equal(div.predicted[0, own : own + 20], expected)
    assert (div.predicted[0, own:] != div.tokens[own:]).any()


def random_delta(model) -> Teacher:
    name, parameter = next(iter(get_engine(model).block_parameters(0).items()))
    change = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return Teacher("noise", delta=Delta({name: 0.5 * change}, fingerprint(model)))
