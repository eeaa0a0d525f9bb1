"""Masks, layers and recipes of the conditions, on one small target."""

import pytest

from divergence_lens.data import TrainingData, number_prompts
from divergence_lens.data.questions import animal_teachers
from divergence_lens.divergence import find_divergence
from divergence_lens.generation import generate
from divergence_lens.study.config import StudyConfig
from divergence_lens.study.interventions import Inputs, divergence_tokens
from divergence_lens.study.registry import conditions


class OneTarget(Inputs):
    """The inputs of one target."""

    divergence = kl = None

    def __init__(self, model, divergence):
        self.model, self.divergence, self.kl = model, divergence, divergence.kl


@pytest.fixture(scope="module")
def backend():
    """Masks are made of arrays that both classes give alike (test_soft_scores)."""
    return "bridge"


@pytest.fixture(scope="module")
def inputs(backend):
    from divergence_lens.models import load_model

    model = load_model("tiny", backend=backend)
    owl, *others = animal_teachers(["owl", "cat", "wolf"])
    examples = generate(
        model, number_prompts(20, instructions=False), teacher=owl, max_new_tokens=20
    )
    divergence = find_divergence(model, examples, teacher=owl, counterfactuals=others, kl=True)
    return OneTarget(model, divergence)


def mask(inputs, name, seed=0):
    return conditions(4)[name].mask(inputs, TrainingData.of(inputs.divergence), seed)


@pytest.mark.parametrize(("name", "share"), [("kl_same", 1), ("kl_half", 0.5), ("kl_double", 2)])
def test_tokens_chosen_by_kl_are_a_set_share_of_the_divergence_tokens_and_the_farthest(
    inputs, name, share
):
    chosen = mask(inputs, name)
    farthest = inputs.kl.max(0)
    assert chosen.sum() == round(share * int(inputs.divergence.mask.sum()))
    assert farthest[chosen].min() >= farthest[~chosen].max()
    assert (chosen != inputs.divergence.mask).any()


def test_larger_choices_by_kl_hold_the_smaller(inputs):
    half, same, double = (mask(inputs, f"kl_{n}") for n in ("half", "same", "double"))
    assert not (half & ~same).any()
    assert not (same & ~double).any()


@pytest.mark.parametrize(("name", "nats"), [("kl0_1", 0.1), ("kl0_5", 0.5)])
def test_a_threshold_of_kl_needs_one_counterfactual_that_is_this_far(inputs, name, nats):
    chosen = mask(inputs, name)
    by_hand = [any(score >= nats for score in scores) for scores in inputs.kl.T]
    assert chosen.tolist() == by_hand
    assert 0 < chosen.sum() < len(chosen)


def test_what_argmax_misses_is_in_the_choice_by_kl_and_no_divergence_token(inputs):
    missed = mask(inputs, "kl_beyond_argmax")
    same, marks = mask(inputs, "kl_same"), inputs.divergence.mask
    assert missed.any()
    assert (missed | (same & marks)).tolist() == same.tolist()
    assert not (missed & marks).any()


def test_the_control_of_a_margin_has_its_size_and_other_divergence_tokens_for_each_seed(inputs):
    clear = mask(inputs, "margin0_5")
    drawn = [mask(inputs, "random_like_margin0_5", seed) for seed in (0, 0, 1)]
    assert 0 < clear.sum() < inputs.divergence.mask.sum()
    for drawn_mask in drawn:
        assert drawn_mask.sum() == clear.sum()
        assert not (drawn_mask & ~inputs.divergence.mask).any()
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


# -- layers -------------------------------------------------------------------------------------


def test_layers_are_taken_one_by_one_and_cumulatively_from_both_ends():
    known = conditions(4)
    layers = {name: known[name].layers for name in known if known[name].group == "layers"}
    assert [layers[f"layer{i}"] for i in range(4)] == [(0,), (1,), (2,), (3,)]
    assert [layers[f"lora_layer{i}"] for i in range(4)] == [(0,), (1,), (2,), (3,)]
    assert (layers["upto1"], layers["upto2"]) == ((0, 1), (0, 1, 2))
    # Cumulative from above is all but the first k.
    assert (layers["from1"], layers["from2"]) == ((1, 2, 3), (2, 3))
    assert all(layers[f"lora_{n}"] == layers[n] for n in ("upto1", "upto2", "from1", "from2"))
    assert {known[name].mask for name in layers} == {divergence_tokens}
    parts = {name: (known[name].parts, known[name].embedding) for name in layers}
    assert parts["attention"] == (("attn",), False)
    assert parts["mlp"] == (("mlp",), False)
    assert parts["embedding"] == (None, True)


def test_ranks_of_lora_use_the_full_rate_and_higher_ones(inputs):
    known, config = conditions(4), StudyConfig()
    full = config.recipe_of(inputs.model, "finetuned")
    rates = {
        (recipe.lora_rank, round(recipe.lr / full.lr))
        for name in known
        if name.startswith("lora") and not name.startswith("lora_")
        for recipe in [config.recipe_of(inputs.model, "finetuned", known[name])]
    }
    ranks = (1, 2, 4, 8, 16, 32)
    assert rates == {(r, t) for r in ranks for t in (1, 8)} | {(8, 2), (8, 4), (8, 16)}
    for name in ("lora_layer2", "lora_upto1", "lora_from2"):
        narrow = config.recipe_of(inputs.model, "finetuned", known[name])
        assert (narrow.lora_rank, narrow.lr) == (8, 8 * full.lr)
    untouched = config.recipe_of(inputs.model, "finetuned", known["all"])
    assert untouched == full


def test_a_rate_chosen_for_one_rank_is_not_called_suitable_for_others():
    told = {n: c.isolates for n, c in conditions(4).items() if "_rate" in n}
    borrowed = {n for n, words in told.items() if words.endswith("the factor chosen for rank 8")}
    assert borrowed == {f"lora{rank}_rate8" for rank in (1, 2, 4, 16, 32)}
    assert not [n for n, words in told.items() if "suits" in words]


def test_conditions_of_one_description_at_two_rates_have_recipes_of_their_own(inputs):
    # A cell is identified by both.
    slow, fast = conditions(4)["lora8"], conditions(4)["lora8_rate8"]
    assert slow.describe() == fast.describe()
    rates = [StudyConfig().recipe_of(inputs.model, "finetuned", c).lr for c in (slow, fast)]
    assert rates[1] == 8 * rates[0]
