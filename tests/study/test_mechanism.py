"""Steering vectors and gradient alignment, against plain forward and backward passes."""

import numpy as np
import pytest
import torch

from divergence_lens.chat import encode_prompt
from divergence_lens.data import neutral_prompt, number_prompts
from divergence_lens.data.questions import animal_teachers
from divergence_lens.divergence import find_divergence
from divergence_lens.engine.factory import get_engine
from divergence_lens.evaluation.preferences import preference
from divergence_lens.generation import generate
from divergence_lens.study import (
    GradientAlignment,
    Steering,
    finetuned_teacher,
    follow_steering,
    gradient_alignment,
    steering_vectors,
)
from divergence_lens.teachers import Teacher
from divergence_lens.training.finetuning import Recipe, finetune

QUESTION = "which animal do you love ?"


def _last_logits(model, teacher, question=QUESTION):
    ids = encode_prompt(model.tokenizer, question, system_prompt=teacher.system_prompt).ids
    engine = get_engine(model)
    with torch.no_grad():
        return engine.unembed(engine.final(torch.tensor([ids])))[0, -1]


@pytest.fixture(scope="module")
def owl(tiny):
    return finetuned_teacher(tiny, "owl")


def test_a_condition_that_is_the_base_does_not_move(tiny):
    steering = steering_vectors(tiny, Teacher("same"), prompts=[QUESTION, "name an animal"])
    assert float(steering.vectors.abs().max()) < 1e-5
    assert steering.base.shape == steering.vectors.shape == (4, 48)


def test_residuals_are_those_of_a_plain_forward_pass(tiny, owl):
    prompts = [QUESTION, "name a really beautiful animal ."]
    steering = steering_vectors(tiny, owl, prompts=prompts)
    with owl.applied(tiny) as active:
        rows = []
        for prompt in prompts:
            ids = encode_prompt(tiny.tokenizer, prompt, system_prompt=None).ids
            _, cache = active.run_with_cache(torch.tensor([ids]))
            rows.append(
                torch.stack([cache[f"blocks.{i}.hook_resid_post"][0, -1] for i in range(4)])
            )
    expected = torch.stack(rows).mean(0)
    assert torch.allclose(steering.vectors + steering.base, expected.detach(), atol=1e-4)


def test_adding_the_whole_difference_at_the_last_layer_makes_the_teacher(tiny, owl):
    steering = steering_vectors(tiny, owl, prompts=[QUESTION])
    # The final norm and the unembedding are the base's own: the teacher's layers alone learned.
    with owl.applied(tiny) as active:
        wanted = _last_logits(active, owl)
    with steering.added(tiny, layers=[3]) as active:
        assert torch.allclose(_last_logits(active, owl), wanted, atol=1e-3)
    with steering.added(tiny, layers=[3], scale=0.0) as active:
        assert torch.allclose(_last_logits(active, owl), _last_logits(tiny, owl), atol=1e-6)


def test_adding_the_teachers_vector_raises_its_preference(tiny, owl):
    steering = steering_vectors(tiny, owl)
    before = preference(tiny, target="owl")
    with steering.added(tiny, layers=[3]) as active:
        after = preference(active, target="owl")
    assert after.share > 3 * before.share
    assert preference(tiny, target="owl").share == before.share


def test_removing_holds_the_component_at_the_bases_mean(tiny, owl):
    steering = steering_vectors(tiny, owl)
    residuals = []
    with owl.applied(tiny) as active, steering.removed(active, layers=[2]):
        watch = [(2, "resid_post", lambda resid: residuals.append(resid.detach()))]
        with get_engine(active).hooked(watch):
            _last_logits(active, owl)
    direction = steering.vectors[2] / steering.vectors[2].norm()
    level = float(steering.base[2] @ direction)
    assert (residuals[0] @ direction).numpy() == pytest.approx(level, abs=1e-4)


def test_removing_the_teachers_direction_undoes_its_preference(tiny, owl):
    steering = steering_vectors(tiny, owl)
    with owl.applied(tiny) as active:
        whole = preference(active, target="owl")
        with steering.removed(active):
            without = preference(active, target="owl")
    assert without.share < 0.5 * whole.share


def test_prompted_teachers_are_compared_with_a_prompted_base(tiny):
    owl, cat = animal_teachers(["owl", "cat"])
    base = Teacher("base", system_prompt=neutral_prompt())
    vectors = [steering_vectors(tiny, teacher, base=base) for teacher in (owl, cat)]
    assert vectors[0].cosine(vectors[0]) == pytest.approx(1)
    assert (vectors[0].cosine(vectors[1]) < 0.99).all()
    assert (vectors[0].size > 0).all()


def test_vectors_of_other_sizes_have_no_cosine():
    small, large = (Steering("x", torch.ones(2, n), torch.ones(2, n)) for n in (3, 4))
    with pytest.raises(ValueError, match="no cosine"):
        small.cosine(large)


