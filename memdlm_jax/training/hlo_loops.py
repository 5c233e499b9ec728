"""How often a loop of a compiled program runs."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # ``hlo`` imports this module.
    from memdlm_jax.training.hlo import Operation, Program

Computation = dict[str, "Operation"]


def trips_of(program: "Program", one: "Operation") -> int | None:
    """Trips of a loop, or ``None`` where the program does not tell.

    What the compiler says, or else the bound of a count from 0 in its condition, by the number that
    its body adds to the count: TPUs take two steps of a product at a time while operands travel.

    Args:
        program: has the loop's condition and body.
        one: the ``while``.
    """
    if found := re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', one.attributes):
        return int(found.group(1))
    condition = program.computations[one.called("condition") or ""]
    inside = [
        other
        for test in condition.values()
        for other in program.computations.get(test.called() or "", {}).values()
    ]
    every = [*condition.values(), *inside]
    compares = [c for c in every if c.opcode == "compare" and "direction=LT" in c.attributes]
    bounds = {c.operands[0] for c in every if c.opcode == "constant" and not c.results[0].dims}
    if len(compares) == 1 and len(bounds) == 1 and (bound := bounds.pop()).isdigit():
        return -(-int(bound) // _step(program, condition, one))
    return None


def _step(program: "Program", condition: Computation, one: "Operation") -> int:
    """What a trip adds to the only number that the condition looks at; 1 where it is not seen."""
    looked_at = {_index(c) for c in condition.values() if c.opcode == "get-tuple-element"}
    body = program.computations[one.called("body") or ""]
    root = next(other for other in body.values() if other.is_root)
    if len(looked_at) != 1 or root.opcode != "tuple":
        return 1
    new = body[root.operands[looked_at.pop()]]
    values = [_constant(body, name) for name in new.operands]
    if called := program.computations.get(new.called() or ""):  # The sum alone, fused.
        new = next(other for other in called.values() if other.is_root)
        own = {n: values[int(o.operands[0])] for n, o in called.items() if o.opcode == "parameter"}
        values = [own.get(name) or _constant(called, name) for name in new.operands]
    known = [value for value in values if value]
    return known[0] if new.opcode == "add" and len(known) == 1 else 1


def _index(one: "Operation") -> int:
    found = re.search(r"index=(\d+)", one.attributes)
    return int(found.group(1)) if found else -1


def _constant(body: Computation, name: str) -> int | None:
    one = body.get(name)
    value = one.operands[0] if one is not None and one.opcode == "constant" else ""
    return int(value) if value.isdigit() else None
