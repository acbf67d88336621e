"""A forward with every `act(conv(x))` as one call, made from its source text.

Both spellings are met: nested, `self.act(self.conv(x))` or `F.leaky_relu(conv(x), 0.2)`, and two neighbouring
statements, `x = self.conv(x)` then `x = self.act(x)` (or `return self.act(x)`). The call is a helper that looks at
the two objects each time and, where they are no fusable pair, calls one after the other; names are evaluated in the
order of the original. So the new forward means what the old one meant, whatever the names hold; nothing is frozen as
tracing would freeze it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import functional as F

from . import pairs
from .rewrite import Site

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.prelu: "prelu",
    F.rrelu: "rrelu",
    F.rrelu_: "rrelu",
}
_HELPER = "__fused_rect_call"


@dataclass(frozen=True)
class Place:
    """One `outer(inner(...))` in the source: the text of the two callables, and the name that the module has there."""

    outer: str
    inner: str
    owner: str


@dataclass(frozen=True)
class Rewritten:
    function: Callable[..., Any]
    places: tuple[Place, ...]


@functools.lru_cache(maxsize=512)
def rewritten(forward: Any) -> Rewritten | None:
    """``forward`` with its pairs as single calls; None where its source is not to be had."""
    if not isinstance(forward, types.FunctionType):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    # A decorated function's source includes the decorator, which getsource shows but __code__ does not run.
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or hasattr(forward, "__wrapped__"):
        return None
    places: list[Place] = []
    definition = _Mangle(forward).visit(definition)
    definition = _Nest(definition).visit(definition)
    definition = _Pair(forward, places).visit(definition)
    return Rewritten(_compiled(forward, definition) if places else forward, tuple(places))


def _compiled(forward: types.FunctionType, definition: ast.FunctionDef) -> Callable[..., Any]:
    """``definition`` as a function with the globals, defaults and closure of ``forward``."""
    free = forward.__code__.co_freevars
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    definition.returns = None
    definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
    definition.args.kw_defaults = [d and ast.Constant(None) for d in definition.args.kw_defaults]
    cells = [ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None)) for name in (*free, _HELPER)]
    factory = ast.FunctionDef(
        "__factory", ast.arguments([], [], None, [], [], None, []), [*cells, definition], [], lineno=1, col_offset=0
    )
    ast.increment_lineno(definition, forward.__code__.co_firstlineno - definition.lineno)
    module = ast.fix_missing_locations(ast.Module([factory], []))
    outer = next(
        c for c in compile(module, forward.__code__.co_filename, "exec").co_consts if isinstance(c, types.CodeType)
    )
    code = next(c for c in outer.co_consts if isinstance(c, types.CodeType) and c.co_name == forward.__name__)
    assert forward.__closure__ is not None or not free
    known = dict(zip(free, forward.__closure__ or ()))
    known[_HELPER] = types.CellType(call)
    function = types.FunctionType(
        code, forward.__globals__, forward.__name__, forward.__defaults__, tuple(known[n] for n in code.co_freevars)
    )
    function.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(function, forward)


Step = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a callable and what it takes behind its input


def call(steps: tuple[Step, ...], inner: Any, *args: Any, **kwargs: Any) -> Any:
    """The steps, outermost first, around inner(*args, **kwargs); each call is held back in case a rectifier follows."""
    held: Any = (inner, args, kwargs)
    for outer, rest, options in reversed(steps):
        if held is not None and _rectifies(outer):
            value, held = _pair(outer, rest, options, *held), None
        else:
            value = value if held is None else held[0](*held[1], **held[2])
            held = (outer, (value, *rest), options)
    return value if held is None else held[0](*held[1], **held[2])


def _rectifies(outer: Any) -> bool:
    return not isinstance(outer, nn.Module) or pairs.rectifier_name(outer) is not None


def _pair(
    outer: Any,
    rest: tuple[Any, ...],
    options: dict[str, Any],
    inner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if not isinstance(outer, nn.Module):
        return pairs.call_function_pair(outer, rest, options, inner, *args, **kwargs)
    if rest or options:
        return outer(inner(*args, **kwargs), *rest, **options)
    return pairs.call_pair(outer, inner, *args, **kwargs)


class _Mangle(ast.NodeTransformer):
    """Private names, `self.__conv`, as the compiler writes them inside the class: `self._Model__conv`."""

    def __init__(self, forward: types.FunctionType) -> None:
        owner = forward.__qualname__.rpartition(".")[0].rpartition(".")[2].lstrip("_")
        self.prefix = f"_{owner}" if owner else ""

    def _mangled(self, name: str) -> str:
        return self.prefix + name if name.startswith("__") and not name.endswith("__") else name

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.attr = self._mangled(node.attr)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._mangled(node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg = self._mangled(node.arg)
        return node


class _Nest(ast.NodeTransformer):
    """`x = inner(...)` directly before `x = outer(x, ...)` or `return outer(x, ...)` becomes one nested statement.

    So does `z = inner(...)` before `y = outer(z, ...)` where nothing else reads z.
    """

    def __init__(self, definition: ast.FunctionDef) -> None:
        self.reads = Counter(
            n.id for n in ast.walk(definition) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)
        )
        # A name of an outer scope is read by others.
        for node in ast.walk(definition):
            if isinstance(node, (ast.Global, ast.Nonlocal)):
                self.reads.update(node.names)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, self._nested(statements))
        return node

    def _nested(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for statement in statements:
            if result and _feeds(result[-1], statement, self.reads):
                statement.value.args[0] = result.pop().value  # type: ignore[attr-defined]
            result.append(statement)
        return result


def _feeds(first: ast.stmt, second: ast.stmt, reads: Counter[str]) -> bool:
    name = _assigned(first)
    if name is None or not isinstance(first.value, ast.Call):  # type: ignore[attr-defined]
        return False
    gone = isinstance(second, ast.Return) or _assigned(second) == name or (_assigned(second) and reads[name] == 1)
    if not gone or not isinstance(second.value, ast.Call):  # type: ignore[attr-defined]
        return False
    outer = second.value  # type: ignore[attr-defined]
    if not (outer.args and isinstance(outer.args[0], ast.Name) and outer.args[0].id == name):
        return False
    others = [outer.func, *outer.args[1:], *(k.value for k in outer.keywords)]
    # What is evaluated before the inner call in the new order must not read the name, nor be more than a look-up.
    return not any(isinstance(n, (ast.Call, ast.NamedExpr)) or _is_name(n, name) for o in others for n in ast.walk(o))


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _assigned(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


class _Pair(ast.NodeTransformer):
    """`outer(inner(a, k=b), r, s=t)` becomes `helper(((outer, (r,), {"s": t}),), inner, a, k=b)`.

    A call around a helper's call joins its steps, so the second pair of `act(head(down(x)))` is seen as well.
    """

    def __init__(self, forward: types.FunctionType, places: list[Place]) -> None:
        self.forward, self.places, self.owner = forward, places, owner_of(forward)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call):
            return self._method(node, node.func.attr, node.func.value)
        if not node.args and node.keywords and node.keywords[0].arg == "input" and self._is_function(node):
            node.args = [node.keywords.pop(0).value]
        if not (node.args and isinstance(node.args[0], ast.Call)):
            return node
        inner = node.args[0]
        if not (self._may_rectify(node) and _may_be_module(_callee(inner))):
            return node
        simple = [*node.args[1:], *(k.value for k in node.keywords)]
        if any(isinstance(n, (ast.Call, ast.NamedExpr, ast.Starred)) for s in simple for n in ast.walk(s)):
            return node
        if any(k.arg is None for k in node.keywords):
            return node
        options = ast.Dict([ast.Constant(k.arg) for k in node.keywords], [k.value for k in node.keywords])
        return self._around(node, inner, ast.unparse(node.func), [node.func, _tuple(node.args[1:]), options])

    def _method(self, node: ast.Call, name: str, inner: ast.Call) -> ast.AST:
        """`inner(a, k=b).relu_()`"""
        if name not in pairs.METHODS or node.args or node.keywords or not _may_be_module(_callee(inner)):
            return node
        return self._around(node, inner, repr(name), [ast.Constant(name), _tuple([]), ast.Dict([], [])])

    def _around(self, node: ast.Call, inner: ast.Call, outer: str, step: list[ast.expr]) -> ast.AST:
        """The helper's call for ``step`` on the result of ``inner``, which may be such a call already."""
        self.places.append(Place(outer, ast.unparse(_callee(inner)), self.owner))
        if _is_name(inner.func, _HELPER):
            steps, arguments = inner.args[0].elts, inner.args[1:]  # type: ignore[attr-defined]
        else:
            steps, arguments = [], [inner.func, *inner.args]
        new = ast.Call(ast.Name(_HELPER, ast.Load()), [_tuple([_tuple(step), *steps]), *arguments], inner.keywords)
        return ast.copy_location(new, node)

    def _may_rectify(self, node: ast.Call) -> bool:
        if _root(node.func) == self.owner and not isinstance(node.func, ast.Name):
            return True
        if self._is_function(node):
            return True
        return isinstance(node.func, ast.Name) and node.func.id in self.forward.__code__.co_varnames


    def _is_function(self, node: ast.Call) -> bool:
        return resolve(self.forward, node.func) in _FUNCTIONS


