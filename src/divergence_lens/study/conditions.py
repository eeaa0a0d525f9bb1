"""A condition of a study: one way to train students, to isolate one factor.

A `Condition` is a change of the data, a mask, the layers that are trained, changes of the recipe,
and the system prompts of training and evaluation. `registry` has those of Schrodi et al. (arXiv
2509.23886) and further controls; a study also accepts your own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from divergence_lens._utils.tables import short_repr
from divergence_lens.study.interventions import DataFunction, MaskFunction, own_lists

KINDS = ("finetuned", "prompted")
PROMPTS = ("own", "absent", "neutral", "empty")
"""System prompts of students: the default for their kind of teacher, none (the template may insert
its own), a neutral one, and the empty string."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Condition:
    """One way to train students.

    Attributes:
        name: The name in tables, of letters, digits, - and _.
        isolates: The cause of a difference from other conditions, in one sentence.
        group: A group of `registry.GROUPS`, or your own.
        data: `data(inputs, seed)` returns the training data with the divergence tokens marked. A
            named function, or a `functools.partial` of one with keyword arguments that JSON can
            represent: both are part of a cell's key.
        mask: `mask(inputs, data, seed)` returns a flag per token, True where the token has a loss;
            None for all tokens. Named like `data`.
        weights: The same for loss weights.
        soft: Fields of `SoftTargets` for soft distillation from the target's teacher; None trains
            on the tokens.
        layers: Layers to train; None for all.
        parts: Parts of them to train; see `freeze_except`.
        embedding: Whether to train the embeddings; without layers or parts, only them.
        recipe: Fields of the recipe to change.
        rate: Factor of the recipe's learning rate.
        train_prompt: System prompt in training, one of `PROMPTS`.
        eval_prompt: System prompt in evaluation.
        kinds: Kinds of teachers to which it applies.
        shared: Whether all targets share one student, as with the control.
        changes_data: Whether to count the divergence tokens that the changed data still have.
        other_model: Whether it needs the study's second base model.
        label: Name in the `condition` column of the table; `name` by default. Students of single
            layers share a label, and the column `layer` has their layer.
    """

    name: str
    isolates: str
    group: str
    data: DataFunction = field(default_factory=lambda: own_lists)
    mask: MaskFunction | None = None
    weights: MaskFunction | None = None
    soft: Mapping[str, Any] | None = None
    layers: tuple[int, ...] | None = None
    parts: tuple[str, ...] | None = None
    embedding: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    train_prompt: str = "own"
    eval_prompt: str = "own"
    kinds: tuple[str, ...] = KINDS
    shared: bool = False
    changes_data: bool = False
    other_model: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "_-" for c in self.name):
            raise ValueError(
                f"a condition's name has only letters, digits, - and _, got {self.name!r}"
            )
        for name in ("train_prompt", "eval_prompt"):
            if getattr(self, name) not in PROMPTS:
                raise ValueError(
                    f"condition {self.name!r}: {name} is {getattr(self, name)!r}; use one of "
                    f"{', '.join(PROMPTS)}"
                )
        unknown = set(self.kinds) - set(KINDS)
        if unknown:
            raise ValueError(
                f"condition {self.name!r}: unknown kind {min(unknown)!r}; use {', '.join(KINDS)}"
            )
        self.describe()

    def __repr__(self) -> str:
        """The name, and the fields that differ from their defaults."""
        return short_repr(self, always=("name",))

    def describe(self) -> dict[str, Any]:
        """The fields that distinguish a student of this condition from others, for JSON.

        `rate` is missing because it changes the recipe, which is part of a cell's key as well.
        """
        functions = {"data": self.data, "mask": self.mask, "weights": self.weights}
        soft = {} if self.soft is None else {"soft": dict(self.soft)}
        return {
            **soft,
            **{k: f if f is None else _describe(f, self.name) for k, f in functions.items()},
            "layers": None if self.layers is None else list(self.layers),
            "parts": None if self.parts is None else list(self.parts),
            "embedding": self.embedding,
            "recipe": dict(self.recipe),
            "train_prompt": self.train_prompt,
            "eval_prompt": self.eval_prompt,
            "shared": self.shared,
        }


def _describe(function: Any, condition: str) -> dict[str, Any]:
    """The name and keyword arguments of a function."""
    keywords: dict[str, Any] = {}
    if isinstance(function, partial):
        if function.args:
            raise ValueError(f"condition {condition!r}: pass arguments of {function} by keyword")
        function, keywords = function.func, dict(function.keywords)
    name = getattr(function, "__qualname__", "<")
    if "<" in name:  # a lambda, or defined inside a function
        raise ValueError(
            f"condition {condition!r}: {function!r} is not a function with a name of its own, by "
            "which other processes import it and cells are identified; define it in a module"
        )
    arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in keywords.items()}
    return {"step": f"{function.__module__}.{name}", **arguments}