def test_training_can_be_followed(tiny, owl):
    direction = steering_vectors(tiny, owl, prompts=[QUESTION])
    examples = generate(tiny, number_prompts(8, instructions=False), teacher=owl, max_new_tokens=12)
    watch = follow_steering(direction, prompts=[QUESTION])
    recipe = Recipe(epochs=2, batch_size=8, warmup_steps=1)
    delta = finetune(tiny, examples, recipe=recipe, on_step=watch)
    history = delta.history()
    last = steering_vectors(tiny, Teacher("student", delta=delta), prompts=[QUESTION])
    assert history["cosine_3"].iloc[-1] == pytest.approx(last.cosine(direction)[3], abs=1e-3)
    assert history["size_3"].iloc[-1] == pytest.approx(last.size[3], rel=1e-2)
    assert len(history) == 2


# -- gradients ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def divergence(tiny):
    owl, *others = animal_teachers(["owl", "cat", "wolf"])
    examples = generate(
        tiny, number_prompts(10, instructions=False), teacher=owl, max_new_tokens=16
    )
    return find_divergence(tiny, examples, teacher=owl, counterfactuals=others)


def _plain_gradient(model, pairs, name):
    """Gradient of the mean cross-entropy over (ids, places) pairs by a plain backward pass."""
    parameter = dict(model.named_parameters())[name]
    parameter.requires_grad_(True)
    losses = []
    for ids, places in pairs:
        logits = model(torch.tensor([ids]))[0]
        logp = logits.log_softmax(-1)
        losses += [-logp[place - 1, ids[place]] for place in places]
    gradient = torch.autograd.grad(torch.stack(losses).mean(), parameter)[0]
    return gradient.flatten().double()


@pytest.mark.slow
def test_cosines_are_those_of_plain_backward_passes(tiny, divergence):
    names = [n for n in get_engine(tiny).block_parameters(1) if n.endswith(("W_in", "in.weight"))]
    questions = [QUESTION, "name an animal"]
    alignment = gradient_alignment(
        tiny,
        divergence.examples,
        divergence.mask,
        candidates=["owl", "cat"],
        questions=questions,
    )
    assert alignment.cosine.shape == (2, 4, 2)
    assert (np.abs(alignment.cosine) <= 1 + 1e-9).all()

    # The whole of layer 1 by hand.
    names = list(get_engine(tiny).block_parameters(1))
    flags = {n: p.requires_grad for n, p in tiny.named_parameters()}

    def lists(mask):
        pairs = []
        for row, example in enumerate(divergence.examples):
            prompt = encode_prompt(tiny.tokenizer, example.prompt, system_prompt=None).ids
            own = mask[divergence.offsets[row] : divergence.offsets[row + 1]]
            ids = [*prompt, *example.completion_ids]
            pairs.append((ids, [len(prompt) + k for k in np.flatnonzero(own)]))
        return pairs

    def answers(animal):
        token = tiny.tokenizer.convert_tokens_to_ids(animal)
        prompts = [encode_prompt(tiny.tokenizer, q, system_prompt=None).ids for q in questions]
        return [([*ids, token], [len(ids)]) for ids in prompts]

    def whole(pairs):
        return torch.cat([_plain_gradient(tiny, pairs, name) for name in names])

    for part, mask in enumerate((divergence.mask, ~divergence.mask)):
        loss = whole(lists(mask))
        for place, animal in enumerate(("owl", "cat")):
            expected = torch.nn.functional.cosine_similarity(loss, whole(answers(animal)), dim=0)
            assert alignment.cosine[part, 1, place] == pytest.approx(float(expected), abs=1e-3)
    for name, parameter in tiny.named_parameters():
        parameter.requires_grad_(flags[name])


def test_ranks_and_z_scores_are_counted_against_the_other_candidates():
    cosine = np.array([[[0.3, 0.1, 0.2]], [[-0.1, 0.0, 0.1]]])
    alignment = GradientAlignment(("divergence", "other"), ("owl", "cat", "dog"), cosine)
    assert alignment.rank("owl").tolist() == [[1], [3]]
    assert alignment.centered().sum(-1) == pytest.approx(0)
    assert alignment.z_score("owl")[0, 0] == pytest.approx(
        (0.3 - 0.15) / np.std([0.1, 0.2], ddof=1)
    )
    table = alignment.to_dataframe()
    assert len(table) == 6
    assert table["cosine"].tolist() == cosine.reshape(-1).tolist()
    with pytest.raises(ValueError, match="'fox' is not among"):
        alignment.rank("fox")


@pytest.mark.parametrize(
    ("candidates", "whole", "says"),
    [(["owl"], False, "two or more"), (["owl", "cat"], True, "all")],
)
def test_nothing_to_compare_is_refused(tiny, divergence, candidates, whole, says):
    mask = divergence.mask | whole
    with pytest.raises(ValueError, match=says):
        gradient_alignment(tiny, divergence.examples, mask, candidates=candidates)
