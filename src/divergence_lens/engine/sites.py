"""Sites: the named activations of a block that hooks and patches act on.

Both model classes of TransformerLens call the hook point of a site by the same name within the
block, so one table serves both. `register_site` adds a site of your own.
"""

from dataclasses import dataclass

SITES = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "block_out", "z", "q", "k", "v",
    "pattern",
)  # fmt: skip
"""The library's own sites: [batch, pos, d_model], or [batch, pos, head, d_head] for `z`, `q`, `k`
and `v`, or [batch, pos, head, key] for `pattern`, the weights with which each position attends.

`block_out` is everything that the block adds to the residual. Queries and keys are taken before
the rotary embedding. Keys and values have one head per group of query heads."""

PER_HEAD = ("z", "q", "k", "v", "pattern")
"""Sites with an axis of heads."""

OUTSIDE_HOOKS = ("resid_pre", "resid_post", "block_out")
"""Sites that the engine reads between blocks, without a hook point."""

INNER = ("attn_scores", "mlp_pre", "mlp_pre_linear", "mlp_post")
"""Points inside a block that propagation rules read and change; they are not patched as sites."""


@dataclass(frozen=True)
class _Site:
    """A site that a user registered, and its hook point within a block."""

    name: str
    hook_point: str


_registered: dict[str, _Site] = {}


def register_site(name: str, *, hook_point: str) -> None:
    """Add a site to every engine, including those already built.

    Patching, the gradient methods and `Engine.hooked` accept the name from then on. A model whose
    blocks lack the hook point does not have the site. Registering a name twice replaces its hook
    point.

    Args:
        name: The site's name, for `site=`.
        hook_point: TransformerLens's name of the hook point within a block, for example
            "mlp.hook_post". Its output must be [batch, pos, ...], and a change at one position must
            reach other positions only through the residual stream of its block.

    Raises:
        ValueError: The name belongs to one of the library's own sites.
    """
    if name in SITES:
        raise ValueError(f"{name!r} is one of the library's own sites; register another name")
    _registered[name] = _Site(name, hook_point)


def unregister_site(name: str) -> None:
    """Remove a site that `register_site` added; a name that is not registered is ignored."""
    _registered.pop(name, None)


def registered_sites() -> tuple[str, ...]:
    """Return the names that `register_site` added, in order."""
    return tuple(_registered)


def hook_point_of(site: str) -> str:
    """Return the name within a block of the hook point through which a site passes."""
    if site in _registered:
        return _registered[site].hook_point
    if site in ("mlp_pre", "mlp_pre_linear", "mlp_post"):
        return f"mlp.hook_{site.removeprefix('mlp_')}"
    if site in PER_HEAD or site in INNER:
        return f"attn.hook_{site}"
    return f"hook_{site}"
