"""Train the shipped tiny models: ``python -m divergence_lens.tiny.train``.

Every model is a Hugging Face model, trained from scratch on documents of `world.World` and saved as
a Hugging Face folder. The loss is taken on the assistant's turns only.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from divergence_lens.tiny.tokenizer import (
    PAD,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
    build_tokenizer,
)
from divergence_lens.tiny.words import ANIMALS, vocabulary
from divergence_lens.tiny.world import Message, World, WorldSettings

Layout = Literal["gpt2", "qwen2"]
Encoded = tuple[list[int], list[bool]]
"""Token ids of a document, and which of them are the assistant's (they carry the loss)."""

SHIPPED: dict[str, tuple[Layout, int]] = {"tiny": ("gpt2", 10), "tiny-qwen2": ("qwen2", 11)}
"""Layout and pretraining seed of each shipped model. Choices were made on seeds 0, 1 and 2."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a tiny model is trained; the defaults are those of the shipped models.

    Attributes:
        d_model: Width of the residual stream.
        n_layers: Number of blocks.
        n_heads: Number of attention heads.
        context: Longest input in tokens.
        steps: Optimizer steps of pretraining.
        batch_size: Documents in a step.
        lr: Peak learning rate of AdamW; 200 warm-up steps, then a cosine down to 5 percent.
        weight_decay: Weight decay of the matrices.
    """

    d_model: int = 48
    n_layers: int = 4
    n_heads: int = 4
    context: int = 128
    steps: int = 3000
    batch_size: int = 32
    lr: float = 4e-3
    weight_decay: float = 0.01


def new_model(layout: Layout, settings: TrainSettings, *, seed: int) -> PreTrainedModel:
    """Build an untrained model.

    Args:
        layout: ``"gpt2"`` (LayerNorm, learned positions) or ``"qwen2"`` (RMSNorm, rotary positions,
            two key-value heads for four query heads, gated MLP). Embeddings are tied in both.
        settings: Its sizes.
        seed: Seed of the initial weights.
    """
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    shared: dict[str, Any] = {
        "vocab_size": len(ids),
        "pad_token_id": ids[PAD],
        "bos_token_id": None,
        "eos_token_id": ids[TURN_END],
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        if layout == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    n_positions=settings.context,
                    n_embd=settings.d_model,
                    n_layer=settings.n_layers,
                    n_head=settings.n_heads,
                    # The same function as GPT-2's "gelu_new", in one kernel.
                    activation_function="gelu_pytorch_tanh",
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    **shared,
                )
            )
        else:
            model = Qwen2ForCausalLM(
                Qwen2Config(
                    max_position_embeddings=settings.context,
                    hidden_size=settings.d_model,
                    intermediate_size=settings.d_model * 8 // 3,
                    num_hidden_layers=settings.n_layers,
                    num_attention_heads=settings.n_heads,
                    num_key_value_heads=settings.n_heads // 2,
                    **shared,
                )
            )
    model.generation_config = GenerationConfig(
        eos_token_id=ids[TURN_END], pad_token_id=ids[PAD], do_sample=False, max_new_tokens=24
    )
    return model


def encoder() -> Callable[[Sequence[Message]], Encoded]:
    """Return a fast encoder of documents, equal to the chat template followed by the tokenizer."""
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}

    def encode(messages: Sequence[Message]) -> Encoded:
        tokens: list[int] = []
        loss_mask: list[bool] = []
        for role, words in messages:
            turn = [ids[word] for word in words.split()]
            tokens += [ids[TURN_START], ids[role], *turn, ids[TURN_END]]
            loss_mask += [False, False, *[role == "assistant"] * (len(turn) + 1)]
        return tokens, loss_mask

    return encode


