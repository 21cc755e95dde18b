"""From jaxprs to one flat program: calls inlined, loops and branches turned into equations.

Two jaxprs are walked in step.  They must be the same text up to sizes; the first difference is
refused with the lines it comes from.

Loops become four equations that every analysis reads like any other:

* ``loop_enter(init) -> carry`` and ``loop_close(carry, next, ...) -> last`` for what is carried,
* ``loop_slice(xs) -> x`` and ``loop_stack(y) -> ys`` for what is scanned over.

``cond`` becomes ``select_n(index, *cases)`` over its inlined branches, ``shard_map`` becomes
``shard`` and ``unshard`` around its inlined body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from uscale_jax.trace import folding
from uscale_jax.trace.compare import different, same_kinds, same_params, structure_error
from uscale_jax.trace.program import Equation, Program, Value, constant, value_of, without_dead_code
from uscale_jax.trace.rewrite import REWRITES
from uscale_jax.trace.source import Source

Env = dict[Any, Value]


def program(closed: Sequence[ClosedJaxpr]) -> Program:
    """Returns the flat program of one jaxpr, or of several that differ in sizes only.

    Raises:
      ValueError: the jaxprs differ in more than sizes.
    """
    builder = _Builder()
    first = [c.jaxpr for c in closed]
    inputs = [value_of(v.aval for v in vs) for vs in zip(*(j.invars for j in first), strict=True)]
    outputs = builder.closed(closed, inputs, None)
    flat = Program(
        tuple(inputs), tuple(builder.captured), builder.equations, tuple(outputs), len(closed)
    )
    return without_dead_code(flat)


def _mutable(name: str, source: Source) -> ValueError:
    return ValueError(
        f"`{name}` works on a mutable array at {source}. Expected: a pure function of parameters "
        "and inputs, whose arrays do not change. Fix: compute new arrays, `x.at[i].set(y)` in "
        "place of `ref[i] = y`."
    )


class _Builder:
    """Collects equations while it walks jaxprs."""

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.captured: list[Value] = []
        self.constants: dict[tuple[int, ...], Value] = {}
        self.enters: dict[int, Equation] = {}
        self.visits = 0
        self.regions, self.region = 0, 0

    def closed(
        self,
        closed: Sequence[ClosedJaxpr],
        args: Sequence[Value],
        source: Source | None,
        called: str | None = None,
    ) -> list[Value]:
        """Inlines jaxprs with constants on ``args``; returns their outputs."""
        jaxprs = [c.jaxpr for c in closed]
        if not all(same_kinds(jaxprs[0].constvars, j.constvars) for j in jaxprs):
            raise different(["  the functions close over different arrays"])
        consts = [
            self._captured(arrays, [v.aval for v in vs])
            for arrays, vs in zip(
                zip(*(c.consts for c in closed), strict=True),
                zip(*(j.constvars for j in jaxprs), strict=True),
                strict=True,
            )
        ]
        return self.jaxprs(jaxprs, consts, args, source, called)

    def inside(
        self, closed: Sequence[ClosedJaxpr], args: Sequence[Value], source: Source
    ) -> list[Value]:
        """Inlines the body of a loop, or a branch: a region of its own."""
        outer, self.regions = self.region, self.regions + 1
        self.region = self.regions
        outputs = self.closed(closed, args, source)
        self.region = outer
        return outputs

    def _captured(self, arrays: Sequence[Any], avals: Sequence[Any]) -> Value:
        key = tuple(map(id, arrays))
        if key not in self.constants:
            self.constants[key] = constant(arrays, avals)
            self.captured.append(self.constants[key])
        return self.constants[key]

    def jaxprs(
        self,
        jaxprs: Sequence[Jaxpr],
        consts: Sequence[Value],
        args: Sequence[Value],
        source: Source | None,
        called: str | None = None,
    ) -> list[Value]:
        """Inlines jaxprs, whose variables must stand for the same values in all."""
        values = [*consts, *args]
        envs = [dict(zip([*j.constvars, *j.invars], values, strict=True)) for j in jaxprs]
        for i in range(max(len(j.eqns) for j in jaxprs)):
            eqns = [j.eqns[i] if i < len(j.eqns) else None for j in jaxprs]
            infos = [eqn and Source(eqn.source_info, source, called) for eqn in eqns]
            names = [None if eqn is None else _jax.primitive_name(eqn) for eqn in eqns]
            if len(set(names)) > 1 or not same_params(eqns):
                raise structure_error(eqns, names, infos)
            present = [eqn for eqn in eqns if eqn is not None]
            found = self._read(envs, [eqn.invars for eqn in present])
            rewired = [place for place, value in enumerate(found) if value is None]
            if rewired:
                raise structure_error(eqns, names, infos, rewired)
            operands = [value for value in found if value is not None]
            name = _jax.primitive_name(present[0])
            self.visits += 1
            outputs = self._equation(name, present, operands, infos[0])
            for env, eqn in zip(envs, present, strict=True):
                env.update(zip(eqn.outvars, outputs, strict=True))
        results = self._read(envs, [j.outvars for j in jaxprs])
        if None in results:
            what = f"  result {results.index(None)} comes from elsewhere in the big one"
            raise different([what if source is None else f"{what}, in the call at {source}"])
        return [value for value in results if value is not None]

    def _read(self, envs: Sequence[Env], columns: Sequence[Sequence[Any]]) -> list[Value | None]:
        """Returns the values of variables, None where programs mean different ones."""
        return [self._value(envs, atoms) for atoms in zip(*columns, strict=True)]

    def _value(self, envs: Sequence[Env], atoms: Sequence[Any]) -> Value | None:
        literals = [isinstance(atom, Literal) for atom in atoms]
        if all(literals):
            return constant([a.val for a in atoms], [a.aval for a in atoms])
        if any(literals):
            return None
        first, *others = (env[atom] for env, atom in zip(envs, atoms, strict=True))
        return first if all(other is first for other in others) else None

    def _equation(
        self, name: str, eqns: Sequence[JaxprEqn], args: Sequence[Value], source: Any
    ) -> list[Value]:
        if name in _jax.CALLS:
            return self._call(name, eqns, args, source)
        if any(map(_jax.refers_to_memory, eqns)):
            raise _mutable(name, source)
        if name in _CONTROL:
            return _CONTROL[name](self, eqns, args, source)
        avals = zip(*([v.aval for v in eqn.outvars] for eqn in eqns), strict=True)
        return self.emit(name, [e.params for e in eqns], args, list(avals), source)

    def _call(
        self, name: str, eqns: Sequence[JaxprEqn], args: Sequence[Value], source: Source
    ) -> list[Value]:
        bodies = [_jax.called_program(name, eqn.params) for eqn in eqns]
        called = eqns[0].params.get("name") if name in ("jit", "pjit") else None
        if isinstance(bodies[0], ClosedJaxpr):
            return self.closed(bodies, args, source, called)
        return self.jaxprs(bodies, (), args, source, called)

    def emit(
        self,
        name: str,
        params: Sequence[Mapping[str, Any]],
        args: Sequence[Value],
        avals: Sequence[Sequence[Any]],
        source: Source | None,
    ) -> list[Value]:
        """Appends an equation, unless its outputs are known constants; returns its outputs."""
        if name in REWRITES:
            rewritten = REWRITES[name](self.emit, params, args, avals, source)
            if rewritten is not None:
                return rewritten
        outputs = tuple(value_of(a) for a in avals)
        visit = self.visits - 1
        eqn = Equation(name, tuple(params), tuple(args), outputs, source, visit=visit)
        eqn.region = self.region
        case = folding.chosen_case(eqn)
        if case is not None and eqn.inputs[case].shape == eqn.outputs[0].shape:
            return [eqn.inputs[case]]
        for output, uniform in zip(outputs, folding.fold(eqn), strict=True):
            output.uniform = uniform
        if any(output.uniform is None for output in eqn.outputs):
            self.equations.append(eqn)
        return list(eqn.outputs)


def _column(eqns: Sequence[JaxprEqn], key: str) -> list[Any]:
    return [eqn.params[key] for eqn in eqns]


def _enter(
    build: _Builder, inits: Sequence[Value], bodies: Sequence[ClosedJaxpr], at: int, source: Source
) -> list[Value]:
    """Emits ``loop_enter`` for every carried value; ``at`` is the first one's place in a body."""
    carried = []
    for i, init in enumerate(inits):
        avals = [body.in_avals[at + i] for body in bodies]
        carried += build.emit("loop_enter", [{}] * len(bodies), [init], [avals], source)
        build.enters[id(carried[-1])] = build.equations[-1]
    return carried


