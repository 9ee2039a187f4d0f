"""Registration of methods with PEFT, through its own extension point."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from gradselect.usage import UsageError

try:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] != "peft":
        raise
    raise ModuleNotFoundError("gradselect.adapters needs PEFT; run: pip install 'peft>=0.20'", name="peft") from None
except ImportError:
    raise UsageError(
        f"peft {version('peft')} cannot be extended with methods of others (it has no register_peft_method); "
        "run: pip install -U 'peft>=0.20'"
    ) from None


def peft_type(name: str) -> PeftType:
    """Return PEFT's type of a method, which is added to its enumeration if it is new.

    PEFT's extension point takes only names of that enumeration, which lists PEFT's own methods.

    Args:
        name: name of the method in lower case.
    """
    key = name.upper()
    if key not in PeftType.__members__:
        kind: Any = PeftType
        member = str.__new__(kind, key)
        member._name_ = member._value_ = key
        kind._member_names_.append(key)
        kind._member_map_[key] = kind._value2member_map_[key] = member
        type.__setattr__(kind, key, member)  # an enumeration refuses the plain assignment
    return PeftType[key]


def register(config_class: Any, tuner_class: Any) -> None:
    """Make a method known to PEFT. If PEFT has one of that name itself, PEFT's stays.

    Args:
        config_class: its subclass of `AdapterConfig`.
        tuner_class: its subclass of `AdapterTuner`.
    """
    if config_class.method not in {kind.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}:
        peft_type(config_class.method)
        register_peft_method(
            name=config_class.method, config_cls=config_class, model_cls=tuner_class, prefix=tuner_class.prefix
        )


def check_is_registered(config_class: Any) -> None:
    """Check that a method is ours in PEFT too.

    Raises:
        UsageError: PEFT has one of that name itself.
    """
    theirs = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type(config_class.method)]
    if theirs is not config_class:
        raise UsageError(
            f"peft {version('peft')} has a method {config_class.method!r} of its own; use {theirs.__module__}."
            f"{theirs.__name__}, in a recipe method={{name: peft, type: {config_class.method.upper()}}}"
        )
