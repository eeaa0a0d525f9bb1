"""Teacher-forced scores with lm-eval's `HFLM`, from token ids.

`loglikelihood` tokenizes its requests and passes them to `_loglikelihood_tokens`. The ids are given
here, so this file calls the latter, as lm-eval's own subclasses do.
"""

from pathlib import Path

import numpy as np
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer
from worker import Arrays, Run, load_hf, serve


def prepare(folder: str, inputs: Path, _options: list[str]) -> Run:
    """Return the log-likelihood of each request."""
    given = np.load(inputs)
    contexts, continuations = (
        [row[row >= 0].tolist() for row in given[name]] for name in ("contexts", "continuations")
    )
    # The text of a request is only a key of lm-eval's cache of answers.
    requests = [
        ((str(number), ""), context, continuation)
        for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True))
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = HFLM(pretrained=load_hf(folder), tokenizer=tokenizer, batch_size=16)

    def run() -> Arrays:
        scores = model._loglikelihood_tokens(requests, disable_tqdm=True)  # noqa: SLF001
        return {"scores": np.array([score for score, _ in scores])}

    return run


serve(prepare)
