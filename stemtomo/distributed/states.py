"""States as files: a tree of arrays and scalars as one .npz with its structure in JSON, without pickle."""

from __future__ import annotations

import io
import json
import os
from typing import IO, Any

import numpy as np

from stemtomo import backend
from stemtomo.distributed.trees import Tree
from stemtomo.locations import ObjectPath

_STRUCTURE = "structure"
_PLAIN = (bool, int, float, str, type(None))


def write_tree(file: IO[bytes], tree: Tree) -> None:
    """Write ``tree`` to an open file.

    Raises
    ------
    TypeError
        If a leaf is neither an array of numbers, a number, a string nor ``None``, or a key is not a string or number.
    """
    arrays: dict[str, np.ndarray] = {}
    structure = json.dumps(_encode(tree, arrays))
    arrays[_STRUCTURE] = np.frombuffer(structure.encode(), np.uint8)
    np.savez(file, **arrays)  # type: ignore[arg-type]


def read_tree(path: str | os.PathLike[str] | ObjectPath) -> Tree:
    """Return the tree that :func:`write_tree` wrote, arrays of the same dtype in the same memory (host or device)."""
    opened = io.BytesIO(path.read_bytes()) if isinstance(path, ObjectPath) else path
    with np.load(opened, allow_pickle=False) as archive:
        structure = json.loads(archive[_STRUCTURE].tobytes().decode())
        return _decode(structure, archive)


def _encode(tree: Tree, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    kind = type(tree)
    if kind is dict:
        if not all(type(key) in _PLAIN for key in tree):
            raise TypeError(f"keys of a state must be strings or numbers, found {list(tree)!r}")
        return {"dict": [[key, _encode(value, arrays)] for key, value in tree.items()]}
    if kind is tuple or kind is list:
        return {kind.__name__: [_encode(value, arrays) for value in tree]}
    if kind in _PLAIN:
        return {"value": tree}
    if isinstance(tree, (np.ndarray, np.generic, complex)) or backend.is_device_array(tree):
        array = backend.to_host(tree)
        if array.dtype.hasobject:
            raise TypeError(f"an array of dtype {array.dtype} holds Python objects and cannot be part of a state")
        name = f"array-{len(arrays)}"
        arrays[name] = array
        return {"array": name, "form": _form(tree)}
    raise TypeError(f"a state holds arrays, numbers, strings and None in dicts, tuples and lists, not {kind.__name__}")


def _form(leaf: Any) -> str:
    if backend.is_device_array(leaf):
        return "device"
    if isinstance(leaf, np.ndarray):
        return "host"
    return "scalar" if isinstance(leaf, np.generic) else "complex"


def _decode(node: dict[str, Any], archive: Any) -> Tree:
    if "dict" in node:
        return {key: _decode(value, archive) for key, value in node["dict"]}
    if "tuple" in node:
        return tuple(_decode(value, archive) for value in node["tuple"])
    if "list" in node:
        return [_decode(value, archive) for value in node["list"]]
    if "value" in node:
        return node["value"]
    array = archive[node["array"]]
    if node["form"] == "device":
        return backend.to_device(array)
    if node["form"] == "complex":
        return complex(array)
    return array[()] if node["form"] == "scalar" else array
