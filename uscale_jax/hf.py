"""Local directories of Hugging Face models: planned, grown, shrunk and loaded.

Needs PyTorch and transformers: ``pip install 'uscale_jax[hf]'``.
"""

from uscale_jax._hf import ModelPlan as ModelPlan
from uscale_jax._hf import grow as grow
from uscale_jax._hf import load as load
from uscale_jax._hf import plan as plan
from uscale_jax._hf import shrink as shrink
