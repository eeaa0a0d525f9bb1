"""Functions on the activations of sites, and the parts of a block that propagation rules change."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from divergence_lens.engine.sites import (
    INNER,
    OUTSIDE_HOOKS,
    PER_HEAD,
    SITES,
    registered_sites,
)
from divergence_lens.models import LensModel, Model

SiteFunction = Callable[[Tensor], Tensor | None]
"""Takes a site's activation and returns its replacement, or None to leave it."""


class SiteHooks(ABC):
    """The sites of a model, and hooks on them; the part of `Engine` that runs nothing."""

    model: Model
    n_layers: int
    n_heads: int
    d_head: int
    _lens: LensModel
    _absent: set[str]
    _functions: dict[tuple[int, str], list[SiteFunction]]
    _block_input: Tensor | None

    @abstractmethod
    def _site_module(self, layer: int, site: str) -> nn.Module:
        """Return the hook point through which `site` of block `layer` passes."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The library's and the registered sites that this model has."""
        own = tuple(site for site in SITES if self._has_site(site))
        return own + tuple(site for site in registered_sites() if self._has_hook_point(site))

    def _has_site(self, site: str) -> bool:
        if site == "pattern" and not self._reads_patterns:
            return False
        return site in SITES and site not in self._absent

    @property
    def _reads_patterns(self) -> bool:
        """Whether the attention computes with the pattern that its hook point returns."""
        return True

    def _has_hook_point(self, site: str) -> bool:
        try:
            self._site_module(0, site)
        except (AttributeError, KeyError):
            return False
        return True

    @property
    def n_kv_heads(self) -> int:
        """The number of key and value heads, fewer than `n_heads` where queries are grouped."""
        return getattr(self._lens.cfg, "n_key_value_heads", None) or self.n_heads

    def site_heads(self, site: str) -> int:
        """Return the number of heads of `site`; 0 if it has no axis of heads."""
        if site not in PER_HEAD:
            return 0
        return self.n_kv_heads if site in ("k", "v") else self.n_heads

    @contextmanager
    def hooked(self, functions: Sequence[tuple[int, str, SiteFunction]]) -> Iterator[None]:
        """Call functions on the activations of sites within the context.

        Args:
            functions: (layer, site, function). A function gets the activation, [batch, pos,
                d_model] or, per head, [batch, pos, head, d_head] (for `pattern`, [batch, pos, head,
                key]), and returns its replacement, or None to leave it. Replacing `resid_mid`
                changes the residual itself, not only what the MLP reads.

        Raises:
            ValueError: The model has no such site or layer.
        """
        handles: list[Any] = []
        added: list[tuple[tuple[int, str], SiteFunction]] = []
        try:
            for layer, site, function in functions:
                self._check_site(layer, site)
                if site in OUTSIDE_HOOKS:
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

    def check_layer(self, layer: int) -> None:
        """Raise if the model does not have the block.

        Raises:
            ValueError: `layer` is out of range.
        """
        if not 0 <= layer < self.n_layers:
            raise ValueError(
                f"layer {layer} is out of range; the model has 0 to {self.n_layers - 1}"
            )

    def _check_site(self, layer: int, site: str) -> None:
        self.check_layer(layer)
        if not self._has_site(site) and site not in (*INNER, *self.sites):
            reason = f"sites are {', '.join(self.sites)}"
            if site == "pattern":
                reason = "its attention does not read the pattern back from the hook point"
            elif site in SITES:
                reason = "its attention and MLP read the same residual, so there is none between"
            raise ValueError(f"the model has no site {site!r}: {reason}")

    def _apply(self, layer: int, site: str, activation: Tensor) -> Tensor:
        for function in self._functions.get((layer, site), ()):
            changed = function(activation)
            activation = activation if changed is None else changed
        return activation

    def _hook(self, site: str, function: SiteFunction) -> Callable[..., Tensor | None]:
        # The hook point of `resid_mid` only feeds the MLP in some classes. resid_mid =
        # resid_pre + attn_out, so a change of attn_out changes the residual itself.
        def mid(_module: nn.Module, _inputs: Any, attn_out: Tensor) -> Tensor | None:
            resid = self._block_input
            changed = function(attn_out if resid is None else resid + attn_out)
            return changed if changed is None or resid is None else changed - resid

        def heads(_module: nn.Module, _inputs: Any, z: Tensor) -> Tensor | None:
            changed = function(
                z.reshape(*z.shape[:2], -1, self.d_head)
            )  # [batch, pos, head, d_head]
            return None if changed is None else changed.reshape(z.shape)

        def pattern(_module: nn.Module, _inputs: Any, weights: Tensor) -> Tensor | None:
            changed = function(weights.transpose(1, 2))  # [batch, pos, head, key]
            return None if changed is None else changed.transpose(1, 2)

        def mlp(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor | None:
            resid = self._block_input
            if resid is None or out.ndim == resid.ndim:
                return function(out)
            changed = function(out.view(resid.shape))  # OPT's MLP writes [batch * pos, d_model]
            return None if changed is None else changed.reshape(out.shape)

        def plain(_module: nn.Module, _inputs: Any, activation: Tensor) -> Tensor | None:
            return function(activation)

        if site == "pattern":
            return pattern
        if site in PER_HEAD:
            return heads
        return {"resid_mid": mid, "mlp_out": mlp}.get(site, plain)

    def norms(self) -> list[nn.Module]:
        """Return all norms of the model, including the final one."""
        return [
            module
            for module in self.model.modules()
            if hasattr(module, "hook_scale") and hasattr(module, "hook_normalized")
        ]

    @staticmethod
    def norm_kind(norm: nn.Module) -> tuple[bool, Tensor | None, float]:
        """Return whether a norm subtracts the mean, its bias if it has one, and its epsilon."""
        inner: Any = getattr(norm, "original_component", norm)
        rms = getattr(norm, "uses_rms_norm", "RMS" in type(norm).__name__)
        bias = getattr(inner, "bias", getattr(inner, "b", None))
        for name in ("eps", "variance_epsilon"):
            if hasattr(inner, name):
                return not rms, bias, float(getattr(inner, name))
        raise ValueError(f"the norm {type(inner).__name__} has no known epsilon attribute")

    def activation(self, layer: int) -> tuple[Callable[[Tensor], Tensor], bool]:
        """Return the MLP's activation function, and whether it gates a second branch.

        Raises:
            ValueError: The MLP is a mixture of experts, or lacks hook points for its parts.
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
                f"the MLP {type(inner).__name__} has no hook points for its activations"
            ) from error
        try:
            self._site_module(layer, "mlp_pre_linear")
        except (AttributeError, KeyError):
            return function, False
        return function, True
