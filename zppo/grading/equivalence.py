"""Whether two parsed answers are the same mathematics: numbers exactly, everything made of numbers
part by part.

math-verify takes two numbers for equal whose difference rounds to zero, which makes all small
numbers equal. Here a difference is zero if no digit of it can be found however far it is computed;
a number written with decimals may be the other one rounded to six digits (`zppo.grading.numbers`).
What is neither a number, a formula, a collection, an interval nor a relation is left to
math-verify.

May run for ever on hostile input: call it where the process can be killed. Answers arrive as trees
from the LaTeX grammar; nothing here turns text into an expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import sympy
from latex2sympy2_extended import is_expr_of_only_symbols
from latex2sympy2_extended.sets import FiniteSet as Listed
from math_verify import verify
from sympy.core.relational import Relational

from zppo.grading.numbers import SIGNIFICANT, rounds_to

Tree: TypeAlias = Any
"""A sympy expression, set, relation or matrix; sympy has no type stubs."""
DIGITS = 100
"""Digits that are computed before a difference counts as zero, besides one for each bit of its
longest integer."""
MAX_DIGITS = 3_000
POINTS = 5
"""Places at which two formulas are compared."""
_MIRROR = {sympy.Lt: sympy.Gt, sympy.Le: sympy.Ge, sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}
_COLLECTIONS = (sympy.Set, sympy.Tuple, sympy.MatrixBase, sympy.MatrixExpr)


def equivalent(answer: Tree, gold: Tree, *, nested: bool = False) -> bool:
    """Whether `answer` is what `gold` is. In a collection (`nested`) every list has brackets, so
    their kind counts."""
    answer, gold = _without_names(answer, gold)
    if _is_inequality(answer) and isinstance(gold, sympy.Set):
        answer = solution_set(answer)
    elif _is_inequality(gold) and isinstance(answer, sympy.Set):
        gold = solution_set(gold)
    if _is_relation(answer) or _is_relation(gold):
        return _is_relation(answer) and _is_relation(gold) and same_relation(answer, gold)
    if any(isinstance(tree, _COLLECTIONS) for tree in (answer, gold)):
        return same_collection(answer, gold, nested=nested)
    verdict = same_expression(answer, gold)
    return left_to_math_verify(answer, gold) if verdict is None else verdict


# ---- numbers and formulas ------------------------------------------------------------------------


def same_expression(answer: Tree, gold: Tree) -> bool | None:
    """Compare two formulas at POINTS places, or two numbers; None where they have no value that can
    be computed."""
    if not all(isinstance(tree, sympy.Expr) and not _is_word(tree) for tree in (answer, gold)):
        return None
    decimal, gold_decimal = answer.has(sympy.Float), gold.has(sympy.Float)
    try:
        answer, gold = _exact(answer), _exact(gold)
        if not answer.free_symbols | gold.free_symbols:
            return _same_constant(answer, gold, decimal=decimal, gold_decimal=gold_decimal)
        return _same_at_points(answer - gold)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return None


def _exact(tree: Tree) -> Tree:
    """The tree computed as far as it can be, its decimals as fractions, its `i` the imaginary
    unit."""
    floats = {number: sympy.Rational(str(number)) for number in tree.atoms(sympy.Float)}
    tree = tree.xreplace(floats)
    symbols = {s: sympy.I if s.name == "i" else sympy.Symbol(s.name) for s in tree.free_symbols}
    return tree.subs(symbols).doit()


def vanishes(tree: Tree) -> bool | None:
    """Whether a number is zero: no digit of it shows at a precision that grows with the integers in
    it.

    None: it is no number. There is no absolute tolerance: sympy computes differences until two
    digits are certain or the limit is reached.
    """
    if tree.is_Rational:
        return bool(tree == 0)
    longest = max((int(number.p).bit_length() for number in tree.atoms(sympy.Integer)), default=1)
    value = tree.evalf(2, maxn=min(DIGITS + longest, MAX_DIGITS))
    parts = value.as_real_imag()
    if not all(part.is_Rational or part.is_Float for part in parts) or value.has(sympy.nan):
        return None
    return all(part == 0 or (part.is_Float and part._prec == 1) for part in parts)


def _same_constant(answer: Tree, gold: Tree, *, decimal: bool, gold_decimal: bool) -> bool | None:
    if answer.has(sympy.zoo, sympy.nan) or gold.has(sympy.zoo, sympy.nan):
        return False
    if answer.is_infinite or gold.is_infinite:
        return bool(answer == gold)
    same = vanishes(answer - gold)
    if same is False and (decimal or gold_decimal):
        pairs = list(zip(answer.as_real_imag(), gold.as_real_imag(), strict=True))
        return all(
            _agree(one, other, decimal=decimal, gold_decimal=gold_decimal) for one, other in pairs
        )
    return same


def _agree(answer: Tree, gold: Tree, *, decimal: bool, gold_decimal: bool) -> bool:
    """Two real numbers: equal, or one is written as a decimal and is the other one rounded, which
    is not whole."""
    if vanishes(answer - gold):
        return True
    if vanishes(gold - gold.round()):
        return False
    return (decimal and answer.is_Rational and rounds_to(_fraction(gold), _fraction(answer))) or (
        gold_decimal and gold.is_Rational and rounds_to(_fraction(answer), _fraction(gold))
    )


def _fraction(number: Tree) -> Fraction:
    """A real number to twenty digits more than a rounded one shows."""
    exact = number if number.is_Rational else sympy.Rational(str(number.evalf(SIGNIFICANT + 50)))
    return Fraction(int(exact.p), int(exact.q))


def _same_at_points(difference: Tree) -> bool | None:
    """Whether a formula is zero at all places where it has a value, if it has one at most of
    them."""
    symbols = sorted(difference.free_symbols, key=str)
    whole = difference.has(
        sympy.Sum, sympy.Product
    )  # sums up to n have a value at whole numbers only
    for denominator in (1,) if whole else (7, 1):
        found = [vanishes(difference.subs(point).doit()) for point in _points(symbols, denominator)]
        if False in found:
            return False
        if found.count(True) > POINTS // 2:
            return True
    return None


def _points(symbols: Sequence[Tree], denominator: int) -> list[dict[Tree, Tree]]:
    """POINTS places: the first has positive coordinates only, the others have both signs unless
    they are whole."""
    places = []
    for place in range(POINTS):
        values = [(17 * place + 11 * index) % 23 + 2 for index in range(len(symbols))]
        signs = [
            -1 if denominator > 1 and (place + index) % 3 == 1 else 1
            for index in range(len(symbols))
        ]
        coordinates = [
            sign * sympy.Rational(value, denominator)
            for sign, value in zip(signs, values, strict=True)
        ]
        places.append(dict(zip(symbols, coordinates, strict=True)))
    return places


def _is_word(tree: Tree) -> bool:
    return isinstance(tree, sympy.Symbol) and len(tree.name) > 1


# ---- collections ---------------------------------------------------------------------------------


def same_collection(answer: Tree, gold: Tree, *, nested: bool) -> bool:
    """Intervals by their ends, matrices and tuples place by place, sets in any order."""
    if isinstance(answer, sympy.MatrixExpr) or isinstance(gold, sympy.MatrixExpr):
        answer, gold = answer.doit(), gold.doit()
    if isinstance(answer, sympy.MatrixBase) and isinstance(gold, sympy.MatrixBase):
        return answer.shape == gold.shape and _same_in_order(list(answer.flat()), list(gold.flat()))
    if isinstance(answer, sympy.Interval) and isinstance(gold, sympy.Interval):
        ends = (answer.left_open, answer.right_open) == (gold.left_open, gold.right_open)
        return ends and _same_in_order([answer.start, answer.end], [gold.start, gold.end])
    if isinstance(answer, sympy.Union) and isinstance(gold, sympy.Union):
        return _same_in_any_order(list(answer.args), list(gold.args))
    if nested and isinstance(answer, sympy.FiniteSet) != isinstance(gold, sympy.FiniteSet):
        return False
    parts, gold_parts = _in_order(answer), _in_order(gold)
    if parts is None or gold_parts is None:
        return left_to_math_verify(answer, gold)
    if isinstance(gold, sympy.FiniteSet):
        unique = list(answer.args) if isinstance(answer, sympy.FiniteSet) else parts
        return _same_in_any_order(unique, list(gold.args))
    return _same_in_order(parts, gold_parts)


def _in_order(tree: Tree) -> list[Tree] | None:
    """The parts of a set, tuple, vector or pair (which the grammar reads as an open interval), as
    they were written."""
    match tree:
        case Listed():
            return list(getattr(tree, "_unsorted_args", tree.args))
        case sympy.FiniteSet() | sympy.Tuple():
            return list(tree.args)
        case sympy.Interval():
            return [tree.start, tree.end] if tree.left_open and tree.right_open else None
        case sympy.MatrixBase():
            return list(tree.flat()) if 1 in tree.shape else None
        case sympy.Set():
            return None
    return [tree]


def _same_in_order(answers: list[Tree], golds: list[Tree]) -> bool:
    return len(answers) == len(golds) and all(
        equivalent(answer, gold, nested=True) for answer, gold in zip(answers, golds, strict=True)
    )


def _same_in_any_order(answers: list[Tree], golds: list[Tree]) -> bool:
    """Whether each is found among the others; equality is transitive enough for the first fit to
    do."""
    left = list(golds)
    for answer in answers:
        match = next(
            (index for index, gold in enumerate(left) if equivalent(answer, gold, nested=True)),
            None,
        )
        if match is None:
            return False
        del left[match]
    return not left


# ---- relations -----------------------------------------------------------------------------------


def _is_relation(tree: Tree) -> bool:
    if isinstance(tree, sympy.And | sympy.Or | sympy.FiniteSet) and tree.args:
        return all(_is_relation(part) for part in tree.args) and not all(
            isinstance(p, sympy.Eq) for p in tree.args
        )
    return isinstance(tree, Relational)


def _is_inequality(tree: Tree) -> bool:
    return _is_relation(tree) and not isinstance(tree, sympy.Eq)


def _without_names(answer: Tree, gold: Tree) -> tuple[Tree, Tree]:
    """`x = 5` answers a gold `5`, `5` a gold `x = 5`, and the last side of a chain counts."""
    answer, gold = _shortened(answer), _shortened(gold)
    if isinstance(answer, sympy.Eq) and not isinstance(gold, Relational):
        return answer.rhs, gold
    if (
        isinstance(gold, sympy.Eq)
        and not isinstance(answer, Relational)
        and is_expr_of_only_symbols(gold.lhs)
    ):
        return answer, gold.rhs
    return answer, gold


def _shortened(tree: Tree) -> Tree:
    """The chain a = b = c as a = c."""
    if (
        isinstance(tree, sympy.And)
        and tree.args
        and all(isinstance(part, sympy.Eq) for part in tree.args)
    ):
        links = getattr(tree, "_unsorted_args", tree.args)
        return sympy.Eq(links[0].lhs, links[-1].rhs, evaluate=False)
    return tree


def either(relations: Sequence[Tree | None]) -> Tree | None:
    """The alternative of inequalities; None if some are none."""
    if not all(relation is not None and _is_inequality(relation) for relation in relations):
        return None
    return sympy.Or(*relations)


def solution_set(relation: Tree) -> Tree:
    """The real numbers that satisfy an inequality of one unknown; one of more stays what it is."""
    if isinstance(relation, sympy.FiniteSet):
        relation = sympy.And(*relation.args)
    relation = relation.xreplace(
        {s: sympy.Symbol(s.name, real=True) for s in relation.free_symbols}
    )
    if len(relation.free_symbols) != 1:
        return relation
    try:
        return relation.as_set()
    except Exception:  # not for this solver
        return relation


def same_relation(answer: Tree, gold: Tree) -> bool:
    """Equal solution sets of one unknown; else left minus right side in a constant ratio, of the
    right sign."""
    if (
        _is_inequality(answer)
        and _is_inequality(gold)
        and answer.free_symbols
        and gold.free_symbols
    ):
        solutions, gold_solutions = solution_set(answer), solution_set(gold)
        if isinstance(solutions, sympy.Set) and isinstance(gold_solutions, sympy.Set):
            names = {s.name for s in answer.free_symbols} == {s.name for s in gold.free_symbols}
            return names and same_collection(solutions, gold_solutions, nested=False)
    if isinstance(answer, Relational) and isinstance(gold, Relational):
        ratio = _ratio(answer, gold)
        if ratio is not None:
            if isinstance(gold, sympy.Eq | sympy.Ne):
                return type(answer) is type(gold)
            return type(answer) is (type(gold) if ratio > 0 else _MIRROR[type(gold)])
    return left_to_math_verify(answer, gold)


def _ratio(answer: Relational, gold: Relational) -> Tree | None:
    """The number that left minus right side of one is times that of the other, or None."""
    try:
        one, other = _exact(answer.lhs - answer.rhs), _exact(gold.lhs - gold.rhs)
        symbols = sorted(one.free_symbols | other.free_symbols, key=str)
        ratios = [(one / other).subs(point).doit() for point in _points(symbols, 7)]
        constant = all(vanishes(ratio - ratios[0]) for ratio in ratios[1:])
        return (
            ratios[0] if constant and ratios[0].is_real and vanishes(ratios[0]) is False else None
        )
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return None


def left_to_math_verify(answer: Tree, gold: Tree) -> bool:
    """math-verify's word, with decimals as fractions and digits enough that nothing small counts as
    zero."""
    trees = [_rational(gold), _rational(answer)]
    return bool(
        verify(*trees, float_rounding=DIGITS, numeric_precision=5 * DIGITS, timeout_seconds=None)
    )


def _rational(tree: Tree) -> Tree:
    return tree.xreplace(
        {number: sympy.Rational(str(number)) for number in tree.atoms(sympy.Float)}
    )
