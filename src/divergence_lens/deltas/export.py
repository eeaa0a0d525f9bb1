"""Export students as Hugging Face checkpoints and peft adapters.

1. Load the base in Hugging Face's layout, and as the model class that was trained.
2. For each trained parameter, list the Hugging Face parameters (and columns) that it may be, by
   name. Accept the one whose values equal the base's, bit for bit. Folded or centered weights have
   none, and are refused.
3. Add the difference there, or write its factors as an adapter.
4. Load the written checkpoint, and compare its logits with the student's.
"""

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from divergence_lens.deltas.low_rank import Factors, Layout, LowRankTensors
from divergence_lens.engine import block_of, canonical, get_engine, plain
from divergence_lens.models import Model, from_pretrained, load_model, no_bar
from divergence_lens.provenance import fingerprint

if TYPE_CHECKING:
    from divergence_lens.deltas.delta import Delta

# Order of queries, keys and values in a fused matrix.
_FUSED = {"Q": 0, "K": 1, "V": 2}
_NORMS = {
    "ln1": ("ln_1", "input_layernorm"),
    "ln2": ("ln_2", "post_attention_layernorm", "pre_feedforward_layernorm"),
    "ln1_post": ("post_attention_layernorm",),
    "ln2_post": ("post_feedforward_layernorm",),
    "q_norm": ("q_norm",),
    "k_norm": ("k_norm",),
    "ln_final": ("ln_f", "final_layer_norm", "norm"),
}
_LEAVES = {"w": "weight", "b": "bias"}
_GATED = ("gate", "in")  # the halves of a fused gate_up_proj, by TransformerLens's names
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def write_checkpoint(delta: "Delta", folder: Path, base: Any) -> Path:
    """See `Delta.to_huggingface`."""
    pair = _Pair.of(delta, base)
    state = dict(pair.state)
    config = copy.deepcopy(pair.config)
    for name in delta.tensors:
        place = pair.place(name)
        stored = state[place.name]
        half = stored.dtype in (torch.float16, torch.bfloat16)
        wide = stored.float() if half else stored.clone()
        change = delta.tensors[name]
        place.add(wide, pair.layouts[name].matrix(change) if place.matrix else change)
        state[place.name] = wide.to(stored.dtype)
        if place.name in pair.tied and pair.keeps_copies:
            config.tie_word_embeddings = False  # only one of the two copies has changed
    with _written(folder) as temporary:
        _save(pair, state, config, temporary)
        pair.compare(delta, temporary)
        about = {"base": delta.base, "header": {**delta.metadata, "history": None}}
        (temporary / "divergence_lens.json").write_text(
            json.dumps(about, indent=1) + "\n", encoding="utf-8"
        )
    return folder


def write_adapter(delta: "Delta", folder: Path, base: Any) -> Path:
    """See `Delta.to_peft`."""
    tensors_of_delta = delta.tensors
    low_rank = tensors_of_delta.factors if isinstance(tensors_of_delta, LowRankTensors) else {}
    if not low_rank:
        raise ValueError(
            "this delta is stored in full, and a peft adapter holds low-rank factors; train with "
            "Recipe(lora_rank=...), or write a checkpoint with to_huggingface"
        )
    pair = _Pair.of(delta, base)
    parts: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    conv = False
    for name, factors in low_rank.items():
        place = pair.place(name)
        n_out = pair.state[place.name].shape[1 if not place.transposed else 0]
        conv |= not place.transposed
        parts.setdefault(place.name.removesuffix(".weight"), []).append(
            place.factors(factors, n_out)
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, module_factors in parts.items():
        scales = {scale for _, _, scale in module_factors}
        rank = sum(len(down) for down, _, _ in module_factors)
        # peft scales an adapter by alpha / rank, with a whole number alpha. Where no alpha gives
        # the scale, the scale is multiplied into B.
        alpha = scales.pop() * rank if len(scales) == 1 else -1.0
        exact = alpha > 0 and alpha == int(alpha)
        ups = [up if exact else scale * up for _, up, scale in module_factors]
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.cat(
            [down for down, _, _ in module_factors]
        ).contiguous()  # [rank, in]
        tensors[f"{stem}.lora_B.weight"] = torch.cat(ups, 1).contiguous()  # [out, rank]
        ranks[module], alphas[module] = rank, int(alpha) if exact else rank
    rank, alpha = min(ranks.values()), min(alphas.values())
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": pair.name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ranks),
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "fan_in_fan_out": conv,
        "inference_mode": True,
    }
    with _written(folder) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(
            json.dumps(settings, indent=2) + "\n", encoding="utf-8"
        )
    return folder


