"""Answers and foils as texts: tokenized in their context, and shown as they were tokenized."""

import pytest
import torch

from divergence_lens.pairs import NO_TOKEN, Pairs, without_padding
from divergence_lens.pairs.answers import answer_ids
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.exact import causal_mediation
from tests.support.models import chat_tokenizer


def after(tokenizer, prompt, answer):
    """The ids of an answer by definition: of prompt and answer together, without the prompt's."""
    before = tokenizer(prompt)["input_ids"]
    together = tokenizer(prompt + answer)["input_ids"]
    assert together[: len(before)] == before
    return together[len(before) :]


@pytest.mark.parametrize(
    ("prompt", "answer", "written"),
    [
        ("Name your", "favorite animal", " favorite animal"),
        ("Name your", " favorite animal", " favorite animal"),
        ("The owls,", "the cat", " the cat"),
        ("more than", "412 owls", " 412 owls"),
        ("412", "owls", " owls"),
        ("8", "0, 467", "0, 467"),
        ("Name:", "412", "412"),
        ("one (", "or two", "or two"),
        ("Name your\n", "favorite", "favorite"),
    ],
)
def test_a_word_after_a_word_gets_a_space(prompt, answer, written):
    tokenizer = chat_tokenizer(None)
    (ids,) = answer_ids(tokenizer, [answer], ([prompt], [prompt]), "answer")
    assert ids == after(tokenizer, prompt, written)
    assert tokenizer.decode(ids) == written


def test_an_answer_that_merges_with_its_prompt_is_refused():
    tokenizer = chat_tokenizer(None)
    assert tokenizer.tokenize("your favorite")[-1] == "Ġfavorite"  # with the space before it
    with pytest.raises(
        ValueError, match=r"answer 0 'favorite' merges .* \[' '\] becomes \[' favorite'\]"
    ):
        answer_ids(tokenizer, ["favorite"], (["Name your "], ["Name your "]), "answer")


def test_an_answer_is_tokenized_alike_on_both_sides_or_refused():
    tokenizer = chat_tokenizer(None)
    with pytest.raises(ValueError, match=r"after the clean prompt, but as .* after the corrupted"):
        answer_ids(tokenizer, ["owls"], (["Name your"], ["Name your\n"]), "answer")


@pytest.mark.parametrize("template", ["chatml", "qwen", "gemma"])
def test_an_answer_to_a_chat_is_as_the_template_writes_it(template):
    tokenizer = chat_tokenizer(template)
    turns = [{"role": "user", "content": "Name an animal."}]
    before = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    turns.append({"role": "assistant", "content": "The cat"})
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    assert whole[: len(before)] == before
    (ids,) = answer_ids(tokenizer, ["The cat"], None, "answer")
    assert len(ids) > 1
    assert whole[len(before) : len(before) + len(ids)] == ids
    assert tokenizer.decode(ids) == "The cat"


def test_pairs_and_effects_state_the_tokens_of_each_answer(random_model, tmp_path):
    model = random_model("qwen2")
    pairs = Pairs.from_prompts(
        model,
        clean=["Name your", "The cat"],
        corrupted=["List your", "The owl"],
        answers=["favorite animal", "loves"],
        foils=["wolf", 7],
        chat=False,
    )
    ids = model.tokenizer("your favorite animal")["input_ids"]
    first = without_padding(pairs.answers)[0]
    assert first == ids[-len(first) :]
    assert "".join(pairs.answer_labels[0]) == " favorite animal"
    assert pairs.foils[1].tolist()[:2] == [7, NO_TOKEN]
    longest = max(map(len, (*pairs.answer_labels, *pairs.foil_labels)))
    assert f"answers of up to {longest} tokens" in repr(pairs)
    assert all(f">{token}</span>" in pairs._repr_html_() for token in pairs.answer_labels[0])
    table = pairs.to_dataframe()
    assert list(table["answer"]) == list(pairs.answer_labels)
    assert table["answer_ids"][0] == first
    assert table["foil_ids"][1] == [7]

    effects = causal_mediation(model, pairs)
    assert effects.answer_labels == pairs.answer_labels
    assert effects.foil_labels == pairs.foil_labels
    assert all(f">{token}</span>" in effects._repr_html_() for token in pairs.answer_labels[0])
    effects.save(tmp_path / "effects")
    for restored in (Effects.load(tmp_path / "effects"), effects):
        assert restored[1].answer_labels == (pairs.answer_labels[1],)
        assert restored[[1, 0]].foil_labels == pairs.foil_labels[::-1]


def test_a_selection_is_as_wide_as_its_longest_answer():
    pairs = Pairs.from_tokens(
        [[1, 2]] * 3, [[3, 2]] * 3, answers=[[5, 6, 7], 8, None], foils=[9, [5, 6], None]
    )
    assert pairs.answers.tolist() == [[5, 6, 7], [8, -1, -1], [-1, -1, -1]]
    assert pairs[1].answers.tolist() == [[8]]
    assert pairs[[2]].foils.tolist() == [[NO_TOKEN]]
    assert pairs[1:].foil_labels == (("5", "6"), ())
    again = Pairs.from_tokens(
        pairs.clean, pairs.corrupted, answers=pairs.answers, foils=pairs.foils
    )
    assert torch.equal(again.answers, pairs.answers)
    assert torch.equal(again.foils, pairs.foils)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"answers": [[5, 6]], "foils": [[5, 6]]}, ValueError, r"the same token ids \[5, 6\]"),
        ({"answers": [[5, NO_TOKEN, 6]]}, ValueError, "negative token id -1"),
        ({"answers": [[[5, 6]]]}, TypeError, r"answers of pair 0 holds \[5, 6\]"),
        ({"answers": [5.5]}, TypeError, "answers of pair 0 holds 5.5"),
        ({"foils": [[1], [2]]}, ValueError, "foils has 2 entries"),
    ],
)
def test_bad_answers_are_refused(unchecked, options, error, message):
    with pytest.raises(error, match=message):
        Pairs.from_tokens([[1, 2]], [[3, 2]], **options)
