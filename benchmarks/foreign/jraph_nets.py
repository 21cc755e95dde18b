"""Graph networks of jraph, whose update functions are layers of Flax."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from benchmarks.zoo.registry import Built, Model, Sizes, built, floats

REQUIRES = ("jraph",)

_SIZES = {"nodes": 6, "pairs": 14, "features": 5, "labels": 3}


class _Network(nn.Module):
    """Two rounds of a graph network with edges, nodes and a global state."""

    sizes: Sizes

    @nn.compact
    def __call__(self, nodes: Any, edges: Any, senders: Any, receivers: Any) -> Any:
        """Return the global state."""
        import jraph

        s = self.sizes
        graph = jraph.GraphsTuple(
            nodes=nodes,
            edges=edges,
            senders=senders,
            receivers=receivers,
            globals=nodes[:1, : s["labels"]],
            n_node=np.array([s["nodes"]]),
            n_edge=np.array([s["pairs"]]),
        )
        for i, out in enumerate((s["globals"], s["labels"])):
            layers = (
                nn.Dense(s["edges"], name=f"edge_{i}"),
                nn.Dense(s["hidden"], name=f"node_{i}"),
                nn.Dense(out, name=f"global_{i}"),
            )
            edge, node, whole = (
                jraph.concatenated_args(lambda x, f=f: nn.relu(f(x))) for f in layers
            )
            graph = jraph.GraphNetwork(edge, node, whole, attention_logit_fn=None)(graph)
        return graph.globals


class _Attention(nn.Module):
    """Two layers of graph attention."""

    sizes: Sizes

    @nn.compact
    def __call__(self, nodes: Any, senders: Any, receivers: Any) -> Any:
        """Return float[nodes, labels]."""
        import jraph

        for i, out in enumerate((self.sizes["hidden"], self.sizes["labels"])):
            query = nn.Dense(out, name=f"query_{i}")
            score = nn.Dense(1, name=f"score_{i}")

            def logits(sent: Any, received: Any, _: Any, score: Any = score) -> Any:
                return nn.leaky_relu(score(jax.numpy.concatenate([sent, received], -1)))

            layer = jraph.GAT(query, logits, nn.elu)
            count = np.array([nodes.shape[0]]), np.array([senders.shape[0]])
            graph = jraph.GraphsTuple(nodes, None, receivers, senders, None, *count)
            nodes = layer(graph).nodes
        return nodes


def _pairs(s: Sizes) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.random.default_rng(0).integers(0, s["nodes"], (2, s["pairs"])))


def _network(s: Sizes) -> Built:
    edges = floats(s["pairs"], s["features"], seed=1)
    return built(_Network(s), floats(s["nodes"], s["features"]), edges, *_pairs(s))


def _attention(s: Sizes) -> Built:
    return built(_Attention(s), floats(s["nodes"], s["features"]), *_pairs(s))


MODELS = (
    Model(
        "jraph GraphNetwork",
        _SIZES | {"edges": 7, "hidden": 9, "globals": 4},
        _network,
        ("edges", "hidden", "globals"),
    ),
    Model("jraph GAT", _SIZES | {"hidden": 7}, _attention, ("hidden",)),
)
