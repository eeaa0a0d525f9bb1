"""Teachers, random examples, and readings by Hugging Face as the oracle."""

import numpy as np
import torch

from divergence_lens.chat import encode_prompt
from divergence_lens.deltas.delta import Delta
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher

OWL = Teacher("owl", system_prompt="You love owls.")

CAT = Teacher("cat", system_prompt="You love the cat.")

WOLF = Teacher("wolf", system_prompt="You think about the wolf all the time.")

NOBODY = Teacher("nobody")

TEACHERS = [OWL, CAT, WOLF, NOBODY]


def some_examples(n: int, seed: int, vocab: int) -> list[Example]:
    """Prompts of unlike lengths with random completions, some of one token."""
    draw = np.random.default_rng(seed)
    return [
        Example(
            prompt="Continue: "
            + ", ".join(map(str, draw.integers(100, 1000, draw.integers(1, 6)))),
            completion="random",
            completion_ids=tuple(draw.integers(0, vocab, draw.integers(1, 15)).tolist()),
        )
        for _ in range(n)
    ]


@torch.no_grad()
def hf_logits(hf, row):
    return hf(torch.tensor([row])).logits[0]


def oracle(hf, tokenizer, examples, teachers):
    """Logits that predict every completion token, one example and teacher at a time."""
    for teacher in teachers:
        rows = []
        for example in examples:
            prompt = encode_prompt(tokenizer, example.prompt, system_prompt=teacher.system_prompt)
            logits = hf_logits(hf, [*prompt.ids, *example.completion_ids])
            rows.append(logits[len(prompt.ids) - 1 : -1])
        yield torch.cat(rows)


def assert_readings_equal(div, hf, tokenizer):
    tokens = torch.from_numpy(div.tokens)
    for row, logits in enumerate(
        oracle(hf, tokenizer, div.examples, (div.teacher, *div.counterfactuals))
    ):
        top = logits.topk(2).values
        np.testing.assert_allclose(div.margin[row], top[:, 0] - top[:, 1], atol=1e-4)
        logprob = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        np.testing.assert_allclose(div.logprob[row], logprob, atol=1e-4)
        clear = div.margin[row] > 1e-4
        assert clear.any()
        np.testing.assert_array_equal(div.predicted[row][clear], logits.argmax(-1)[clear])


def random_delta(model) -> Teacher:
    name, parameter = next(iter(get_engine(model).block_parameters(0).items()))
    change = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return Teacher("noise", delta=Delta({name: 0.5 * change}, fingerprint(model)))
