"""Selective fine-tuning: train, at every step, only the part of the model that matters now.

The names of `public_names.py` are here. They are loaded when the first one is asked for: torch takes seconds to load,
and the command line says before that what it does.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from gradselect import delta as delta
    from gradselect import sparsegrad as sparsegrad
    from gradselect.public_names import *  # noqa: F403

__version__ = "0.1.0.dev0"

if not _typing.TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> _typing.Any:
        if name != "__all__" and name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public_names = _importlib.import_module("gradselect.public_names")
        globals().setdefault("__all__", public_names.__all__)
        for each in public_names.__all__:  # a name that somebody has replaced stays so
            globals().setdefault(each, getattr(public_names, each))
        try:
            return globals()[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
