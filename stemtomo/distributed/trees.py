"""Trees: the dicts, tuples and lists of arrays and scalars that parts hold and sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

Tree: TypeAlias = Any
"""A leaf (array or scalar), or a dict, tuple or list of trees; ``None`` is the empty contribution."""


def map_tree(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Apply ``function`` to the corresponding leaves of one or more trees of the same structure."""
    _require_same_structure((tree, *others))
    if isinstance(tree, dict):
        return {key: map_tree(function, value, *(other[key] for other in others)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        found = (map_tree(function, *leaves) for leaves in zip(tree, *others, strict=True))
        return type(tree)(*found) if hasattr(tree, "_fields") else type(tree)(found)
    return function(tree, *others)


def leaves(tree: Tree) -> Iterator[Any]:
    """Iterate over the leaves of ``tree``, depth first."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from leaves(item)
    else:
        yield tree


def find(nest: Any, kind: type) -> Iterator[Any]:
    """Iterate over the objects of type ``kind`` nested in dicts, tuples and lists."""
    return (leaf for leaf in leaves(nest) if isinstance(leaf, kind))


def replace(nest: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return ``nest`` with ``function(item)`` in the place of every object of type ``kind``."""
    if next(find(nest, kind), None) is None:
        return nest
    return map_tree(lambda leaf: function(leaf) if isinstance(leaf, kind) else leaf, nest)


def tree_bytes(tree: Tree) -> int:
    """Bytes of all arrays in ``tree``; scalars count as nothing."""
    return sum(int(getattr(leaf, "nbytes", 0)) for leaf in leaves(tree))


def sum_trees(trees: Sequence[Tree]) -> Tree:
    """Sum ``trees`` leaf by leaf in the given order, without changing any of them.

    ``None`` contributes nothing, at the top or at any node; the sum of nothing is ``None``.

    Raises
    ------
    ValueError
        If two trees differ in structure, or two arrays in shape.
    """
    present = [tree for tree in trees if tree is not None]
    if not present:
        return None
    first = present[0]
    _require_same_structure(present)
    if isinstance(first, dict):
        return {key: sum_trees([tree[key] for tree in present]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(sum_trees(items) for items in zip(*present, strict=True))
    return _sum_leaves(present)


def _sum_leaves(terms: Sequence[Any]) -> Any:
    total = terms[0]
    owned = False  # the first array belongs to a part; only what is made here may be added to in place
    for term in terms[1:]:
        if np.shape(term) != np.shape(total):
            raise ValueError(
                f"cannot sum arrays of shapes {np.shape(total)} and {np.shape(term)}; parts must agree on it"
            )
        if owned and np.ndim(term) and term.dtype == total.dtype:
            total += term
        else:
            total = total + term
            owned = True
    return total


def _require_same_structure(trees: Sequence[Tree]) -> None:
    kinds = {_structure(tree) for tree in trees}
    if len(kinds) > 1:
        raise ValueError(f"the values of the parts differ in structure: {' and '.join(sorted(kinds))}; they must agree")


def _structure(tree: Tree) -> str:
    if isinstance(tree, dict):
        return f"dict of {sorted(map(str, tree))}"
    if isinstance(tree, (list, tuple)):
        return f"{type(tree).__name__} of {len(tree)}"
    return "leaf"
