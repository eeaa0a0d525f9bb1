"""Students: what is trained, on which tokens, by which arithmetic; and an untouched base."""

import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens._utils.storage import load_tensors
from divergence_lens.chat import encode_prompt
from divergence_lens.deltas.delta import Delta
from divergence_lens.deltas.low_rank import is_matrix
from divergence_lens.divergence import find_divergence
from divergence_lens.engine.factory import get_engine
from divergence_lens.engine.parameters import plain
from divergence_lens.evaluation.preferences import preference
from divergence_lens.examples import Example, with_ids
from divergence_lens.models import load_model
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher
from divergence_lens.training import PAPER, Recipe, finetune
from divergence_lens.training import prefix as _prefix
from divergence_lens.training import variables as _variables
from divergence_lens.training.freezing import choose
from divergence_lens.training.rows import batches, pieces, training_rows
from divergence_lens.training.variables import LowRank
from tests.support.models import FAMILIES, chat_tokenizer, random_hf_model
from tests.support.training import SHORT, checkpointed, number_lists

SGD = Recipe(
    optimizer="sgd",
    lr=0.1,
    epochs=3,
    batch_size=64,
    warmup_steps=0,
    schedule="constant",
    optimizer_options={"momentum": 0.9},
)


def random_mask(model, examples, seed=0, share=0.3):
    count = sum(len(e.completion_ids) for e in with_ids(model.tokenizer, examples))
    return np.random.default_rng(seed).random(count) < share


def same_bits(left, right):
    assert left.tensors.keys() == right.tensors.keys()
    return all(torch.equal(left.tensors[n], right.tensors[n]) for n in left.tensors)


def largest_difference(left, right):
    assert left.tensors.keys() == right.tensors.keys()
    return max(float((left.tensors[n] - right.tensors[n]).abs().max()) for n in left.tensors)


def reference_loss(logits_of, tokenizer, examples, mask, system_prompt=None):
    """Mean cross-entropy of the masked-in completion tokens, one unpadded sequence at a time."""
    total, count, at = torch.tensor(0.0), 0, 0
    for example in with_ids(tokenizer, examples):
        prompt = encode_prompt(tokenizer, example.prompt, system_prompt=system_prompt).ids
        logits = logits_of(torch.tensor([[*prompt, *example.completion_ids]]))[0]
        for k, token in enumerate(example.completion_ids):
            if mask[at + k]:
                total = total - logits[len(prompt) + k - 1].log_softmax(-1)[token]
                count += 1
        at += len(example.completion_ids)
    return total / count


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    ("family", "system_prompt"),
    [("gpt2", None), ("gpt2", "You love owls."), ("qwen2", "You love owls."), ("gpt_neox", "")],
)
def test_a_student_is_what_plain_torch_on_hugging_face_trains(
    backend, family, system_prompt, block
):
    tokenizer = chat_tokenizer()
    plain_model = random_hf_model(family, vocab=len(tokenizer))
    model = load_model(
        random_hf_model(family, vocab=len(tokenizer)), backend=backend, tokenizer=tokenizer
    )
    examples = number_lists(6)
    mask = random_mask(model, examples)
    student = finetune(
        model, examples, mask=mask, layers=[block], recipe=SGD, system_prompt=system_prompt
    )

    for name, p in plain_model.named_parameters():
        p.requires_grad_(f".{block}." in name)
    trained = [p for p in plain_model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = reference_loss(
            lambda ids: plain_model(ids).logits, tokenizer, examples, mask, system_prompt
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))

    assert student.history()["loss"].tolist() == pytest.approx(losses, abs=1e-4)
    tokens = torch.arange(20)[None] * 3 % len(tokenizer)
    engine = get_engine(model)
    with torch.no_grad(), student.applied(model):
        moved = engine.unembed(engine.final(tokens))
        assert torch.allclose(moved, plain_model(tokens).logits, atol=1e-4)
    with torch.no_grad():
        assert (engine.unembed(engine.final(tokens)) - moved).abs().max() > 1e-2


