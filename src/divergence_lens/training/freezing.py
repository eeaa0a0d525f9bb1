"""Choose the trainable parameters: layers, parts of layers, the embeddings, or names by pattern."""

import difflib
import fnmatch
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from types import TracebackType

from torch.nn import Parameter

from divergence_lens._utils.validation import refuse_one_number
from divergence_lens.engine import Engine, canonical, get_engine, inside_block, plain
from divergence_lens.models import Model


class Trainable(Mapping[str, Parameter]):
    """The trainable parameters by name; everything else in the model is frozen.

    A mapping from full parameter name to parameter. As a context manager it restores every
    `requires_grad` flag on exit; without `with`, call `restore` when done.
    """

    def __init__(self, model: Model, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = dict(parameters)
        # By identity: a tied parameter has one tensor and two names.
        chosen = {id(p) for p in self._parameters.values()}
        # All of the model's parameters, not only the engine's: unused copies are frozen too.
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        for p, _ in self._flags:
            p.requires_grad_(id(p) in chosen)
        learning = {id(p) for p in model.parameters() if p.requires_grad}
        if learning != chosen:
            self.restore()
            raise RuntimeError(
                f"{len(chosen)} parameters were chosen but {len(learning)} are trainable; "
                "the model hides parameters from `model.parameters()`"
            )

    def __getitem__(self, name: str) -> Parameter:
        """Return the parameter called `name`."""
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the model's order."""
        return iter(self._parameters)

    def __len__(self) -> int:
        """Return the number of trainable tensors."""
        return len(self._parameters)

    @property
    def n_parameters(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self._parameters.values())

    def restore(self) -> None:
        """Restore every `requires_grad` flag."""
        for p, flag in self._flags:
            p.requires_grad_(flag)

    def __enter__(self) -> "Trainable":
        """Return the mapping itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore every `requires_grad` flag."""
        self.restore()

    def __repr__(self) -> str:
        """Return a table of names, shapes and counts."""
        lines = [f"Trainable: {len(self)} tensors, {self.n_parameters:,} parameters"]
        lines += [f"  {n}  {tuple(p.shape)}  {p.numel():,}" for n, p in self._parameters.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(n)}</td><td>{tuple(p.shape)}</td><td>{p.numel():,}</td></tr>"
            for n, p in self._parameters.items()
        )
        return (
            "<table><thead><tr><th>parameter</th><th>shape</th><th>count</th></tr></thead>"
            f"<tbody>{rows}</tbody><tfoot><tr><td>total</td><td>{len(self)} tensors</td>"
            f"<td>{self.n_parameters:,}</td></tr></tfoot></table>"
        )


def freeze_except(
    model: Model,
    *,
    layers: Iterable[int] | None = None,
    parts: Iterable[str] | None = None,
    embedding: bool = False,
    unembedding: bool = False,
    pattern: str | None = None,
) -> Trainable:
    """Freeze the whole model but the chosen parameters.

    ```python
    with freeze_except(model, layers=[7], parts=["attn"]) as trainable:
        ...                       # only the attention of layer 7 has requires_grad
    ```

    Args:
        model: Either model class.
        layers: Layers to train; None means all (or none, if only `embedding`, `unembedding` or
            `pattern` is given).
        parts: Restrict the layers to these parts: "attn", "mlp", "ln", a matrix or bias in
            TransformerLens's names on either class ("W_Q", "b_O", "W_in", ...), or the model's own
            name ("c_fc"). `*` matches as in file names ("W_*"). A layout with queries, keys and
            values in one matrix has "W_QKV".
        embedding: Train the token and position embeddings. If the model ties the unembedding to
            them, it is the same tensor and is trained too.
        unembedding: Train the unembedding and the final norm.
        pattern: File-name pattern over full parameter names, instead of `layers` and `parts`.

    Returns:
        The trainable parameters by name; a context manager that restores the flags.

    Raises:
        ValueError: A layer out of range; a part or pattern that matches nothing (the nearest names
            are listed); nothing left to train; `pattern` together with `layers` or `parts`.
    """
    chosen = choose(
        model,
        layers=layers,
        parts=parts,
        embedding=embedding,
        unembedding=unembedding,
        pattern=pattern,
    )
    return Trainable(model, chosen)


