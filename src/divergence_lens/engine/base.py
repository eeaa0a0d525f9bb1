"""`Engine`: the forward passes that all higher packages share.

A pass runs block by block over a residual stream [batch, pos, d_model]. It can start at any
position after stored keys and values, can start at any block, and can be read or changed at the
sites of each block. `engine.hooked` and `engine.bridge` hold what differs between a
`HookedTransformer` and a `TransformerBridge`.

Tokens are right padded or not padded, and no attention mask is passed: under a causal mask no
position attends to those on its right, so padding never reaches a position that is read.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from divergence_lens.engine.decoding import Decoder, LockstepDecoder
from divergence_lens.engine.equivalence import OwnPass, fused_tolerance
from divergence_lens.engine.fused import FusedBlocks
from divergence_lens.engine.fused_classes import fused_blocks
from divergence_lens.engine.heads import block_parts
from divergence_lens.engine.hooking import SiteFunction, SiteHooks
from divergence_lens.engine.passes import KeyValues, Pass, Work
from divergence_lens.engine.sites import SITES
from divergence_lens.engine.static import StaticDecoder
from divergence_lens.models import Model, is_hooked, lens_model, model_name

_log = logging.getLogger(__name__)


class Engine(SiteHooks):
    """One model's forward passes, block by block. Get it with `get_engine(model)`.

    Attributes:
        model: The model.
        n_layers, n_heads, d_model, d_head, n_ctx: Its sizes.
        d_vocab: Number of ids that it reads.
        d_vocab_out: Number of ids that it predicts, the width of its logits.
        causal: Whether no position attends to a later one.
        work: The number of positions computed so far, and how many of them in fused blocks.
    """

    position_axis: int

    def __init__(self, model: Model) -> None:
        self.model = model
        self._lens = lens_model(model)
        cfg = self._lens.cfg
        self.n_layers = cfg.n_layers
        self.n_heads = cfg.n_heads
        self.d_model: int = cfg.d_model
        self.d_head = cfg.d_head
        self.d_vocab: int = cfg.d_vocab
        # In TransformerLens, -1 means the same number as d_vocab.
        self.d_vocab_out: int = max(getattr(cfg, "d_vocab_out", -1), -1)
        if self.d_vocab_out < 0:
            self.d_vocab_out = cfg.d_vocab
        self.n_ctx: int = cfg.n_ctx
        parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
        self._absent = {"resid_mid"} if parallel else set()
        self.causal = getattr(cfg, "attention_dir", "causal") == "causal"
        self._functions = {}
        self._block_input = None
        self._fast: FusedBlocks | None = None
        self.work = Work()

    @property
    def device(self) -> torch.device:
        """The device of the embeddings."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return next(self.model.parameters()).dtype

    # -- differences between the two model classes ------------------------------------------------

    @abstractmethod
    def _begin(self, run: Pass, tokens: Tensor) -> Tensor:
        """Return the embeddings of `tokens`; put the arguments that the blocks need into `run`."""

    @abstractmethod
    def _block(self, layer: int, resid: Tensor, run: Pass) -> Tensor: ...

    @abstractmethod
    def by_position(self, layer: int) -> list[nn.Module]:
        """Return the modules of block `layer` that act on each position alone, query to MLP.

        Their output at a position affects only the block's output at that position.
        """

    @abstractmethod
    def norm(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Apply the final norm."""

    @abstractmethod
    def _unembed(self, hidden: Tensor) -> Tensor:
        """Return logits from the model's own unembedding, before the soft cap."""

    @abstractmethod
    def block_parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """Return the parameters that block `layer` computes with, by their full names."""

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the model computes with, by name; tied ones once."""

    def unembed(
        self, hidden: Float[Tensor, "*batch d_model"], ids: Int64[Tensor, " ids"] | None = None
    ) -> Float[Tensor, "*batch columns"]:
        """Return the logits of normed hidden states, including the soft cap.

        Args:
            hidden: The states.
            ids: The only ids to compute, one for each column; all if not given.
        """
        self.work.unembedded += hidden.shape[:-1].numel()
        fast = self._fast
        use_fast = fast is not None and fast.fit_unembed()
        if fast is not None and use_fast:
            logits = fast.unembed(hidden, ids)
        else:
            logits = self._unembed(hidden)
            logits = logits if ids is None else logits[..., ids]
        return self.soft_cap(logits)

    def soft_cap(self, logits: Float[Tensor, "*batch ids"]) -> Float[Tensor, "*batch ids"]:
        """Apply the model's cap on logits, if it has one: cap * tanh(logits / cap)."""
        cap = getattr(self._lens.cfg, "output_logits_soft_cap", None)
        return logits if cap is None or cap <= 0 else cap * torch.tanh(logits / cap)

    def unembedding_frozen(self) -> bool:
        """Whether no parameter of the unembedding takes gradients."""
        return not any(p.requires_grad for p in self.unembedding_parameters())

    def unembedding_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the unembedding, also where they are tied to the embedding."""
        yield from self._lens.unembed.parameters()

    def unembedding_copy(self) -> Callable[[Tensor], Tensor]:
        """Return `unembed` with copies of the current weights, which later changes do not reach."""
        copied = _CopiedUnembedding(self._lens.unembed, self._unembed)
        values = {name: p.detach().clone() for name, p in copied.named_parameters()}

        def unembed(hidden: Tensor) -> Tensor:
            return self.soft_cap(torch.func.functional_call(copied, values, (hidden,)))

        return unembed

    # -- passes -----------------------------------------------------------------------------

    def begin(
        self,
        tokens: Int[Tensor, "batch pos"],
        past: KeyValues | None = None,
        *,
        keep: bool = False,
        depths: Int[Tensor, " pos"] | None = None,
    ) -> Pass:
        """Start a pass over `tokens`, which follow `past`.

        Args:
            tokens: Right padded or unpadded ids.
            past: Keys and values of the preceding positions; a single row is used for every row.
            keep: Store the keys and values of this pass, too (`run.key_values()`).
            depths: Number of tokens between the past and each token, where they do not follow one
                another (see `branch`).

        Raises:
            ValueError: More positions than the context holds, or ids outside the vocabulary.
        """
        offset = past.length if past is not None else 0
        length = offset + (tokens.shape[1] if depths is None else int(depths.max()) + 1)
        if length > self.n_ctx:
            raise ValueError(
                f"{length} tokens do not fit the context of {self.n_ctx}; "
                "shorten the prompt or the completion"
            )
        tokens = tokens.to(self.device)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.d_vocab:
            raise ValueError(
                f"token ids run from {int(tokens.min())} to {int(tokens.max())}; "
                f"the vocabulary has {self.d_vocab}: do they come from another tokenizer?"
            )
        run = Pass(past, keep=keep, position_axis=self.position_axis)
        run.positions = None if depths is None else offset + depths
        run.resid = self._begin(run, tokens)
        return run

    def block(
        self,
        layer: int,
        resid: Float[Tensor, "rows pos d_model"],
        run: Pass,
        *,
        rows: Int[Tensor, " rows"] | None = None,
        since: int = 0,
    ) -> Float[Tensor, "rows requested d_model"]:
        """Run one block.

        Args:
            layer: The block.
            resid: Its `resid_pre`. The positions are those of `run`; the rows may differ.
            run: The pass, from `begin`.
            rows: For each row of `resid`, its row in the past of `run`.
            since: Return only the positions from this one on; fused blocks skip the others.

        Returns:
            `resid_post` of the block.
        """
        run.rows = rows
        if since:
            fused = self._fused(layer)
            if fused is not None and not any((layer, site) in self._functions for site in SITES):
                self.work.positions += resid.shape[:2].numel()
                return fused.block(layer, resid, run, since)
        return self._with_sites(layer, resid, run)[:, since:]

    def _with_sites(self, layer: int, resid: Tensor, run: Pass) -> Tensor:
        resid = self._apply(layer, "resid_pre", resid)
        self._block_input = resid
        self.work.positions += resid.shape[:2].numel()
        try:
            out = self._block(layer, resid, run)
        finally:
            self._block_input = None
        if (layer, "block_out") in self._functions:
            out = resid + self._apply(layer, "block_out", out - resid)
        return self._apply(layer, "resid_post", out)

    def mlp_out(
        self, layer: int, resid: Float[Tensor, "rows pos d_model"]
    ) -> Float[Tensor, "rows pos d_model"]:
        """Return what the MLP of a block adds, from the residual that it reads through its norm."""
        fused = self._fused(layer)
        if fused is not None:
            return fused.mlp_out(layer, resid)
        parts = block_parts(self, layer)
        assert parts.mlp is not None
        assert parts.mlp_norm is not None
        inputs: tuple[Tensor, ...] = (parts.mlp_norm(resid),)
        if type(parts.mlp).__name__ == "BloomMLPBridge":  # it adds the residual to its output
            inputs += (torch.zeros_like(resid),)
        out = parts.mlp(*inputs)
        # In some classes, the router logits of a mixture of experts follow.
        added: Tensor = out[0] if isinstance(out, tuple) else out
        return added

    def last_block(
        self,
        resid: Float[Tensor, "rows pos d_model"],
        run: Pass,
        target: Int[Tensor, " rows"],
        *,
        rows: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows d_model"]:
        """Run the last block, and return its output at one position of each row.

        `target` counts positions of `resid`. After the attention, only that position is computed
        where the model class allows it. Only the attention's sites may be hooked in this block.
        """
        out = self.block(self.n_layers - 1, resid, run, rows=rows)
        return out[torch.arange(len(out), device=out.device), target]

    def final_from(
        self, resid: Float[Tensor, "batch pos d_model"], layer: int, run: Pass
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run the blocks from `layer` up and the final norm, on the `resid_pre` of `layer`."""
        for index in range(layer, self.n_layers):
            resid = self.block(index, resid, run)
        return self.norm(resid)

    def final(
        self,
        tokens: Int[Tensor, "batch pos"],
        past: KeyValues | None = None,
        *,
        since: int = 0,
    ) -> Float[Tensor, "batch requested d_model"]:
        """Run all blocks and the final norm; pass the positions you need to `unembed`.

        Args:
            tokens: Right padded or unpadded ids.
            past: Keys and values of the preceding positions.
            since: Return only the hidden states from this position on.
        """
        run = self.begin(tokens, past)
        last = self.n_layers - 1
        resid = run.resid
        for layer in range(last):
            resid = self.block(layer, resid, run)
        # No later block attends to this one's output, so only the requested positions are computed.
        return self.norm(self.block(last, resid, run, since=since))

    def _fused(self, layer: int) -> FusedBlocks | None:
        """Return the fused blocks, if nothing observes or trains the inside of this block."""
        fused = self._fast
        return fused if fused is not None and fused.fit(layer) else None

    def prefill(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], KeyValues]:
        """Run `final`, and return the keys and values of every position as well."""
        return self.extend(tokens, None)

    def extend(
        self, tokens: Int[Tensor, "batch pos"], past: KeyValues | None
    ) -> tuple[Float[Tensor, "batch pos d_model"], KeyValues]:
        """Run `final` on tokens that follow `past`, and return all keys and values as well."""
        run = self.begin(tokens, past, keep=True)
        hidden = self.final_from(run.resid, 0, run)
        return hidden, run.key_values()

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Hold packed copies of the weights within the context, where that makes passes faster.

        On a CPU, this takes as much memory as the model. Parameters may change within the context,
        but not through `.data`, which leaves no trace.
        """
        with nullcontext() if self._fast is None else self._fast.packed():
            yield

    def decoder(self) -> Decoder:
        """Return a decoder for batches of prompts: static if nothing observes the blocks.

        It may copy parameters, so make a new one after they have changed.
        """
        fused = self._fast
        if fused is None or self._functions or torch.is_grad_enabled() or not fused.fit_decoding():
            return LockstepDecoder(self)
        return StaticDecoder(self, fused)

    @torch.no_grad()
    def branch(
        self, tokens: Int[Tensor, "batch node"], parents: Sequence[int], past: KeyValues
    ) -> Float[Tensor, "batch node d_model"]:
        """Run `final` on a tree of tokens that follow each row of `past`.

        Continuations with the same first tokens share their computation. With fused blocks,
        one pass runs all nodes: the mask lets a node attend to the past, its ancestors and itself,
        and its position is that of its depth. Otherwise one pass runs the nodes of each depth, each
        on a copy of its parent's keys and values.

        Args:
            tokens: The token of each node.
            parents: The index of each node's parent, which comes before it; -1 after the past.
            past: Keys and values of the preceding positions, one row per row of `tokens`.
        """
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        if self._fast is not None and all(map(self._fast.fit, range(self.n_layers))):
            run = self.begin(tokens, past, depths=torch.tensor(depths, device=self.device))
            run.allow_ancestors(parents, self.dtype)
            return self.final_from(run.resid, 0, run)
        batch, n_nodes = tokens.shape
        hidden: Tensor | None = None
        level, stored = [-1], past
        for depth in range(max(depths) + 1):
            nodes = [node for node in range(n_nodes) if depths[node] == depth]
            place = torch.tensor([level.index(parents[node]) for node in nodes], device=self.device)
            # Rows are sorted by row of the past, then by node of the level.
            first = torch.arange(batch, device=self.device)[:, None] * len(level)  # [batch, 1]
            parent_rows = (first + place).flatten()  # [batch * nodes of the level]
            stored = stored.select(parent_rows)
            states, stored = self.extend(tokens[:, nodes].reshape(-1, 1), stored)
            if hidden is None:
                hidden = states.new_empty(batch, n_nodes, states.shape[-1])
            hidden[:, nodes] = states.reshape(batch, len(nodes), -1)
            level = nodes
        assert hidden is not None
        return hidden

    @torch.no_grad()
    def activations(
        self, tokens: Int[Tensor, "batch pos"], *, sites: Sequence[str] = ("resid_pre",)
    ) -> dict[str, Float[Tensor, "layer batch pos ..."]]:
        """Return the activations of all blocks at the given sites, from one forward pass."""
        by_site: dict[str, list[Tensor]] = {site: [] for site in sites}

        def recorder(site: str) -> SiteFunction:
            return lambda activation: by_site[site].append(activation.detach())

        watch = [(layer, site, recorder(site)) for layer in range(self.n_layers) for site in sites]
        with self.hooked(watch):
            self.final(tokens)
        return {site: torch.stack(layers) for site, layers in by_site.items()}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Switch off the gradients of all parameters within the context."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def use_fused_blocks(self, own: OwnPass) -> None:
        """Use the fused blocks from now on, if each agrees with the model's own block.

        Args:
            own: The probe, run through the model's own blocks.
        """
        fused = fused_blocks(self, self._lens, hooked=is_hooked(self.model))
        if fused is None or not all(map(fused.fit, range(self.n_layers))):
            return
        difference = own.fused_difference(fused)
        # A broken block may give NaN, which is not greater than anything.
        if difference <= fused_tolerance(self.dtype):
            self._fast = fused
            return
        _log.warning(
            "%s runs through its own blocks, which is slower: the fused blocks give other results "
            "(relative difference %.2g)",
            model_name(self.model),
            difference,
        )


class _CopiedUnembedding(nn.Module):
    """An unembedding as a module of its own, so that it can be called with other weights."""

    def __init__(self, module: nn.Module, unembed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._unembed = unembed

    def forward(self, hidden: Tensor) -> Tensor:
        return self._unembed(hidden)
