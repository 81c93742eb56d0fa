import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import make_configs
from distill.export.onnx import default_exporter, fuse, shorten
from distill.export.pooling import SUFFIX, keep_first_token
from distill.export.quantization import Setting, quantize
from export.graphs import RIGHT, export_tiny, run_graph

FIRST_TOKEN = make_configs(layers=2)
MODERN = FIRST_TOKEN.pop("modernbert")
MODERN.classifier_pooling = "mean"
OTHERS = {
    "modernbert, mean": MODERN,
    "gpt2, last": transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=40, num_labels=3, pad_token_id=0
    ),
}
LEFT = [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]


def _logits(path, ids, mask):
    return run_graph(path, ids, mask)[0]


def _matrix_rows(path):
    """Rank of what each product with a matrix of weights is taken of, in the order of the graph."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in model.graph.value_info}
    weights = {entry.name for entry in model.graph.initializer if len(entry.dims) == 2}
    return [
        ranks.get(n.input[0]) for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights
    ]


@pytest.mark.parametrize("name", FIRST_TOKEN)
def test_the_last_layer_runs_on_the_first_token_with_the_same_logits(name, tmp_path):
    exported, model = export_tiny(FIRST_TOKEN[name], tmp_path)
    assert shorten(exported, tmp_path / "short.onnx")
    onnx.checker.check_model(tmp_path / "short.onnx", full_check=True)
    ids = np.arange(5, 25).reshape(2, 10)
    mask = np.array([[1] * 10, RIGHT])
    with torch.no_grad():
        expected = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(_logits(tmp_path / "short.onnx", ids, mask), expected, atol=1e-4, rtol=1e-4)
    before, after = _matrix_rows(exported), _matrix_rows(tmp_path / "short.onnx")
    # The projection after attention and both of the feed-forward network, at least.
    assert after.count(2) - before.count(2) >= 3 and len(after) == len(before)


optimums_graph = pytest.mark.skipif(
    default_exporter() != "optimum", reason="looks for the nodes that Optimum writes"
)


@optimums_graph
@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_the_last_fused_attention_has_one_query(name, provider, tmp_path):
    exported, _ = export_tiny(FIRST_TOKEN[name], tmp_path)
    assert fuse(exported, tmp_path / "fused.onnx", FIRST_TOKEN[name])
    assert shorten(tmp_path / "fused.onnx", tmp_path / "fused.onnx", provider)
    model = onnx.load(tmp_path / "fused.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Attention") == 1  # of the first of two layers
    # Those for the CPU need no keys and values of the tokens.
    assert kinds.count("MultiHeadAttention") == (provider == "cuda")
    assert kinds.count("FusedMatMul") == (provider == "cpu")
    assert any(output.endswith(SUFFIX) for node in model.graph.node for output in node.output)
    ids = np.arange(5, 25).reshape(2, 10)
    for mask in ([[1] * 10, RIGHT], [LEFT, RIGHT]):
        np.testing.assert_allclose(
            _logits(tmp_path / "fused.onnx", ids, np.array(mask)),
            _logits(exported, ids, np.array(mask)),
            atol=1e-4,
            rtol=1e-3,
        )


@optimums_graph
@pytest.mark.parametrize(
    "setting",
    [Setting(fused=True), Setting(fused=True, per_channel=False), Setting(fused=True, attention=True)],
    ids=str,
)
def test_in_int8_the_matrices_of_one_query_are_stored_in_int8_too(setting, tmp_path):
    exported, _ = export_tiny(FIRST_TOKEN["bert"], tmp_path)
    fuse(exported, tmp_path / "fused.onnx", FIRST_TOKEN["bert"])
    shorten(tmp_path / "fused.onnx", tmp_path / "fused.onnx")
    quantize(tmp_path / "fused.onnx", tmp_path / "int8.onnx", setting)
    heads = [entry for entry in onnx.load(tmp_path / "int8.onnx").graph.initializer if len(entry.dims) == 3]
    kinds = sorted((entry.name.rsplit("_", 1)[1], entry.data_type) for entry in heads)
    assert kinds == [("int8", onnx.TensorProto.INT8)] * 2 + [("scale", onnx.TensorProto.FLOAT)] * 2
    ids, mask = np.arange(5, 25).reshape(2, 10), np.array([[1] * 10, RIGHT])
    expected = _logits(exported, ids, mask)
    np.testing.assert_allclose(
        _logits(tmp_path / "int8.onnx", ids, mask), expected, atol=0.1 * np.abs(expected).max()
    )


@pytest.mark.parametrize("name", OTHERS)
def test_a_classifier_that_pools_otherwise_is_left_as_it_is(name, tmp_path):
    exported, _ = export_tiny(OTHERS[name], tmp_path)
    model = onnx.load(exported)
    assert not keep_first_token(model)
    assert model == onnx.load(exported)


@optimums_graph
def test_a_hidden_state_that_is_an_output_too_stays_whole(tmp_path):
    exported, _ = export_tiny(FIRST_TOKEN["bert"], tmp_path)
    model = onnx.load(exported)
    pooling = next(n for n in model.graph.node if n.op_type == "Gather" and "pooler" in n.name)
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(pooling.input[0], onnx.TensorProto.FLOAT, None)
    )
    assert not keep_first_token(model)