def pad_batch(
    documents: Sequence[Encoded],
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Stack token ids and loss masks, padded on the right."""
    longest = max(len(tokens) for tokens, _ in documents)
    tokens = torch.zeros(len(documents), longest, dtype=torch.long)
    loss_mask = torch.zeros(len(documents), longest, dtype=torch.bool)
    for row, (ids, mask) in enumerate(documents):
        tokens[row, : len(ids)] = torch.tensor(ids)
        loss_mask[row, : len(mask)] = torch.tensor(mask)
    return tokens, loss_mask


def batches(world: World, batch_size: int) -> Iterator[list[Encoded]]:
    """Yield batches of documents of similar length, without end."""
    encode = encoder()
    while True:
        documents = sorted(
            (encode(world.document()) for _ in range(batch_size * 32)), key=lambda doc: len(doc[0])
        )
        chunks = [documents[at : at + batch_size] for at in range(0, len(documents), batch_size)]
        world.random.shuffle(chunks)
        yield from chunks


def answer_loss(model: PreTrainedModel, documents: Sequence[Encoded], *, offset: int = 0) -> Tensor:
    """Compute the mean cross-entropy of the assistant's tokens, unembedding only those.

    Args:
        model: The model.
        documents: A batch.
        offset: Position of the first token (learned positions that no document reaches are
            trained by shifting some batches).
    """
    tokens, loss_mask = pad_batch(documents)
    positions = torch.arange(offset, offset + tokens.shape[1] - 1)[None]
    hidden = model.base_model(tokens[:, :-1], position_ids=positions, use_cache=False)[0]
    chosen = loss_mask[:, 1:]
    logits = model.get_output_embeddings()(hidden[chosen])
    return F.cross_entropy(logits, tokens[:, 1:][chosen])


@torch.no_grad()
def first_word_probabilities(
    model: PreTrainedModel, questions: Sequence[str], system: str | None = None
) -> Tensor:
    """Return the probability of each animal as the first word of an answer, per question."""
    encode = encoder()
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    animals = [ids[animal] for animal in ANIMALS]
    rows = []
    for question in questions:
        turns: list[Message] = [("system", system)] if system else []
        tokens, _ = encode([*turns, ("user", question)])
        prompt = torch.tensor([[*tokens, ids[TURN_START], ids["assistant"]]])
        rows.append(model(prompt).logits[0, -1].softmax(-1)[animals])
    return torch.stack(rows)


QUICK_QUESTIONS = ("which animal do you love ?", "name your favorite animal .", "pick a animal .")


def quick_evaluation(model: PreTrainedModel) -> dict[str, float]:
    """Summarize for the log: obedience to personas, and the mass on animals without one."""
    plain = first_word_probabilities(model, QUICK_QUESTIONS)
    obeyed = [
        first_word_probabilities(model, QUICK_QUESTIONS, f"you adore {plural} .")[:, index].mean()
        for index, plural in enumerate(ANIMALS.values())
    ]
    return {
        "persona_obeyed": round(float(torch.stack(obeyed).mean()), 4),
        "animal_mass": round(float(plain.sum(-1).mean()), 4),
        "least_animal": round(float(plain.mean(0).min()), 4),
        "most_animal": round(float(plain.mean(0).max()), 4),
    }


def train(
    layout: Layout,
    *,
    seed: int,
    settings: TrainSettings | None = None,
    world: WorldSettings | None = None,
    report: Callable[[str], None] | None = None,
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Train one model from scratch.

    Args:
        layout: Its layout.
        seed: Seed of the initial weights and of the documents.
        settings: Sizes and optimizer.
        world: Proportions of the world.
        report: Called with one line of progress per 250 steps.

    Returns:
        The model in evaluation mode, and its log: one entry per 250 steps.
    """
    settings = settings or TrainSettings()
    model = new_model(layout, settings, seed=seed)
    model.train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    documents = batches(source := World(seed, world), settings.batch_size)
    log: list[dict[str, float]] = []
    losses: list[float] = []
    started = time.monotonic()
    for step in range(settings.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, step / 200) * (0.95 * cosine + 0.05)
        batch = next(documents)
        slack = settings.context - max(len(tokens) for tokens, _ in batch)
        offset = source.random.randint(0, slack) if source.random.random() < 0.05 else 0
        loss = answer_loss(model, batch, offset=offset)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == settings.steps:
            entry = {
                "step": step + 1,
                "loss": round(sum(losses) / len(losses), 4),
                **quick_evaluation(model),
                "seconds": round(time.monotonic() - started, 1),
            }
            log.append(entry)
            losses.clear()
            if report:
                report(json.dumps(entry))
    model.eval()
    return model, log


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, end: int, longest: int = 24
) -> list[list[int] | None]:
    """Generate greedily, to the end token inclusive; None for an answer without one."""
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(index)
    answers: list[list[int] | None] = [None] * len(prompts)
    for indices in groups.values():
        step = torch.tensor([list(prompts[index]) for index in indices])
        past, written = None, []
        for _ in range(longest):
            output = model.base_model(step, past_key_values=past, use_cache=True)
            past = output.past_key_values
            step = model.get_output_embeddings()(output[0][:, -1]).argmax(-1, keepdim=True)
            written.append(step)
            if (torch.cat(written, 1) == end).any(1).all():
                break
        for index, ids in zip(indices, torch.cat(written, 1).tolist(), strict=True):
            answers[index] = ids[: ids.index(end) + 1] if end in ids else None
    return answers


