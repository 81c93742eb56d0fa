"""Heads of a student's attention."""

import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import make_configs, make_rows, make_tokenizer
from distill.export.idle_heads import drop_idle_heads
from distill.export.onnx import default_exporter, export_fp32, fuse, shorten
from distill.student.heads import PROJECTIONS, keep_heads
from export.graphs import RIGHT, run_graph

from distill.artifact import read_manifest
from distill.errors import DistillError
from distill.models import load_model

TEXTS = [text for text, _ in make_rows(40)]
FAMILIES = {name: config for name, config in make_configs(layers=2).items() if name in PROJECTIONS}
INPUTS = {
    "input_ids": torch.arange(5, 25).reshape(2, 10),
    "attention_mask": torch.ones(2, 10, dtype=torch.long),
}
SIZE = 8  # features of a head
SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def _model(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(FAMILIES[family]).eval()
    for weight in model.parameters():  # vectors too, which start as ones and zeros
        torch.nn.init.normal_(weight, std=0.3)
    return model


def _tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length, tokenizer.model_input_names = 32, ["input_ids", "attention_mask"]
    return tokenizer


def _readers(model):
    """The layers that read what the heads make."""
    reader = PROJECTIONS[model.config.model_type][1]
    return [part for name, part in model.named_modules() if name.endswith(f".{reader}")]


def _idle(model):
    """Heads of each layer that nothing is read of."""
    return [
        [head for head in range(4) if not part.weight[:, SIZE * head : SIZE * (head + 1)].any()]
        for part in _readers(model)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_heads_that_add_nothing_the_answers_are_the_same(family):
    model = _model(family)
    for part, head in zip(_readers(model), (2, 0), strict=True):
        part.weight.data[:, SIZE * head : SIZE * (head + 1)] = 0
    kept = keep_heads(model, 3, TEXTS, _tokenizer()).eval()
    assert _idle(kept) == [[2], [0]]
    with torch.no_grad():
        torch.testing.assert_close(kept(**INPUTS).logits, model(**INPUTS).logits)
    assert keep_heads(model, 4, TEXTS, _tokenizer()) is model


def test_a_head_counts_by_what_it_adds():
    model = _model("bert")
    first = model.bert.encoder.layer[0].attention
    first.self.value.weight.data.zero_()
    # Each makes what its bias says, whatever it attends to.
    for head, (makes, weighs) in enumerate([(1.0, 10.0), (20.0, 1.0), (10.0, 3.0), (1.0, 1.0)]):
        features = slice(SIZE * head, SIZE * (head + 1))
        first.self.value.bias.data[features] = makes
        first.output.dense.weight.data[:, features] = weighs
    assert _idle(keep_heads(model, 1, TEXTS, _tokenizer()))[0] == [0, 1, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_are_gone_stay_so_in_training(family):
    model = keep_heads(_model(family), 2, TEXTS, _tokenizer()).train()
    idle = _idle(model)
    before = [part.weight.detach().clone() for part in _readers(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**INPUTS, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    assert _idle(model) == idle and [len(heads) for heads in idle] == [2, 2]
    assert all((part.weight != old).any() for part, old in zip(_readers(model), before, strict=True))


@pytest.mark.skipif(default_exporter() != "optimum", reason="looks for the nodes that Optimum writes")
@pytest.mark.parametrize("family", FAMILIES)
def test_export_leaves_them_out_with_the_same_logits(family, tmp_path):
    model = keep_heads(_model(family), 1, TEXTS, _tokenizer())
    model.save_pretrained(tmp_path / "model")
    _tokenizer().save_pretrained(tmp_path / "model")
    exported = export_fp32(tmp_path / "model", tmp_path / "onnx")
    fused, short = tmp_path / "fused.onnx", tmp_path / "short.onnx"
    assert fuse(exported, fused, model.config)
    shorten(fused, short)
    graph = onnx.load(short).graph
    [attention] = [node for node in graph.node if node.op_type == "Attention"]  # the last has one query
    assert next(one.i for one in attention.attribute if one.name == "num_heads") == 1
    shapes = {entry.name: tuple(entry.dims) for entry in graph.initializer}
    assert shapes[attention.input[1]] == (32, 3 * SIZE)
    # The absorbed keys and values of the last attention, head by head.
    assert [shape for shape in shapes.values() if len(shape) == 3] == [(1, SIZE, 32), (1, 32, SIZE)]
    ids, mask = np.arange(5, 25).reshape(2, 10), np.array([[1] * 10, RIGHT])
    expected = run_graph(exported, ids, mask)[0]
    np.testing.assert_allclose(run_graph(short, ids, mask)[0], expected, atol=1e-4, rtol=1e-3)
    cuda = tmp_path / "cuda.onnx"
    shorten(fused, cuda, "cuda")
    heads = [
        one.i for node in onnx.load(cuda).graph.node for one in node.attribute if one.name == "num_heads"
    ]
    assert heads == [4, 4]


def _fused(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    _tokenizer().save_pretrained(tmp_path / "model")
    fuse(export_fp32(tmp_path / "model", tmp_path / "onnx"), tmp_path / "fused.onnx", model.config)
    return onnx.load(tmp_path / "fused.onnx")


@pytest.mark.skipif(default_exporter() != "optimum", reason="looks for the nodes that Optimum writes")
def test_heads_that_make_something_are_left_as_they_are(tmp_path):
    model = _model("bert")
    # What a head makes of its bias alone is the same for every text, but not nothing.
    model.bert.encoder.layer[0].attention.self.value.weight.data[:SIZE] = 0
    graph = _fused(model, tmp_path)
    assert not drop_idle_heads(graph)
    assert graph == onnx.load(tmp_path / "fused.onnx")


@pytest.mark.skipif(default_exporter() != "optimum", reason="looks for the nodes that Optimum writes")
def test_heads_that_something_else_reads_too_are_left_as_they_are(tmp_path):
    graph = _fused(keep_heads(_model("bert"), 1, TEXTS, _tokenizer()), tmp_path)
    for node in [node for node in graph.graph.node if node.op_type == "Attention"]:
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    before = graph.SerializeToString()
    assert not drop_idle_heads(graph)
    assert graph.SerializeToString() == before


@pytest.mark.parametrize(
    ("config", "keep", "line"),
    [
        (FAMILIES["bert"], 5, "the student's checkpoint has only 4 heads in each attention"),
        (make_configs(layers=2)["mpnet"], 2, "export leaves no heads out of a mpnet"),
        (transformers.CamembertConfig(**SMALL), 2, "export leaves no heads out of a camembert"),
    ],
)
def test_what_cannot_be_left_out_is_refused(config, keep, line):
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(DistillError, match=f"--attention-heads {keep}: {line}"):
        keep_heads(model, keep, TEXTS, _tokenizer())


def test_a_student_with_fewer_heads_is_trained_and_exported(run, chain, tmp_path):
    student = tmp_path / "student"
    done = run(
        "train-student", "--teacher", chain.teacher, "--student", chain.checkpoint, "--layers", 2,
        "--attention-heads", 1, "--max-steps", 2, "--output", student,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    manifest = read_manifest(student, "train-student")
    assert manifest.options["attention_heads"] == 1
    assert [len(heads) for heads in _idle(load_model(str(student), manifest.labels))] == [3, 3]
    done = run("export", "--int8", "--max-drop", 100, "--student", student, "--output", tmp_path / "export")
    assert done.exit_code == 0, done.output
