"""Device and precision; what fits a device, and what to do where it does not."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from distill.errors import DistillError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def choose_device(wanted: str = "auto") -> str:
    """Return "cuda" or "cpu".

    Raises:
        DistillError: if CUDA is asked for and absent. Nothing falls back silently.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise DistillError(
            "--device cuda: PyTorch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    return wanted


def cpu_has_bf16() -> bool:
    """Say whether PyTorch may use bf16 instructions (AVX512-BF16 or AMX) of this CPU.

    Autocast also "works" without them, in an emulation 15 times slower than fp32, so the instructions are
    asked for, and PyTorch's own ceiling (ATEN_CPU_CAPABILITY) is honoured.
    """
    if "AVX512" not in torch.backends.cpu.get_cpu_capability().upper():
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_precision(device: str, wanted: str = "auto") -> str:
    """Return "bf16", "fp16" or "fp32": the fastest that the device computes natively.

    Raises:
        DistillError: if the device cannot compute what is asked for.
    """
    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
        if wanted == "bf16" and not native:
            raise DistillError(
                "--precision bf16: this GPU has no bf16 (compute capability below 8.0); use fp16"
            )
        return wanted if wanted != "auto" else ("bf16" if native else "fp16")
    if wanted == "fp16":
        raise DistillError("--precision fp16: only a CUDA device trains in fp16; use bf16 or fp32 on a CPU")
    if wanted == "bf16" and not cpu_has_bf16():
        raise DistillError(
            "--precision bf16: this CPU has no bf16 instructions and would emulate them; use fp32"
        )
    return wanted if wanted != "auto" else ("bf16" if cpu_has_bf16() else "fp32")


@contextmanager
def inference(device: str, precision: str) -> Iterator[None]:
    """Inference mode with autocast to `precision`."""
    autocast = torch.autocast(device, PRECISIONS[precision]) if precision != "fp32" else nullcontext()
    with torch.inference_mode(), autocast:
        yield


def put_on(model: Any, device: str, precision: str) -> None:
    """Move a model to a device for inference; one that is too large there in fp32 in half its size.

    That is with the matrices of linear layers cast to what autocast casts them to at every call: the same
    numbers.

    Raises:
        DistillError: if it does not fit so either.
    """
    try:
        model.to(device)
        return
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    model.to("cpu")
    release()
    try:
        for matrix in _matrices(model):
            matrix.data = matrix.data.to(device, PRECISIONS[precision])
        model.to(device)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        size = sum(one.numel() for one in model.parameters()) / 1e9
        raise DistillError(
            f"out of memory: a model of {size:.1f} billion parameters does not fit this device in "
            f"{precision}; take a smaller one, or --device cpu"
        ) from error


@contextmanager
def placed(model: Any, device: str, precision: str) -> Iterator[None]:
    """Within it a model is where `put_on` puts it; one from a CPU is there again afterwards, whole."""
    if model.device.type == device:
        yield
        return
    matrices = _matrices(model)
    whole = [matrix.data for matrix in matrices]
    try:
        put_on(model, device, precision)
        yield
    finally:
        for matrix, data in zip(matrices, whole, strict=True):
            matrix.data = data
        model.to("cpu")
        release()


def _matrices(model: Any) -> list[torch.Tensor]:
    return [one.weight for one in model.modules() if isinstance(one, torch.nn.Linear | Conv1D)]


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, or a library below it, found no memory: cuBLAS and cuDNN have errors of their own."""
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
    return told or isinstance(error, torch.OutOfMemoryError)


def release() -> None:
    """Free what nobody uses: accelerate's optimizer refers to itself, so it stays until it is looked for."""
    gc.collect()
    torch.cuda.empty_cache()
