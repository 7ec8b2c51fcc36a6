"""Names of the leaves and the plain values of a feature, for options and messages."""

from gpucache_pipes.files.layout import Tree


def leaf_names(tree: Tree) -> list[str]:
    """Return the name of each leaf for options and messages, in the order of the tree.

    >>> import torch
    >>> from gpucache_pipes.files import flatten
    >>> tree, _, _ = flatten({"x": torch.zeros(2), "y": [3, torch.ones(1)]})
    >>> leaf_names(tree)
    ["['x']", "['y'][1]"]
    """
    return _names(tree)[0]


def value_names(tree: Tree) -> list[str]:
    """Return the name of each plain value, in the same way.

    >>> import torch
    >>> from gpucache_pipes.files import flatten
    >>> tree, _, _ = flatten({"x": torch.zeros(2), "y": [3, torch.ones(1)]})
    >>> value_names(tree)
    ["['y'][0]"]
    """
    return _names(tree)[1]


def _names(tree: Tree) -> tuple[list[str], list[str]]:
    leaves: list[str] = []
    values: list[str] = []

    def visit(node: Tree, name: str) -> None:
        if isinstance(node, int):
            (leaves if node >= 0 else values).append(name or "the feature")
        else:
            labels = node.keys if node.keys is not None else range(len(node.children))
            for label, child in zip(labels, node.children, strict=True):
                visit(child, f"{name}[{label!r}]")

    visit(tree, "")
    return leaves, values
