"""Selective fine-tuning: train, at every step, only the part of the model that matters now.

The names of `public_names.py` are here. They are loaded when the first one is asked for: torch takes seconds to load,
and the command line says before that what it does.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from gradselect import delta as delta
    from gradselect import sparsegrad as sparsegrad
    from gradselect import spt as spt
    from gradselect.public_names import *  # noqa: F403

    __version__: str

if not _typing.TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> _typing.Any:
        if name == "__version__":
            return globals().setdefault(name, _installed_version())
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

    def _installed_version() -> str:
        """Return the version of the installed package: its tag, or the commit that it was installed from."""
        metadata = _importlib.import_module("importlib.metadata")
        try:
            return metadata.version("gradselect")
        except metadata.PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
