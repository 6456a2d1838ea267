# SPDX-License-Identifier: Apache-2.0
"""A traced program as one list of operations: calls inlined, repeats and waste out."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Use(NamedTuple):
    """One operation of a flattened program.

    Attributes:
      name: of the primitive; "whole" and "split" are layouts asked of a parameter, and
        "turned" is what was put together, as its reader wants it.
      reads: values it reads.
      writes: values it makes.
      bodies: programs it runs, each on the reads after the first `skipped`.
      skipped: see there.
      num_consts: of a body's inputs, those that stay.
      num_carried: of the results, those that a body also reads, after the constants.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    bodies: tuple[Any, ...] = ()
    skipped: int = 0
    num_consts: int = 0
    num_carried: int = 0


class Flat:
    """A program with calls inlined; values are numbers.

    Attributes:
      uses: operations, in order.
      avals: abstract value of each value.
      inputs: constants and arguments.
      outputs: results.
      read: values that something reads, results among them.
    """

    def __init__(self, jaxpr: Any):
        self.uses: list[Use] = []
        self.avals: list[Any] = []
        self._seen: dict[Any, list[int]] = {}
        self._loop: Any = None  # the loop of one step whose body is being inlined
        closed = getattr(jaxpr, "jaxpr", jaxpr)
        names = (*closed.constvars, *closed.invars)
        self.inputs = [self._new(v.aval) for v in names]
        self.outputs = self._inline(closed, dict(zip(names, self.inputs, strict=True)))
        self._drop_unread()

    def _drop_unread(self) -> None:
        """A compiler leaves out what nothing reads."""
        kept: list[Use] = []
        needed = self.read = set(self.outputs)
        for use in reversed(self.uses):
            if needed.intersection(use.writes):
                needed.update(use.reads)
                kept.append(use)
        self.uses = kept[::-1]

    def _new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _read(self, atom: Any, env: Mapping[Any, int]) -> int:
        if not hasattr(atom, "val"):
            return env[atom]
        # A literal is no array: it is a value that nobody holds.
        key = ("literal", str(atom.val), str(atom.aval))
        if key not in self._seen:
            self._seen[key] = [self._new(atom.aval)]
        return self._seen[key][0]

    def _inline(self, jaxpr: Any, env: dict[Any, int]) -> list[int]:
        for equation in jaxpr.eqns:
            reads = [self._read(atom, env) for atom in equation.invars]
            inner = _called(equation)
            if inner is None:
                writes = self._append(equation, reads)
            else:
                writes = self._call(equation, inner, reads)
            env |= dict(zip(equation.outvars, writes, strict=True))
        return [self._read(atom, env) for atom in jaxpr.outvars]

    def _call(self, equation: Any, inner: Any, reads: list[int]) -> list[int]:
        body = getattr(inner, "jaxpr", inner)
        given = [self._new(v.aval) for v in body.constvars]
        if equation.primitive.name != "scan":
            names = (*body.constvars, *body.invars)
            return self._inline(body, dict(zip(names, given + reads, strict=True)))
        # A scan of one step reads the only entry of what it goes through.
        params = equation.params
        start = params["num_consts"] + params["num_carry"]
        for place, variable in enumerate(body.invars[start:], start):
            reads[place] = self._one("squeeze", reads[place], variable.aval)
        names = (*body.constvars, *body.invars)
        outer, self._loop = self._loop, equation
        outs = self._inline(body, dict(zip(names, given + reads, strict=True)))
        self._loop = outer
        stacked = zip(outs, equation.outvars, strict=True)
        return [
            self._one("reshape", out, variable.aval)
            if n >= params["num_carry"]
            else out
            for n, (out, variable) in enumerate(stacked)
        ]

    def _one(self, name: str, read: int, aval: Any) -> int:
        self.uses.append(Use(name, (read,), (self._new(aval),)))
        return self.uses[-1].writes[0]

    def _append(self, equation: Any, reads: list[int]) -> list[int]:
        """Adds an operation, unless the same was done before."""
        use = _use(equation, reads)
        key = None
        if not use.bodies:
            params = sorted(equation.params.items())
            # Messages are placed before a loop of one step is found to be none: what
            # was sent outside it is sent again inside.
            place = self._loop if use.name == "whole" else None
            key = use.name, use.reads, str(params), str(equation.outvars[0].aval), place
            if key in self._seen:
                return self._seen[key]
        writes = [self._new(v.aval) for v in equation.outvars]
        self.uses.append(use._replace(writes=tuple(writes)))
        if use.name == "whole":
            turned = self._new(equation.outvars[0].aval)
            self.uses.append(Use("turned", (writes[0],), (turned,)))
            writes = [turned]
        if key is not None:
            self._seen[key] = writes
        return writes


def _use(equation: Any, reads: list[int]) -> Use:
    """Returns an operation without its results."""
    name, params = equation.primitive.name, equation.params
    use = Use(name, tuple(reads), ())
    if name == "scan":
        return use._replace(
            bodies=(params["jaxpr"],),
            num_consts=params["num_consts"],
            num_carried=params["num_carry"],
        )
    if name == "while":
        consts = params["body_nconsts"]
        return use._replace(
            bodies=(params["body_jaxpr"],),
            skipped=params["cond_nconsts"],
            num_consts=consts,
            num_carried=len(equation.outvars),
        )
    if name == "cond":
        return use._replace(bodies=tuple(params["branches"]), skipped=1)
    if name == "sharding_constraint":
        return use._replace(name=_layout(params["sharding"].spec))
    return use


def _layout(spec: Any) -> str:
    """Returns what a constraint asks for.

    Rows are split over (data, fsdp) together; `fsdp` alone splits a parameter. What
    names no rows and no `fsdp` asks for a parameter whole.
    """
    if "fsdp" in spec:
        return "split"
    return "sharding_constraint" if any(isinstance(a, tuple) for a in spec) else "whole"


def _called(equation: Any) -> Any:
    """Returns the program that an equation runs exactly once, or None."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return params["jaxpr"] if params["length"] == 1 else None
    if name in ("while", "cond"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            return params[key]
    return None
