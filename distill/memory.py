"""How much memory a training takes, and how to cut its batches so that it fits."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from distill.devices import PRECISIONS
from distill.errors import DistillError

logger = logging.getLogger(__name__)
MARGIN = 0.9  # of what is free; the rest is for the allocator's gaps and the kernels' own space
STATE = {"adamw": 8, "adamw_8bit": 2}  # bytes of optimizer state a trained number
COMFORT = 8  # texts in a micro-batch below which recomputation costs less time than smaller batches


@dataclass(frozen=True)
class Footprint:
    """What training a model takes, in bytes.

    Attributes:
        weights: of all parameters and buffers.
        trained: how many numbers are trained.
        fixed: kept for the backward pass whatever the batch: weights cast by autocast.
        text: kept for the backward pass for each text.
        layer: of `text`, what one layer keeps.
        outside: of `text`, what is kept when every layer is computed again in the backward pass.
        tables: how many of the trained numbers are in embeddings, whose optimizer state stays at 32 bits.
        recomputable: whether layers can be computed again in the backward pass.
    """

    weights: int
    trained: int
    fixed: int
    text: int
    layer: int
    outside: int
    tables: int = 0
    recomputable: bool = True

    def peak(
        self, micro_batch: int, accumulation: int = 1, recompute: bool = False, optimizer: str = "adamw"
    ) -> int:
        """Bytes in use at the fullest moment of a step.

        That is the end of a forward pass, when all is kept for the backward pass, or the end of the backward
        pass, when all gradients are there. Gradients of earlier micro-batches are there in both.
        """
        gradients = 4 * self.trained
        text = self.outside + self.layer if recompute else self.text
        kept = self.fixed + micro_batch * text
        moment = gradients + kept if accumulation > 1 else max(gradients, kept)
        state = STATE[optimizer] * (self.trained - self.tables) + STATE["adamw"] * self.tables
        return self.weights + state + moment


@dataclass(frozen=True)
class Plan:
    """How a step is cut: `micro_batch` texts at a time, `accumulation` times."""

    micro_batch: int
    accumulation: int
    recompute: bool = False
    optimizer: str = "adamw"
    peak: int = 0


def measure(model: Any, batch: Callable[[int], dict[str, torch.Tensor]], precision: str) -> Footprint:
    """Measure a footprint by two forward passes, of one and of two texts.

    Args:
        model: a sequence classifier, on the device where it will be trained.
        batch: gives the inputs of that many of the longest texts.
        precision: "fp32", "bf16" or "fp16" (autocast).

    Raises:
        torch.OutOfMemoryError: if not even these fit.
    """
    weights = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    tables = {id(one.weight): one.weight for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    recomputable = bool(getattr(model, "supports_gradient_checkpointing", False))
    training = model.training
    model.train()
    try:
        one, two = (_kept(model, batch(texts), precision) for texts in (1, 2))
        text = two - one
        outside, layer = text, 0
        if recomputable:
            with _recomputing(model):
                outside = max(0, _kept(model, batch(2), precision) - _kept(model, batch(1), precision))
            layer = max(0, text - outside) // max(1, int(getattr(model.config, "num_hidden_layers", 1)))
    finally:
        model.train(training)
    return Footprint(
        weights,
        trained,
        max(0, one - text),
        text,
        layer,
        outside,
        sum(one.numel() for one in tables.values() if one.requires_grad),
        recomputable,
    )


def _kept(model: Any, inputs: dict[str, torch.Tensor], precision: str) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside the parameters themselves."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being given again

    device = model.device
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    autocast = torch.autocast(device.type, PRECISIONS[precision]) if precision != "fp32" else nullcontext()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one), autocast:
        output = model(**moved)
    del output
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def plan(
    footprint: Footprint,
    batch_size: int,
    accumulation: int,
    recompute: bool,
    limit: int,
    optimizer: str | None = None,
) -> Plan:
    """The fastest way to take a step of `batch_size` texts, `accumulation` times, within `limit` bytes.

    First whole batches, then smaller ones down to 8 texts; then with each layer computed again in the
    backward pass; then down to single texts; then with an 8-bit optimizer where bitsandbytes is installed.

    Args:
        footprint: of `measure`.
        batch_size: texts a step.
        accumulation: steps of the kind before the optimizer's.
        recompute: recompute in any case.
        limit: bytes that there are.
        optimizer: the one to take, "adamw" or "adamw_8bit"; as needed when left out.

    Raises:
        DistillError: if a single text does not fit.
    """
    eight = ["adamw_8bit"] if find_spec("bitsandbytes") else []
    optimizers = [optimizer] if optimizer else ["adamw", *eight]
    again = [True] if recompute else [False, *([True] if footprint.recomputable else [])]
    sizes = [size for size in range(batch_size, 0, -1) if batch_size % size == 0]
    for kind in optimizers:
        for smallest in (min(COMFORT, batch_size), 1):
            for recomputed in again:
                for size in (size for size in sizes if size >= smallest):
                    times = accumulation * batch_size // size
                    peak = footprint.peak(size, times, recomputed, kind)
                    if peak <= limit:
                        return Plan(size, times, recomputed, kind, peak)
    least = footprint.peak(1, accumulation * batch_size, again[-1], optimizers[-1]) / 2**30
    raise DistillError(
        f"--model: training it takes {least:.1f} GiB even one text at a time, and {limit / 2**30:.1f} GiB "
        "are free; use --lora or --qlora, a smaller --max-length, or a smaller model"
    )


def smaller(before: Plan, title: str, recomputable: bool = True) -> Plan:
    """Half the texts at a time, or fewer, twice as often; in the end with layers computed again.

    Raises:
        DistillError: if it was one text at a time, with all that can be done.
    """
    if before.micro_batch > 1:
        size = next(size for size in range(before.micro_batch // 2, 0, -1) if before.micro_batch % size == 0)
        times = before.accumulation * before.micro_batch // size
        return replace(before, micro_batch=size, accumulation=times)
    if recomputable and not before.recompute:
        return replace(before, recompute=True)
    raise DistillError(
        f"{title}: out of memory with one text at a time; use --lora or --qlora, a smaller --max-length, or "
        "a smaller model"
    )


def available(device: str) -> int | None:
    """Bytes of the GPU that a training may use beside what is there already; None on a CPU."""
    if device != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(MARGIN * (free + unused))