def choose(
    model: Model,
    *,
    layers: Iterable[int] | None = None,
    parts: Iterable[str] | None = None,
    embedding: bool = False,
    unembedding: bool = False,
    pattern: str | None = None,
) -> dict[str, Parameter]:
    """Return the parameters that `freeze_except` would leave trainable; no flag changes."""
    engine = get_engine(model)
    every = {n: p for n, p in engine.named_parameters().items() if _is_real(engine, n, p)}
    names: set[str] = set()
    if pattern is not None:
        if layers is not None or parts is not None:
            raise ValueError("give either `pattern` or `layers` and `parts`, not both")
        names |= {
            n
            for n in every
            if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(plain(n), pattern)
        }
        if not names:
            raise ValueError(
                f"no parameter matches {pattern!r}; nearest: {_near(pattern, map(plain, every))}"
            )
    elif layers is not None or parts is not None or not (embedding or unembedding):
        names |= _of_layers(engine, layers, parts)
    outside = set(every).difference(*(engine.block_parameters(i) for i in range(engine.n_layers)))
    names |= {n for n in outside if (embedding if _embeds(n) else unembedding)}
    if unembedding and not names & outside:
        raise ValueError(
            "this model has no unembedding of its own (it is tied): use embedding=True"
        )
    if not names:
        raise ValueError("nothing is left to train: choose at least one layer, part or pattern")
    return {n: p for n, p in every.items() if n in names}


def lowest_layer(model: Model, chosen: Iterable[str]) -> int | None:
    """Return the lowest layer with a chosen parameter; everything below it is frozen.

    `n_layers` if only the final norm or the unembedding is trained, None if the embeddings are.
    """
    engine = get_engine(model)
    left = set(chosen)  # names not yet assigned to a layer
    lowest = engine.n_layers
    for layer in reversed(range(engine.n_layers)):
        own = left.intersection(engine.block_parameters(layer))
        lowest = layer if own else lowest
        left -= own
    return None if any(_embeds(name) for name in left) else lowest


def _embeds(name: str) -> bool:
    return bool(re.search(r"(?<!un)embed(?!_out)|wte|wpe", plain(name)))


def _is_real(engine: Engine, name: str, parameter: Parameter) -> bool:
    """Whether the model's own layout has this parameter.

    A HookedTransformer gives every architecture all biases, as zeros. A student that trained them
    could not be stored in the original architecture, and would differ from a bridge's.
    """
    last = name.rsplit(".", maxsplit=1)[-1].lstrip("_")
    if not (last.startswith("b_") or last == "bias") or bool(parameter.detach().any()):
        return True
    if re.search(r"unembed|lm_head|embed_out", plain(name)):
        return False
    cfg = engine.model.cfg
    if getattr(cfg, "original_architecture", None) == "GPTNeoForCausalLM":
        return canonical(name) not in {"attn.b_Q", "attn.b_K", "attn.b_V"}
    return not getattr(cfg, "gated_mlp", False)


def _of_layers(
    engine: Engine, layers: Iterable[int] | None, parts: Iterable[str] | None
) -> set[str]:
    refuse_one_number(layers, "layers")
    chosen = list(range(engine.n_layers)) if layers is None else list(dict.fromkeys(layers))
    for layer in chosen:
        if not isinstance(layer, Integral):
            raise TypeError(
                f"layers contains {layer!r}; layers are whole numbers from 0 to "
                f"{engine.n_layers - 1}"
            )
        if isinstance(layer, bool) or not 0 <= layer < engine.n_layers:
            raise ValueError(
                f"layer {layer} is out of range: the model has layers 0 to {engine.n_layers - 1}"
            )
    own = [item for layer in chosen for item in engine.block_parameters(layer).items()]
    names = [n for n, p in own if _is_real(engine, n, p)]
    if parts is None:
        return set(names)
    if isinstance(parts, str):
        raise TypeError(f"parts is a sequence of names: write parts=[{parts!r}]")
    matched: set[str] = set()
    for part in parts:
        matching = {n for n in names if _is_part(n, part)}
        if not matching:
            known = {"attn", "mlp", "ln"} | {canonical(n).split(".")[-1] for n in names}
            known |= {c for n in names for c in inside_block(n).split(".")[:-1]}
            raise ValueError(
                f"no parameter of layers {chosen} is called {part!r}; nearest: {_near(part, known)}"
            )
        matched |= matching
    return matched


def _is_part(name: str, part: str) -> bool:
    first, *rest = canonical(name).split(".")
    words = {
        first,
        ".".join([first, *rest]),
        *rest,
        *inside_block(name).split("."),
        inside_block(name),
    }
    if first.startswith("ln"):
        words.add("ln")
    # A bare "weight" or "w" would match nearly everything.
    return any(fnmatch.fnmatchcase(w, part) for w in words - {"weight", "bias", "w", "b"})


def _near(name: str, known: Iterable[str]) -> str:
    options = sorted(set(known))
    return ", ".join(difflib.get_close_matches(name, options, n=5, cutoff=0.3) or options[:8])