def _close(
    build: _Builder,
    carried: Sequence[Value],
    following: Sequence[Value],
    also: Sequence[Value],
    avals: Sequence[Sequence[Any]],
    source: Source,
) -> list[Value]:
    """Emits ``loop_close`` for every carried value, and keeps it wherever the carry is used."""
    last = []
    for before, after, columns in zip(carried, following, avals, strict=True):
        params: list[Mapping[str, Any]] = [{}] * len(columns)
        last += build.emit("loop_close", params, [before, after, *also], [columns], source)
        build.enters[id(before)].needs.append(build.equations[-1])
    return last


def _out_avals(eqns: Sequence[JaxprEqn]) -> list[list[Any]]:
    return [list(avals) for avals in zip(*([v.aval for v in e.outvars] for e in eqns), strict=True)]


def _scan(
    build: _Builder, eqns: Sequence[JaxprEqn], args: Sequence[Value], source: Source
) -> list[Value]:
    bodies = _column(eqns, "jaxpr")
    n, c = _jax.scan_counts(eqns[0].params)
    params = [{"length": eqn.params["length"]} for eqn in eqns]
    carried = _enter(build, args[n : n + c], bodies, n, source)
    slices = []
    for i, xs in enumerate(args[n + c :]):
        avals = [body.in_avals[n + c + i] for body in bodies]
        slices += build.emit("loop_slice", params, [xs], [avals], source)
    outputs = build.inside(bodies, [*args[:n], *carried, *slices], source)
    avals = _out_avals(eqns)
    last = _close(build, carried, outputs[:c], (), avals[:c], source)
    stacked = []
    for y, columns in zip(outputs[c:], avals[c:], strict=True):
        stacked += build.emit("loop_stack", params, [y], [columns], source)
    return last + stacked


