"""Unit-scaled operations: every tensor starts at scale one, forward and backward.

Functions on arrays.  Of inputs, weights and incoming gradients that are independent, of mean 0 and
variance 1, each gives an output and gradients of scale one, by constants known before training;
with a ``constraint`` (the default), by one constant for what must be one.  So float16 and float8
need no loss scaling at first, and models of every width start alike.

Constants come from shapes while tracing: under ``jax.vmap`` those of one example, in
``jax.shard_map`` those of one shard.  Gradients are deliberately not derivatives: reverse mode
only, unless under :func:`true_gradients`.

>>> import jax, jax.numpy as jnp
>>> from uscale_jax import numerics as un
>>> x, w = jax.random.normal(jax.random.key(0), (2, 256, 256))
>>> y = un.gelu(un.linear(x, w))
>>> print(f"{jnp.std(y):.1f}")
1.0
"""

from uscale_jax.numerics._activations import ActivationScales as ActivationScales
from uscale_jax.numerics._activations import activation as activation
from uscale_jax.numerics._activations import activation_scales as activation_scales
from uscale_jax.numerics._activations import gelu as gelu
from uscale_jax.numerics._activations import glu as glu
from uscale_jax.numerics._activations import relu as relu
from uscale_jax.numerics._activations import sigmoid as sigmoid
from uscale_jax.numerics._activations import silu as silu
from uscale_jax.numerics._activations import silu_glu as silu_glu
from uscale_jax.numerics._activations import tanh as tanh
from uscale_jax.numerics._attention import attention as attention
from uscale_jax.numerics._attention import attention_scale as attention_scale
from uscale_jax.numerics._attention import softmax as softmax
from uscale_jax.numerics._constraints import Constraint as Constraint
from uscale_jax.numerics._constraints import GradientMatch as GradientMatch
from uscale_jax.numerics._constraints import constrained as constrained
from uscale_jax.numerics._constraints import verify_gradients as verify_gradients
from uscale_jax.numerics._convolution import conv as conv
from uscale_jax.numerics._formats import Format as Format
from uscale_jax.numerics._formats import number_format as number_format
from uscale_jax.numerics._formats import quantized as quantized
from uscale_jax.numerics._formats import saturating_cast as saturating_cast
from uscale_jax.numerics._fp8 import Fp8DotGeneral as Fp8DotGeneral
from uscale_jax.numerics._fp8_unit import UnitFp8DotGeneral as UnitFp8DotGeneral
from uscale_jax.numerics._fp8_unit import fp8_linear as fp8_linear
from uscale_jax.numerics._fp8_unit import unit_fp8_dot_general as unit_fp8_dot_general
from uscale_jax.numerics._layers import dropout as dropout
from uscale_jax.numerics._layers import embedding as embedding
from uscale_jax.numerics._layers import layer_norm as layer_norm
from uscale_jax.numerics._layers import rms_norm as rms_norm
from uscale_jax.numerics._losses import cross_entropy as cross_entropy
from uscale_jax.numerics._losses import mse as mse
from uscale_jax.numerics._products import dot_general as dot_general
from uscale_jax.numerics._products import einsum as einsum
from uscale_jax.numerics._products import linear as linear
from uscale_jax.numerics._products import linear_readout as linear_readout
from uscale_jax.numerics._products import matmul as matmul
from uscale_jax.numerics._residual import add as add
from uscale_jax.numerics._residual import residual_add as residual_add
from uscale_jax.numerics._residual import residual_split as residual_split
from uscale_jax.numerics._residual import residual_taus as residual_taus
from uscale_jax.numerics._scale import scale_bwd as scale_bwd
from uscale_jax.numerics._scale import scale_fwd as scale_fwd
from uscale_jax.numerics._scale import scaled as scaled
from uscale_jax.numerics._scale import true_gradients as true_gradients
