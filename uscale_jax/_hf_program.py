"""A model of Hugging Face's transformers as a function of JAX and the shapes of its tensors.

``torch.export`` gives the program of the PyTorch module, in which every operation is one of
PyTorch's own; each is run by a function of JAX (``_hf_aten``).  What depends on neither tensors of
the state nor inputs (positions, masks, rotary tables) is computed by PyTorch.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax._hf_aten import OPERATIONS, dtype_of
from uscale_jax._types import Apply, Key, Tree


class HFModel(NamedTuple):
    """A model as a function, and what its state is."""

    apply: Apply
    """``apply(params, *inputs)`` returns the tree of outputs as a list."""
    params: Tree
    """Shapes of its floating tensors by the parts of their names, tied ones once."""
    tied: Mapping[str, str]
    """By every further name of a tied tensor, the name that it has in ``params``."""
    others: Mapping[str, tuple[int, ...]]
    """The shapes of the tensors of its state that are no floating ones, by name."""
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of its outputs."""
    renamed: Callable[[str], str]
    """What the model calls a tensor, by its name in files."""


def installed(name: str) -> Any:
    """Returns a module.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"planning for a model directory runs its PyTorch program, and {error.name!r} is not "
            "installed. Fix: pip install 'uscale_jax[hf]' (PyTorch for CPUs is enough)."
        ) from error


def key_of(name: str) -> Key:
    """Returns where a tensor stands in the tree of parameters."""
    return tuple(name.split("."))


def hf_model(kind: Any, config: Any, inputs: Mapping[str, Any]) -> HFModel:
    """Returns the model of a class and a configuration; no parameter is allocated.

    Args:
      kind: a class of transformers, such as ``LlamaForCausalLM``.
      config: its configuration.
      inputs: arrays by the names of its arguments.

    Raises:
      ValueError: PyTorch cannot export it, or it has operations that are not known here.
    """
    module = _built(kind, config)
    names = _names(module)
    run = _Function(module, names, tuple(inputs))
    shapes = _nested({name: _shape(tensor) for name, tensor in names.states.items()})
    outputs = jax.eval_shape(run, shapes, *inputs.values())
    return HFModel(
        apply=run,
        params=shapes,
        tied=names.tied,
        others=names.others,
        shapes=tuple(tuple(x.shape) for x in jax.tree.leaves(outputs)),
        renamed=_renaming(module),
    )


def _renaming(module: Any) -> Callable[[str], str]:
    """How names in files become the model's, where transformers (from 5 on) has changed these."""
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
        steps = mapping.get_model_conversion_mapping(module)
    except (ImportError, AttributeError):  # an earlier transformers, or no model of it
        return lambda name: name
    plain = [step for step in steps if isinstance(step, loading.WeightRenaming)]
    return lambda name: str(loading.apply_renamings(name, plain))


class _Names(NamedTuple):
    """The tensors of a module's state."""

    states: dict[str, Any]
    tied: dict[str, str]
    others: dict[str, tuple[int, ...]]


def _built(kind: Any, config: Any) -> Any:
    """The module; its parameters take no memory, its buffers are as they are."""
    torch = installed("torch")

    def without_storage(module: Any, name: str, parameter: Any) -> Any:
        del module, name
        if parameter is None or parameter.device.type == "meta":
            return parameter
        return torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    register = torch.nn.modules.module.register_module_parameter_registration_hook
    hook = register(without_storage)
    try:
        module = kind(config).eval()
    finally:
        hook.remove()
    _place(module)
    return module


def _place(module: Any) -> None:
    """Makes parameters one number each, seen at every place: on the device of inputs and buffers.

    Without a place, on PyTorch's device "meta", programs that combine them with either would fail.
    """
    torch = installed("torch")
    placed: dict[int, Any] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and id(old) not in placed:
                one = torch.zeros((), dtype=old.dtype).expand(old.shape)
                # With the old one, whose address Python might else give to another.
                placed[id(old)] = torch.nn.Parameter(one, requires_grad=False), old
            if old is not None:
                part._parameters[name] = placed[id(old)][0]


def _names(module: Any) -> _Names:
    kept = set(module.state_dict(keep_vars=True))
    tensors = dict(module.named_parameters(remove_duplicate=False))
    tensors |= {n: x for n, x in module.named_buffers(remove_duplicate=False) if n in kept}
    first: dict[int, str] = {}
    names = _Names({}, {}, {})
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            names.others[name] = tuple(tensor.shape)
        elif (owner := first.setdefault(id(tensor), name)) == name:
            names.states[name] = tensor
        else:
            names.tied[name] = owner
    return names


def _nested(values: Mapping[str, Any]) -> Tree:
    root: dict[str, Any] = {}
    for name, value in values.items():
        *outer, last = key_of(name)
        inner = root
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return root


def _shape(tensor: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(tensor.shape), dtype_of(tensor.dtype))


def _tensor(x: Any) -> Any:
    """A tensor to export a program with, of which only the shape and the dtype count."""
    kind = np.int64 if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype
    return installed("torch").from_numpy(np.ones(x.shape, kind))


