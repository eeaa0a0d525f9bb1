"""A student as a small named set of differences on top of an unmodified base model.

A finetuned model is stored as a `Delta`: the float32 difference of every trained parameter to the
base, and the fingerprint of that base. One loaded model thus serves any number of students and
finetuned teachers. Each is applied for the length of a `with` block, after which the base is
restored bit for bit.
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
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from divergence_lens._utils.hub import OnHub
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

# Per live model: the use that its weights are reserved for.
_in_use: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
# Per live model: its fingerprint, and the state of its parameters when that was computed.
_known: WeakKeyDictionary[nn.Module, tuple[str, dict[str, tuple[Any, ...]]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False, repr=False)
class Delta(OnHub):
    """The trained parameters of a student or a finetuned teacher, as differences to its base.

    Attributes:
        tensors: Parameter name -> difference to the base, float32, on the CPU, in the parameter's
            shape. The names are those of the trained model class, see `Engine.named_parameters`. A
            student trained with LoRA stores the factors; each difference is computed when read.
        base: Fingerprint of the base model.
        metadata: Model, settings, losses and package versions, as JSON data.
    """

    _hub_type: ClassVar[str] = "model"

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
        """Number of scalars that change."""
        if isinstance(self.tensors, LowRankTensors):
            return sum(math.prod(f.layout.shape) for f in self.tensors.factors.values())
        return sum(t.numel() for t in self.tensors.values())

    @property
    def rank(self) -> int | None:
        """Largest rank of the stored factors; None if the delta is stored in full."""
        if isinstance(self.tensors, LowRankTensors):
            return max(f.rank for f in self.tensors.factors.values())
        return None

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """Turn the model into the student for the length of a `with` block.

        The differences are added in place. Afterwards the original values are restored bit for bit,
        also after an exception. In half precision the sum is computed in float32 and rounded.

        Yields:
            The same model object, now with the student's weights.

        Raises:
            ValueError: The model is not the base that the delta was trained on: another class,
                other parameter names or shapes, or other weights (including changes in place).
            RuntimeError: A delta is already applied to the model, or the model is being trained.
        """
        with reserved(model, "a delta is applied to it"):
            parameters = self._check_base(model)
            originals = {name: p.detach().clone() for name, p in parameters.items()}
            try:
                with torch.no_grad():
                    for name, p in parameters.items():
                        # W + D in float32, rounded once to the type of W.
                        wide = p.float() if p.dtype in (torch.float16, torch.bfloat16) else p
                        p.copy_(wide + self.tensors[name].to(p.device))
                yield model
            finally:
                restore_values(model, parameters, originals)

    def _check_base(self, model: Model) -> dict[str, nn.Parameter]:
        """Check that the model is the base, and return the parameters that the delta changes."""
        parameters = get_engine(model).named_parameters()
        trained, given = self._model("class"), type(model).__name__
        missing = [name for name in self.tensors if name not in parameters]
        if missing and trained is not None and trained != given:
            fix = _BACKENDS.get(trained, "the class that was trained")
            raise ValueError(
                f"this delta was trained on a {trained} and the model is a {given}, whose "
                f"parameters have other names; load the base with {fix}, or train the delta again"
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
        given_base = base_fingerprint(model)
        if given_base != self.base:
            raise ValueError(
                f"this model is not the base of the delta: its fingerprint is {given_base[:12]}, "
                f"the delta was trained on {self.base[:12]} "
                f"({self._model('name') or 'unnamed'}); "
                "load the same weights in the same dtype, and undo changes made in place"
            )
        return {name: parameters[name] for name in self.tensors}

    def _model(self, key: str) -> str | None:
        value = (self.metadata.get("model") or {}).get(key)
        return None if value is None else str(value)

    def norms(self) -> dict[int | str, float]:
        """Frobenius norm of the change, per layer.

        Returns:
            Layer index -> norm over all its parameters. The key of a parameter outside the layers
            is its name.
        """
        squares: dict[int | str, float] = {}
        tensors = self.tensors
        for name in tensors:
            match = _BLOCK.search(name)
            key: int | str = int(match.group(1)) if match else name
            square = (
                tensors.factors[name].square()
                if isinstance(tensors, LowRankTensors)
                else float(tensors[name].double().square().sum())
            )
            squares[key] = squares.get(key, 0.0) + square
        return {
            k: squares[k] ** 0.5 for k in sorted(squares, key=lambda k: (isinstance(k, str), k))
        }

    def digest(self) -> str:
        """Hash the differences alone: equal deltas have equal hashes, whatever their metadata."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def _combined(self, tensors: Mapping[str, Tensor], operation: str) -> "Delta":
        inherited: dict[str, Any] = {
            k: v for k, v in self.metadata.items() if k in ("model", "versions")
        }
        return Delta(tensors, self.base, inherited | {"operation": operation})

    def __add__(self, other: "Delta") -> "Delta":
        """Add two deltas of one base; parameters that only one of them changes are included."""
        if not isinstance(other, Delta):
            return NotImplemented
        if other.base != self.base:
            raise ValueError(
                f"deltas of different bases cannot be added: {self.base[:12]} and {other.base[:12]}"
            )
        if isinstance(self.tensors, LowRankTensors) and isinstance(other.tensors, LowRankTensors):
            return self._combined(self.tensors.plus(other.tensors), "sum of two deltas")
        tensors = dict(self.tensors)
        for name, tensor in other.tensors.items():
            tensors[name] = tensors[name] + tensor if name in tensors else tensor
        return self._combined(tensors, "sum of two deltas")

    def __sub__(self, other: "Delta") -> "Delta":
        """Subtract a delta of the same base."""
        return self + -other if isinstance(other, Delta) else NotImplemented

    def __mul__(self, factor: float) -> "Delta":
        """Multiply every difference by `factor`."""
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
        """Negate every difference."""
        return self * -1.0

    def history(self) -> "pd.DataFrame":
        """One row per update: step, epoch, loss, learning rate and the values from `on_step`."""
        import pandas as pd

        table = pd.DataFrame(self.metadata.get("history", []))
        # Files store the entries of a row in alphabetical order.
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
        """Read a delta written by `save`; refuse damaged files and files of another kind."""
        tensors, header = load_tensors(path, _KIND)
        stored = (
            LowRankTensors.from_stored(tensors, header["low_rank"])
            if "low_rank" in header
            else tensors
        )
        return cls(stored, header["base"], header["metadata"])

    def to_huggingface(self, folder: str | Path, *, base: Any = None) -> Path:
        """Write the student as a separate checkpoint, which `AutoModelForCausalLM` loads.

        The base is loaded again in Hugging Face's layout, and the differences are added to it. The
        written checkpoint is then loaded: its logits must equal the student's to 1e-5 (in half
        precision, to rounding), otherwise `folder` is removed.

        Args:
            folder: An empty or new folder. The base's tokenizer and the delta's metadata
                (`divergence_lens.json`) are written to it too.
            base: The base's weights: a hub name, a folder, or a Hugging Face model. By default, the
                name under which the trained model was loaded.

        Returns:
            The folder.

        Raises:
            ValueError: The base is not the one that was trained on (this includes folded or
                centered weights, which Hugging Face's layout cannot hold); a difference has no
                equivalent in Hugging Face's layout; the folder contains files.
        """
        from divergence_lens.deltas.export import write_checkpoint

        return write_checkpoint(self, Path(folder), base)

    def to_peft(self, folder: str | Path, *, base: Any = None) -> Path:
        """Write a student that was trained with LoRA as an adapter, which peft loads.

        If Hugging Face stores queries, keys and values in one matrix, the rank of its adapter is
        the sum of their ranks, as recorded in its configuration.

        Args:
            folder: An empty or new folder.
            base: As in `to_huggingface`.

        Returns:
            The folder.

        Raises:
            ValueError: The delta is stored in full, not as factors; or as in `to_huggingface`.
        """
        from divergence_lens.deltas.export import write_adapter

        return write_adapter(self, Path(folder), base)

    def __repr__(self) -> str:
        """Return one line: the number of changed parameters, where they are, and the base."""
        keys = list(self.norms())
        layers = [str(key) for key in keys if isinstance(key, int)]
        named = [f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"] if layers else []
        where = ", ".join([*named, *(key for key in keys if isinstance(key, str))])
        model = self._model("name") or "base"
        return f"Delta({self.n_parameters:,} parameters in {where}; over {model} {self.base[:12]})"

    def _repr_html_(self) -> str:
        named = [(f"layer {k}" if isinstance(k, int) else k, v) for k, v in self.norms().items()]
        rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{v:.4g}</td></tr>" for k, v in named)
        return (
            f"<p>{html.escape(repr(self))}</p><table><thead><tr><th>where</th>"
            f"<th>norm of the change</th></tr></thead><tbody>{rows}</tbody></table>"
        )


@contextmanager
def reserved(model: Model, use: str) -> Iterator[None]:
    """Reserve the model's weights for one use, during which the model differs from its base.

    Raises:
        RuntimeError: The weights are already reserved.
    """
    if model in _in_use:
        raise RuntimeError(
            f"the weights of this model are in use: {_in_use[model]}; leave that `with` block "
            "first (two deltas of one base can be added: `(a + b).applied(model)`)"
        )
    _in_use[model] = use
    try:
        yield
    finally:
        del _in_use[model]


def restore_values(
    model: Model, parameters: dict[str, nn.Parameter], originals: dict[str, Tensor]
) -> None:
    """Restore the original values, and mark the cached fingerprint as valid again."""
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(originals[name])
    if model in _known:
        # Only the entries of the restored tensors: a change of any other is still detected.
        _known[model][1].update({name: _state(p) for name, p in parameters.items()})


def base_fingerprint(model: Model) -> str:
    """Return `fingerprint(model)`, cached until the weights change.

    Hashing a large model takes many seconds, and deltas are applied often. Storage, version counter
    and a checksum of the bits are compared instead. The checksum also detects changes made through
    `.data`, which the version counter misses.
    """
    state = {name: _state(p) for name, p in get_engine(model).named_parameters().items()}
    if model not in _known or _known[model][1] != state:
        _known[model] = (fingerprint(model), state)
    return _known[model][0]


def _state(parameter: nn.Parameter) -> tuple[Any, ...]:
    """Describe the values of a parameter: its memory, version counter and checksum."""
    # Integers of the same size: a float sum would round, and NaN would differ from itself.
    bits = parameter.detach().view(_BITS[parameter.element_size()])
    # checksum = sum_i (i + 1) * sum_j bits[i, j]: a changed value or two swapped rows change it.
    rows = (
        bits.flatten(0, -2).sum(-1, dtype=torch.int64) if bits.ndim > 1 else bits.reshape(-1).long()
    )  # [rows]
    checksum = int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())
    return (
        parameter.data_ptr(),
        parameter._version,  # noqa: SLF001 - the counter has no public name
        parameter.dtype,
        tuple(parameter.shape),
        checksum,
    )
