"""Tiny classifiers of known families, exported as a student would be."""

import numpy as np
import onnxruntime
import torch
import transformers
from conftest import make_tokenizer
from distill.export.onnx import export_fp32

RIGHT = [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]


def export_tiny(config, folder, tokenizer=None):
    """A randomly initialised classifier of `config`: its ONNX file and itself."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    for weight in model.parameters():  # vectors too, which start as ones and zeros
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder / "model")
    (tokenizer or make_tokenizer()).save_pretrained(folder / "model")
    return export_fp32(folder / "model", folder / "onnx"), model


def run_graph(path, ids, mask):
    """All outputs of a graph on the CPU provider."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return session.run(None, {node.name: given[node.name] for node in session.get_inputs()})
