"""Small faults put into a module's code, one at a time: a test suite that is worth its time notices each of them.

A *mutant* is the module with one expression or statement replaced. Not mutated, because no behaviour hangs on it: type
annotations and aliases, docstrings, decorators, protocols, what is logged, and the text of errors (that they are
raised is mutated).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
UNTOUCHED_FIELDS = {"annotation", "returns", "decorator_list", "bases", "keywords_of_class", "exc", "type"}


@dataclass(frozen=True)
class Mutant:
    """Line, column (from 1) and qualified name of the function it is in, what stands there and what is put there.

    `apply` puts it into the tree that was mutated, for good.
    """

    line: int
    column: int
    where: str
    was: str
    now: str
    parent: ast.AST
    field: str
    index: int | None
    new: ast.AST

    def apply(self) -> None:
        if self.index is None:
            setattr(self.parent, self.field, self.new)
        else:
            getattr(self.parent, self.field)[self.index] = self.new

    def __str__(self) -> str:
        return f"{self.line}:{self.column}: {self.where}: {self.was} -> {self.now}"


def mutants(tree: ast.Module) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    return sorted(_visit(tree, ""), key=lambda mutant: mutant.line)


def _visit(node: ast.AST, where: str) -> Iterator[Mutant]:
    for field, value in ast.iter_fields(node):
        if field in UNTOUCHED_FIELDS or (isinstance(node, ast.ClassDef) and field == "keywords"):
            continue
        if isinstance(value, ast.AST):
            yield from _child(node, field, None, value, where)
        elif isinstance(value, list):
            for index, child in enumerate(value):
                if isinstance(child, ast.AST):
                    yield from _child(node, field, index, child, where)


def _child(parent: ast.AST, field: str, index: int | None, node: ast.AST, where: str) -> Iterator[Mutant]:
    if _says_nothing(node, where):
        return
    if isinstance(node, ast.expr | ast.stmt):
        for new in _replacements(node):
            ast.copy_location(new, node)
            ast.fix_missing_locations(new)
            yield Mutant(
                node.lineno, node.col_offset + 1, where or "module", _text(node), _text(new), parent, field, index, new
            )
    inside = where
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        inside = f"{where}.{node.name}".lstrip(".")
    yield from _visit(node, inside)


def _says_nothing(node: ast.AST, where: str) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()):  # docstrings, ...
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log")))):
            return True
        case ast.ClassDef(bases=bases):
            return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in bases)
        case ast.Assign(value=ast.Subscript() | ast.BinOp(op=ast.BitOr())):  # Label = Literal[...], Node = int | ...
            return not where
        case ast.Import() | ast.ImportFrom():
            return True
    return False


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"


def _replacements(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(left=left, ops=operators, comparators=others):
            for i, operator in enumerate(operators):
                for new in COMPARISONS[type(operator)]:
                    yield ast.Compare(left, [*operators[:i], new(), *operators[i + 1 :]], others)
        case ast.BinOp(left=left, op=operator, right=right):
            if type(operator) in OPERATORS:
                yield ast.BinOp(left, OPERATORS[type(operator)](), right)
        case ast.AugAssign(target=target, op=operator, value=value):
            yield ast.AugAssign(target, OPERATORS[type(operator)](), value)
            yield ast.Pass()
        case ast.BoolOp(op=operator, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(value=str() as value):
            yield ast.Constant(f"{value}?")
        case ast.Constant(value=bytes() as value):
            yield ast.Constant(value + b"?")
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield from (ast.IfExp(new, body, orelse) for new in _negated(test))
        case ast.If(test=test, body=body, orelse=orelse):
            yield from (ast.If(new, body, orelse) for new in _negated(test))
        case ast.While(test=test, body=body, orelse=orelse):
            yield from (ast.While(new, body, orelse) for new in _negated(test))
        case ast.Call(func=func, args=args, keywords=keywords):
            if isinstance(func, ast.Name) and func.id in NAMES:
                yield ast.Call(ast.Name(NAMES[func.id], ast.Load()), args, keywords)
            for i in range(len(keywords)):
                yield ast.Call(func, args, [*keywords[:i], *keywords[i + 1 :]])
        case ast.Slice(lower=lower, upper=upper, step=step):
            if lower is not None:
                yield ast.Slice(None, upper, step)
            if upper is not None:
                yield ast.Slice(lower, None, step)
        case ast.ListComp(elt=element, generators=[part]) if part.ifs:
            yield ast.ListComp(element, [_unconditional(part)])
        case ast.SetComp(elt=element, generators=[part]) if part.ifs:
            yield ast.SetComp(element, [_unconditional(part)])
        case ast.GeneratorExp(elt=element, generators=[part]) if part.ifs:
            yield ast.GeneratorExp(element, [_unconditional(part)])
        case ast.DictComp(key=key, value=value, generators=[part]) if part.ifs:
            yield ast.DictComp(key, value, [_unconditional(part)])
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield ast.Return(ast.Constant(None))
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AnnAssign(target=ast.Attribute()):
            yield ast.Pass()
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield ast.Pass()
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()


def _negated(test: ast.expr) -> Iterator[ast.expr]:
    # A comparison and a `not` have mutants of their own that say the same.
    if not isinstance(test, ast.Compare | ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), test)


def _unconditional(part: ast.comprehension) -> ast.comprehension:
    return ast.comprehension(part.target, part.iter, [], part.is_async)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
