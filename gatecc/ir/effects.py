"""Effects: what a rewrite gives up of a model and what it needs, so that nobody has to know its class.

What it does to weights, it asks the editor for (`gatecc.ir.weights`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effects:
    """The default gives up nothing, needs nothing and promises nothing: a loss that is not declared here is an error.

    ``loses_buffers``: tables of the old computation, such as rotary ones, may be read no more. ``loses_parameters``: so
    may what the owner of a site holds, its own parameters or a child's. They stay in the module, where `revert` finds
    them, and get no gradient; modules that gatecc made are never lost, for that would cut off an earlier rewrite.
    ``loses_outputs``: outputs that show the inside of a site, such as attention weights, may be None from now on.
    ``loses_cache``: a token depends on earlier ones in a way that no KV cache holds, so calls with one are refused.

    ``reads_mask``: the edit depends on which keys a query may see. That is proved best in the graph of the whole model,
    so exports write a model with such rewrites from that graph. ``whole_model``: the edit must see the whole model as
    one graph, for it reads an input of the model or a distant value.

    ``same_for_layers``: the edit reads nothing of its layer but the graph, and fills new modules by
    ``edit.module(..., fill=)`` alone; it is then done once for all layers that share a graph. A subclass that adds to a
    rewrite has to promise it for itself.

    ``causal_block``: a causal model stays causal for whole blocks of so many tokens; an output may depend on every
    token of its block.

    ``in_python``: the edit is one of control flow that no graph holds. `Rewrite.install` does it on the model itself,
    and its sites are not captured. With ``reads_sites`` they are: the edit is one of weights alone, `Rewrite.edit_at`
    says which at the sites that were found, and modules keep their own forward.
    """

    loses_buffers: bool = False
    loses_parameters: bool = False
    loses_outputs: bool = False
    loses_cache: bool = False
    reads_mask: bool = False
    whole_model: bool = False
    same_for_layers: bool = False
    causal_block: int = 1
    in_python: bool = False
    reads_sites: bool = False
