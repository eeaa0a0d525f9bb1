"""Teachers: a model under one condition, which generates data or is compared with the generator.

In Cloud et al., "Subliminal Learning" (arXiv 2507.14805), a teacher has a preference from its
system prompt or from training. Here a condition is a system prompt, other weights (a `Delta` over
the base model, or another model), or both.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.deltas import Delta
from divergence_lens.engine import get_engine
from divergence_lens.models import Model, check_model, model_name

# Tokenizers with one vocabulary can still split text differently; this probe contains words,
# numbers, white space and punctuation.
_PROBE = "You love owls: 412, 467 and\n\n1,030.5; isn't it (so)?  Über-owls\t!"


@dataclass(frozen=True, repr=False)
class Teacher:
    """One condition of a model.

    Attributes:
        name: Its name in results; the teachers of one comparison have different names.
        system_prompt: The system message. None gives none, and a chat template may then insert its
            own default.
        delta: Trained weights, as differences over the base model (or over `model`).
        model: Another model instead of the base, with the same tokenizer.
    """

    name: str
    system_prompt: str | None = None
    delta: Delta | None = None
    model: Model | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError(f"a teacher needs a name, got {self.name!r}")
        if self.model is not None:
            check_model(self.model)

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """Apply this teacher's weights for the length of a `with` block.

        A delta is added in-place and removed again, bit for bit; another model is yielded as it is.
        The system prompt is not applied here: pass it to the functions that encode prompts.

        Args:
            model: The base model.

        Yields:
            The model to run: `model` itself, or the teacher's own.

        Raises:
            ValueError: The teacher's model has another tokenizer or vocabulary, or the delta
                belongs to another base.
            RuntimeError: A delta is already applied to the model.
        """
        self.check_tokenizer(model)
        active = model if self.model is None else self.model
        if self.delta is None:
            yield active
            return
        with self.delta.applied(active):
            yield active

    def check_tokenizer(self, model: Model) -> None:
        """Refuse a teacher whose model uses other token ids than `model`.

        Raises:
            ValueError: Its model has another tokenizer or vocabulary, or one of the two has none.
        """
        if self.model is None or self.model is model:
            return
        base: Any = model.tokenizer
        own: Any = self.model.tokenizer
        if base is None and own is None:
            sizes = [get_engine(one).d_vocab for one in (model, self.model)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"teacher {self.name!r}: its model reads {sizes[1]} token ids and "
                    f"{model_name(model)!r} reads {sizes[0]}; they cannot share data"
                )
            return
        if base is None or own is None:
            owner = model if base is None else self.model
            raise ValueError(
                f"teacher {self.name!r}: the model {model_name(owner)!r} has no tokenizer, so it "
                "cannot be checked that both models use the same ids; load it with tokenizer=."
            )
        same = base is own or (
            base.get_vocab() == own.get_vocab()
            and base(_PROBE, add_special_tokens=False)["input_ids"]
            == own(_PROBE, add_special_tokens=False)["input_ids"]
        )
        if not same:
            raise ValueError(
                f"teacher {self.name!r}: its model {model_name(self.model)!r} has another "
                f"tokenizer ({len(own)} tokens) than {model_name(model)!r} ({len(base)} tokens); "
                "only models that share a tokenizer can be compared token by token."
            )
        # The embedding may be padded beyond the tokenizer, to another size in each model.
        if get_engine(self.model).d_vocab < len(base):
            raise ValueError(
                f"teacher {self.name!r}: its model {model_name(self.model)!r} has "
                f"{get_engine(self.model).d_vocab} embeddings for the {len(base)} tokens of the "
                "tokenizer."
            )

    def __repr__(self) -> str:
        """Show the name and the condition."""
        parts = [repr(self.name)]
        if self.system_prompt is not None:
            parts.append(f"system_prompt={self.system_prompt!r}")
        if self.delta is not None:
            parts.append(f"delta={self.delta!r}")
        if self.model is not None:
            parts.append(f"model=<{model_name(self.model)}>")
        return f"Teacher({', '.join(parts)})"


def check_teacher(value: object, name: str = "teacher") -> None:
    """Refuse a value that is not a `Teacher`.

    Raises:
        TypeError: `value` is something else.
    """
    if not isinstance(value, Teacher):
        shown = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
        raise TypeError(
            f"{name} is {shown}, not a Teacher; create one with Teacher(name, system_prompt=...) "
            "or animal_teachers([...])"
        )


def check_teachers(values: object, name: str) -> None:
    """Refuse a value that is not a sequence of `Teacher`s.

    Raises:
        TypeError: One teacher, a string, or something else among them.
    """
    if isinstance(values, Teacher):
        raise TypeError(f"{name} is one Teacher; write {name}=[...], a list")
    refuse_one_string(values, name)
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} is a {type(values).__name__}; write {name}=[...], a list")
    for index, value in enumerate(values):
        check_teacher(value, f"{name}[{index}]")


def prompted_teachers(system_prompts: Mapping[str, str]) -> list[Teacher]:
    """Create one teacher per system prompt.

    Args:
        system_prompts: Name of the teacher -> its system prompt.

    Returns:
        The teachers, in the order of the mapping.
    """
    return [Teacher(name, system_prompt=prompt) for name, prompt in system_prompts.items()]
