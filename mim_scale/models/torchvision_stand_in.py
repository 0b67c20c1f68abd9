"""timm, which Primus is made of, wants torchvision at import, and what is used of timm here uses nothing of it.

A torchvision that was built for another torch (a CPU build, say) fails as soon as it is imported, and there may be no
torchvision at all. Names alone then stand in for it while timm is imported, and for no longer.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

PACKAGE = "torchvision"


@contextmanager
def timm_importable() -> Iterator[None]:
    """Inside, timm can be imported whether torchvision works or not."""
    if _works():
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget()


def _works() -> bool:
    try:
        importlib.import_module(PACKAGE)
    # An operator that is missing is a RuntimeError, a library that is missing an OSError.
    except (ImportError, OSError, RuntimeError):
        _forget()
        return False
    return True


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _Names(ModuleType):
    """Has every name, each an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Empty(type):
    """A class whose every attribute is its own name: members of enumerations are keys of tables."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name
