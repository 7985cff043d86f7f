"""Shard a model over the processes of a learner call with FSDP2, so that each process holds a part of all weights.

Each process also holds only its part of the gradients and of the optimizer's state. transformers reads the parts from the
model's files (`from_pretrained(distributed_config=...)`). The processes gather the weights of one layer at a time, for its
forward pass and for its backward pass. Outside a learner call, and with one process, all functions here do nothing special.

FSDP2 sets these rules for a learner:

 1. All processes call the layers equally often and in the same order. A process without rows makes an empty pass
    (`PolicyModel.iterate_shard`). Otherwise the other processes wait for it forever.
 2. Layers are called inside the root module (`run_in_root`). trl's trainers call the root itself.
 3. By default FSDP2 computes the mean of the gradients over the processes. Charter's own loops divide a loss by the size of
    the whole step, so they need the sum (`sum_gradients_in_backward`). trl's trainers need the mean.
 4. Modules that are added after loading (LoRA adapters, the value head) are complete in each process. Their gradients are
    summed after the backward pass (`all_reduce_gradients`; trl's trainers do this themselves).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig

from engine.errors import UsageError
from trainer.distributed import get_num_shards, multiplies_in_bf16

T = TypeVar("T")
_RUN = "run_function"  # the method that `run_in_root` adds to a root module


def load_model(auto_class: Any, folder: Path, **arguments: Any) -> Any:
    """Return the result of `auto_class.from_pretrained(folder)`. Inside a learner call of several processes, shard the model.

    Raise UsageError if transformers cannot shard this model.
    """
    if (num_shards := get_num_shards()) == 1:
        return auto_class.from_pretrained(folder, **arguments)
    from transformers.distributed import DistributedConfig

    with torch.device("meta"):
        empty_model = auto_class.from_config(AutoConfig.from_pretrained(folder))
    model_class = type(empty_model)
    if not _has_plan_for_layers(empty_model):
        raise UsageError(
            f"a {model_class.__name__} cannot be trained by {num_shards} processes",
            "the plan of transformers for FSDP2 names no layers of this model, so each process would hold all weights at once",
            "start one process (charter train), or set another models.policy",
        )
    # The plan of a causal language model gathers the output layer when its module is called. trl and `distill.py` use the weight
    # of the output layer without this call. Without the entry, the output layer belongs to the root and is gathered with it.
    plan, model_class._fsdp_plan = model_class._fsdp_plan, None
    try:
        # Autocast would keep a complete bf16 copy of each fp32 weight until the backward pass. FSDP2 gathers bf16 copies instead, and
        # releases them after each layer. Gradients are summed in fp32.
        config = DistributedConfig(fsdp_size=num_shards, fsdp_mixed_precision=multiplies_in_bf16())
        return model_class.from_pretrained(folder, distributed_config=config, **arguments)
    finally:
        model_class._fsdp_plan = plan


def _has_plan_for_layers(model: Any) -> bool:
    """Return whether transformers' plan divides the layers of this model. Its general plan does not name the layers of all models."""
    names = [name for name, _ in model.named_modules()]
    rules = [re.escape(rule).replace(r"\*", r"\d+") for rule in model.fsdp_plan if "*" in rule]
    return any(re.fullmatch(rule, name) for rule in rules for name in names)


def is_sharded(model: Any) -> bool:
    """Return whether the weights of a model are divided among the processes."""
    return isinstance(model, FSDPModule)


def run_in_root(root: Any, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Call a function that calls layers of `root` without calling `root` itself.

    Without gradients, the gathered weights are released at once. Otherwise, `parameters()` would return them instead of the parts.
    """
    if not is_sharded(root):
        return function(*arguments, **named)
    if not hasattr(root, _RUN):
        setattr(root, _RUN, lambda function, *arguments, **named: function(*arguments, **named))
        register_fsdp_forward_method(root, _RUN)
    result: T = getattr(root, _RUN)(function, *arguments, **named)
    if not torch.is_grad_enabled():
        release_gathered_weights(root)
    return result


def release_gathered_weights(model: Any) -> None:
    """Release the gathered weights after forward passes without gradients. The model then has only its parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sum_gradients_in_backward(model: Any) -> None:
    """Let the backward pass sum the gradients over the processes instead of computing their mean."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has only the sum


def replace_trainable_parts(model: Any) -> None:
    """Make all trainable parameters complete and equal in all processes, after adapters were added to a sharded model.

    Adapters are complete and get random values. Modules that were copied for training (`modules_to_save`) have parts.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and isinstance(parameter, DTensor):
                setattr(module, name, torch.nn.Parameter(parameter.detach().full_tensor()))
            elif parameter.requires_grad:
                distributed.broadcast(parameter.data, src=0)


def copy_to_parameter(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Copy a complete value into a parameter, or into the part that this process holds. All processes have the same value."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(value)


def copy_gathered_module(module: Any) -> Any:
    """Return a copy of a module that has complete weights in each process and needs no other process."""
    copied = copy.copy(module)
    copied._parameters = {
        name: None if p is None else torch.nn.Parameter(get_complete(p).detach().clone(), requires_grad=False)
        for name, p in module._parameters.items()
    }
    return copied


def get_complete(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the parts of all processes. All processes call this function."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_reduce_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace the gradient of each complete parameter with its sum over all processes.

    The backward pass has already summed the gradients of sharded parameters.
    """
    if get_num_shards() == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:  # this process has no row of the minibatch
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
    """Limit the norm of all gradients together. Return the norm before."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    groups = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups if group]
    total = torch.stack([get_complete(norm) for norm in norms]).norm()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return float(total)


def gather_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the complete weights of a sharded model on the CPU of the main process. Return {} in the other processes."""
    from transformers.distributed.utils import gather_full_state_dict

    return dict(gather_full_state_dict(model))
