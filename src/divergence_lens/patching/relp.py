"""Other ways back through a model than its gradient: RelP's rules, and the corrections of AtP*."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divergence_lens.engine import Engine, Pass, SiteFunction
from divergence_lens.patching.request import Case

# Nearer to zero than this, the slope of an activation's secant is taken here.
_NEAR_ZERO = 1e-4


@contextmanager
def relevance_rules(engine: Engine) -> Iterator[None]:
    """Backward passes follow the rules of RelP (arXiv 2508.21258) while the context lasts.

    What is computed forwards stays as it is. Backwards, the scale of a norm is a constant
    (LN-rule), attention patterns are constants (AH-rule), an activation function is a
    multiplication by its own ratio of output to input (identity rule), and a product of two
    branches gives each of them half (half rule).

    Raises:
        ValueError: If the model hides its queries, keys or MLP activations.
    """
    functions: list[tuple[int, str, SiteFunction]] = []
    for layer in range(engine.n_layers):
        functions += [(layer, name, Tensor.detach) for name in ("q", "k")]
        if "mlp_out" in engine.sites:
            functions += _mlp_rules(engine, layer)
    with ExitStack() as stack:
        for norm in engine.norms():
            handle = norm.register_forward_hook(_norm_rule)
            stack.callback(handle.remove)
        stack.enter_context(engine.hooked(functions))
        yield


def _norm_rule(norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The same output, with the norm's scale as a constant for the gradient.

    Multiplied by `scale / scale.detach()`, which is 1, an output loses the gradient by its scale.
    """
    centred, bias, eps = Engine.norm_kind(norm)
    x = inputs[0].float()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    ratio = (scale / scale.detach()).to(output.dtype)
    scaled = output.detach() if bias is None else output.detach() - bias
    shown: Tensor = output + scaled * (ratio - 1)  # added, so that not even a rounding changes
    return shown


def _mlp_rules(engine: Engine, layer: int) -> list[tuple[int, str, SiteFunction]]:
    function, gated = engine.activation(layer)
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor], None]:
        def keep(activation: Tensor) -> None:
            kept[name] = activation

        return keep

    def post(activation: Tensor) -> Tensor:
        x = kept.pop("pre")
        safe = torch.where(x.abs() < _NEAR_ZERO, _NEAR_ZERO, x).detach()
        path = x * (function(safe) / safe)
        if gated:
            other = kept.pop("pre_linear")
            path = (path * other.detach() + path.detach() * other) / 2
        return activation.detach() + (path - path.detach())

    found: list[tuple[int, str, SiteFunction]] = [(layer, "mlp_pre", keeper("pre"))]
    if gated:
        found.append((layer, "mlp_pre_linear", keeper("pre_linear")))
    return [*found, (layer, "mlp_post", post)]


class QueryKey:
    """The QK correction of AtP* (arXiv 2403.00745), for sites `q` and `k`.

    A gradient through a saturated softmax is nearly zero, whatever the attention would do. So the
    attention is computed again with the query or key in place, and only what follows it is taken
    as linear: the effect is the gradient of `z` times the exact change of `z`.
    """

    def __init__(self, case: Case, site: str, start: Callable[[], Pass], first: int) -> None:
        self._case, self._site, self._start, self._first = case, site, start, first

    @torch.no_grad()
    def contraction(
        self, layer: int
    ) -> Callable[[Float[Tensor, "batch pos head d_head"]], Float[Tensor, "batch pos heads"]]:
        """From the gradient of `z` of one layer to the values of its queries or keys."""
        base, patched = self._attention(layer, patched=False), self._attention(layer, patched=True)
        if self._site == "q":  # the query of one position reaches the z of that position only
            change = patched["z"] - base["z"]
            return lambda gradient: (gradient.float() * change).sum(-1)
        weight = self._moved(base, patched)
        z, values = base["z"], base["v"]
        groups = z.shape[2] // values.shape[2]
        values = values.repeat_interleave(groups, dim=2)

        def contract(gradient: Tensor) -> Tensor:
            gradient = gradient.float()
            to_values = torch.einsum("bihd,bjhd->bhij", gradient, values)
            to_z = torch.einsum("bihd,bihd->bhi", gradient, z)
            found = (weight * (to_values - to_z[..., None])).sum(2)  # [batch, head, key position]
            summed: Tensor = found.unflatten(1, (-1, groups)).sum(2)
            return summed.movedim(1, -1)

        return contract

    def _moved(
        self, base: dict[str, Tensor], patched: dict[str, Tensor]
    ) -> Float[Tensor, "batch head query key"]:
        """How far the new key j draws z of query i towards its value: z moves by w (v_j - z_i).

        With only score s_j changed to s_j', and R the sum of e^s over all other keys,
        w = (e^s_j' - e^s_j) / (R + e^s_j').
        """
        scores, changed = base["attn_scores"].double(), patched["attn_scores"].double()
        total = scores.logsumexp(-1, keepdim=True)
        old, new = (scores - total).exp(), (changed - total).clamp(max=300.0).exp()
        # Where one key has all the weight, 1 - weight is lost to rounding: add up the others.
        largest = scores.argmax(-1, keepdim=True)
        others = scores.scatter(-1, largest, -torch.inf).logsumexp(-1, keepdim=True) - total
        rest = (1 - old).scatter(-1, largest, others.exp())
        moved = torch.where(old + new > 0, (new - old) / (rest + new), 0.0)
        return moved[..., self._first :].float()

    def _attention(self, layer: int, *, patched: bool) -> dict[str, Tensor]:
        """What one block's attention computes at the positions that are run again."""
        case, first = self._case, self._first
        found: dict[str, Tensor] = {}

        def keeper(name: str) -> Callable[[Tensor], None]:
            def keep(activation: Tensor) -> None:
                found[name] = activation.float()

            return keep

        names = ("z",) if self._site == "q" else ("z", "v", "attn_scores", "pattern")
        functions: list[tuple[int, str, SiteFunction]] = [(layer, n, keeper(n)) for n in names]
        if patched:
            new, differs = (
                case.new(self._site, layer)[:, first:],
                case.chunk.differs[:, first:, None, None],
            )
            functions.append((layer, self._site, lambda old: torch.where(differs, new, old)))
        with case.engine.hooked(functions):
            resid = case.base.resid[layer][:, first:]
            rows = torch.arange(len(resid), device=resid.device)
            case.engine.block(layer, resid, self._start(), rows=rows)
        if "pattern" in found and not patched:
            _check_softmax(found)
        return found


def _check_softmax(found: dict[str, Tensor]) -> None:
    if not torch.allclose(found["attn_scores"].softmax(-1), found["pattern"], atol=0.02):
        raise ValueError(
            "the attention of this model is not the softmax of the scores that it shows; "
            'use method="graddrop" for its keys, which needs no scores'
        )
