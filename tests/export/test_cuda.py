import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import make_configs
from distill.export import cuda
from distill.export.bundle import ExportOptions
from distill.export.cuda_graphs import (
    quantize_static,
    quantize_weights,
    separate_attention,
    static_grids,
    to_fp16,
)
from distill.export.observation import channel_ranges, moments, products
from distill.export.onnx import default_exporter, fuse, shorten
from distill.export.placement import off_cuda
from export.graphs import RIGHT, export_tiny, run_graph
from onnx import TensorProto, helper, numpy_helper

from distill import Classifier, export_student
from distill.artifact import read_manifest
from distill.bundle import open_bundle
from distill.errors import DistillError

optimums_graph = pytest.mark.xfail(
    default_exporter() != "optimum", reason="transformers' own graphs have no attention that is fused yet"
)
FAMILIES = make_configs(layers=2)
IDS = np.arange(5, 25).reshape(2, 10)
MASK = np.array([[1] * 10, RIGHT])


@pytest.fixture(scope="module", params=FAMILIES)
def fused(request, tmp_path_factory):
    """A graph of each family as it is prepared for CUDA, with the logits of the plain one."""
    folder = tmp_path_factory.mktemp("graphs")
    config = FAMILIES[request.param]
    exported, _ = export_tiny(config, folder)
    path = folder / "fused.onnx"
    if fuse(exported, path, config, provider="cuda"):
        shorten(path, path, provider="cuda")
    else:
        shorten(exported, path)
    return onnx.load(path), run_graph(exported, IDS, MASK)[0], folder


def _logits(model, folder):
    onnx.save(model, folder / "form.onnx")
    return run_graph(folder / "form.onnx", IDS, MASK)[0]


def _static(separated, folder):
    """As `write_cuda` quantizes, over the texts of this test."""
    names = list(dict.fromkeys(node.input[0] for node, _ in products(separated)))
    exposed = onnx.ModelProto()
    exposed.CopyFrom(separated)
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    onnx.save(exposed, folder / "exposed.onnx")
    values = run_graph(folder / "exposed.onnx", IDS, MASK)[1:]
    observed = [(name, v.reshape(-1, v.shape[-1])) for name, v in zip(names, values, strict=True)]
    grids = static_grids(separated, channel_ranges(observed))
    return quantize_static(separated, grids, moments(observed, lambda name, rows: grids[name].values(rows)))


@optimums_graph
def test_fp16_runs_on_cuda_alone_and_answers_as_fp32(fused, request):
    model, expected, folder = fused
    half = to_fp16(model)
    assert off_cuda(half) == []
    if request.node.callspec.params["fused"] in ("bert", "distilbert", "roberta", "electra"):
        kinds = [node.op_type for node in half.graph.node]
        assert kinds.count("Attention") + kinds.count("MultiHeadAttention") == 2
    assert any(entry.data_type == onnx.TensorProto.FLOAT16 for entry in half.graph.initializer)
    logits = _logits(half, folder)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())


@optimums_graph
def test_int8_products_run_on_cuda_alone_and_answer_as_fp32(fused):
    model, expected, folder = fused
    separated = separate_attention(model)
    quantized = _static(separated, folder)
    kinds = [node.op_type for node in quantized.graph.node]
    assert off_cuda(quantized) == []
    assert kinds.count("MatMulInteger") >= 8 and "Attention" not in kinds
    np.testing.assert_allclose(_logits(quantized, folder), expected, atol=0.1 * np.abs(expected).max())


