"""The forward passes that every other room shares.

A pass goes block by block over a residual stream [batch, pos, d_model], can start at any position
after kept keys and values, can start at any block, and can be watched or changed at the sites of
each block. What a `HookedTransformer` and a `TransformerBridge` do differently is in
`_hooked_engine` and `_bridge_engine`; they, this room and `models` alone know which a model is.

Tokens are right padded or not padded, and no attention mask is ever passed: under a causal mask
what stands right of a position cannot reach it, so rows of padding are simply not read.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from divergence_lens.engine.fused import FusedBlocks
from divergence_lens.models import Model, is_hooked, model_name, untyped

_log = logging.getLogger(__name__)

SITES = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "block_out", "z", "q", "k", "v"
)  # fmt: skip
"""The sites of a block, [batch, pos, d_model]; `z`, `q`, `k`, `v` are [batch, pos, head, d_head].

`block_out` is all that the block adds to the residual. Queries and keys are taken before rotation,
and keys and values have a head for each group of query heads."""

PER_HEAD = ("z", "q", "k", "v")

INNER = ("attn_scores", "pattern", "mlp_pre", "mlp_pre_linear", "mlp_post")
"""Points between the sites, for those that change how a block computes."""

SiteFunction = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of every block for the first `length` positions of a batch.

    Their layout is the model class's own; other rooms only cut, pick and repeat them.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    position_axis: int

    @property
    def length(self) -> int:
        """Number of positions that are kept."""
        return self.keys[0].shape[self.position_axis]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.keys[0].shape[0]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "KeyValues":
        return KeyValues(
            tuple(change(key) for key in self.keys),
            tuple(change(value) for value in self.values),
            self.position_axis,
        )

    def upto(self, length: int) -> "KeyValues":
        """The first `length` positions; a view."""
        return self._map(lambda kept: kept.narrow(self.position_axis, 0, length))

    def select(self, rows: Int[Tensor, "rows"]) -> "KeyValues":
        """The given rows, in the given order; a copy."""
        return self._map(lambda kept: kept.index_select(0, rows))

    def expand(self, batch: int) -> "KeyValues":
        """One row repeated `batch` times; a view."""
        if self.batch != 1:
            raise ValueError(f"only a single row can be repeated, this holds {self.batch}")
        return self._map(lambda kept: kept.expand(batch, *kept.shape[1:]))


class Pass:
    """A forward pass under way: its embeddings, where it starts, and what it keeps.

    Attributes:
        resid: the embeddings, `resid_pre` of block 0, [batch, pos, d_model].
        offset: absolute position of the first token of `resid`.
        rows: for each row of the residual, its row in the past; None where they are the same.
    """

    def __init__(self, past: KeyValues | None, *, keep: bool, position_axis: int) -> None:
        self.resid: Tensor
        self.past = past
        self.keep = keep
        self.rows: Tensor | None = None
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.masks: dict[tuple[int, int], Tensor] = {}
        self._axis = position_axis
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def offset(self) -> int:
        """Absolute position of the pass's first token."""
        return self.past.length if self.past is not None else 0

    def key_values(self) -> KeyValues:
        """The keys and values of the past and of this pass, once all blocks have run.

        Raises:
            RuntimeError: The blocks handed none over.
        """
        if not self._kept:
            raise RuntimeError("its attention hands over no keys and values")
        layers = [self._kept[layer] for layer in sorted(self._kept)]
        return KeyValues(
            tuple(key for key, _ in layers), tuple(value for _, value in layers), self._axis
        )

    def join(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the past before a block's new keys and values, and keep the whole if asked to."""
        if self.past is not None and self.past.length:
            key = torch.cat([self.rows_of(self.past.keys[layer], len(key)), key], self._axis)
            value = torch.cat(
                [self.rows_of(self.past.values[layer], len(value)), value], self._axis
            )
        if self.keep:
            self._kept[layer] = (key, value)
        return key, value

    def rows_of(self, kept: Tensor, batch: int) -> Tensor:
        """What is kept of the past, for each of `batch` rows."""
        if len(kept) == 1:
            return kept.expand(batch, *kept.shape[1:])
        return kept if self.rows is None else kept.index_select(0, self.rows)


class Engine(ABC):
    """One model's forward passes, block by block. Get it with `get_engine(model)`.

    Attributes:
        model: the model.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_vocab, n_ctx: its sizes.
        causal: whether no position attends to a later one.
        sites: the names in `SITES` that this model has.
    """

    position_axis: int

    def __init__(self, model: Model) -> None:
        self.model = model
        self._lens = untyped(model)
        cfg = self._lens.cfg
        self.n_layers: int = cfg.n_layers
        self.n_heads: int = cfg.n_heads
        self.n_kv_heads: int = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        self.d_model: int = cfg.d_model
        self.d_head: int = cfg.d_head
        self.d_vocab: int = cfg.d_vocab
        self.n_ctx: int = cfg.n_ctx
        parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
        self.sites = tuple(site for site in SITES if not (parallel and site == "resid_mid"))
        self.causal = getattr(cfg, "attention_dir", "causal") == "causal"
        self._functions: dict[tuple[int, str], list[SiteFunction]] = {}
        self._block_input: Tensor | None = None
        self._fast: FusedBlocks | None = None

    @property
    def device(self) -> torch.device:
        """The device of the embeddings."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return next(self.model.parameters()).dtype

    # -- what the two classes do differently ------------------------------------------------

    @abstractmethod
    def _begin(self, run: Pass, tokens: Tensor) -> Tensor:
        """The embeddings of `tokens`, and whatever the blocks need put into `run`."""

    @abstractmethod
    def _block(self, layer: int, resid: Tensor, run: Pass) -> Tensor: ...

    @abstractmethod
    def _site_module(self, layer: int, site: str) -> nn.Module:
        """The hook point through which `site` of block `layer` passes."""

    @abstractmethod
    def by_position(self, layer: int) -> list[nn.Module]:
        """Modules of block `layer` that treat each position by itself, from the query to the MLP.

        What they give at a position goes into nothing but the block's output there.
        """

    @abstractmethod
    def norm(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The final norm."""

    @abstractmethod
    def _unembed(self, hidden: Tensor) -> Tensor:
        """Logits through the model's own unembedding, without the soft cap."""

    @abstractmethod
    def block_parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """The parameters that block `layer` computes with, by their full names."""

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the model computes with, by name; tied ones once."""

    def unembed(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Logits of normed hidden states, the soft cap included."""
        fast = self._fast
        seen = fast is None or not fast.fit_unembed()
        logits = self._unembed(hidden) if fast is None or seen else fast.unembed(hidden)
        return _soft_cap(logits, self._lens.cfg)

    # -- passes -----------------------------------------------------------------------------

    def begin(
        self, tokens: Int[Tensor, "batch pos"], past: KeyValues | None = None, *, keep: bool = False
    ) -> Pass:
        """Start a pass over `tokens`, which follow `past`.

        Args:
            tokens: right padded or unpadded ids.
            past: keys and values of the positions before; of one row, it serves every row.
            keep: keep the keys and values of this pass too (`run.key_values()`).

        Raises:
            ValueError: more positions than the context holds, or ids outside the vocabulary.
        """
        offset = past.length if past is not None else 0
        if offset + tokens.shape[1] > self.n_ctx:
            raise ValueError(
                f"{offset + tokens.shape[1]} tokens do not fit the context of {self.n_ctx}; "
                "shorten the prompt or the completion"
            )
        tokens = tokens.to(self.device)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.d_vocab:
            raise ValueError(
                f"token ids run from {int(tokens.min())} to {int(tokens.max())}; "
                f"the vocabulary has {self.d_vocab}: were they made with another tokenizer?"
            )
        run = Pass(past, keep=keep, position_axis=self.position_axis)
        run.resid = self._begin(run, tokens)
        return run

    def block(
        self,
        layer: int,
        resid: Float[Tensor, "rows pos d_model"],
        run: Pass,
        *,
        rows: Int[Tensor, "rows"] | None = None,
    ) -> Float[Tensor, "rows pos d_model"]:
        """Run one block.

        Args:
            layer: which block.
            resid: its `resid_pre`; the positions are those of `run`, the rows may be others.
            run: the pass, from `begin`.
            rows: for each row of `resid`, its row in the pass's past.

        Returns:
            `resid_post` of the block.
        """
        run.rows = rows
        return self._with_sites(layer, resid, run)

    def _with_sites(self, layer: int, resid: Tensor, run: Pass) -> Tensor:
        resid = self._apply(layer, "resid_pre", resid)
        self._block_input = resid
        try:
            out = self._block(layer, resid, run)
        finally:
            self._block_input = None
        if (layer, "block_out") in self._functions:
            out = resid + self._apply(layer, "block_out", out - resid)
        return self._apply(layer, "resid_post", out)

    def last_block(
        self,
        resid: Float[Tensor, "rows pos d_model"],
        run: Pass,
        target: Int[Tensor, "rows"],
        *,
        rows: Int[Tensor, "rows"] | None = None,
    ) -> Float[Tensor, "rows d_model"]:
        """`block` of the last block, at one position of each row, its number in `resid`.

        What follows the attention is computed at that position alone where that can be done. No
        site of the block may be hooked, other than those of its attention.
        """
        out = self.block(self.n_layers - 1, resid, run, rows=rows)
        return out[torch.arange(len(out), device=out.device), target]

    def site_heads(self, site: str) -> int:
        """How many heads `site` has; 0 if it has no axis of heads."""
        if site not in PER_HEAD:
            return 0
        return self.n_kv_heads if site in ("k", "v") else self.n_heads

    def final_from(
        self, resid: Float[Tensor, "batch pos d_model"], layer: int, run: Pass
    ) -> Float[Tensor, "batch pos d_model"]:
        """Blocks from `layer` up and the final norm, starting at `resid_pre` of `layer`."""
        for index in range(layer, self.n_layers):
            resid = self.block(index, resid, run)
        return self.norm(resid)

    def final(
        self,
        tokens: Int[Tensor, "batch pos"],
        past: KeyValues | None = None,
        *,
        since: int = 0,
    ) -> Float[Tensor, "batch asked d_model"]:
        """All blocks and the final norm; `unembed` what is needed of it.

        Args:
            tokens: right padded or unpadded ids.
            past: keys and values of the positions before.
            since: only the hidden states of positions from here on come back.
        """
        run = self.begin(tokens, past)
        last = self.n_layers - 1
        resid = run.resid
        for layer in range(last):
            resid = self.block(layer, resid, run)
        fused = self._fused(last)
        if fused is None or any((last, site) in self._functions for site in SITES):
            return self.norm(self.block(last, resid, run)[:, since:])
        # The last block's output is wanted at these positions alone.
        return self.norm(fused.block(last, resid, run, since))

    def _fused(self, layer: int) -> FusedBlocks | None:
        """The fast form of a block, if there is one and nobody would see that it was taken."""
        fused = self._fast
        return fused if fused is not None and fused.fit(layer) else None

    def prefill(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], KeyValues]:
        """`final`, with the keys and values of every position kept."""
        return self.extend(tokens, None)

    def extend(
        self, tokens: Int[Tensor, "batch pos"], past: KeyValues | None
    ) -> tuple[Float[Tensor, "batch pos d_model"], KeyValues]:
        """`final` of tokens that follow `past`, with all keys and values kept."""
        run = self.begin(tokens, past, keep=True)
        hidden = self.final_from(run.resid, 0, run)
        return hidden, run.key_values()

    @torch.no_grad()
    def activations(
        self, tokens: Int[Tensor, "batch pos"], *, sites: Sequence[str] = ("resid_pre",)
    ) -> dict[str, Float[Tensor, "layer batch pos ..."]]:
        """The activations of all blocks at the given sites, of one forward pass."""
        kept: dict[str, list[Tensor]] = {site: [] for site in sites}

        def keeper(site: str) -> SiteFunction:
            return lambda activation: kept[site].append(activation.detach())

        watch = [(layer, site, keeper(site)) for layer in range(self.n_layers) for site in sites]
        with self.hooked(watch):
            self.final(tokens)
        return {site: torch.stack(found) for site, found in kept.items()}

    # -- parts of a block that rules of propagation act on ----------------------------------

    def norms(self) -> list[nn.Module]:
        """All norms of the model, the final one included."""
        return [
            module
            for module in self.model.modules()
            if hasattr(module, "hook_scale") and hasattr(module, "hook_normalized")
        ]

    @staticmethod
    def norm_kind(norm: nn.Module) -> tuple[bool, Tensor | None, float]:
        """Whether a norm takes the mean away, its bias if it has one, and its epsilon."""
        inner: Any = getattr(norm, "original_component", norm)
        rms = getattr(norm, "uses_rms_norm", "RMS" in type(norm).__name__)
        bias = getattr(inner, "bias", getattr(inner, "b", None))
        for name in ("eps", "variance_epsilon"):
            if hasattr(inner, name):
                return not rms, bias, float(getattr(inner, name))
        raise ValueError(f"the norm {type(inner).__name__} does not say its epsilon")

    def activation(self, layer: int) -> tuple[Callable[[Tensor], Tensor], bool]:
        """The activation function of a block's MLP, and whether a second branch is gated by it.

        Raises:
            ValueError: the MLP is a mixture of experts, or one whose parts cannot be seen.
        """
        mlp: Any = self._lens.blocks[layer].mlp
        inner = getattr(mlp, "original_component", mlp)
        function = getattr(inner, "act_fn", getattr(inner, "act", None))
        if not callable(function) or getattr(mlp, "ln", None) is not None:
            raise ValueError(
                f"the MLP {type(inner).__name__} of this model has no plain activation function"
            )
        try:
            self._site_module(layer, "mlp_pre"), self._site_module(layer, "mlp_post")
        except (AttributeError, KeyError) as error:
            raise ValueError(
                f"the MLP {type(inner).__name__} of this model does not show its activations"
            ) from error
        try:
            self._site_module(layer, "mlp_pre_linear")
        except (AttributeError, KeyError):
            return function, False
        return function, True

    # -- sites ------------------------------------------------------------------------------

    @contextmanager
    def hooked(self, functions: Sequence[tuple[int, str, SiteFunction]]) -> Iterator[None]:
        """Call functions on the activations of sites while the context lasts.

        Args:
            functions: (layer, site, function). A function gets the activation, [batch, pos,
                d_model] or, per head, [batch, pos, head, d_head], and returns its replacement, or
                None to leave it. Replacing `resid_mid` changes the residual itself, not only what
                the MLP reads.

        Raises:
            ValueError: the model has no such site or layer.
        """
        handles: list[Any] = []
        added: list[tuple[tuple[int, str], SiteFunction]] = []
        try:
            for layer, site, function in functions:
                self._check_site(layer, site)
                if site in ("resid_pre", "resid_post", "block_out"):
                    self._functions.setdefault((layer, site), []).append(function)
                    added.append(((layer, site), function))
                    continue
                point = self._site_module(layer, "attn_out" if site == "resid_mid" else site)
                handles.append(point.register_forward_hook(self._hook(site, function)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for key, function in added:
                self._functions[key].remove(function)
                if not self._functions[key]:
                    del self._functions[key]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter takes a gradient while the context lasts."""
        kept = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in kept:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in kept:
                parameter.requires_grad_(True)

    def check_layer(self, layer: int) -> None:
        """Refuse a block that the model does not have.

        Raises:
            ValueError: `layer` is out of range.
        """
        if not 0 <= layer < self.n_layers:
            raise ValueError(
                f"layer {layer} is out of range; the model has 0 to {self.n_layers - 1}"
            )

    def _check_site(self, layer: int, site: str) -> None:
        self.check_layer(layer)
        if site not in self.sites and site not in INNER:
            reason = (
                "attention and MLP read the same residual here, there is none between them"
                if site in SITES
                else f"sites are {', '.join(self.sites)}"
            )
            raise ValueError(f"the model has no site {site!r}: {reason}")

    def _apply(self, layer: int, site: str, activation: Tensor) -> Tensor:
        for function in self._functions.get((layer, site), ()):
            changed = function(activation)
            activation = activation if changed is None else changed
        return activation

    def _hook(self, site: str, function: SiteFunction) -> Callable[..., Tensor | None]:
        def mid(_module: nn.Module, _inputs: Any, attn_out: Tensor) -> Tensor | None:
            resid = self._block_input
            changed = function(attn_out if resid is None else resid + attn_out)
            return changed if changed is None or resid is None else changed - resid

        def heads(_module: nn.Module, _inputs: Any, z: Tensor) -> Tensor | None:
            changed = function(z.reshape(*z.shape[:2], -1, self.d_head))
            return None if changed is None else changed.reshape(z.shape)

        def plain(_module: nn.Module, _inputs: Any, activation: Tensor) -> Tensor | None:
            return function(activation)

        if site in PER_HEAD:
            return heads
        return mid if site == "resid_mid" else plain

    @torch.no_grad()
    def difference_to(self, own: Float[Tensor, "2 pos d_vocab"]) -> float:
        """How far passes block by block are from the model's own logits of `_probe`.

        They are run in two pieces where the model is causal, with rows that are other and more than
        those that the pass began with, as patching runs them.

        Returns:
            The greatest difference, relative to the greatest logit or 1.
        """
        tokens = probe_tokens(self.model)
        rows = torch.tensor([1, 0, 1], device=self.device)
        start, past, found = 0, None, []
        if self.causal:
            start = 2
            hidden, past = self.prefill(tokens[:, :start])
            found.append((self.unembed(hidden), own[:, :start]))
        run = self.begin(tokens[:, start:], past)
        resid = run.resid[rows]
        for layer in range(self.n_layers):
            resid = self.block(layer, resid, run, rows=rows)
        found.append((self.unembed(self.norm(resid)), own[rows, start:]))
        scale = max(1.0, float(own.float().abs().max()))
        return max(float((a.float() - b.float()).abs().max()) for a, b in found) / scale

    @torch.no_grad()
    def use_fused_blocks(self) -> None:
        """Take the fast form of the blocks from now on, if it computes what the model's own do."""
        fused = FusedBlocks.of(self, self._lens, hooked=is_hooked(self.model))
        if fused is None or not all(map(fused.fit, range(self.n_layers))):
            return
        tokens = torch.arange(6, device=self.device)[None] * 3 % self.d_vocab
        logits = []
        for fast in (None, fused):
            self._fast = fast
            _, past = self.prefill(tokens[:, :2])
            logits.append(self.unembed(self.final(tokens[:, 2:], past, since=1)).float())
        scale = max(1.0, float(logits[0].abs().max()))
        tolerance = 1e-5 if self.dtype in (torch.float32, torch.float64) else 0.05
        difference = float((logits[0] - logits[1]).abs().max()) / scale
        if not difference <= tolerance:
            self._fast = None
            _log.warning(
                "%s runs through its own blocks, which is slower: the fused ones give other logits "
                "(relative difference %.2g)",
                model_name(self.model),
                difference,
            )


def probe_tokens(model: Model) -> Int[Tensor, "2 6"]:
    """Two rows of unlike ids: what depends on a row's content shows, and is not taken for both."""
    device = next(model.parameters()).device
    first = torch.arange(6, device=device)
    return torch.stack([first * 3, first * 5 + 1]) % int(untyped(model).cfg.d_vocab)


def _soft_cap(logits: Tensor, cfg: Any) -> Tensor:
    cap = getattr(cfg, "output_logits_soft_cap", None)
    return logits if cap is None or cap <= 0 else cap * torch.tanh(logits / cap)
