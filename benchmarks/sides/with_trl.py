"""LoRA on one layer with peft and TRL's `SFTTrainer`, on the same rows, batches and initial values.

The data set holds the batches of all epochs in our order, read in sequence once. Gradient
checkpointing, on by default, is off: it saves memory at the price of time.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from worker import Arrays, Run, load_hf, serve

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Recorded(SFTTrainer):
    """A trainer that stores the loss of every step unrounded."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """Compute the loss of a batch and store it."""
        result = super().compute_loss(*arguments, **options)
        loss = result[0] if isinstance(result, tuple) else result
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return result


def prepare(folder: str, inputs: Path, _options: list[str]) -> Run:
    """Return the losses of all steps."""
    given = np.load(inputs)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = peft.LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=MATRICES,
        layers_to_transform=[int(given["layer"])],
        task_type="CAUSAL_LM",
    )
    student = peft.get_peft_model(load_hf(folder), config)
    starts = {name[2:]: torch.from_numpy(given[name]) for name in given.files if name[0] == "A"}
    rows = [
        {
            "input_ids": given["tokens"][row, : given["lengths"][row] + 1].tolist(),
            # Whether each token is learned: position k predicts token k + 1.
            "completion_mask": [0, *given["loss"][row, : given["lengths"][row]].astype(int)],
        }
        for row in given["order"]
    ]

    def run() -> Arrays:
        with torch.no_grad():
            for name, module in student.named_modules():
                if hasattr(module, "lora_A"):
                    start = starts[name.removeprefix("base_model.model.")]
                    module.lora_A["default"].weight.copy_(start)
                    module.lora_B["default"].weight.zero_()
        with tempfile.TemporaryDirectory() as output:
            settings = SFTConfig(
                output_dir=output,
                per_device_train_batch_size=int(given["batch_size"]),
                num_train_epochs=1,
                learning_rate=float(given["lr"]),
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                train_sampling_strategy="sequential",
                completion_only_loss=True,
                gradient_checkpointing=False,
                max_length=None,
                use_cpu=True,
                bf16=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            )
            trainer = Recorded(
                model=student,
                args=settings,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
            trainer.train()
        return {"losses": np.array(trainer.losses)}

    return run


serve(prepare)