def owner_of(forward: Any) -> str:
    """The name of the first argument of ``forward``, by custom `self`."""
    code = forward.__code__
    return str(code.co_varnames[0]) if code.co_argcount else ""


def _callee(call: ast.Call) -> ast.expr:
    """What is called last; of a helper's call, its outermost step."""
    return call.args[0].elts[0].elts[0] if _is_name(call.func, _HELPER) else call.func  # type: ignore[attr-defined]


def _tuple(elements: list[Any]) -> ast.Tuple:
    return ast.Tuple(elements, ast.Load())


def _may_be_module(node: ast.expr) -> bool:
    root = _root(node)
    return root is not None and root not in ("super", "torch", "F", "nn")


def _root(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Subscript)) or _is_getattr(node):
        node = node.args[0] if isinstance(node, ast.Call) else node.value  # type: ignore[attr-defined]
    return node.id if isinstance(node, ast.Name) else None


def _is_getattr(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _is_name(node.func, "getattr") and len(node.args) == 2


_UNKNOWN = object()


def resolve(forward: Any, node: ast.expr) -> Any:
    """The global object that a dotted name means in ``forward``, or a unique object that equals nothing."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id in forward.__code__.co_varnames:
        return _UNKNOWN
    value = forward.__globals__.get(node.id, _UNKNOWN)
    for name in reversed(names):
        value = getattr(value, name, _UNKNOWN)
    try:
        hash(value)
    except TypeError:
        return _UNKNOWN
    return value


# ---- what a place means for one module ----


def sites(module: nn.Module, name: str, place: Place) -> Iterator[Site]:
    """The site that ``place`` is in ``module``; nothing where it clearly is none."""
    outer, inner = (_look_up(module, text, place.owner) for text in (place.outer, place.inner))
    outer = F.relu if place.outer.strip("'") in pairs.METHODS else outer
    rectifier = pairs.rectifier_name(outer) if isinstance(outer, nn.Module) else _FUNCTIONS.get(outer)
    linear_map = pairs.linear_map_name(inner)
    where = f"{name}.{place.inner.removeprefix(f'{place.owner}.')}".lstrip(".")
    if linear_map and isinstance(outer, (types.FunctionType, functools.partial)) and rectifier is None:
        yield Site(where, linear_map, place.outer, False, "a function of yours, whose code is not looked into")
    if (outer is not _UNKNOWN and rectifier is None) or (inner is not _UNKNOWN and linear_map is None):
        return
    if outer is _UNKNOWN or inner is _UNKNOWN:
        kinds = linear_map or place.inner, rectifier or place.outer
        yield Site(where, *kinds, True, "decided at each call: its modules are local names")
        return
    if rectifier in ("prelu", "rrelu") and not isinstance(outer, nn.Module):
        reason: str | None = (
            f"F.{rectifier} is called as a function; torch.compile's backend fuses it, or use the module"
        )
    else:
        reason = pairs.obstacle(outer if isinstance(outer, nn.Module) else nn.ReLU(), inner)
    yield Site(where, linear_map or "", rectifier or "", reason is None, reason or "")


def _look_up(module: nn.Module, text: str, owner: str) -> Any:
    node = ast.parse(text, mode="eval").body
    if _root(node) != owner:
        forward = getattr(type(module), "_fused_rect_original", type(module)).forward
        return resolve(forward, node)
    value: Any = module
    try:
        return _follow(value, node)
    except (AttributeError, IndexError, KeyError, TypeError):
        return _UNKNOWN


def _follow(value: Any, node: ast.expr) -> Any:
    if isinstance(node, ast.Attribute):
        return getattr(_follow(value, node.value), node.attr)
    if isinstance(node, ast.Subscript):
        if not isinstance(node.slice, ast.Constant):
            raise KeyError(ast.unparse(node))
        return _follow(value, node.value)[node.slice.value]
    if isinstance(node, ast.Call):
        if not isinstance(node.args[1], ast.Constant):
            raise KeyError(ast.unparse(node))
        return getattr(_follow(value, node.args[0]), str(node.args[1].value))
    return value
