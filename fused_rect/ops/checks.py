"""What the ops demand of their tensors, checked before anything is written, and how a tensor is made dense."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..internals import is_dense, suggested_memory_format
from ..rules import Parameters, Rule

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)


def check(input: Tensor, parameters: Parameters, rule: Rule) -> None:
    """RuntimeError, as torch's own functions raise it, for tensors that do not fit together."""
    if input.dtype not in FLOATING:
        raise RuntimeError(
            f"input must be float16, bfloat16, float32 or float64, got {input.dtype}; convert it with input.float()"
        )
    bias, weight, seed = parameters
    if bias is not None:
        if input.dim() < 2:
            raise RuntimeError(
                "input must have its channels in dim 1 for a bias, "
                f"got shape {tuple(input.shape)}; add a batch dimension"
            )
        if bias.dim() != 1 or bias.shape[0] != input.shape[1]:
            raise RuntimeError(
                f"bias must have shape ({input.shape[1]},), one value for each channel of input (dim 1), "
                f"got {tuple(bias.shape)}"
            )
        _check_companion("bias", bias, input)
    if rule.learned:
        _check_weight(weight, input)
    elif rule.random:
        _check_seed(seed, input)


def check_dtypes(input: Tensor, parameters: Parameters) -> None:
    """The ops take float32 parameters beside 16-bit inputs; outside autocast that mix is somebody's mistake."""
    for name, parameter in (("bias", parameters.bias), ("weight", parameters.weight)):
        if parameter is None or parameter.dtype == input.dtype or torch.is_autocast_enabled(input.device.type):
            continue
        raise RuntimeError(
            f"{name} must have the dtype of input ({input.dtype}), got {parameter.dtype}; "
            f"convert it with {name}.to(input.dtype), or run under torch.autocast"
        )


def _check_companion(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.dtype != input.dtype and not (input.dtype in HALF and tensor.dtype == torch.float32):
        raise RuntimeError(
            f"{name} must have the dtype of input ({input.dtype}) or float32 beside a 16-bit input, "
            f"got {tensor.dtype}; convert it with {name}.to(input.dtype)"
        )
    if tensor.device != input.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, "
            f"but {name} is on {tensor.device} and input on {input.device}; move it with {name}.to(input.device)"
        )


def _check_weight(weight: Tensor | None, input: Tensor) -> None:
    if weight is None:
        raise RuntimeError("weight is required: prelu's slope tensor of shape (1,) or (C,)")
    channels = input.shape[1] if input.dim() > 1 else 1
    if weight.dim() > 1 or weight.numel() not in (1, channels):
        raise RuntimeError(
            f"weight must hold 1 or {channels} values, one for each channel of input (dim 1), "
            f"got shape {tuple(weight.shape)}"
        )
    _check_companion("weight", weight, input)


def _check_seed(seed: Tensor | None, input: Tensor) -> None:
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        got = "None" if seed is None else f"{seed.dtype} of shape {tuple(seed.shape)}"
        raise RuntimeError(
            f"seed must be an int64 tensor of shape (1,), got {got}; draw one with fused_rect.random.new_seed"
        )
    if seed.device != input.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but seed is on {seed.device} and input on {input.device}; "
            "draw it with fused_rect.random.new_seed(input.device)"
        )


def check_kept(grad: Tensor, kept: Tensor, parameters: Parameters, rule: Rule) -> None:
    """RuntimeError unless ``grad`` is a gradient of the call that kept ``kept``, its bits or its input."""
    if kept.dtype != torch.uint8:
        check(kept, parameters, rule)
        if grad.shape != kept.shape or grad.dtype != kept.dtype or grad.device != kept.device:
            raise RuntimeError(
                "grad must have the shape, dtype and device of the input that is kept "
                f"({tuple(kept.shape)}, {kept.dtype}, {kept.device}), "
                f"got {tuple(grad.shape)}, {grad.dtype}, {grad.device}"
            )
        return
    check(grad, parameters, rule)
    if rule.keeps_input:
        raise RuntimeError(f"kept must be the input of {rule.name}, whose gradients need its values, got bits (uint8)")
    if kept.dim() != 1 or kept.shape[0] != (grad.numel() + 7) // 8 or kept.device != grad.device:
        raise RuntimeError(
            f"kept must hold the bits of {grad.numel()} elements in {(grad.numel() + 7) // 8} bytes on {grad.device}, "
            f"got shape {tuple(kept.shape)} on {kept.device}"
        )
    if not is_dense(grad):
        raise RuntimeError(
            "grad must be dense and laid out as the output was, since bits follow the memory, "
            f"got shape {tuple(grad.shape)} with strides {grad.stride()}"
        )


def check_in_place(input: Tensor) -> None:
    """RuntimeError where two elements of ``input`` share one place in memory, or it may not be written any more."""
    if input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "input: Inplace update to inference tensor outside InferenceMode is not allowed; pass input.clone()"
        )
    if not is_dense(input) and any(size > 1 and stride == 0 for size, stride in zip(input.shape, input.stride())):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the input tensor before performing the operation."
        )


def dense(tensor: Tensor, stride: Sequence[int] | None = None) -> Tensor:
    """``tensor`` itself where it is dense, else a contiguous copy (channels_last where its strides suggest that).

    stride: of the dense layout that is wanted, where it matters.
    """
    if stride is not None:
        return laid_out_as(tensor, stride)
    return tensor if is_dense(tensor) else tensor.contiguous(memory_format=suggested_memory_format(tensor))


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``dense(tensor)``, without the copy."""
    return (
        tensor
        if is_dense(tensor)
        else torch.empty_like(tensor, device="meta").contiguous(memory_format=suggested_memory_format(tensor))
    ).stride()


def one_after_the_other(parameter: Tensor | None) -> Tensor | None:
    """``parameter`` itself where its values lie so, as kernels read them, else a copy."""
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()


def laid_out_as(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """``tensor`` with the strides of a dense tensor of its shape: itself, or a copy."""
    if tensor.stride() == tuple(stride):
        return tensor
    return tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)