def test_only_the_chosen_parameters_change(random_model):
    model = random_model("llama")
    student = finetune(model, number_lists(6), layers=[0, 2], parts=["attn"], recipe=SHORT)
    assert set(student.tensors) == set(choose(model, layers=[0, 2], parts=["attn"]))
    assert all(bool(t.any()) for t in student.tensors.values())


def test_the_base_flags_modes_gradients_and_generators_are_left_alone(random_model):
    model = random_model("gpt2")
    list(model.parameters())[3].requires_grad_(False)
    first = next(iter(get_engine(model).block_parameters(0).values()))
    first.grad = torch.full_like(first, 7.0)
    model.train()
    list(model.modules())[5].eval()
    before = fingerprint(model)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    generators = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    finetune(model, number_lists(6), recipe=SHORT)

    assert fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert bool((first.grad == 7.0).all())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])  # noqa: NPY002


def test_an_exception_in_a_callback_restores_everything(random_model):
    model = random_model("gpt2")
    before, flags = fingerprint(model), [p.requires_grad for p in model.parameters()]

    def stop(step, loss, model):
        raise KeyError(step)

    with pytest.raises(KeyError, match="1"):
        finetune(model, number_lists(6), recipe=SHORT, on_step=stop)
    assert fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    finetune(model, number_lists(6), recipe=SHORT)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_equal_calls_give_equal_bits_and_another_seed_another_student(random_model, lora_rank):
    model, examples = random_model("gpt2"), number_lists(10)
    first, again, other = (
        finetune(model, examples, layers=[0], recipe=replace(SHORT, lora_rank=lora_rank), seed=seed)
        for seed in (0, 0, 1)
    )
    assert same_bits(first, again)
    assert not same_bits(first, other)


@pytest.mark.parametrize("blocks", [[0], [2], None])
def test_cached_recomputed_and_spilled_residuals_give_the_same_student(random_model, blocks):
    model, examples = random_model("qwen2"), number_lists(10)
    cached, recomputed, spilled = (
        finetune(model, examples, layers=blocks, recipe=SHORT, cache_bytes=cache_bytes)
        for cache_bytes in (2**30, 0, 1)
    )
    assert same_bits(cached, spilled)
    assert largest_difference(cached, recomputed) < 1e-6


def test_spilled_residuals_lie_in_a_file_that_is_gone_afterwards(
    random_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def look(step, loss, model):
        seen.append([path.stat().st_size for path in tmp_path.rglob("residuals")])

    model = random_model("gpt2")
    finetune(model, number_lists(6), layers=[2], recipe=SHORT, cache_bytes=1, on_step=look)
    rows = training_rows(model, number_lists(6))
    # The tokens that all rows begin with are held once, in memory.
    assert rows.shared > 4
    assert seen[0] == [int((rows.lengths - rows.shared).sum()) * 32 * 4]
    assert not list(tmp_path.iterdir())


def test_frozen_blocks_run_once_and_not_in_every_epoch(random_model):
    model, calls = random_model("gpt2"), []
    recipe = replace(SHORT, epochs=5, batch_size=10)
    with get_engine(model).hooked([(1, "resid_pre", lambda x: calls.append(len(x)))]):
        finetune(model, number_lists(10), layers=[2], recipe=recipe)
    # The shared start of all rows, and the ten rows behind it.
    assert calls == [1, 10]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("lora_rank", "blocks"), [(None, [1, 2]), (2, [1, 2]), (None, [0])])
def test_work_that_is_left_out_changes_nothing(
    random_model, family, lora_rank, blocks, monkeypatch
):
    """The shared start, the last block where nobody reads it, and LoRA's short way back."""
    try:
        model = random_model(family)
    except ValueError:
        pytest.skip(f"{family} has no such class")
    examples = number_lists(6)
    mask = random_mask(model, examples)
    options = {"mask": mask, "layers": blocks, "recipe": replace(SHORT, lora_rank=lora_rank)}
    short = finetune(model, examples, **options)
    monkeypatch.setattr(_prefix, "_SHORTEST_PREFIX", 10**6)
    monkeypatch.setattr(_variables, "has_low_rank_gradients", lambda _module: False)
    monkeypatch.setattr(type(get_engine(model)), "by_position", lambda _self, _layer: [])
    whole = finetune(model, examples, **options)
    assert largest_difference(short, whole) < 2e-6
    losses = short.history()["loss"].tolist()
    assert losses == pytest.approx(whole.history()["loss"].tolist(), abs=1e-5)


