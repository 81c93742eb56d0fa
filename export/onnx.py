"""A PyTorch student becomes an fp32 ONNX graph through Optimum, plain and with fused operators."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from distill.export.equal_rows import store_equal_rows_once
from distill.export.idle_heads import drop_idle_heads
from distill.export.one_query import attend_from_first_token
from distill.export.pooling import keep_first_token
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from distill.averaging import AveragingConfig
from distill.errors import DistillError

logger = logging.getLogger(__name__)
OPSET = 18


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


def default_exporter() -> str:
    """Optimum; transformers' own exporter with transformers 5, which Optimum cannot be used with."""
    return "optimum" if int(transformers.__version__.split(".")[0]) < 5 else "transformers"


def export_fp32(student: Path, folder: Path, exporter: str | None = None) -> Path:
    """Export a student's folder; gives the path of `model.onnx` in `folder`.

    Args:
        student: a checkpoint's folder.
        folder: to write to.
        exporter: "optimum" or "transformers"; `default_exporter()` when left out.

    Raises:
        DistillError: if it cannot export this architecture, or cannot be used here.
    """
    exporter = exporter or default_exporter()
    if exporter != default_exporter():
        raise DistillError(
            f"--exporter {exporter}: not with transformers {transformers.__version__}; use --exporter "
            f"{default_exporter()}, or another version of transformers"
        )
    export = _with_optimum if exporter == "optimum" else _with_transformers
    try:
        with quiet():
            export(student, folder)
    except Exception as error:  # the exporters raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise DistillError(f"--student {student}: {exporter} cannot export it: {reason}") from error
    return folder / "model.onnx"


def _with_optimum(student: Path, folder: Path) -> None:
    from optimum.exporters.onnx import export, main_export
    from optimum.exporters.onnx.model_configs import DistilBertOnnxConfig

    task = "text-classification"
    config = AutoConfig.from_pretrained(student, trust_remote_code=False)
    if config.model_type == AveragingConfig.model_type:
        folder.mkdir(parents=True, exist_ok=True)
        # It has the inputs of a DistilBERT: tokens and their mask.
        export(_open(student), DistilBertOnnxConfig(config, task=task), folder / "model.onnx", opset=OPSET)
        return
    # Optimum traces a text of 16 tokens, of which a model of shorter texts has no positions.
    length = min(16, AutoTokenizer.from_pretrained(student, trust_remote_code=False).model_max_length)
    main_export(
        str(student), folder, task=task, do_validation=False, no_post_process=True, sequence_length=length
    )


def _open(student: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        student, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    ).eval()


def _with_transformers(student: Path, folder: Path) -> None:
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = _open(student)
    tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
    # Two texts of different length, so that neither axis is taken for a constant.
    texts = tokenizer(["one text", "another, longer text"], padding=True, return_tensors="pt")
    exported = OnnxExporter().export(model, dict(texts), config=OnnxConfig(dynamic=True, opset_version=OPSET))
    folder.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(exported.program, folder / "model.onnx")


def shorten(model: Path, shortened: Path, provider: str = "cpu") -> bool:
    """Write `model` without what its answer does not need; say whether only its first token is read.

    Rows of tokens that share one are left out too, here and not before: fusion would not know the embedding;
    and, for the CPU, heads that add nothing, where attention is fused.
    """
    graph = onnx.load(model)
    if provider == "cpu":
        drop_idle_heads(graph)
    found = keep_first_token(graph)
    if found:
        attend_from_first_token(graph, provider)
    store_equal_rows_once(graph)
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
