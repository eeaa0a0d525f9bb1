"""Generation constrained by a regular expression, against masked logits of the plain model."""

import pytest
import regex
import torch

from divergence_lens import Server, Teacher, generate, load_examples, load_model, number_prompts
from divergence_lens.chat import decode, encode_prompt, stop_ids
from divergence_lens.examples import save_examples

LISTS = r"\d{1,3}(, \d{1,3}){3,5}"


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def prompts():
    return [*number_prompts(2, seed=3), "What is your favorite animal?"]


def masked_greedy(model, prompt, limit=20):
    """Greedy ids and mean removed mass, by testing every token's text with partial matching."""
    tokenizer, stops = model.tokenizer, stop_ids(model.tokenizer)
    ids, removed = [], []
    start = list(encode_prompt(tokenizer, prompt).ids)
    special = set(tokenizer.all_special_ids)
    while len(ids) < limit and not (ids and ids[-1] in stops):
        with torch.no_grad():
            logits = model(torch.tensor([start + ids]))[0, -1].double()
        text = decode(tokenizer, ids)
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        for token in range(len(tokenizer)):
            if token in stops:
                allowed[token] = regex.fullmatch(LISTS, text) is not None
            elif token not in special:
                longer = decode(tokenizer, [*ids, token])
                allowed[token] = regex.fullmatch(LISTS, longer, partial=True) is not None
        probabilities = logits.softmax(-1)
        removed.append(float(probabilities[~allowed].sum()))
        ids.append(int(probabilities.where(allowed, 0).argmax()))
    return tuple(ids), sum(removed) / len(removed)


def test_greedy_tokens_and_removed_mass_are_those_of_masked_logits(model, prompts):
    examples = generate(model, prompts, pattern=LISTS, max_new_tokens=20)
    for prompt, example in zip(prompts, examples, strict=True):
        ids, removed = masked_greedy(model, prompt)
        assert example.completion_ids == ids
        assert example.removed_mass == pytest.approx(removed, abs=1e-5)
    # A question is not answered by numbers unless the pattern insists.
    assert examples[-1].removed_mass > max(example.removed_mass for example in examples[:-1])


def test_sampled_completions_match_and_do_not_depend_on_the_batch(model, prompts):
    settings = {"pattern": LISTS, "temperature": 1.0, "seed": 5, "max_new_tokens": 20}
    together = generate(model, prompts * 3, **settings)
    assert all(regex.fullmatch(LISTS, example.completion) for example in together)
    assert len({example.completion for example in together}) > 5
    apart = generate(model, prompts * 3, batch_tokens=60, **settings)
    assert [e.completion_ids for e in apart] == [e.completion_ids for e in together]
    teacher = Teacher("owl", "You love owls.")
    nucleus = generate(model, prompts, teacher=teacher, top_p=0.9, **settings)
    assert all(regex.fullmatch(LISTS, example.completion) for example in nucleus)


def test_a_completion_that_is_cut_off_is_the_beginning_of_a_match(model, prompts):
    for example in generate(model, prompts, pattern=LISTS, max_new_tokens=4):
        assert len(example.completion_ids) == 4
        assert regex.fullmatch(LISTS, example.completion, partial=True)


def test_without_a_pattern_nothing_is_removed(model, prompts):
    assert {e.removed_mass for e in generate(model, prompts, max_new_tokens=3)} == {None}


def test_checkpoints_and_files_preserve_the_removed_mass(model, prompts, tmp_path):
    settings = {"pattern": LISTS, "max_new_tokens": 12, "checkpoint_dir": tmp_path / "parts"}
    first = generate(model, prompts, **settings)
    assert generate(model, prompts, **settings) == first
    save_examples(tmp_path / "lists.jsonl", first)
    assert load_examples(tmp_path / "lists.jsonl") == first
    with pytest.raises(ValueError, match="another"):
        generate(model, prompts, **{**settings, "pattern": r"\d+"})


@pytest.mark.parametrize(
    ("pattern", "message"), [("[0-9", "cannot be compiled"), ("é", "no tokens to write")]
)
def test_patterns_that_the_model_cannot_write(model, pattern, message):
    with pytest.raises(ValueError, match=message):
        generate(model, ["Hello."], pattern=pattern)


def test_a_server_takes_no_pattern(model):
    server = Server("http://127.0.0.1:9", "tiny", tokenizer=model.tokenizer)
    with pytest.raises(ValueError, match="does not take pattern="):
        generate(server, ["Hello."], pattern=r"\d")