def _exported(module: Any, inputs: Mapping[str, Any]) -> Any:
    torch = installed("torch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch's about itself
        try:
            return torch.export.export(module, (), dict(inputs)).run_decompositions({})
        except Exception as error:
            raise ValueError(
                f"PyTorch cannot export {type(module).__name__} with inputs "
                f"{', '.join(inputs)}: {error}. Expected: a model whose program does not depend on "
                "values. Fix: pass other `inputs`."
            ) from error


class _Function:
    """A module as a function of parameters and inputs, exported for every shape of inputs."""

    def __init__(self, module: Any, names: _Names, inputs: Sequence[str]) -> None:
        self.module, self.names, self.inputs = module, names, inputs
        self.programs: dict[Any, _Program] = {}

    def __call__(self, params: Tree, *inputs: Any) -> list[Any]:
        """Return the outputs."""
        shapes = tuple((tuple(x.shape), str(x.dtype)) for x in inputs)
        if shapes not in self.programs:
            given = {n: _tensor(x) for n, x in zip(self.inputs, inputs, strict=True)}
            exported = _exported(self.module, given)
            self.programs[shapes] = _Program(exported, self.names, self.inputs)
        return self.programs[shapes](params, *inputs)


class _Program:
    """An exported program as a function of parameters and inputs."""

    def __init__(self, exported: Any, names: _Names, inputs: Sequence[str]) -> None:
        self.inputs = inputs
        self.states = _placeholders(exported, names)
        self.outputs = _outputs(exported)
        self.nodes = list(exported.graph.nodes)
        self.computed = _computed(self.nodes, {*self.states, *inputs})
        _check_known(self.computed)
        self.fixed = self._constants(exported)

    def __call__(self, params: Tree, *inputs: Any) -> list[Any]:
        """Return the outputs."""
        given = dict(zip(self.inputs, inputs, strict=True))
        values = dict(self.fixed)
        for node in self.nodes:
            if node.name in self.states:
                values[node] = _at(params, self.states[node.name])
            elif node.name in given:
                values[node] = jnp.asarray(given[node.name])
        with _semantics():
            for node in self.computed:
                values[node] = _applied(node, values)
        return [_array(x) for x in self._returned(values)]

    def _returned(self, values: Mapping[Any, Any]) -> Iterator[Any]:
        by_name = {node.name: value for node, value in values.items()}
        return (by_name[name] for name in self.outputs)

    def _constants(self, exported: Any) -> dict[Any, Any]:
        """What is computed from buffers and from nothing, by PyTorch."""
        torch = installed("torch")
        held = {**exported.state_dict, **exported.constants}
        targets = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs}
        targets = {name: x for name, x in targets.items() if name not in self.states}
        dynamic = {*self.computed}
        values: dict[Any, Any] = {}
        with torch.no_grad():
            for node in self.nodes:
                if node.op == "placeholder" and targets.get(node.name) in held:
                    values[node] = held[targets[node.name]]
                elif node.op == "call_function" and node not in dynamic:
                    args, kwargs = _looked_up((node.args, node.kwargs), values)
                    values[node] = node.target(*args, **kwargs)
        return {node: _arrays(value) for node, value in values.items()}


def _placeholders(exported: Any, names: _Names) -> dict[str, Key]:
    """By the name of a node that stands for a parameter, where that is in the tree."""
    found = {}
    for spec in exported.graph_signature.input_specs:
        owner = names.tied.get(spec.target, spec.target)
        if owner in names.states:
            found[spec.arg.name] = key_of(owner)
    return found


def _outputs(exported: Any) -> list[str]:
    specs = exported.graph_signature.output_specs
    return [s.arg.name for s in specs if s.kind.name == "USER_OUTPUT" and hasattr(s.arg, "name")]


def _computed(nodes: Sequence[Any], sources: set[str]) -> list[Any]:
    """The operations whose results depend on parameters or inputs, in order."""
    dynamic = {node for node in nodes if node.name in sources}
    for node in nodes:
        if node.op == "call_function" and not dynamic.isdisjoint(node.all_input_nodes):
            dynamic.add(node)
    return [node for node in nodes if node in dynamic and node.op == "call_function"]


def _check_known(nodes: Sequence[Any]) -> None:
    if unknown := sorted({_operation(node) for node in nodes} - set(OPERATIONS)):
        raise ValueError(
            f"the model's program has operations of PyTorch that are not known here: "
            f"{', '.join(unknown)}. Expected: those of language and vision models (linear, "
            "attention, norms, convolutions, ...). Fix: report the model's class."
        )


def _applied(node: Any, values: Mapping[Any, Any]) -> Any:
    args, kwargs = _looked_up((node.args, node.kwargs), values)
    with jax.named_scope(_module_of(node)):
        return OPERATIONS[_operation(node)](*args, **kwargs)


def _looked_up(tree: Any, values: Mapping[Any, Any]) -> Any:
    """Arguments of a node, with values for nodes."""
    if isinstance(tree, dict):
        return {name: _looked_up(x, values) for name, x in tree.items()}
    if isinstance(tree, list | tuple):  # of kinds of PyTorch's own
        return [_looked_up(x, values) for x in tree]
    return values[tree] if type(tree).__name__ == "Node" else tree


def _arrays(x: Any) -> Any:
    return [*map(_arrays, x)] if isinstance(x, list | tuple) else _array(x)


def _array(x: Any) -> Any:
    """An array of what may be a tensor."""
    if not hasattr(x, "detach"):
        return x
    array = x.detach().numpy()
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))


def _at(tree: Tree, key: Key) -> Any:
    for part in key:
        tree = tree[part]
    return tree


def _operation(node: Any) -> str:
    """The name of a node's operation, without namespace and overload: ``add``."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(packet.__name__)


def _module_of(node: Any) -> str:
    """Where in the model the node is: ``model.layers.0.mlp``."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    return str(stack[-1][0] if stack else "") or "model"


@contextmanager
def _semantics() -> Iterator[None]:
    """PyTorch's rules for dtypes and ranks, whatever the user's are."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
