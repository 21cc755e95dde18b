"""Vision models of jax-image-models."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.foreign.nnx_modules import nnx_built
from benchmarks.zoo.registry import Built, Model, Sizes, floats

REQUIRES = ("jimm",)

_SIZES = {"batch": 2, "side": 16, "colours": 3, "labels": 5, "heads": 4, "head_dim": 6, "inner": 21}


def _options(s: Sizes) -> dict[str, Any]:
    from flax import nnx

    return {
        "in_channels": s["colours"],
        "img_size": s["side"],
        "patch_size": 8,
        "num_layers": 2,
        "num_heads": s["heads"],
        "mlp_dim": s["inner"],
        "hidden_size": s["heads"] * s["head_dim"],
        "rngs": nnx.Rngs(0),
        "dtype": None,
    }


def _called(module: Any, x: Any) -> Any:
    """Return ``module(x)`` on a mesh of one device, without which it refuses to reshard."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"), axis_types=kinds)
    with jax.sharding.use_abstract_mesh(mesh):
        return module(x)


def _image(s: Sizes) -> Any:
    return floats(s["batch"], s["side"], s["side"], s["colours"])


def _vit(s: Sizes) -> Built:
    import jimm
    from flax import nnx

    with nnx.use_eager_sharding(False):
        net = jimm.VisionTransformer(num_classes=s["labels"], dropout_rate=0.0, **_options(s))
    return nnx_built(net, _called, _image(s))


def _dino(version: str) -> Any:
    def build(s: Sizes) -> Built:
        import jimm
        from flax import nnx

        with nnx.use_eager_sharding(False):
            net = getattr(jimm, f"DINOv{version}Model")(**_options(s))
        return nnx_built(net, lambda m, x: _called(m, x).mean(-1), _image(s))

    return build


_FREE = ("heads", "head_dim", "inner")

MODELS = (
    Model("jimm VisionTransformer", _SIZES, _vit, _FREE, {"labels": "output"}),
    Model("jimm DINOv2", _SIZES, _dino("2"), _FREE),
    Model("jimm DINOv3", _SIZES | {"head_dim": 8}, _dino("3"), ("heads", "inner")),
)
