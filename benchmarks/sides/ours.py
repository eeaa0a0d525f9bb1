"""This library's side of every comparison; the options are the task, its size and the backend.

Each task chooses its inputs, stores them for the peer, and returns the calls that are timed. The
model is loaded once for all tasks.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from worker import Arrays, Run, serve

import divergence_lens as dl
from divergence_lens.chat import encode_prompts, stop_ids
from divergence_lens.data import preference_questions
from divergence_lens.deltas.low_rank import is_matrix
from divergence_lens.engine import get_engine
from divergence_lens.evaluation.answers import form_events, form_ids
from divergence_lens.training.freezing import choose, plain
from divergence_lens.training.rows import batches, training_rows
from divergence_lens.training.variables import LowRank

# Concatenates the turns: for base models without a chat template.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
)
CLEAN = "A little girl saw a big dog in the park. The dog was very happy, so the girl and the dog"
CORRUPTED = "The old man had one red car at his house. The car was very small, and the man then"
Inputs = dict[str, Any]
Task = Callable[[Any, int], tuple[Inputs, Run]]


def padded(rows: list[Any]) -> np.ndarray:
    """Pad rows on the right with -1."""
    array = np.full((len(rows), max(map(len, rows))), -1)
    for number, row in enumerate(rows):
        array[number, : len(row)] = row
    return array


def number_lists(count: int) -> list[dl.Example]:
    """Number prompts, each answered with ten random numbers."""
    random = np.random.default_rng(0)
    return [
        dl.Example(prompt, ", ".join(map(str, random.integers(100, 1000, 10))))
        for prompt in dl.number_prompts(count, seed=0)
    ]


def writable(tokenizer: Any, candidates: Sequence[str]) -> list[str]:
    """The candidates that the tokenizer can write."""
    names = []
    for name in candidates:
        with contextlib.suppress(ValueError):
            form_ids(tokenizer, [name])
            names.append(name)
    return names


def one_pair(model: Any, length: int) -> tuple[Inputs, dl.Pairs]:
    """Two sentences of `length` tokens; the metric compares the two tokens that they predict."""
    rows = [model.tokenizer(text)["input_ids"][:length] for text in (CLEAN, CORRUPTED)]
    with torch.no_grad():
        first, second = model(torch.tensor(rows))[:, -1].topk(2).indices.tolist()
    answer, foil = first[0], second[0] if second[0] != first[0] else first[1]
    inputs = {"clean": rows[0], "corrupted": rows[1], "answer": answer, "foil": foil}
    pairs = dl.Pairs.from_tokens(
        torch.tensor(rows[:1]), torch.tensor(rows[1:]), answers=[answer], foils=[foil]
    )
    return inputs, pairs


def batch_of_pairs(model: Any, length: int) -> tuple[Inputs, dl.Pairs]:
    """Eight pairs: the sentences of `one_pair`, each rotated by another number of tokens."""
    inputs, _ = one_pair(model, length)
    for name in ("clean", "corrupted"):
        row = np.array(inputs[name])
        inputs[name] = np.stack([np.roll(row, shift) for shift in range(8)])
    pairs = dl.Pairs.from_tokens(
        torch.from_numpy(inputs["clean"]),
        torch.from_numpy(inputs["corrupted"]),
        answers=[inputs["answer"]] * 8,
        foils=[inputs["foil"]] * 8,
    )
    return inputs, pairs


def patching(model: Any, length: int) -> tuple[Inputs, Run]:
    """The metric after patching resid_post at each layer and position."""
    inputs, pairs = one_pair(model, length)

    def run() -> Arrays:
        effects = dl.causal_mediation(model, pairs, site="resid_post")
        return {"values": effects.values[0] + effects.clean_metric[0]}

    return inputs, run


def nodes(model: Any, length: int) -> tuple[Inputs, Run]:
    """Gradient attribution of embeddings, heads and MLPs, toward the clean run."""
    inputs, pairs = batch_of_pairs(model, length)
    sites = ("resid_pre", "z", "mlp_out")

    def run() -> Arrays:
        effects = dl.attribution_patch(model, pairs, site=sites, direction="denoising")
        means = {site: one.values.mean(0) for site, one in effects.items()}
        return {**means, "resid_pre": means["resid_pre"][0]}

    return inputs, run


def activations(model: Any, length: int) -> tuple[Inputs, Run]:
    """Gradient times activation of every block's output."""
    inputs, pairs = batch_of_pairs(model, length)

    def run() -> Arrays:
        # Attribution toward zeros is minus the product.
        effects = dl.attribution_patch(model, pairs, site="resid_post", corruption="zero")
        return {"values": -effects.values}

    return inputs, run


def heads(
    model: Any, length: int, method: Literal["gradient", "integrated-inputs"] = "gradient"
) -> tuple[Inputs, Run]:
    """Gradient attribution of the embeddings and of every head, summed over positions."""
    inputs, pairs = batch_of_pairs(model, length)

    def run() -> Arrays:
        effects = dl.attribution_patch(
            model, pairs, site=("resid_pre", "z"), method=method, steps=5
        )
        return {
            "resid_pre": effects["resid_pre"].values[:, 0].mean(0).sum(),
            "z": effects["z"].values.mean(0).sum(1),  # [layer, head]
        }

    return inputs, run