@dataclass(frozen=True)
class _Place:
    """The position of a parameter of the trained class in Hugging Face's layout.

    Attributes:
        name: Name of Hugging Face's parameter.
        transposed: Whether it is stored as [out, in].
        matrix: Whether the difference must be viewed as one matrix (or vector) first.
        columns: The outputs that belong to the parameter, in order; None for all.
        expert: Index into the stacked experts; None for other parameters.
    """

    name: str
    transposed: bool = False
    matrix: bool = False
    columns: Tensor | None = None
    expert: int | None = None

    def view(self, stored: Tensor) -> Tensor:
        """View Hugging Face's parameter as [in, out]."""
        stored = stored if self.expert is None else stored[self.expert]
        return stored.T if self.transposed and stored.ndim == 2 else stored

    def read(self, stored: Tensor) -> Tensor:
        """Read the values of the parameter from Hugging Face's."""
        view = self.view(stored)
        return view if self.columns is None else view[..., self.columns]

    def add(self, stored: Tensor, change: Tensor) -> None:
        """Add a change of the parameter to Hugging Face's, in place."""
        view = self.view(stored)
        if self.columns is None:
            view += change.reshape(view.shape)
        else:
            view[..., self.columns] += change.reshape(*view.shape[:-1], -1)

    def factors(self, factors: Factors, n_out: int) -> tuple[Tensor, Tensor, float]:
        """Return peft's A [rank, in] and B [out, rank], and their scale."""
        # Outputs of a fused matrix that belong to other parameters do not change: rows of zeros.
        up = torch.zeros(n_out, factors.rank)  # [out, rank]
        up[slice(None) if self.columns is None else self.columns] = factors.up.T
        return factors.down.T, up, factors.scale