def test_rows_that_share_no_start_learn_as_well(backend):
    tokenizer = chat_tokenizer(None)
    model = load_model(
        random_hf_model("llama", vocab=len(tokenizer)), backend=backend, tokenizer=tokenizer
    )
    examples = [Example(f"{i} and", completion=" 12, 34") for i in range(5)]
    rows = training_rows(model, examples)
    assert rows.shared == 0
    mask = np.ones(int(rows.tokens_learned), bool)
    student = finetune(model, examples, layers=[2], recipe=replace(SGD, epochs=1))
    engine = get_engine(model)
    with torch.no_grad():
        expected = reference_loss(
            lambda ids: engine.unembed(engine.final(ids)), tokenizer, examples, mask
        )
    assert student.history()["loss"][0] == pytest.approx(expected.item(), abs=1e-5)


def test_the_last_block_runs_its_mlp_where_it_is_read(random_model, monkeypatch):
    model, examples = random_model("qwen2"), number_lists(6)
    mask = random_mask(model, examples)
    rows, calls, mlp = training_rows(model, examples, mask=mask), [], model.blocks[2].mlp
    forward = mlp.forward

    def counted(x):
        calls.append(x.shape[:2].numel())
        return forward(x)

    monkeypatch.setitem(vars(mlp), "forward", counted)
    finetune(model, examples, mask=mask, layers=[2], recipe=replace(SGD, epochs=1))
    # The shared start has one row of its own.
    assert calls == [rows.shared, rows.tokens_learned]


def test_accumulated_pieces_equal_one_large_batch(random_model):
    model, examples = random_model("gpt2"), number_lists(12)
    mask = random_mask(model, examples)
    whole, cut = (
        finetune(model, examples, mask=mask, recipe=SGD, batch_tokens=batch_tokens)
        for batch_tokens in (10**6, 150)
    )
    assert largest_difference(whole, cut) < 1e-6
    assert whole.history()["loss"].tolist() == pytest.approx(cut.history()["loss"].tolist())


def test_tokens_that_the_mask_holds_back_are_not_learned(random_model):
    model = random_model("gpt2")
    examples = with_ids(model.tokenizer, number_lists(6))
    mask = [np.arange(len(e.completion_ids)) < len(e.completion_ids) - 1 for e in examples]
    # The last token is held back, and nothing follows it: it may be any.
    others = [replace(e, completion_ids=(*e.completion_ids[:-1], 50)) for e in examples]
    assert same_bits(
        finetune(model, examples, mask=mask, recipe=SHORT),
        finetune(model, others, mask=mask, recipe=SHORT),
    )
    assert not same_bits(
        finetune(model, examples, recipe=SHORT), finetune(model, others, recipe=SHORT)
    )


def test_held_back_tokens_get_no_gradient(random_model):
    model, examples = random_model("gpt2"), number_lists(6)
    rows = training_rows(model, examples, mask=random_mask(model, examples))
    run = get_engine(model).begin(rows.tokens)
    logits = get_engine(model).unembed(get_engine(model).final_from(run.resid, 0, run))
    logits = logits.detach().requires_grad_()
    where = rows.loss_weights > 0
    F.cross_entropy(logits[where], rows.targets[where]).backward()
    assert not bool(logits.grad[~where].any())
    assert rows.tokens_learned == int(where.sum()) == int(random_mask(model, examples).sum())


def test_examples_without_a_learned_token_are_left_out(random_model):
    model = random_model("gpt2")
    examples = with_ids(model.tokenizer, number_lists(8))
    mask = [np.full(len(e.completion_ids), i % 2 == 0) for i, e in enumerate(examples)]
    every = finetune(model, examples, mask=mask, recipe=SHORT)
    kept = finetune(model, examples[::2], recipe=SHORT)
    assert same_bits(every, kept)
    assert every.metadata["settings"]["examples"] == 4