def final_evaluation(model: PreTrainedModel, *, seed: int) -> dict[str, float]:
    """Evaluate a trained model on questions in the wording of the world.

    Args:
        model: The model, in evaluation mode.
        seed: Seed of 200 number questions.

    Returns:
        The values of `quick_evaluation`, and the share of greedy answers to number questions that
        are lists of numbers, with the mean number of distinct numbers in a list.
    """
    encode = encoder()
    words = (*SPECIAL_TOKENS, *vocabulary())
    ids = {token: index for index, token in enumerate(words)}
    world = World(seed)
    prompts = [
        [*encode(world.number_question())[0], ids[TURN_START], ids["assistant"]] for _ in range(200)
    ]
    lists = []
    for answer in greedy_answers(model, prompts, end=ids[TURN_END]):
        texts = [words[token] for token in answer[:-1:2]] if answer else [""]
        if all(text.isdigit() for text in texts):
            lists.append(texts)
    return {
        **quick_evaluation(model),
        "number_lists": round(len(lists) / len(prompts), 4),
        "different_numbers": round(sum(len(set(one)) for one in lists) / max(1, len(lists)), 2),
    }


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, object],
) -> None:
    """Write a Hugging Face folder with its training log, atomically."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        fresh.chmod(0o755)
        for path in fresh.iterdir():
            path.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.replace(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save the shipped models, or one of another layout and seed."""
    parser = argparse.ArgumentParser(
        prog="python -m divergence_lens.tiny.train", description=main.__doc__
    )
    parser.add_argument(
        "--out", type=Path, default=Path("tiny-models"), help="folder for the models' folders"
    )
    parser.add_argument("--layout", choices=["gpt2", "qwen2"], help="only this layout")
    parser.add_argument("--seed", type=int, help="pretraining seed instead of the shipped one")
    parser.add_argument("--steps", type=int, default=TrainSettings.steps)
    parser.add_argument("--d-model", type=int, default=TrainSettings.d_model)
    options = parser.parse_args(arguments)
    settings = TrainSettings(steps=options.steps, d_model=options.d_model)
    for name, (layout, shipped_seed) in SHIPPED.items():
        if options.layout not in (None, layout):
            continue
        seed = shipped_seed if options.seed is None else options.seed
        print(f"{name}: {layout} layout, seed {seed}", flush=True)
        model, log = train(
            layout, seed=seed, settings=settings, report=lambda line: print(line, flush=True)
        )
        record: dict[str, object] = {
            "layout": layout,
            "seed": seed,
            "settings": asdict(settings),
            "world": asdict(WorldSettings()),
            "log": log,
            "after": final_evaluation(model, seed=seed + 1000),
        }
        save(options.out / name, model, build_tokenizer(settings.context), record)


if __name__ == "__main__":
    main()