class _Pair:
    """The base in two forms: in Hugging Face's layout, and as the class that was trained."""

    def __init__(self, hf_model: Any, tokenizer: Any, name: str, backend: Any) -> None:
        self.name, self.tokenizer, self.kind = name, tokenizer, type(hf_model)
        self.config = copy.deepcopy(hf_model.config)
        self.generation_config = getattr(hf_model, "generation_config", None)
        # Read before load_model: a bridge renames the parameters of the model that it wraps.
        self.state: dict[str, Tensor] = {n: t.detach() for n, t in hf_model.state_dict().items()}
        self.linear = {n for n, m in hf_model.named_modules() if isinstance(m, nn.Linear)}
        ends = [hf_model.get_input_embeddings(), hf_model.get_output_embeddings()]
        self.embeds, self.unembeds = (
            [n for n, m in hf_model.named_modules() if m is end and end is not None] for end in ends
        )
        tied = len(ends) == 2 and None not in ends and ends[0].weight is ends[1].weight
        self.tied = {f"{n}.weight" for n in (*self.embeds, *self.unembeds)} if tied else set()
        dtype = next(hf_model.parameters()).dtype
        self.model: Model = load_model(
            hf_model, backend=backend, device="cpu", dtype=dtype, tokenizer=tokenizer
        )
        self.engine = get_engine(self.model)
        self.parameters = self.engine.named_parameters()
        owners = {id(p): m for m in self.model.modules() for p in m.parameters(recurse=False)}
        self.layouts = {n: Layout.of(n, p, owners[id(p)]) for n, p in self.parameters.items()}
        # A HookedTransformer stores a tied matrix twice, a bridge once.
        self.keeps_copies = "unembed.W_U" in self.parameters

    @classmethod
    def of(cls, delta: "Delta", base: Any) -> "_Pair":
        """Load the base of a delta, and refuse a model with another fingerprint."""
        trained = delta.metadata.get("model") or {}
        backend = "hooked" if trained.get("class") == "HookedTransformer" else "bridge"
        dtype = getattr(torch, str(trained.get("dtype", "float32")))
        source = trained.get("name") if base is None else base
        if source is None:
            raise ValueError("the delta does not name its base; pass base=")
        if isinstance(source, nn.Module):
            name = str(getattr(source.config, "name_or_path", "") or trained.get("name") or "model")
            hf_model, tokenizer = _copy(source, dtype), None
        else:
            try:
                hf_model, tokenizer, name = from_pretrained(source, dtype)
            except (ValueError, FileNotFoundError) as error:
                if base is not None:
                    raise
                raise ValueError(
                    f"the base was loaded as {source!r}, which cannot be loaded now; give "
                    "base= (a hub name, a folder or a Hugging Face model)"
                ) from error
        pair = cls(hf_model, tokenizer, name, backend)
        given_base = fingerprint(pair.model)
        if given_base != delta.base:
            raise ValueError(
                f"{name!r} is not the base of the delta: in Hugging Face's layout its fingerprint "
                f"is {given_base[:12]}, and the delta was trained on {delta.base[:12]}; folded, "
                "centered or otherwise changed weights cannot be exported (train on a model from "
                "load_model); give another base with base="
            )
        return pair

    def place(self, name: str) -> _Place:
        """Locate a parameter in Hugging Face's layout, by name and then by its values."""
        value = self.parameters[name].detach()
        candidates = [*self._of_same_name(name), *self._outside(name), *self._in_block(name)]
        for place in candidates:
            own = self.layouts[name].matrix(value) if place.matrix else value
            stored = place.read(self.state[place.name])
            if stored.numel() == own.numel() and torch.equal(stored.reshape(own.shape), own):
                return place
        raise ValueError(
            f"{plain(name)!r} has no equivalent in the layout of {self.kind.__name__}; train "
            "without it"
            + (f" (compared with {', '.join(p.name for p in candidates)})" if candidates else "")
        )

    def _of_same_name(self, name: str) -> Iterator[_Place]:
        same = plain(name)
        if same in self.state and self.state[same].shape == self.parameters[name].shape:
            transposed = same.removesuffix(".weight") in self.linear
            # LoRA needs the matrix view; for a sum it makes no difference.
            matrix = self.parameters[name].ndim == 2 and block_of(name) is not None
            yield _Place(same, transposed and matrix, matrix)

    def _outside(self, name: str) -> Iterator[_Place]:
        if name == "embed.W_E":
            yield from (_Place(f"{n}.weight") for n in self.embeds)
        if name == "unembed.W_U":
            yield from (_Place(f"{n}.weight", transposed=True) for n in self.unembeds)
        if name == "pos_embed.W_pos":
            yield from (_Place(n) for n in self.state if n.endswith("wpe.weight"))
        *_, module, leaf = name.split(".")
        if module in _NORMS and leaf in _LEAVES:
            yield from (
                _Place(n)
                for n in self.state
                if block_of(n) == block_of(name)
                and n.split(".")[-2:-1] in [[norm] for norm in _NORMS[module]]
                and n.endswith(_LEAVES[leaf])
            )

    def _in_block(self, name: str) -> Iterator[_Place]:
        own_name, block = canonical(name), block_of(name)
        if block is None:
            return
        yield from self._gated(name)
        part, _, letter = own_name.rpartition("_")
        for other in self.state:
            if block_of(other) != block:
                continue
            transposed = other.removesuffix(".weight") in self.linear
            if canonical(other) == own_name:
                yield _Place(other, transposed, matrix=self.parameters[name].ndim > 1)
            elif canonical(other) == f"{part}_QKV" and letter in _FUSED:
                n_out = self.state[other].shape[0 if transposed else -1]
                for columns in self._columns(letter, n_out):
                    matrix = self.parameters[name].ndim > 1
                    yield _Place(other, transposed, matrix=matrix, columns=columns)

    def _gated(self, name: str) -> Iterator[_Place]:
        """Yield places in matrices that hold gate and up side by side, and in stacked experts."""
        match = re.search(
            r"mlp\.(?:experts\.(?P<expert>\d+)\.)?(?:W_)?(?P<part>gate|in|out)(?:\.weight)?$",
            plain(name),
        )
        if match is None:
            return
        router = f"mlp.{match['part']}.weight"
        yield from (
            _Place(other, transposed=True, matrix=True)
            for other in self.state
            if block_of(other) == block_of(name) and other.endswith(router)
        )
        expert = None if match["expert"] is None else int(match["expert"])
        fused = "down_proj" if match["part"] == "out" else "gate_up_proj"
        for other in self.state:
            if block_of(other) != block_of(name) or fused not in other.split("."):
                continue
            if (self.state[other].ndim == 3) != (expert is not None):
                continue  # a router is also called gate
            columns = None
            if fused == "gate_up_proj":
                halves = torch.arange(self.state[other].shape[-2]).chunk(2)
                columns = halves[_GATED.index(match["part"])]
            yield _Place(other, transposed=True, matrix=True, columns=columns, expert=expert)

    def _columns(self, letter: str, n_out: int) -> Iterator[Tensor]:
        """Yield the columns of Q, K or V in a fused matrix: one after another, or head by head."""
        every, index = torch.arange(n_out), _FUSED[letter]  # [out]
        n_q = self.engine.n_heads * self.engine.d_head
        # GPT-2, Phi-3: all of Q, then all of K, then all of V.
        yield every.split([n_q, (n_out - n_q) // 2, (n_out - n_q) // 2])[index]
        if n_out == 3 * n_q:
            # GPT-NeoX, BLOOM: Q, K and V of head 0, then of head 1, ...
            per_head = every.reshape(
                self.engine.n_heads, 3, self.engine.d_head
            )  # [head, 3, d_head]
            yield per_head[:, index].flatten()

    @torch.no_grad()
    def compare(self, delta: "Delta", folder: Path) -> None:
        """Refuse a checkpoint whose logits differ from the student's."""
        tokens = (
            torch.arange(min(12, self.engine.n_ctx))[None] * 7 % self.engine.d_vocab
        )  # [1, pos]
        with delta.applied(self.model):
            ours = self.engine.unembed(self.engine.final(tokens)).float()
        with no_bar(hidden=True):
            written = self.kind.from_pretrained(folder, dtype=self.engine.dtype).eval()
        theirs = written(tokens).logits.float()  # [1, pos, d_vocab]
        difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
        # Written as `not <=`, because NaN is not greater than anything.
        if not difference <= _TOLERANCE.get(self.engine.dtype, 0.05):
            raise ValueError(
                f"the checkpoint's logits differ from the student's by {difference:.2g}; "
                f"{self.kind.__name__} cannot be exported"
            )


def _copy(source: Any, dtype: torch.dtype) -> Any:
    """Copy a Hugging Face model, including one that a bridge has wrapped."""
    state = {plain(n): t for n, t in source.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        copied = type(source)(copy.deepcopy(source.config)).to(dtype)
    copied.load_state_dict({n: state[n].detach().cpu() for n in copied.state_dict()})
    return copied.eval()


def _save(pair: _Pair, state: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    with torch.device("meta"):
        written = pair.kind(config)
    written.load_state_dict(dict(state), assign=True)
    if config.tie_word_embeddings:
        written.tie_weights()
    if pair.generation_config is not None:
        written.generation_config = pair.generation_config
    with no_bar(hidden=True):
        written.save_pretrained(folder)
        if pair.tokenizer is not None:
            pair.tokenizer.save_pretrained(folder)


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `folder` once it is complete."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