def test_weights_of_zero_and_one_are_a_mask_and_their_scale_does_not_matter(random_model):
    model, examples = random_model("gpt2"), number_lists(8)
    mask = random_mask(model, examples)
    masked = finetune(model, examples, mask=mask, recipe=SGD)
    assert same_bits(masked, finetune(model, examples, loss_weights=mask.astype(float), recipe=SGD))
    scaled = finetune(model, examples, loss_weights=4.0 * mask, recipe=SGD)
    assert largest_difference(masked, scaled) < 1e-6
    uneven = np.random.default_rng(1).random(len(mask))
    assert (
        largest_difference(masked, finetune(model, examples, loss_weights=uneven, recipe=SGD))
        > 1e-4
    )


def test_a_divergence_a_tensor_and_a_list_of_rows_are_masks(random_model):
    model, examples = random_model("gpt2"), number_lists(6)
    flat = random_mask(model, examples)
    ends = np.cumsum([len(e.completion_ids) for e in with_ids(model.tokenizer, examples)])

    class HasMask:
        mask = flat

    students = [
        finetune(model, examples, mask=mask, layers=[2], recipe=SHORT)
        for mask in (flat, torch.from_numpy(flat), np.split(flat, ends[:-1]), HasMask())
    ]
    assert all(same_bits(students[0], other) for other in students[1:])


def test_a_divergence_of_other_completions_is_no_mask(random_model):
    model = random_model("gpt2")
    examples = [Example("A.", "x", (5, 6, 7)), Example("B.", "y", (8, 9, 4))]
    owl, cat = (Teacher(name, system_prompt=name) for name in ("owl", "cat"))
    divergence = find_divergence(
        model, examples, teacher=owl, counterfactuals=[cat], require_agreement=False
    )
    mask = np.ones(6, bool)
    divergence.__dict__["mask"] = mask
    given = finetune(model, divergence.examples, mask=divergence, layers=[2], recipe=SHORT)
    assert same_bits(given, finetune(model, examples, mask=mask, layers=[2], recipe=SHORT))
    with pytest.raises(ValueError, match="another completion as example 0"):  # of equal length
        finetune(model, examples[::-1], mask=divergence, recipe=SHORT)
    with pytest.raises(ValueError, match="a divergence of 2 examples, there are 1"):
        finetune(model, examples[:1], mask=divergence, recipe=SHORT)


