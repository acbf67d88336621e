"""Code that a user names, "module:name" or "path/to/file.py:name": found, and blamed for its own errors."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fused_rect

# Frames of these are on the way to the user's code, or below it.
_OTHERS = tuple(f"{Path(str(module.__file__)).parent}/" for module in (fused_rect, torch))
_STANDARD = f"{sysconfig.get_path('stdlib')}/"


class UserError(RuntimeError):
    """Code that the user named has failed; the message names its file, line and error."""


def named(name: str) -> Any:
    """The object that ``name`` names. Raises ValueError where there is none, UserError where its code fails."""
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ValueError(f"{name!r} names nothing: expected module:name or file.py:name")
    module = _file(Path(where)) if where.endswith(".py") else _module(where)
    try:
        return getattr(module, attribute)
    except AttributeError:
        there = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        told = f"it defines {', '.join(there)}" if there else "it defines nothing"
        raise ValueError(f"{name!r} names nothing: {where} has no {attribute!r}, {told}") from None


def _module(name: str) -> ModuleType:
    try:
        with users_code():
            return importlib.import_module(name)
    except UserError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{name}.".startswith(f"{missing.name}."):
            raise ValueError(f"{name!r} names nothing: {missing}") from missing
        raise


def _file(path: Path) -> ModuleType:
    """The module in ``path``, which stands in sys.modules, so that the source of its classes can be found."""
    if not path.is_file():
        raise ValueError(f"{str(path)!r} names nothing: there is no such file")
    name = path.stem
    while name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path.resolve()):
        name += "_"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with users_code():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def users_code() -> Iterator[None]:
    """What fails inside, an exit included, is a UserError."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise error if isinstance(error, UserError) else UserError(described(error)) from error


def described(error: BaseException) -> str:
    """The error's type and first line, behind the innermost line of code that is neither torch's nor ours, if any."""
    if isinstance(error, UserError):
        return str(error)
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {text}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_others(f.filename)]
    return f"{frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}: {text}" if frames else text


def _is_others(file: str) -> bool:
    return file.startswith((*_OTHERS, "<")) or (file.startswith(_STANDARD) and "site-packages" not in file)