def integrated(model: Any, length: int) -> tuple[Inputs, Run]:
    """The same with the gradient integrated along the path of the inputs, five steps."""
    return heads(model, length, "integrated-inputs")


def generation(model: Any, count: int) -> tuple[Inputs, Run]:
    """32 greedy tokens after each of `count` number prompts."""
    prompts, new_tokens = dl.number_prompts(count, seed=0), 32
    inputs = {
        "prompts": padded([prompt.ids for prompt in encode_prompts(model.tokenizer, prompts)]),
        "stops": sorted(stop_ids(model.tokenizer)),
        "new_tokens": new_tokens,
    }

    def run() -> Arrays:
        examples = dl.generate(model, prompts, max_new_tokens=new_tokens)
        tokens = np.full((len(prompts), new_tokens), -1)
        for number, example in enumerate(examples):
            ids = example.completion_ids or ()
            tokens[number, : len(ids)] = ids
        return {"tokens": tokens}

    return inputs, run


def answers(model: Any, count: int) -> tuple[Inputs, Run]:
    """The log-probability of every form of every candidate after `count` questions.

    `preference` also computes the probability that the word ends after a form. Requests do not, so
    every token counts as such an end here, which costs the same and has probability 1.
    """
    names, category = writable(model.tokenizer, dl.ANIMALS), "animal"
    if not names:
        names, category = writable(model.tokenizer, dl.TREES), "tree"
    questions = preference_questions(category)[:count]
    prompts = [encoded.ids for encoded in encode_prompts(model.tokenizer, questions)]
    forms, _ = form_ids(model.tokenizer, names)
    engine = get_engine(model)
    every_word_ends = np.zeros(engine.d_vocab, dtype=bool)
    inputs = {
        "contexts": padded([prompt for prompt in prompts for _ in forms]),
        "continuations": padded([form for _ in prompts for form in forms]),
    }

    @torch.no_grad()
    def run() -> Arrays:
        events = form_events(engine, prompts, forms, every_word_ends, 8192)
        return {"scores": np.log(events).ravel()}

    return inputs, run


def lists(model: Any, count: int) -> tuple[Inputs, Run]:
    """The log-probability of `count` number lists under two teachers."""
    owl, cat = dl.animal_teachers(["owl", "cat"])
    examples = number_lists(count)

    def compare() -> dl.Divergence:
        return dl.find_divergence(model, examples, teacher=owl, counterfactuals=[cat])

    written = [example.completion_ids or () for example in compare().examples]
    contexts = [
        prompt.ids
        for teacher in (owl, cat)
        for prompt in encode_prompts(
            model.tokenizer, [e.prompt for e in examples], system_prompt=teacher.system_prompt
        )
    ]
    inputs = {"contexts": padded(contexts), "continuations": padded(2 * written)}
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in written])[:-1]])

    def run() -> Arrays:
        divergence = compare()
        logprob = divergence.logprob.astype(float)  # [teacher, token]
        scores = np.add.reduceat(logprob, starts, axis=1).ravel()
        return {"scores": scores, "predicted": divergence.predicted}

    return inputs, run


def training(model: Any, count: int) -> tuple[Inputs, Run]:
    """The losses of LoRA on the middle layer: `count` number lists, batches of 8, two epochs."""
    layer, epochs, size = get_engine(model).n_layers // 2, 2, 8
    examples = number_lists(count)
    recipe = dl.Recipe(
        lr=2e-4,
        epochs=epochs,
        batch_size=size,
        warmup_steps=0,
        schedule="constant",
        lora_rank=8,
        lora_alpha=8.0,
        optimizer_options={},
    )
    rows = training_rows(model, examples)
    chosen = {n: p for n, p in choose(model, layers=[layer]).items() if is_matrix(n, p)}
    start = LowRank(model, chosen, rank=8, alpha=8.0, seed=0)
    inputs = {
        "tokens": torch.cat([rows.tokens[:, :1], rows.targets], 1),
        "loss": rows.loss_weights > 0,
        "lengths": rows.lengths,
        "order": np.concatenate(
            [batch for epoch in range(epochs) for batch in batches(rows.lengths, size, 0, epoch)]
        ),
        "batch_size": size,
        "lr": recipe.lr,
        "layer": layer,
        **{
            f"A {plain(name).removesuffix('.weight')}": start.factors(i)[0].detach().T
            for i, name in enumerate(chosen)
        },
    }

    def run() -> Arrays:
        student = dl.finetune(model, examples, layers=[layer], recipe=recipe)
        return {"losses": student.history()["loss"].to_numpy()}

    return inputs, run


TASKS: dict[str, Task] = {
    "patching": patching,
    "nodes": nodes,
    "activations": activations,
    "heads": heads,
    "integrated": integrated,
    "generation": generation,
    "answers": answers,
    "lists": lists,
    "training": training,
}


@lru_cache(maxsize=1)
def load(folder: str, backend: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load the model of a folder."""
    model = dl.load_model(folder, backend=backend, dtype=dtype)
    if model.tokenizer.chat_template is None:
        model.tokenizer.chat_template = PLAIN
    return model


def prepare(folder: str, inputs: Path, options: list[str]) -> Run:
    """Store the task's inputs and return its calls."""
    name, size, backend = options
    arrays, run = TASKS[name](load(folder, backend), int(size))
    np.savez(inputs, **{name: np.asarray(array) for name, array in arrays.items()})
    return run


if __name__ == "__main__":
    serve(prepare)