def test_what_a_moved_zero_adds_is_taken_off_and_the_mean_is_kept(tmp_path):
    random = np.random.default_rng(0)
    weights, bias = random.normal(size=(64, 8)).astype(np.float32), np.ones(8, dtype=np.float32)
    rows = np.abs(random.normal(size=(200, 64))).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
            helper.make_node("Add", ["product", "bias"], ["y"], name="sum"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    observed = [("x", rows)]
    grids = static_grids(model, channel_ranges(observed))
    assert grids["x"].zero < -100
    quantized = quantize_static(
        model, grids, moments(observed, lambda name, values: grids[name].values(values))
    )
    onnx.save(quantized, tmp_path / "q.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
    found, expected = session.run(None, {"x": rows})[0], rows @ weights + bias
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    np.testing.assert_allclose(found.mean(axis=0), expected.mean(axis=0), atol=6e-3)  # FP16 of 8 to 16


@optimums_graph
def test_int8_weights_run_on_cuda_alone_and_answer_as_fp32(fused):
    model, expected, folder = fused
    quantized = quantize_weights(separate_attention(model))
    assert off_cuda(quantized) == []
    assert sum(node.op_type == "MatMulNBits" for node in quantized.graph.node) >= 6
    np.testing.assert_allclose(_logits(quantized, folder), expected, atol=0.05 * np.abs(expected).max())


def test_an_attention_that_cannot_be_taken_apart_stays(fused):
    model, _, folder = fused
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    whole = [node for node in copy.graph.node if node.op_type == "Attention"]
    if not whole:
        pytest.skip("no fused attention")
    for node in whole:
        node.attribute.append(onnx.helper.make_attribute("unidirectional", 1))
    separated = separate_attention(copy)
    for quantized in (_static(separated, folder), quantize_weights(separated)):
        assert sum(node.op_type == "Attention" for node in quantized.graph.node) == len(whole)


@pytest.fixture(scope="module")
def bundle(chain, tmp_path_factory):
    output = tmp_path_factory.mktemp("cuda") / "bundle"
    options = ExportOptions(chain.student, output, provider=("cpu", "cuda"), int8=True, max_drop=100.0)
    export_student(options)
    return output


@optimums_graph
def test_the_bundle_gets_both_files_and_fp16_is_the_one_for_cuda(bundle):
    details = read_manifest(bundle, "export").details
    assert details["files"] == {
        "fp32": "onnx/model.onnx", "cpu": "onnx/model_quantized.onnx", "cuda": "onnx/model_fp16.onnx",
    }  # fmt: skip
    assert {path.name for path in (bundle / "onnx").iterdir()} == {
        "model.onnx", "model_quantized.onnx", "model_fp16.onnx", "model_int8_cuda.onnx",
    }  # fmt: skip
    found = details["cuda"]
    assert found["measured_ms"] == {}
    assert found["fp16"]["label_agreement"] == 1.0 and found["int8"]["form"] == "weights"
    static, weights = found["int8"]["trials"]
    assert static["mean_logit_difference"] > weights["mean_logit_difference"]
    assert found["fused_attentions"] == 2
    assert [trial["form"] for trial in found["int8"]["trials"]] == ["static", "weights"]
    assert found["int8"]["agreement_with_cpu_int8"] >= 0.9
    assert set(details["temperature"]) >= {"onnx/model_fp16.onnx", "onnx/model_int8_cuda.onnx"}


def test_the_file_that_is_fastest_on_a_gpu_is_taken(chain, tmp_path, monkeypatch):
    times = {"onnx/model_fp16.onnx": 2.0, "onnx/model_int8_cuda.onnx": 1.0, "onnx/static.onnx": 1.5,
             "onnx/weights.onnx": 1.0}  # fmt: skip
    monkeypatch.setattr(cuda, "_latency", lambda draft, files: {file: times[file] for file in files})
    options = ExportOptions(chain.student, tmp_path / "b", provider=("cuda",), int8=True, max_drop=100.0)
    details = export_student(options).details
    assert details["files"]["cuda"] == "onnx/model_int8_cuda.onnx"
    assert details["cuda"]["int8"]["form"] == "weights"
    assert {path.name for path in (tmp_path / "b" / "onnx").iterdir()} == {
        "model.onnx", "model_fp16.onnx", "model_int8_cuda.onnx",
    }  # fmt: skip
    assert details["files"]["cpu"] == "onnx/model.onnx"


def test_int8_weights_are_the_way_out_where_int8_products_lose_too_much(chain, tmp_path, monkeypatch):
    def ruin(separated, ranges):
        return static_grids(separated, {name: found * 1e-3 for name, found in ranges.items()})

    monkeypatch.setattr(cuda, "static_grids", ruin)
    times = {"onnx/static.onnx": 1.0, "onnx/weights.onnx": 2.0}
    monkeypatch.setattr(cuda, "_latency", lambda draft, files: {file: times.get(file, 3.0) for file in files})
    options = ExportOptions(chain.student, tmp_path / "b", provider=("cuda",), int8=True)
    found = export_student(options).details["cuda"]["int8"]
    assert found["form"] == "weights"
    assert [trial["form"] for trial in found["trials"]] == ["static", "weights"]


def test_a_file_that_loses_too_much_is_refused(chain, tmp_path, monkeypatch):
    def ruin(model):
        copy = to_fp16(model)
        for entry in copy.graph.initializer:
            if entry.data_type == onnx.TensorProto.FLOAT16:
                entry.raw_data = bytes(len(entry.raw_data))
        return copy

    monkeypatch.setattr(cuda, "to_fp16", ruin)
    with pytest.raises(DistillError, match=r"model_fp16\.onnx loses \d+\.\d\d points of validation macro-F1"):
        export_student(ExportOptions(chain.student, tmp_path / "b", provider=("cuda",)))
    assert not (tmp_path / "b").exists()


def test_cuda_is_never_given_a_file_that_failed_the_kernel_check(bundle, chain, tmp_path, monkeypatch):
    import onnxruntime

    assert read_manifest(bundle, "export").details["on_cuda"] == [
        "onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_int8_cuda.onnx",
    ]  # fmt: skip
    monkeypatch.setattr("distill.export.bundle.off_cuda", lambda model: ["Gemm of odd types"])
    export_student(ExportOptions(chain.student, tmp_path / "off"))
    found = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: found)
    for folder, file in ((bundle, "onnx/model_quantized.onnx"), (tmp_path / "off", "onnx/model.onnx")):
        with pytest.raises(
            DistillError, match=r"\.onnx has operators that CUDA has no kernels for; leave the"
        ):
            Classifier(folder, provider="cuda", file=file)
    with pytest.raises(DistillError, match=r"onnx/none\.onnx: not a file of this bundle"):
        Classifier(bundle, provider="cuda", file="onnx/none.onnx")
    # An older bundle has no list.
    older = open_bundle(bundle)
    del older.manifest["details"]["on_cuda"]
    with pytest.raises(DistillError, match="CUDA has no kernels for"):
        Classifier(older, provider="cuda", file="onnx/model_quantized.onnx")


def test_cuda_that_is_not_really_used_is_an_error_and_auto_says_so(bundle, monkeypatch, caplog):
    import onnxruntime

    found = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: found)
    with pytest.raises(DistillError, match="CUDA"):  # the package for the CPU refuses or falls back
        Classifier(bundle, provider="cuda")
    caplog.set_level("INFO", logger="distill")
    classifier = Classifier(bundle)
    assert (classifier.provider, classifier.file) == ("cpu", "onnx/model_quantized.onnx")
    assert "using the CPU" in caplog.text
