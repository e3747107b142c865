"""Nested sections and dotted keys: two writings of the same tree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Tree = dict[str, object]  # a value is a Tree or a leaf


def flatten(tree: Mapping[object, object], prefix: str = "") -> dict[str, object]:
    """Leaves by dotted key, in order; a list is a leaf, and so is a section with nothing in it.

    >>> flatten({"models": {"policy": {"num_gpu": 8}}})
    {'models.policy.num_gpu': 8}
    """
    leaves: dict[str, object] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            leaves.update(flatten(value, f"{key}."))
        else:
            leaves[key] = value
    return leaves


def nest(leaves: Mapping[str, object], sections: Iterable[str] = ()) -> Tree:
    """The inverse of ``flatten``; every one of ``sections`` exists, even when nothing is in it."""
    tree: Tree = {}
    for section in sections:
        _section(tree, section.split("."))
    for key, value in leaves.items():
        *path, name = key.split(".")
        _section(tree, path)[name] = value
    return tree


def _section(tree: Tree, path: Iterable[str]) -> Tree:
    for name in path:
        below = tree.get(name)
        if not isinstance(below, dict):
            below = Tree()
            tree[name] = below
        tree = below
    return tree
