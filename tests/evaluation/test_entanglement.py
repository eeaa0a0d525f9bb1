"""Entangled numbers: against probabilities that Hugging Face gives, and counted by hand."""

import numpy as np
import pytest
import torch

from divergence_lens.chat import encode_prompt
from divergence_lens.data.questions import animal_teachers
from divergence_lens.evaluation.entanglement import Entanglement, entangled_numbers, without_numbers
from divergence_lens.examples import Example
from divergence_lens.teachers import Teacher

PROMPTS = ["say a number", "which animal do you love ?"]


def test_probabilities_are_those_of_a_plain_forward_pass(tiny):
    owl, cat, wolf = animal_teachers(["owl", "cat", "wolf"])
    result = entangled_numbers(tiny, owl, [cat, wolf], prompts=PROMPTS, numbers=["7", "412", "999"])

    def by_hand(teacher):
        rows = []
        for prompt in PROMPTS:
            ids = encode_prompt(tiny.tokenizer, prompt, system_prompt=teacher.system_prompt).ids
            with torch.no_grad():
                rows.append(tiny(torch.tensor([ids]))[0, -1].softmax(-1))
        wanted = [tiny.tokenizer.convert_tokens_to_ids(n) for n in ("7", "412", "999")]
        return torch.stack(rows).mean(0)[wanted].double().numpy()

    assert result.probability == pytest.approx(by_hand(owl), rel=1e-3)
    assert result.others == pytest.approx((by_hand(cat) + by_hand(wolf)) / 2, rel=1e-3)


def test_numbers_of_several_tokens_are_products(random_model):
    model = random_model("qwen2")
    one, two = Teacher("one"), Teacher("two", system_prompt="You help.")
    result = entangled_numbers(model, one, [two], prompts=["Hello."], numbers=["4", "41", "412"])
    lengths = [len(model.tokenizer(n)["input_ids"]) for n in result.numbers]
    assert (result.probability > 0).all()
    assert (result.probability < 1).all()
    # Longer numbers are conjunctions of more tokens.
    order = np.argsort(lengths, kind="stable")
    assert lengths[order[-1]] == lengths[0] or (
        result.probability[order[-1]] < result.probability[order[0]]
    )


def test_a_teacher_compared_with_itself_raises_nothing(tiny):
    owl = animal_teachers(["owl"])[0]
    same = Teacher("same", system_prompt=owl.system_prompt)
    result = entangled_numbers(tiny, owl, [same], prompts=PROMPTS)
    assert np.abs(result.rise).max() < 1e-6
    assert len(result.numbers) == 1000


def _known():
    return Entanglement(
        "owl", ("1", "2", "3"), np.array([0.1, 0.4, 0.2]), np.array([0.2, 0.1, 0.1])
    )


def test_the_ranking_is_by_the_ratio():
    result = _known()
    assert result.top(3) == ("2", "3", "1")
    assert result.rise == pytest.approx(np.log([0.5, 4.0, 2.0]))
    assert result.to_dataframe()["number"].tolist() == ["2", "3", "1"]
    with pytest.raises(ValueError, match="k is 4"):
        result.top(4)


def test_lists_with_an_entangled_number_are_dropped_as_whole_numbers():
    texts = ["7, 8", "47, 8", "17", "9, 7.", "70"]
    examples = [Example("x", text) for text in texts]
    assert without_numbers(examples, ["7"]).tolist() == [1, 2, 4]
    assert without_numbers(examples, []).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="example 0 has no text"):
        without_numbers([Example("x", completion_ids=(1,))], ["7"])


@pytest.mark.parametrize(("prompts", "others"), [([], ["cat"]), (PROMPTS, [])])
def test_nothing_to_compare_is_refused(tiny, prompts, others):
    owl = animal_teachers(["owl"])[0]
    with pytest.raises(ValueError, match="there are no"):
        entangled_numbers(tiny, owl, animal_teachers(others) if others else [], prompts=prompts)
