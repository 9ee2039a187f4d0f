"""All that `gradselect doctor` looks at, in order."""

from __future__ import annotations

from collections.abc import Iterator

from .findings import Finding


def examine() -> Iterator[Finding]:
    """Look at the installation and the devices of this machine; yield each finding when it is known.

    Example:
        >>> next(examine()).name
        'python'
    """
    from .packages import features, versions

    yield from versions()
    try:
        import torch  # noqa: F401
    except Exception as error:  # a broken installation raises anything: OSError for a library that is not found
        yield Finding.broken("torch", error, advice="pip install --force-reinstall torch")
        return
    yield from features()
    from .devices import examine_devices

    yield from examine_devices()
