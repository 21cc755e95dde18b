"""Change the scale of a model and of its learning rate together, without losing what it learned.

>>> import jax.numpy as jnp, optax
>>> import uscale_jax as us
>>> params = {"kernel": jnp.array([[1.0, -2.0, 3.0]])}
>>> us.scale_params(params, 0.5)["kernel"]
Array([[ 0.5, -1. ,  1.5]], dtype=float32)
>>> tx = optax.chain(optax.adam(1e-3), us.unit_scale_lr(0.5))  # learning rate α/k = 2α
"""

from uscale_jax import hf as hf
from uscale_jax._axes import Axes as Axes
from uscale_jax._axes import Axis as Axis
from uscale_jax._axes import Concatenation as Concatenation
from uscale_jax._axes import Dimension as Dimension
from uscale_jax._axes import trace_axes as trace_axes
from uscale_jax._budget import Budget as Budget
from uscale_jax._budget import BudgetAxis as BudgetAxis
from uscale_jax._budget import budget as budget
from uscale_jax._chain_order import UnitScaleOrderWarning as UnitScaleOrderWarning
from uscale_jax._checkpoint import resize_checkpoint as resize_checkpoint
from uscale_jax._clip import clip_by_global_norm as clip_by_global_norm
from uscale_jax._compensate import compensate as compensate
from uscale_jax._coordinate_report import CoordinateCheck as CoordinateCheck
from uscale_jax._coordinates import Width as Width
from uscale_jax._coordinates import coordinate_check as coordinate_check
from uscale_jax._distill import distillation_loss as distillation_loss
from uscale_jax._effective import EffectiveScale as EffectiveScale
from uscale_jax._effective import Ratios as Ratios
from uscale_jax._effective import effective_lr_scale as effective_lr_scale
from uscale_jax._exponents import Exponents as Exponents
from uscale_jax._exponents import GrowthExponents as GrowthExponents
from uscale_jax._exponents import Obstacle as Obstacle
from uscale_jax._exponents import Symmetry as Symmetry
from uscale_jax._exponents import TracedExponents as TracedExponents
from uscale_jax._exponents import trace_exponents as trace_exponents
from uscale_jax._frame import UnitScaleFrameWarning as UnitScaleFrameWarning
from uscale_jax._frame import scale_optimizer as scale_optimizer
from uscale_jax._grow import grow as grow
from uscale_jax._homogeneous import homogeneous_exponents as homogeneous_exponents
from uscale_jax._importance import Importance as Importance
from uscale_jax._importance import importance as importance
from uscale_jax._learning_rate import UnitScaleState as UnitScaleState
from uscale_jax._learning_rate import unit_scale_lr as unit_scale_lr
from uscale_jax._plan import LeafPlan as LeafPlan
from uscale_jax._plan import Plan as Plan
from uscale_jax._plan import PlanAxis as PlanAxis
from uscale_jax._planning import plan as plan
from uscale_jax._replace import with_dot_general as with_dot_general
from uscale_jax._select import select as select
from uscale_jax._shrink import UnitScaleShrinkWarning as UnitScaleShrinkWarning
from uscale_jax._shrink import shrink as shrink
from uscale_jax._state import resize_state as resize_state
from uscale_jax._track import Tracked as Tracked
from uscale_jax._track import track_scales as track_scales
from uscale_jax._track_numbers import Sizes as Sizes
from uscale_jax._track_report import Scales as Scales
from uscale_jax._track_rows import TrackedValue as TrackedValue
from uscale_jax._transfer import transfer as transfer
from uscale_jax._transfer_result import LeafTransfer as LeafTransfer
from uscale_jax._transfer_result import Transfer as Transfer
from uscale_jax._unit_result import UnitScaled as UnitScaled
from uscale_jax._unit_scale import unit_scale as unit_scale
from uscale_jax._values import scale_params as scale_params
from uscale_jax._verify import Verification as Verification
from uscale_jax._verify import verify as verify
from uscale_jax.numerics._fp8 import fp8_dot_general as fp8_dot_general
from uscale_jax.numerics._simulate import simulate_format as simulate_format

__version__ = "0.1.0"