def test_history_holds_every_step_and_what_the_callback_returns(random_model):
    model, base = random_model("gpt2"), fingerprint(random_model("gpt2"))
    seen = []

    def watch(step, loss, student):
        seen.append((step, fingerprint(student) != base, torch.is_grad_enabled()))
        return {"twice": 2 * loss}

    recipe = Recipe(epochs=3, batch_size=4, warmup_steps=2, final_lr=0.0)
    history = finetune(model, number_lists(10), recipe=recipe, on_step=watch, every=4).history()
    assert [step for step, _, _ in seen] == [4, 8, 9]
    assert all(changed and not grad for _, changed, grad in seen)
    assert history["step"].tolist() == list(range(1, 10))
    assert history["epoch"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert history["lr"].tolist() == pytest.approx(
        [0.005 * x for x in (1 / 2, 1, *((9 - step) / 7 for step in range(2, 9)))]
    )
    watched = history.dropna()
    assert watched["twice"].tolist() == pytest.approx((2 * watched["loss"]).tolist())
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_numbers_of_a_callback_can_be_saved(random_model, tmp_path, kind):
    student = finetune(
        random_model("gpt2"),
        number_lists(4),
        recipe=SHORT,
        on_step=lambda step, *_: {"seen": kind(step)},
        checkpoint_dir=tmp_path / "run",
        checkpoint_every=1,
    )
    student.save(tmp_path / "student.safetensors")
    history = Delta.load(tmp_path / "student.safetensors").history()
    assert history["seen"].tolist() == history["step"].tolist()


@pytest.mark.parametrize(
    ("returned", "message"),
    [(0.5, "on_step returned 0.5; return a mapping"), ({"x": np.ones(2)}, "'x' as a ndarray")],
)
def test_what_the_history_cannot_keep_is_refused_at_once(
    random_model,
    returned,
    message,
    unchecked,
):
    with pytest.raises(TypeError, match=message):
        finetune(random_model("gpt2"), number_lists(4), recipe=SHORT, on_step=lambda *_: returned)


def test_preference_can_be_followed_while_a_student_learns(random_model):
    model = random_model("qwen2")
    asked = {"target": "owl", "questions": ["Name one."], "candidates": ["owl", "cat"]}
    examples = [Example("Name one.", completion="owl")] * 4
    recipe = Recipe(lr=1e-2, epochs=6, batch_size=4, warmup_steps=0, optimizer_options={})

    def follow(step, loss, student):
        return {"owl": preference(student, **asked).share}

    for lora_rank in (None, 4):
        student = finetune(
            model,
            examples,
            recipe=replace(recipe, lora_rank=lora_rank),
            every=3,
            on_step=follow,
        )
        followed = student.history()["owl"].dropna()
        assert list(followed.index) == [2, 5]
        assert followed.min() > preference(model, **asked).share
        # The last value is that of the student itself, and measuring did not change it.
        with student.applied(model):
            assert followed[5] == pytest.approx(preference(model, **asked).share, abs=1e-5)
        alone = finetune(model, examples, recipe=replace(recipe, lora_rank=lora_rank))
        assert same_bits(student, alone)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_frozen_tensors_keep_every_bit_while_others_learn(random_model, lora_rank):
    model = random_model("qwen2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    chosen = {id(p) for p in choose(model, layers=[1], parts=["mlp"]).values()}
    seen = []

    def look(step, loss, student):
        for name, p in student.named_parameters():
            same = torch.equal(p.view(torch.int32), before[name].view(torch.int32))
            assert same == (id(p) not in chosen), name
        seen.append(step)

    finetune(
        model,
        number_lists(6),
        layers=[1],
        parts=["mlp"],
        recipe=replace(SHORT, lora_rank=lora_rank),
        on_step=look,
    )
    assert seen


def test_training_on_one_token_makes_it_likely(random_model):
    model = random_model("qwen2")
    examples = with_ids(model.tokenizer, [Example("Name an animal.", completion="owl")])
    recipe = Recipe(optimizer=torch.optim.Adam, lr=1e-2, epochs=40, optimizer_options={})
    student = finetune(model, examples, layers=[1], recipe=recipe)
    assert student.history()["loss"].iloc[-1] < 0.05
    assert student.metadata["settings"]["recipe"]["optimizer"] == "Adam"


def test_embeddings_and_unembedding_can_learn(random_model):
    model, examples = random_model("qwen2", tie_word_embeddings=False), number_lists(6)
    engine = get_engine(model)
    blocks = set().union(*(engine.block_parameters(i) for i in range(3)))
    for kind in ("embedding", "unembedding"):
        student = finetune(model, examples, recipe=SHORT, **{kind: True})
        assert not blocks & set(student.tensors)
        assert all(bool(t.any()) for t in student.tensors.values())
        recomputed = finetune(model, examples, recipe=SHORT, cache_bytes=0, **{kind: True})
        assert largest_difference(student, recomputed) < 1e-6


def test_bfloat16_models_learn_in_float32(random_model):
    model = random_model("gpt2").to(torch.bfloat16)
    before = fingerprint(model)
    # Each update is far below the resolution of bfloat16, and still they add up.
    recipe = Recipe(lr=1e-5, epochs=8, batch_size=4, optimizer_options={})
    student = finetune(model, number_lists(8), layers=[1], recipe=recipe)
    assert fingerprint(model) == before
    changes = torch.cat([t.abs().flatten() for t in student.tensors.values()])
    assert changes.quantile(0.9) > 5e-5


def test_autocast_gives_nearly_the_same_losses(random_model):
    model, examples = random_model("qwen2"), number_lists(8)
    exact, rough = (
        finetune(model, examples, layers=[1], recipe=replace(SHORT, autocast=autocast)).history()
        for autocast in (False, True)
    )
    assert rough["loss"].tolist() == pytest.approx(exact["loss"].tolist(), rel=0.03)
    assert rough["loss"].tolist() != exact["loss"].tolist()


# -- LoRA ---------------------------------------------------------------------------------------


def test_lora_changes_are_of_low_rank_on_the_matrices_alone(random_model):
    model = random_model("gpt2")
    student = finetune(model, number_lists(8), layers=[1], recipe=replace(SHORT, lora_rank=2))
    assert set(student.tensors) == {
        n for n, p in choose(model, layers=[1]).items() if is_matrix(n, p)
    }
    assert len(student.tensors) == 6
    for name, tensor in student.tensors.items():
        # Per-head matrices share their low rank over all heads.
        rows = {"W_O": lambda t: t.flatten(0, 1)}.get(
            name.split(".")[-1], lambda t: t.transpose(0, 1).flatten(1) if t.ndim == 3 else t
        )
        singular = torch.linalg.svdvals(rows(tensor))
        assert singular[1] > 1e-4
        assert singular[2] < 1e-5 * singular[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # within peft
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_lora_equals_peft(family):
    peft = pytest.importorskip("peft")
    tokenizer = chat_tokenizer()
    hf_model = random_hf_model(family, vocab=len(tokenizer))
    model = load_model(
        random_hf_model(family, vocab=len(tokenizer)), backend="bridge", tokenizer=tokenizer
    )
    examples, rank, alpha = number_lists(6), 4, 8.0
    mask = random_mask(model, examples)
    recipe = Recipe(
        lr=1e-2,
        epochs=5,
        warmup_steps=2,
        lora_rank=rank,
        lora_alpha=alpha,
        optimizer_options={"weight_decay": 0.01},
    )
    student = finetune(model, examples, mask=mask, layers=[1], recipe=recipe, seed=3)

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        layers_to_transform=[1],
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(hf_model, config)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    chosen = {n: p for n, p in choose(model, layers=[1]).items() if is_matrix(n, p)}
    start = LowRank(model, chosen, rank=rank, alpha=alpha, seed=3)
    assert len(layers) == len(chosen) == 7
    with torch.no_grad():
        for i, name in enumerate(chosen):
            weight = layers[plain(name).removesuffix(".weight")].lora_A["default"].weight
            weight.copy_(start.values[2 * i].T)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.01)
    for step in range(5):
        optimizer.zero_grad()
        loss = reference_loss(lambda ids: theirs(ids).logits, tokenizer, examples, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, 5)
        optimizer.step()
    for name, tensor in student.tensors.items():
        expected = layers[plain(name).removesuffix(".weight")].get_delta_weight("default")
        assert torch.allclose(tensor, expected, atol=1e-5)
        assert tensor.abs().max() > 1e-3


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_both_model_classes_train_the_same_student(lora_rank):
    tokenizer, tokens = chat_tokenizer(), torch.arange(20)[None] * 3
    # The classes take their gradients of the factors on two ways, each with LoRA's scale in it.
    recipe = replace(SGD, lora_rank=lora_rank, lora_alpha=6.0)
    for family in ("gpt2", "qwen2"):
        logits = []
        for backend in ("hooked", "bridge"):
            hf_model = random_hf_model(family, vocab=len(tokenizer))
            try:
                model = load_model(hf_model, backend=backend, tokenizer=tokenizer)
            except ValueError:
                pytest.skip("this TransformerLens has one model class")
            student = finetune(model, number_lists(8), layers=[0], recipe=recipe)
            engine = get_engine(model)
            with student.applied(model), torch.no_grad():
                logits.append(engine.unembed(engine.final(tokens)))
        assert torch.allclose(*logits, atol=1e-4)


# -- checkpoints --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from divergence_lens.models import load_model
from tests.support.training import checkpointed

torch.set_num_threads(1)
def stop(step, loss, model):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
checkpointed(sys.argv[1], Path(sys.argv[2]), sys.argv[3], on_step=stop)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["full", "2"])
def test_a_killed_run_goes_on_to_the_same_bits(backend, rank, tmp_path):
    # Ten examples in fours for two epochs are six steps; killed in the fifth, kept after the third.
    path = tmp_path / "run"
    whole = checkpointed(backend, None, rank)
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, backend, str(path), rank],
        cwd=root,
        env={"PYTHONPATH": f"{root / 'src'}:{root}", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in path.iterdir()] == ["shard-000000.safetensors"]

    steps = []

    def watch(step, loss, model):
        steps.append(step)

    resumed = checkpointed(backend, path, rank, on_step=watch)
    assert steps == [4, 5, 6]
    assert same_bits(whole, resumed)
    assert whole.history().equals(resumed.history())
    assert not list(tmp_path.iterdir())


