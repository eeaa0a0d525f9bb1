"""Compare `finetune` with peft in a plain Hugging Face loop: LoRA on one layer.

Both sides get the same model (a random Llama of 12 layers and d_model 512, or that of a folder),
and the same number prompts and lists, batches, steps, learning rates and initial values. peft
trains `layers_to_transform=[layer]`. Its loop pads on the right, runs the whole model, and computes
logits and loss only at completion tokens. It receives token ids, while the time of `finetune`
includes tokenization and all checks.

The task runs with and without a system prompt, because `finetune` runs the shared prefix of all
rows once and the loop runs it once per row.

    python benchmarks/finetuning.py --threads 2 --layers 0 6 11
    python benchmarks/finetuning.py --model FOLDER --layers 0 15 29 --threads 1 --cpu
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import peft
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from divergence_lens.data import neutral_prompt, number_prompts
from divergence_lens.deltas.low_rank import is_matrix
from divergence_lens.examples import Example
from divergence_lens.models import load_model
from divergence_lens.tiny import tiny_folder
from divergence_lens.training.finetuning import Recipe, finetune
from divergence_lens.training.freezing import choose, plain
from divergence_lens.training.rows import TrainingRows, batches, training_rows
from divergence_lens.training.variables import LowRank

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_llama(vocab: int, layers: int, width: int) -> LlamaForCausalLM:
    """Build a random model; every call gives the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def number_lists(count: int) -> list[Example]:
    """The library's number prompts, each answered with eight to ten random numbers."""
    random = np.random.default_rng(0)
    return [
        Example(prompt, ", ".join(map(str, random.integers(100, 1000, random.integers(8, 11)))))
        for prompt in number_prompts(count)
    ]


def with_peft(model: Any, rows: TrainingRows, layer: int, recipe: Recipe, start: dict) -> list:
    """Train with peft in a plain loop and return the losses."""
    config = peft.LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=MATRICES,
        layers_to_transform=[layer],
        task_type="CAUSAL_LM",
    )
    student = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, module in student.named_modules():
            if hasattr(module, "lora_A"):
                module.lora_A["default"].weight.copy_(start[name.removeprefix("base_model.model.")])
    student.eval()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = recipe.build(trained)
    losses: list[float] = []
    per_epoch = -(-len(rows) // recipe.batch_size)
    for epoch in range(recipe.epochs):
        for batch in batches(rows.lengths, recipe.batch_size, 0, epoch):
            index, length = torch.from_numpy(batch), int(rows.lengths[batch].max())
            where = rows.loss_weights[index, :length] > 0
            hidden = student.base_model.model.model(rows.tokens[index, :length]).last_hidden_state
            logits = student.base_model.model.lm_head(hidden[where])
            loss = F.cross_entropy(logits, rows.targets[index, :length][where])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(len(losses), recipe.epochs * per_epoch)
            optimizer.step()
            losses.append(loss.item())
    return losses


def lora_start(bridge: Any, layer: int) -> dict[str, torch.Tensor]:
    """The initial values of LoRA's A in `finetune`, by module name."""
    chosen = {n: p for n, p in choose(bridge, layers=[layer]).items() if is_matrix(n, p)}
    low_rank = LowRank(bridge, chosen, rank=8, alpha=8.0, seed=0)
    names = [plain(name).removesuffix(".weight") for name in chosen]
    return {name: low_rank.factors(i)[0].detach().T for i, name in enumerate(names)}


def main() -> None:
    """Time both sides and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 6, 11])
    parser.add_argument("--model", help="a folder; otherwise a random Llama")
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of time passed")
    parser.add_argument("--depth", type=int, default=12, help="layers of the model")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--examples", type=int, default=120)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--system-prompt", choices=["none", "neutral", "both"], default="both")
    # Without a system prompt, the templates of SmolLM2 and Qwen2.5 write their own.
    parser.add_argument("--backends", nargs="+", default=["hooked", "bridge"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu else time.perf_counter
    tokenizer = AutoTokenizer.from_pretrained(options.model or tiny_folder("tiny"))

    def base_model() -> Any:
        if options.model is None:
            return random_llama(len(tokenizer), options.depth, options.width)
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    examples = number_lists(options.examples)
    recipe = Recipe(
        lr=2e-4,
        epochs=options.epochs,
        batch_size=20,
        warmup_steps=5,
        lora_rank=8,
        lora_alpha=8.0,
        optimizer_options={},
    )
    bridge = load_model(base_model(), backend="bridge", tokenizer=tokenizer)
    models = {
        backend: load_model(base_model(), backend=backend, tokenizer=tokenizer)
        for backend in options.backends
    }
    for system_prompt in {"none": [None], "neutral": [neutral_prompt()]}.get(
        options.system_prompt, [None, neutral_prompt()]
    ):
        rows = training_rows(bridge, examples, system_prompt=system_prompt)
        print(
            f"\n{'without' if system_prompt is None else 'with'} a system prompt: "
            f"{rows.lengths.mean():.0f} tokens per row, {rows.shared} in the shared prefix, "
            f"{rows.tokens_learned / len(rows):.0f} with a loss\n"
            f"{'layer':>5}  {'backend':>8}  {'peft, s':>8}  {'ours, s':>8}  {'ratio':>6}  "
            "loss diff."
        )
        for layer in options.layers:
            start = lora_start(bridge, layer)
            seconds, theirs = float("inf"), []
            for _ in range(options.repeats):
                hf_model = base_model()
                began = clock()
                theirs = with_peft(hf_model, rows, layer, recipe, start)
                seconds = min(seconds, clock() - began)
            for backend, model in models.items():
                own = float("inf")
                for _ in range(options.repeats):
                    began = clock()
                    student = finetune(
                        model,
                        examples,
                        layers=[layer],
                        recipe=recipe,
                        system_prompt=system_prompt,
                    )
                    own = min(own, clock() - began)
                losses = student.history()["loss"].tolist()
                apart = max(abs(a - b) for a, b in zip(losses[:20], theirs[:20], strict=True))
                print(
                    f"{layer:>5}  {backend:>8}  {seconds:>8.1f}  {own:>8.1f}  "
                    f"{seconds / own:>6.2f}  {apart:.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
