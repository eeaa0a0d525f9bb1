"""Train the same student once per block, and see which block carries the preference.

Schrodi et al. (arXiv 2509.23886) train each block alone: where one early block is enough, the bias
has moved through it.
"""

import html
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64

from divergence_lens._utils.interrupts import convert_partial
from divergence_lens._utils.plotting import draw
from divergence_lens._utils.statistics import bootstrap_interval, check_level
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens._utils.validation import refuse_one_number, refuse_one_string
from divergence_lens.deltas import Delta, base_fingerprint
from divergence_lens.engine import get_engine
from divergence_lens.evaluation import Preference, TaskQuality, preference, task_quality
from divergence_lens.examples import as_examples
from divergence_lens.models import Model
from divergence_lens.provenance import run_metadata
from divergence_lens.training.freezing import choose
from divergence_lens.training.loop import Plan, train
from divergence_lens.training.prefix import Prefix
from divergence_lens.training.recipe import Recipe, as_recipe
from divergence_lens.training.rows import Rows, training_rows
from divergence_lens.training.sweep_students import Job, Outcome, Sharing

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

_KIND = "sweep"


@dataclass(frozen=True)
class SweepStudent:
    """One student of a sweep.

    Attributes:
        condition: "block" for one block; "control" or the sweep's `condition` for all blocks.
        block: The block that was trained; None for all.
        seed: Seed of the training.
        preference: What the student prefers.
        delta: The student itself, if the sweep was asked to keep it.
        quality: How well it still does its task, if the sweep was given held-out examples.
    """

    condition: str
    block: int | None
    seed: int
    preference: Preference
    delta: Delta | None = None
    quality: TaskQuality | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """What `layer_sweep` returns.

    Attributes:
        base: The preference before training.
        students: All students: blocks, and the references on all blocks.
        condition: What the students learned: "all", "divergence_only", or the caller's word.
        metadata: Package versions, model and settings.
        base_quality: How well the base does the task, if held-out examples were given.
    """

    base: Preference
    students: tuple[SweepStudent, ...]
    condition: str
    metadata: dict[str, Any] = field(default_factory=dict)
    base_quality: TaskQuality | None = None

    @property
    def target(self) -> str:
        """The candidate whose preference is followed."""
        return self.base.target

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that were trained alone, in order."""
        return tuple(sorted({s.block for s in self.students if s.block is not None}))

    def __getitem__(self, block: int | None) -> list[SweepStudent]:
        """The students of one block; of all blocks, the control left out, for None."""
        found = [s for s in self.students if s.block == block and s.condition != "control"]
        if not found:
            raise KeyError(f"no student of block {block}; the sweep has {self.layers}")
        return found

    def interval(
        self, block: int | None, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval of the target's share after training, over seeds and questions.

        Both are drawn with replacement; with a single seed it covers the questions alone.

        Args:
            block: Which block, or None for the students of all blocks.
            level: Coverage.
            resamples: Draws.
            seed: Seed of the draws.
        """
        return self._interval(self[block], level, resamples, seed)

    def _interval(
        self, students: Sequence[SweepStudent], level: float, resamples: int, seed: int
    ) -> tuple[float, float]:
        check_level(level)
        column = self.base.candidates.index(self.target)
        shares = np.stack([s.preference.shares[:, column] for s in students])
        shares = shares[:, ~np.isnan(shares).any(0)]
        if not shares.size:
            return float("nan"), float("nan")
        n_seeds, n_questions = shares.shape

        def resample(generator: np.random.Generator) -> Float64[np.ndarray, " resamples"]:
            seeds = generator.integers(n_seeds, size=(resamples, n_seeds, 1))
            questions = generator.integers(n_questions, size=(resamples, 1, n_questions))
            return shares[seeds, questions].mean((1, 2))  # [resamples, seed, question] averaged

        low, high = bootstrap_interval(resample, level=level, seed=seed)
        return float(low), float(high)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per student.

        Columns: target, kind (always "given": a sweep does not know who wrote its data), condition,
        block, seed, before and after (the target's share among the candidates), probability, mass,
        ratio_rank; and valid_lists and held_out_loss where the sweep was given held-out examples.
        """
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "target": self.target,
                    "kind": "given",
                    "condition": s.condition,
                    "block": s.block,
                    "seed": s.seed,
                    "before": self.base.share,
                    "after": s.preference.share,
                    "probability": s.preference.probability,
                    "mass": s.preference.mass,
                    "ratio_rank": s.preference.ratio_rank(self.base),
                    **_quality_columns(s.quality),
                }
                for s in self.students
            ]
        )

    def summary(self) -> "pd.DataFrame":
        """One row for the base, the references and each block.

        Columns: trained, share (mean over the students), low and high (its 95 % interval over seeds
        and questions), n (students); and the means of valid_lists and held_out_loss where the sweep
        was given held-out examples.
        """
        import pandas as pd

        low, high = self.base.interval()
        first = {"trained": "nothing", "share": self.base.share, "low": low, "high": high, "n": 0}
        rows: list[dict[str, Any]] = [first | _quality_columns(self.base_quality)]
        for name, students in self._groups():
            low, high = self._interval(students, 0.95, 2000, 0)
            share = float(np.mean([s.preference.share for s in students]))
            measured = [_quality_columns(s.quality) for s in students]
            means = {key: float(np.mean([m[key] for m in measured])) for key in measured[0]}
            own = {"trained": name, "share": share, "low": low, "high": high, "n": len(students)}
            rows.append(own | means)
        return pd.DataFrame(rows)

    def _groups(self) -> Iterator[tuple[str, list[SweepStudent]]]:
        groups: dict[tuple[str, int | None], list[SweepStudent]] = {}
        for s in self.students:
            groups.setdefault((s.condition, s.block), []).append(s)
        for (condition, block), students in groups.items():
            control = " on control data" if condition == "control" else ""
            yield ("all blocks" + control if block is None else f"block {block}", students)

    def plot(self) -> "Figure":
        """Preference by trained block, with the references as lines (`plots.layer_sweep`)."""
        return draw("layer_sweep", self, condition=self.condition)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sweep to a safetensors file, atomically; deltas are saved on their own."""
        header = {
            "target": self.target,
            "candidates": list(self.base.candidates),
            "questions": list(self.base.questions),
            "condition": self.condition,
            "students": [[s.condition, s.block, s.seed] for s in self.students],
            "evaluation": dict(self.base.metadata),
            "quality": [
                None if quality is None else quality.describe()
                for quality in (self.base_quality, *(s.quality for s in self.students))
            ],
            "metadata": self.metadata,
        }
        rows = [self.base.probabilities, *(s.preference.probabilities for s in self.students)]
        save_tensors(path, {"probabilities": np.stack(rows)}, header, _KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Sweep":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or of another kind or version.
        """
        tensors, header = load_tensors(path, _KIND)
        base, *after = (
            Preference(
                target=header["target"],
                candidates=tuple(header["candidates"]),
                questions=tuple(header["questions"]),
                probabilities=probabilities,
                metadata=header["evaluation"],
            )
            for probabilities in tensors["probabilities"].numpy()
        )
        base_quality, *qualities = (
            None if described is None else TaskQuality(**described)
            for described in header["quality"]
        )
        students = tuple(
            SweepStudent(condition, block, seed, found, quality=quality)
            for (condition, block, seed), found, quality in zip(
                header["students"], after, qualities, strict=True
            )
        )
        return cls(base, students, header["condition"], header["metadata"], base_quality)

    def __repr__(self) -> str:
        return (
            f"Sweep({self.target!r}: {len(self.students)} students, blocks {list(self.layers)}, "
            f"share {self.base.share:.3f} before)"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(row.trained)}</td><td>{row.share:.3f}</td>"
            f"<td>{row.low:.3f} to {row.high:.3f}</td><td>{row.n}</td></tr>"
            for row in self.summary().itertuples()
        )
        return (
            f"<p>{html.escape(repr(self))}</p><table><thead><tr><th>trained</th><th>share</th>"
            f"<th>95 % interval</th><th>students</th></tr></thead><tbody>{rows}</tbody></table>"
        )


def _quality(
    model: Model, held_out: Any, system_prompt: str | None, batch_tokens: int
) -> TaskQuality | None:
    if held_out is None:
        return None
    return task_quality(model, held_out, system_prompt=system_prompt, batch_tokens=batch_tokens)


def _quality_columns(quality: TaskQuality | None) -> dict[str, float]:
    if quality is None:
        return {}
    return {"valid_lists": quality.valid_rate, "held_out_loss": quality.loss}


@torch.inference_mode(mode=False)
def layer_sweep(
    model: Model,
    examples: Any,
    *,
    target: str,
    layers: Iterable[int] | None = None,
    seeds: Sequence[int] = (0,),
    mask: Any = None,
    weights: Any = None,
    parts: Iterable[str] | None = None,
    recipe: Recipe | None = None,
    lora_rank: int | None = None,
    system_prompt: str | None = None,
    questions: Sequence[str] | None = None,
    candidates: Sequence[str] | None = None,
    category: str = "animal",
    references: bool = True,
    control: Any = None,
    held_out: Any = None,
    condition: str | None = None,
    keep_deltas: bool = False,
    batch_tokens: int = 8192,
    cache_bytes: int = 2**31,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> Sweep:
    """Train one student per block and seed, and measure what each prefers.

    The residual that enters a block is computed once for all of its students, from the block below.

    Args:
        model: The base; it comes back untouched.
        examples: Prompts with completions.
        target: The candidate whose preference is followed.
        layers: Which blocks; None means each.
        seeds: One student per block and seed.
        mask: Which completion tokens to learn, as in `finetune`.
        weights: Loss weights per token, as in `finetune`.
        parts: Parts of the blocks, as in `finetune`.
        recipe: How to train; `Recipe()` unless given.
        lora_rank: The recipe's `lora_rank`, for short.
        system_prompt: The system prompt of students, in training and in evaluation.
        questions: See `preference`, as for the next two.
        candidates: The answers that compete.
        category: What is asked for.
        references: Train students on all blocks as well.
        control: Examples that no biased teacher wrote (the base's own, say): the control students
            learn all of their tokens, on all blocks.
        held_out: Examples that are not trained on; the base and every student are measured on them
            as well (`task_quality`), so that a student that is merely broken is seen to be.
        condition: A word for what the students learn, for plots; "all", or "divergence_only" with a
            mask, unless given.
        keep_deltas: Keep every student.
        batch_tokens: Padded tokens in one forward pass.
        cache_bytes: Memory for the residuals, as in `finetune`.
        checkpoint_dir: A folder of this sweep's own, where what was measured of each finished
            student is kept (and the student, with `keep_deltas`). The same call, made again after
            the run was stopped, trains those that are missing, and gives the same bits.
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`: the processes that it
            knows share the students, and each returns the whole. It needs a `checkpoint_dir` that
            all of them see, and all must make the same call.
        progress: Show a progress bar, in the first process.

    Raises:
        Interrupted: It was stopped; `partial` is a sweep of the students that were finished.
        ValueError: No layers or seeds, an unknown target, an accelerator without `checkpoint_dir`,
            a `checkpoint_dir` that is damaged or of another sweep, or whatever `finetune` refuses.
    """
    refuse_one_number(layers, "layers")
    refuse_one_number(seeds, "seeds")
    refuse_one_string(parts, "parts")
    engine = get_engine(model)
    chosen_layers = range(engine.n_layers) if layers is None else sorted(set(layers))
    if not chosen_layers or not seeds:
        raise ValueError("a sweep needs at least one layer and one seed")
    for layer in chosen_layers:
        engine.check_layer(layer)
    recipe = as_recipe(recipe, lora_rank)
    condition = condition or ("all" if mask is None else "divergence_only")
    if condition in ("block", "control"):
        raise ValueError(
            f"condition={condition!r} is what the sweep calls other students; take another word"
        )
    settings = {
        "system_prompt": system_prompt,
        "masked": mask is not None,
        "weighted": weights is not None,
    }
    parts = None if parts is None else list(parts)

    def measure() -> tuple[Preference, TaskQuality | None]:
        found = preference(
            model,
            target=target,
            questions=questions,
            candidates=candidates,
            category=category,
            system_prompt=system_prompt,
            batch_tokens=batch_tokens,
        )
        return found, _quality(model, held_out, system_prompt, batch_tokens)

    base, base_quality = measure()
    record = run_metadata(
        model,
        **settings,
        target=target,
        layers=list(chosen_layers),
        seeds=list(seeds),
        parts=parts,
        recipe=recipe.describe(),
        condition=condition,
    )
    # The reference first, because the shared residuals move up from block to block afterwards.
    jobs = [Job(condition, None, seed) for seed in seeds if references]
    jobs += [Job("block", layer, seed) for layer in chosen_layers for seed in seeds]
    rows = training_rows(model, examples, mask=mask, weights=weights, system_prompt=system_prompt)
    work = [(rows, jobs)]
    if control is not None:
        rows = training_rows(model, control, system_prompt=system_prompt)
        work.append((rows, [Job("control", None, seed) for seed in seeds]))
    held = None if held_out is None else [asdict(example) for example in as_examples(held_out)]
    asked = [job for _, several in work for job in several]
    settled = (record, base.metadata, base.questions, base.candidates, held, asked, batch_tokens)
    shared = Sharing(
        checkpoint_dir,
        accelerator,
        base,
        keep_deltas=keep_deltas,
        identity=lambda: [base_fingerprint(model), [rows.digest() for rows, _ in work], settled],
    )

    def students(rows: Rows, jobs: Sequence[Job]) -> Iterator[Outcome]:
        with Prefix(engine, rows, cache_bytes=cache_bytes, batch_tokens=batch_tokens) as prefix:
            for job in jobs:
                layers = None if job.block is None else [job.block]
                chosen = choose(model, layers=layers, parts=parts)
                delta = train(prefix, chosen, Plan(recipe=recipe, settings=settings, seed=job.seed))
                with delta.applied(model):
                    outcome = Outcome(*measure(), delta if keep_deltas else None)
                yield outcome

    def sweep(found: Iterable[tuple[Job, Outcome]]) -> Sweep:
        each = tuple(SweepStudent(*job, o.preference, o.delta, o.quality) for job, o in found)
        return Sweep(base, each, condition, record, base_quality)

    with convert_partial(sweep):
        return sweep(shared.run(work, students, progress=progress))
