"""A student as a small named set of differences over an untouched base model.

A finetuned model is kept as `Delta`: for every trained parameter its float32 difference to the
base, plus the fingerprint of that base. One loaded model thus serves any number of students and
finetuned teachers, each of which is swapped in for as long as a `with` block lasts and taken out
again bit for bit.
"""

import hashlib
import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens.deltas.low_rank import LowRankTensors
from divergence_lens.engine import get_engine
from divergence_lens.models import Model
from divergence_lens.provenance import fingerprint

if TYPE_CHECKING:
    import pandas as pd

_KIND = "delta"
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers|h)\.(\d+)\.")
_BACKENDS = {
    "HookedTransformer": 'load_model(..., backend="hooked")',
    "TransformerBridge": 'load_model(..., backend="bridge")',
}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Per live model: what its weights are in use for; its fingerprint and the state it was taken from.
_in_use: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_known: WeakKeyDictionary[nn.Module, tuple[str, dict[str, tuple[Any, ...]]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """The trained parameters of a student or a finetuned teacher, as differences to its base.

    Attributes:
        tensors: Parameter name -> difference to the base, float32, on the CPU, in the parameter's
            shape. The names are those of the model class that was trained, see
            `Engine.named_parameters`. A student that was trained with LoRA holds the factors, and
            each difference is multiplied out when it is read.
        base: Fingerprint of the untouched base model.
        metadata: Where it comes from: model, settings, losses, versions. JSON-able.
    """

    tensors: Mapping[str, Tensor]
    base: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("a Delta needs at least one parameter; it was given none")
        if isinstance(self.tensors, LowRankTensors):
            stored = [(n, t) for n, f in self.tensors.factors.items() for t in (f.down, f.up)]
        else:
            tensors = {n: t.detach().to("cpu", torch.float32) for n, t in self.tensors.items()}
            stored = list(tensors.items())
            object.__setattr__(self, "tensors", tensors)
        for name, tensor in stored:
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"the difference of {name!r} holds NaN or infinite values")

    @property
    def n_parameters(self) -> int:
        """How many of the model's parameters change."""
        if isinstance(self.tensors, LowRankTensors):
            return sum(math.prod(f.layout.shape) for f in self.tensors.factors.values())
        return sum(t.numel() for t in self.tensors.values())

    @property
    def rank(self) -> int | None:
        """The greatest rank of the factors that it is kept as; None where it is kept in full."""
        if isinstance(self.tensors, LowRankTensors):
            return max(f.rank for f in self.tensors.factors.values())
        return None

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model as the student, for the length of a `with` block.

        The differences are added in place and the original values put back afterwards, bit for bit,
        also after an exception. In half precision the sum is taken in float32 and rounded.

        Yields:
            The same model object, now with the student's weights.

        Raises:
            ValueError: The model is not the base that the delta was trained on: another class,
                other parameter names or shapes, or other weights (changed in place included).
            RuntimeError: A delta is applied to the model already, or it is being trained.
        """
        with reserved(model, "a delta is applied to it"):
            parameters = self._fitting(model)
            originals = {name: p.detach().clone() for name, p in parameters.items()}
            try:
                with torch.no_grad():
                    for name, p in parameters.items():
                        wide = p.float() if p.dtype in (torch.float16, torch.bfloat16) else p
                        p.copy_(wide + self.tensors[name].to(p.device))
                yield model
            finally:
                restore_values(model, parameters, originals)

    def _fitting(self, model: Model) -> dict[str, nn.Parameter]:
        """The model's parameters that the delta changes, after the checks that it is the base."""
        parameters = get_engine(model).named_parameters()
        trained, given = self._model("class"), type(model).__name__
        missing = [name for name in self.tensors if name not in parameters]
        if missing and trained is not None and trained != given:
            fix = _BACKENDS.get(trained, "the class that was trained")
            raise ValueError(
                f"this delta was trained on a {trained} and the model is a {given}, whose "
                f"parameters have other names; load the base with {fix}, or train the delta anew"
            )
        if missing:
            raise ValueError(
                f"the model has no parameter {missing[0]!r} ({len(missing)} of "
                f"{len(self.tensors)} names are unknown): the delta belongs to another base, "
                f"{self._model('name') or 'unnamed'}"
            )
        for name, tensor in self.tensors.items():
            if tensor.shape != parameters[name].shape:
                raise ValueError(
                    f"this delta's {name!r} has shape {tuple(tensor.shape)}, the model's has "
                    f"{tuple(parameters[name].shape)}: it belongs to another base"
                )
        found = base_fingerprint(model)
        if found != self.base:
            raise ValueError(
                f"this model is not the base of the delta: its fingerprint is {found[:12]}, the "
                f"delta was trained over {self.base[:12]} ({self._model('name') or 'unnamed'}); "
                "load the same weights in the same dtype, and undo changes made in place"
            )
        return {name: parameters[name] for name in self.tensors}

    def _model(self, key: str) -> str | None:
        value = (self.metadata.get("model") or {}).get(key)
        return None if value is None else str(value)

    def norms(self) -> dict[int | str, float]:
        """Frobenius norm of the change, per block.

        Returns:
            Block index -> norm over all its parameters; a parameter outside the blocks has its own
            name as key.
        """
        squares: dict[int | str, float] = {}
        held = self.tensors
        for name in held:
            found = _BLOCK.search(name)
            key: int | str = int(found.group(1)) if found else name
            square = (
                held.factors[name].square()
                if isinstance(held, LowRankTensors)
                else float(held[name].double().square().sum())
            )
            squares[key] = squares.get(key, 0.0) + square
        return {
            k: squares[k] ** 0.5 for k in sorted(squares, key=lambda k: (isinstance(k, str), k))
        }

    def digest(self) -> str:
        """A hash of the differences alone: equal deltas have equal ones, whatever made them."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def _combined(self, tensors: Mapping[str, Tensor], operation: str) -> "Delta":
        kept: dict[str, Any] = {
            k: v for k, v in self.metadata.items() if k in ("model", "versions")
        }
        return Delta(tensors, self.base, kept | {"operation": operation})

    def __add__(self, other: "Delta") -> "Delta":
        """The sum of two deltas over one base; what only one of them changes is kept."""
        if not isinstance(other, Delta):
            return NotImplemented
        if other.base != self.base:
            raise ValueError(
                "deltas over different bases cannot be added: "
                f"{self.base[:12]} and {other.base[:12]}"
            )
        if isinstance(self.tensors, LowRankTensors) and isinstance(other.tensors, LowRankTensors):
            return self._combined(self.tensors.plus(other.tensors), "sum of two deltas")
        tensors = dict(self.tensors)
        for name, tensor in other.tensors.items():
            tensors[name] = tensors[name] + tensor if name in tensors else tensor
        return self._combined(tensors, "sum of two deltas")

    def __sub__(self, other: "Delta") -> "Delta":
        """The difference of two deltas over one base."""
        return self + -other if isinstance(other, Delta) else NotImplemented

    def __mul__(self, factor: float) -> "Delta":
        """The delta with every difference multiplied by `factor`."""
        if not isinstance(factor, int | float):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"a delta cannot be scaled by {factor}; give a finite number")
        scaled: Mapping[str, Tensor]
        if isinstance(self.tensors, LowRankTensors):
            factors = self.tensors.factors
            scaled = LowRankTensors({n: f.scaled(factor) for n, f in factors.items()})
        else:
            scaled = {n: t * factor for n, t in self.tensors.items()}
        return self._combined(scaled, f"scaled by {factor}")

    __rmul__ = __mul__

    def __neg__(self) -> "Delta":
        """The opposite change."""
        return self * -1.0

    def history(self) -> "pd.DataFrame":
        """Step, epoch, loss, learning rate and what `on_step` returned, one row per update."""
        import pandas as pd

        table = pd.DataFrame(self.metadata.get("history", []))
        # Files keep the entries of a row in alphabetical order.
        first = [c for c in ("step", "epoch", "loss", "lr") if c in table]
        return table[first + [c for c in table if c not in first]]

    def save(self, path: str | Path) -> None:
        """Write the delta as safetensors with a JSON header (atomic)."""
        record: dict[str, Any] = {"base": self.base, "metadata": self.metadata}
        if isinstance(self.tensors, LowRankTensors):
            tensors, record["low_rank"] = self.tensors.as_stored()
        else:
            tensors = dict(self.tensors)
        save_tensors(path, tensors, record, _KIND)

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """Read a delta written by `save`; damaged and foreign files are refused."""
        tensors, header = load_tensors(path, _KIND)
        held = (
            LowRankTensors.from_stored(tensors, header["low_rank"])
            if "low_rank" in header
            else tensors
        )
        return cls(held, header["base"], header["metadata"])

    def to_huggingface(self, folder: str | Path, *, base: Any = None) -> Path:
        """Write the student as a checkpoint of its own, which `AutoModelForCausalLM` loads.

        The base is loaded anew in Hugging Face's layout, the differences are added there, and what
        was written is loaded once more: its logits equal the student's here to 1e-5 (in half
        precision, to its rounding), or nothing is left in `folder`.

        Args:
            folder: Where to; must be empty or not there. It also gets the base's tokenizer and
                `divergence_lens.json`, with where the student comes from.
            base: Where the base's weights are: a hub name, a folder, or a Hugging Face model. The
                name that the trained model was loaded under, unless given.

        Returns:
            The folder.

        Raises:
            ValueError: The base is not the one that was trained on (weights that were folded or
                centred included: Hugging Face's layout has no place for them); a difference has
                no place in Hugging Face's layout; the folder holds files.
        """
        from divergence_lens.deltas.export import write_checkpoint

        return write_checkpoint(self, Path(folder), base)

    def to_peft(self, folder: str | Path, *, base: Any = None) -> Path:
        """Write a student that was trained with LoRA as an adapter, which peft loads.

        Where Hugging Face keeps queries, keys and values in one matrix, the adapter of that matrix
        has the sum of their ranks, and says so.

        Args:
            folder: Where to; must be empty or not there.
            base: As in `to_huggingface`.

        Returns:
            The folder.

        Raises:
            ValueError: The delta is kept in full and not as factors; or as in `to_huggingface`.
        """
        from divergence_lens.deltas.export import write_adapter

        return write_adapter(self, Path(folder), base)

    def __repr__(self) -> str:
        """One line: how much changed, where, over which base."""
        where = ", ".join(str(k) for k in self.norms())
        model = self._model("name") or "base"
        return f"Delta({self.n_parameters:,} parameters in {where}; over {model} {self.base[:12]})"

    def _repr_html_(self) -> str:
        named = [(f"block {k}" if isinstance(k, int) else k, v) for k, v in self.norms().items()]
        rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{v:.4g}</td></tr>" for k, v in named)
        return (
            f"<p>{html.escape(repr(self))}</p><table><thead><tr><th>where</th>"
            f"<th>norm of the change</th></tr></thead><tbody>{rows}</tbody></table>"
        )


@contextmanager
def reserved(model: Model, use: str) -> Iterator[None]:
    """Mark the model's weights as in use: for as long as it lasts, the model is not its base.

    Raises:
        RuntimeError: They are in use already.
    """
    if model in _in_use:
        raise RuntimeError(
            f"the weights of this model are in use: {_in_use[model]}; leave that `with` block "
            "first (two deltas over one base can be added: `(a + b).applied(model)`)"
        )
    _in_use[model] = use
    try:
        yield
    finally:
        del _in_use[model]


def restore_values(
    model: Model, parameters: dict[str, nn.Parameter], originals: dict[str, Tensor]
) -> None:
    """Copy the original values back; the fingerprint that is known of the base holds again."""
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(originals[name])
    if model in _known:
        # Only the entries of the tensors that were put back: a change of any other still shows.
        _known[model][1].update({name: _state(p) for name, p in parameters.items()})


def base_fingerprint(model: Model) -> str:
    """`fingerprint(model)`, computed once for as long as the weights stay as they are.

    Hashing a large model takes many seconds, and a delta is applied often. Storage, version counter
    and a checksum of the bits are compared instead; the checksum also sees changes made through
    `.data`, which no counter counts.
    """
    state = {name: _state(p) for name, p in get_engine(model).named_parameters().items()}
    if model not in _known or _known[model][1] != state:
        _known[model] = (fingerprint(model), state)
    return _known[model][0]


def _state(parameter: nn.Parameter) -> tuple[Any, ...]:
    bits = parameter.detach().view(_BITS[parameter.element_size()])
    # Row sums weighted by the row's number: a changed value or two swapped rows change it.
    rows = (
        bits.flatten(0, -2).sum(-1, dtype=torch.int64) if bits.ndim > 1 else bits.reshape(-1).long()
    )
    checksum = int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())
    return (
        parameter.data_ptr(),
        parameter._version,  # noqa: SLF001 - the counter has no public name
        parameter.dtype,
        tuple(parameter.shape),
        checksum,
    )
