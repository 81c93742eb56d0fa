"""A PyTorch student becomes an fp32 ONNX graph through Optimum, plain and with fused operators."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
from distill.export.pooling import attend_from_first_token, keep_first_token

from distill.errors import DistillError

logger = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' chatter off the screen; their errors still come through as exceptions."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def export_fp32(student: Path, folder: Path) -> Path:
    """Export with Optimum; gives the path of `model.onnx` in `folder`.

    Raises:
        DistillError: if Optimum cannot export this architecture.
    """
    from optimum.exporters.onnx import main_export

    try:
        with quiet():
            main_export(
                str(student), folder, task="text-classification", do_validation=False, no_post_process=True
            )
    except Exception as error:  # the exporter raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise DistillError(f"--student {student}: Optimum cannot export it: {reason}") from error
    return folder / "model.onnx"


def shorten(model: Path, shortened: Path) -> bool:
    """Write `model` without what its answer does not need; False if that is nothing."""
    graph = onnx.load(model)
    found = keep_first_token(graph)
    if found:
        attend_from_first_token(graph)
    onnx.save(graph, shortened)
    return found


def fuse(model: Path, fused: Path, config: Any, provider: str = "cpu") -> bool:
    """Write `model` with attention and GELU fused; False where ONNX Runtime knows no fusion.

    For CUDA all is fused, and padding is known by the text's length (it stands on the right). For the CPU,
    LayerNormalization stays apart from the addition before it and from the embedding, and GELU from its bias:
    the kernels that fuse them are slower there than the plain ones; and attention takes the mask as it is,
    which is right for padding on either side.
    """
    from onnxruntime.transformers.fusion_options import AttentionMaskFormat, FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    known = {
        "bert": "bert",
        "distilbert": "bert",
        "roberta": "bert",
        "xlm-roberta": "bert",
        "electra": "bert",
        "mpnet": "bert",
    }
    kind = known.get(config.model_type)
    if kind is None:
        return False
    options = FusionOptions(kind)
    options.attention_mask_format = AttentionMaskFormat.MaskIndexEnd
    if provider == "cpu":
        options.enable_skip_layer_norm = False
        options.enable_bias_skip_layer_norm = False
        options.enable_embed_layer_norm = False
        options.enable_bias_gelu = False
        options.attention_mask_format = AttentionMaskFormat.AttentionMask
    try:
        with quiet():
            optimized = optimize_model(
                str(model),
                kind,
                optimization_options=options,
                num_heads=config.num_attention_heads,
                hidden_size=config.hidden_size,
                opt_level=0,
            )
            optimized.save_model_to_file(str(fused))
    except Exception as error:  # fusion is an offer, never a need
        logger.info("Fusion left out: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
        return False
    return True
