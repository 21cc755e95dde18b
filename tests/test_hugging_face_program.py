"""Operations of PyTorch as functions of JAX, each against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch: pip install 'uscale_jax[hf]'")

import torch
from torch.nn import functional

from uscale_jax._hf_program import hf_model


class Config:
    """What stands for a configuration."""


def net(forward):
    """A class with a few parameters, as those of transformers are made: from a configuration."""

    class Net(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            draw = lambda *shape: torch.nn.Parameter(  # noqa: E731
                torch.randn(*shape, generator=generator) * 0.5 + 0.1
            )
            self.table, self.square, self.gain = draw(11, 6), draw(6, 6), draw(6)
            self.wide, self.bias = draw(10, 6), draw(10)
            self.image, self.line = draw(4, 3, 3, 2), draw(4, 6, 3)
            self.register_buffer("mean", torch.linspace(-1, 1, 6))
            self.register_buffer("count", torch.tensor(3))
            self.register_buffer("angles", torch.linspace(0, 2, 6), persistent=False)

        def forward(self, x):
            return forward(self, x)

    return Net


X = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
IDS = np.random.default_rng(0).integers(0, 11, (2, 5)).astype(np.int32)
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 8, 9)).astype(np.float32)


def heads(x, count):
    return x.reshape(2, 5, count, -1).transpose(1, 2)


def attend(m, x, **how):
    q, k, v = functional.linear(x, m.square), functional.linear(x, m.wide[:6]), x @ m.square
    return functional.scaled_dot_product_attention(heads(q, 3), heads(k, 3), heads(v, 3), **how)


def grouped(m, x):
    q, k = heads(functional.linear(x, m.square.repeat(2, 1)), 6), heads(x * m.gain, 3)
    return functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)


def normed(m, x):
    return functional.batch_norm(x.transpose(1, 2), m.mean, m.mean**2, m.gain, m.mean, eps=1e-3)


PROGRAMS = {
    "embedding": (lambda m, x: functional.embedding(x, m.table), IDS),
    "linear": (lambda m, x: functional.linear(x, m.wide, m.bias), X),
    "addmm": (lambda m, x: torch.addmm(m.gain, x[0], m.square, beta=2, alpha=0.5), X),
    "products": (
        lambda m, x: torch.bmm(x @ m.square, x.mT) + torch.einsum("bti,bsi->bts", x, x),
        X,
    ),
    "baddbmm": (lambda m, x: torch.baddbmm(m.square[None, :5, :5], x, x.mT, alpha=0.3), X),
    "cumsum": (lambda m, x: torch.cumsum(x * m.gain, 1), X),
    "attention": (lambda m, x: attend(m, x), X),
    "causal": (lambda m, x: attend(m, x, is_causal=True, scale=0.3), X),
    "mask": (lambda m, x: attend(m, x, attn_mask=torch.eye(5)[None, None] > 0), X),
    "numbers": (lambda m, x: attend(m, x, attn_mask=torch.linspace(0, 3, 25).view(5, 5)), X),
    "groups": (grouped, X),
    "layer norm": (lambda m, x: functional.layer_norm(x, (6,), m.gain, m.mean, 1e-3), X),
    "two axes": (lambda m, x: functional.layer_norm(x * m.gain, (5, 6)), X),
    "rms norm": (lambda m, x: functional.rms_norm(x, (6,), m.gain), X),
    "batch norm": (normed, X),
    "group norm": (lambda m, x: functional.group_norm(x.mT, 2, m.gain, m.mean), X),
    "conv1d": (lambda m, x: functional.conv1d(x.mT, m.line, m.bias[:4], padding=1, stride=2), X),
    "conv2d": (lambda m, x: functional.conv2d(x, m.image, stride=(2, 1), padding=(1, 0)), PIXELS),
    "conv groups": (
        lambda m, x: functional.conv1d(x.mT[:, :4], m.line[:, :2], groups=2, dilation=2),
        X,
    ),
    "gates": (lambda m, x: functional.silu(x * m.gain) * torch.sigmoid(x) + functional.relu(x), X),
    "gelu": (lambda m, x: functional.gelu(x * m.gain) + functional.gelu(x, approximate="tanh"), X),
    "functions": (lambda m, x: (x * m.gain).exp().log().abs().sqrt() + x.tanh() + x.erf(), X),
    "powers": (lambda m, x: (x.abs() * m.gain.abs()) ** 1.5 + x.pow(2).rsqrt() - x**3 / 7, X),
    "sums": (lambda m, x: (x * m.gain).mean(-1, keepdim=True) + x.sum((1, 2))[:, None, None], X),
    "softmax": (lambda m, x: torch.softmax(x * m.gain, -1, dtype=torch.float32), X),
    "where": (lambda m, x: torch.where(x > 0, x * m.gain, x.clamp(-0.5, 0.5)), X),
    "filled": (lambda m, x: (x * m.gain).masked_fill(x < 0, -2.0), X),
    "parts": (
        lambda m, x: torch.cat([*x.chunk(2, -1)[::-1], *(x * m.gain).split([1, 5], 2)], -1),
        X,
    ),
    "places": (
        lambda m, x: (x * m.gain).permute(2, 0, 1)[1:5:2].unsqueeze(1).expand(2, 4, 2, 5),
        X,
    ),
    "stack": (lambda m, x: torch.stack([x[:, 0], (x * m.gain)[:, -1]]).squeeze(0).flatten(1), X),
    "index": (lambda m, x: (x * m.gain)[:, torch.tensor([3, 1])], X),
    "gather": (lambda m, x: torch.gather(x * m.gain, 1, torch.ones(2, 1, 6, dtype=torch.int64)), X),
    "rotary": (lambda m, x: x * m.angles.cos() + torch.cat([-x[..., 3:], x[..., :3]], -1).sin(), X),
    "dtypes": (
        lambda m, x: (x * m.gain).to(torch.float16).float() + x.type_as(m.gain) + m.count,
        X,
    ),
    "one is 1": (lambda m, x: (1 - x * m.gain) * 2 + torch.sub(x, m.gain, alpha=3), X),
}


def state(params, module):
    name = lambda path: ".".join(part.key for part in path)  # noqa: E731
    tensors = module.state_dict()
    get = lambda path, _: jnp.asarray(tensors[name(path)].numpy())  # noqa: E731
    return jax.tree_util.tree_map_with_path(get, params)


@pytest.mark.parametrize("name", PROGRAMS)
def test_operations_are_those_of_pytorch(name):
    forward, x = PROGRAMS[name]
    kind = net(forward)
    module = kind(Config()).eval()
    given = torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x)
    wanted = module(given).detach().numpy()
    model = hf_model(kind, Config(), {"x": x})
    [found] = model.apply(state(model.params, module), jnp.asarray(x))
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    assert np.std(wanted) > 0.05


def test_other_shapes_of_inputs_are_programs_of_their_own():
    kind = net(lambda m, x: functional.linear(x.reshape(x.shape[0], -1, 6), m.square))
    module = kind(Config()).eval()
    model = hf_model(kind, Config(), {"x": X})
    longer = np.random.default_rng(2).standard_normal((3, 7, 6)).astype(np.float32)
    [found] = jax.jit(model.apply)(state(model.params, module), longer)
    wanted = module(torch.from_numpy(longer)).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_what_a_state_is():
    model = hf_model(net(lambda m, x: x * m.mean + m.angles + m.count), Config(), {"x": X})
    assert set(model.params) == {
        "bias", "gain", "image", "line", "mean", "square", "table", "wide",
    }  # fmt: skip
    assert model.others == {"count": ()}
    assert model.shapes == ((2, 5, 6),)


def test_tied_tensors_are_one():
    class Tied(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.embed = torch.nn.Embedding(11, 6)
            self.head = torch.nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = hf_model(Tied, Config(), {"x": IDS})
    assert list(model.params) == ["embed"]
    assert model.tied == {"head.weight": "embed.weight"}
    table = np.random.default_rng(1).standard_normal((11, 6)).astype(np.float32)
    [found] = model.apply({"embed": {"weight": table}}, IDS)
    np.testing.assert_allclose(found, table[IDS] @ table.T, rtol=1e-5, atol=1e-5)


def test_operations_that_are_not_known_are_named():
    with pytest.raises(ValueError, match="operations of PyTorch that are not known here: sinh"):
        hf_model(net(lambda m, x: torch.sinh(x * m.gain)), Config(), {"x": X})


def test_programs_that_depend_on_values_are_refused():
    def forward(m, x):
        return x if x.sum() > 0 else x * m.gain

    with pytest.raises(ValueError, match="PyTorch cannot export Net with inputs x"):
        hf_model(net(forward), Config(), {"x": X})