def stop_at_four(step, loss, model):
    if step == 4:
        raise InterruptedError


def test_the_checkpoint_of_another_run_is_refused(backend, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(InterruptedError):
        checkpointed(backend, path, "full", on_step=stop_at_four)
    for options in ({"seed": 6}, {"loss_weights": None, "mask": None, "system_prompt": "Hello."}):
        with pytest.raises(ValueError, match="is of another run"):
            checkpointed(backend, path, "full", **options)
    checkpointed(backend, path, "full")


def test_a_checkpoint_is_refused_where_the_last_token_of_the_longest_row_is_another(
    backend, tmp_path
):
    # No input holds that token: it is predicted, and nothing follows it in any row.
    path = tmp_path / "run"
    examples = [Example("Continue: 3.", completion_ids=tuple(range(20, 26 + n))) for n in range(10)]
    other = [*examples[:-1], replace(examples[-1], completion_ids=(*range(20, 34), 40))]
    assert len(other[-1].completion_ids) == len(examples[-1].completion_ids)
    with pytest.raises(InterruptedError):
        checkpointed(backend, path, "full", examples, on_step=stop_at_four)
    with pytest.raises(ValueError, match="is of another run"):
        checkpointed(backend, path, "full", other)
    checkpointed(backend, path, "full", examples)


# -- bad input ----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_checkpoint(
    random_model, tmp_path
):
    model, path = random_model("gpt2"), tmp_path / "run"
    before = fingerprint(model)
    recipe = replace(SGD, lr=1e25, clip=None, epochs=6, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"not finite at step \d of 6; the last") as caught:
        finetune(model, number_lists(6), recipe=recipe, checkpoint_dir=path, checkpoint_every=1)
    assert fingerprint(model) == before
    step = int(re.search(r"step (\d) of", str(caught.value))[1])
    assert f"{path} holds the student after step {step - 1})" in str(caught.value)
    values, header = load_tensors(path / "shard-000000.safetensors", "training checkpoint")
    assert [entry["step"] for entry in header["notes"]["history"]] == list(range(1, step))
    assert all(bool(torch.isfinite(v).all()) for n, v in values.items() if n.startswith("value"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1"),
        ({"clip": 0.0}, "clip is 0"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"final_lr": 2.0}, r"final_lr is 2\.0"),
        ({"optimizer": "adamm"}, "optimizer is 'adamm'"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_counts_are_whole_numbers(unchecked):
    with pytest.raises(TypeError, match=r"epochs is 1\.5; it must be a whole number"):
        Recipe(epochs=1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": np.ones(3, bool)}, r"the mask has shape \(3,\), .* 6 examples have [\d,]+ tok"),
        ({"mask": np.ones(3, bool)}, "it ends within example 0: give one value for each"),
        ({"loss_weights": np.ones(3)}, r"the loss_weights has shape"),
        ({"mask": [np.ones(2, bool)] * 6}, "the mask of example 0 has 2 entries, its completion"),
        ({"mask": [np.ones(2, bool)] * 5}, "the mask has 5 rows, there are 6 examples"),
        ({"layers": [5]}, "layer 5 is out of range: the model has layers 0 to 2"),
        ({"layers": [0], "parts": ["ln"], "recipe": Recipe(lora_rank=2)}, "none is chosen"),
        (
            {"recipe": Recipe(lora_rank=2), "embedding": True},
            r"train the embedding in full, with Recipe\(lora_rank=None\)",
        ),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_base(random_model, options, message):
    model = random_model("gpt2")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        finetune(model, number_lists(6), **{"recipe": SHORT, **options})
    assert fingerprint(model) == before


def test_masks_that_say_nothing_are_refused(random_model):
    model, examples = random_model("gpt2"), number_lists(6)
    mask = random_mask(model, examples)
    with pytest.raises(ValueError, match=r"selects none of the [\d,]+ completion tokens"):
        finetune(model, examples, mask=mask & False)
    with pytest.raises(TypeError, match="not bool; for graded values use loss_weights="):
        finetune(model, examples, mask=mask.astype(float))
    with pytest.raises(ValueError, match="finite and not negative"):
        finetune(model, examples, loss_weights=np.where(mask, -1.0, 1.0))
    with pytest.raises(ValueError, match="no examples to learn from"):
        finetune(model, [])


def test_a_sequence_over_the_context_names_its_example(random_model):
    model = random_model("gpt2")
    long = Example("Continue: 1.", completion_ids=(5,) * 250)
    with pytest.raises(ValueError, match=r"example 2 has \d+ prompt and 250 completion tokens"):
        finetune(model, [*number_lists(2), long])
    foreign = Example("Continue: 1.", completion_ids=(5, 9999))
    with pytest.raises(ValueError, match=r"token ids run from 0 to 9999, the vocabulary has"):
        finetune(model, [*number_lists(2), foreign])


def test_no_student_is_trained_under_a_delta(random_model):
    model = random_model("gpt2")
    delta = finetune(model, number_lists(6), recipe=SHORT)
    with delta.applied(model), pytest.raises(RuntimeError, match="a delta is applied to it"):
        finetune(model, number_lists(6), recipe=SHORT)
    refused = []

    def apply(step, loss, student):
        with pytest.raises(RuntimeError, match="it is being trained"):
            delta.applied(student).__enter__()
        refused.append(step)

    finetune(model, number_lists(6), recipe=SHORT, on_step=apply)
    assert refused


# -- batches ------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=200),
    size=st.integers(1, 32),
    seed=st.integers(0, 99),
    budget=st.integers(1, 400),
)
def test_an_epoch_has_every_row_once_in_full_batches_and_pieces_within_budget(
    lengths, size, seed, budget
):
    lengths = np.array(lengths)
    epoch = batches(lengths, size, seed, 0)
    assert sorted(np.concatenate(epoch)) == list(range(len(lengths)))
    assert len(epoch) == -(-len(lengths) // size)
    again = batches(lengths, size, seed, 0)
    assert all(np.array_equal(a, b) for a, b in zip(epoch, again, strict=True))
    for batch in epoch:
        cut = list(pieces(batch, lengths, budget))
        assert sorted(np.concatenate(cut)) == sorted(batch)
        assert all(len(p) == 1 or len(p) * lengths[p].max() <= budget for p in cut)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", torch.optim.SGD, torch.optim.RMSprop])
def test_every_optimizer_runs_without_options(optimizer):
    recipe = replace(Recipe(), optimizer=optimizer)
    variable = torch.ones(2, requires_grad=True)
    built = recipe.build([variable])
    variable.sum().backward()
    built.step()
    assert (variable < 1).all()
    assert recipe.describe()["optimizer_options"] == ({"eps": 5e-3} if optimizer == "adamw" else {})


def test_the_paper_s_recipe():
    assert (PAPER.lora_rank, PAPER.lora_alpha, PAPER.lr) == (8, 8, 2e-4)
    assert (PAPER.batch_size, PAPER.epochs, PAPER.warmup_steps, PAPER.clip) == (60, 10, 5, 1.0)
    assert PAPER.rate(4, 105) == PAPER.rate(5, 105) == 2e-4
    assert PAPER.rate(104, 105) == pytest.approx(2e-6)


def test_a_student_is_a_delta_that_says_how_it_was_made(random_model, tmp_path):
    model = random_model("gpt2")
    student = finetune(model, number_lists(6), layers=[1], recipe=SHORT, seed=4)
    student.save(tmp_path / "student.safetensors")
    loaded = Delta.load(tmp_path / "student.safetensors")
    assert loaded.metadata == student.metadata
    assert loaded.metadata["settings"]["seed"] == 4
    assert loaded.metadata["settings"]["recipe"]["lr"] == SHORT.lr
    assert loaded.metadata["versions"]["torch"]
    assert list(loaded.norms()) == [1]
