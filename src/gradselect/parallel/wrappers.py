"""Data-parallel wrappers: the model inside them, and checks that refuse set-ups that cannot work."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradselect.usage import UsageError


def unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, then each module inside DistributedDataParallel, DataParallel and torch.compile."""
    yield model
    inner = model._modules.get("_orig_mod")  # torch.compile's; its class is slow to import
    if isinstance(model, DistributedDataParallel | DataParallel):
        inner = model.module
    if inner is not None:
        yield from unwrapping(inner)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without wrappers."""
    *_, innermost = unwrapping(model)
    return innermost


def check_module(model: object) -> None:
    """Check that `model` is a module.

    Raises:
        UsageError: it is not, but its parameters, for example.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"expected a model (torch.nn.Module), got {type(model).__name__}; pass the model itself and not "
            "model.parameters(), e.g. gs.BlockOptimizer(model, policy=gs.AdaGradSelect(fraction=0.2)): parameters are "
            "found by their names in it"
        )


def check_placement(model: nn.Module) -> None:
    """Check that all parameters are materialised, on one device, and not hidden by a wrapper.

    Raises:
        UsageError: names the parameter or wrapper, and what to write instead.
    """
    check_module(model)
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        raise UsageError(
            "a DeepSpeed engine steps an optimizer of its own and hides gradients from others; train the model itself, "
            "wrapped in DistributedDataParallel(model, find_unused_parameters=True), or sharded with "
            "torch.distributed.fsdp.fully_shard(model) (in Accelerate: fsdp_version: 2)"
        )
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if getattr(parameter, "ds_id", None) is not None:
            raise UsageError(
                f"{name!r} belongs to DeepSpeed ZeRO-3, which hides weights and gradients from other optimizers; shard "
                "with torch.distributed.fsdp.fully_shard(model) instead (in Accelerate: fsdp_version: 2)"
            )
        if parameter.is_meta:
            raise UsageError(
                f"{name!r} is on the meta device and has no values; materialise the model first: "
                "model.to_empty(device=...), then load its weights, then build the optimizer"
            )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UsageError(
            "FullyShardedDataParallel flattens parameters across blocks; shard with FSDP2 instead: "
            "torch.distributed.fsdp.fully_shard(model) (in Accelerate: fsdp_version: 2)"
        )
    trained = {name: parameter.device for name, parameter in parameters.items() if parameter.requires_grad}
    first = next(iter(trained.items()), None)
    for name, device in trained.items():
        if first is not None and device != first[1]:
            raise UsageError(
                f"the model is on two devices: {first[0]!r} on {first[1]}, {name!r} on {device}; load it onto one, "
                'without device_map="auto", and use fully_shard to spread it over several'
            )


def check_data_parallel(*, trains_everything: bool) -> None:
    """Check, within a forward pass, that a running DistributedDataParallel allows parameters without a gradient.

    Raises:
        UsageError: it does not.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None or trains_everything:
        return
    if not wrapper.find_unused_parameters or wrapper.static_graph:
        raise UsageError(
            f"DistributedDataParallel(find_unused_parameters={wrapper.find_unused_parameters}, "
            f"static_graph={wrapper.static_graph}) does not average the gradients of blocks that change; write "
            "DistributedDataParallel(model, find_unused_parameters=True), in TrainingArguments "
            "ddp_find_unused_parameters=True"
        )