def _while(
    build: _Builder, eqns: Sequence[JaxprEqn], args: Sequence[Value], source: Source
) -> list[Value]:
    m, n = eqns[0].params["cond_nconsts"], eqns[0].params["body_nconsts"]
    bodies = _column(eqns, "body_jaxpr")
    carried = _enter(build, args[m + n :], bodies, n, source)
    stop = build.inside(_column(eqns, "cond_jaxpr"), [*args[:m], *carried], source)
    outputs = build.inside(bodies, [*args[m : m + n], *carried], source)
    return _close(build, carried, outputs, stop, _out_avals(eqns), source)


def _cond(
    build: _Builder, eqns: Sequence[JaxprEqn], args: Sequence[Value], source: Source
) -> list[Value]:
    branches = list(zip(*_column(eqns, "branches"), strict=True))
    cases = [build.inside(branch, args[1:], source) for branch in branches]
    outputs = []
    for i, columns in enumerate(_out_avals(eqns)):
        operands = [args[0], *(case[i] for case in cases)]
        outputs += build.emit("select_n", [{}] * len(eqns), operands, [columns], source)
    return outputs


def _linear_solve(
    build: _Builder, eqns: Sequence[JaxprEqn], args: Sequence[Value], source: Source
) -> list[Value]:
    """A solution is what the user's solver computes, from its constants and the right side."""
    lengths = eqns[0].params["const_lengths"]
    before = lengths.matvec + lengths.vecmat
    constants = args[before : before + lengths.solve]
    right = args[sum(lengths) :]
    bodies = [jaxprs.solve for jaxprs in _column(eqns, "jaxprs")]
    return build.closed(bodies, [*constants, *right], source)


def _shard_map(
    build: _Builder, eqns: Sequence[JaxprEqn], args: Sequence[Value], source: Source
) -> list[Value]:
    bodies = _column(eqns, "jaxpr")
    mesh = eqns[0].params["mesh"]
    local = []
    for i, (arg, spec) in enumerate(zip(args, eqns[0].params["in_specs"], strict=True)):
        params = [{"shards": _jax.shard_counts(spec, arg.ndim, mesh)}] * len(eqns)
        local += build.emit(
            "shard", params, [arg], [[body.invars[i].aval for body in bodies]], source
        )
    outputs = []
    inner = build.jaxprs(bodies, (), local, source)
    specs = eqns[0].params["out_specs"]
    for value, spec, columns in zip(inner, specs, _out_avals(eqns), strict=True):
        params = [{"shards": _jax.shard_counts(spec, value.ndim, mesh)}] * len(eqns)
        outputs += build.emit("unshard", params, [value], [columns], source)
    return outputs


_Control = Callable[[_Builder, Sequence[JaxprEqn], Sequence[Value], Source], list[Value]]

_CONTROL: dict[str, _Control] = {
    "cond": _cond,
    "custom_linear_solve": _linear_solve,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
