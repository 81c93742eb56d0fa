from itertools import chain as concatenated

import numpy as np
import onnx
import pytest
import torch
from conftest import make_rows, train_tokenizer
from distill.export import bundle
from distill.export.bundle import ExportOptions
from distill.export.equal_rows import store_equal_rows_once
from distill.export.quantization import _quantize_tables
from distill.student import training, vocabulary
from distill.student.options import StudentOptions
from distill.student.vocabulary import share_rows, shared_rows
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedTokenizerFast,
)

from distill import Classifier, DistillError, export_student, train_student
from distill.artifact import Manifest
from distill.encoding import read_long_texts
from distill.models import count_parameters, load_model, load_tokenizer, text_logits
from distill.training import fit

CORPUS = [text for text, _ in make_rows(200)]
OTHER = ["unheard zebras quarrel over lovelier telephones", "ylevol enohp", "batteries, batteries! (again)"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(params=["wordpiece", "byte-level bpe", "unigram"])
def tokenizer(request):
    return _tokenizer(request.param)


def _tokenizer(kind):
    tokenizer = train_tokenizer(kind, CORPUS + OTHER, SPECIAL)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    return read_long_texts(found, "head")


def _model(tokenizer, config=BertConfig, model=BertForSequenceClassification):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.5, "pad_token_id": tokenizer.pad_token_id}
    return model(config(**small, **sizes, num_labels=3)).eval()


def _logits(model, tokenizer, text):
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits


def _used(tokenizer, texts):
    return {token for text in texts for token in tokenizer(text)["input_ids"]}


@pytest.mark.parametrize("size", [None, 30])
@pytest.mark.parametrize(
    "kind", [(BertConfig, BertForSequenceClassification), (MPNetConfig, MPNetForSequenceClassification)]
)
def test_a_text_whose_tokens_keep_their_rows_gets_the_same_answer(tokenizer, kind, size):
    model, texts = _model(tokenizer, *kind), CORPUS + OTHER
    before = {text: _logits(model, tokenizer, text) for text in texts}
    rows = shared_rows(model, tokenizer, CORPUS, size)
    share_rows(model, rows)
    own = {token for token, row in enumerate(rows.tolist()) if token == row}
    same = [text for text in texts if _used(tokenizer, [text]) <= own]
    assert len(same) >= (len(CORPUS) if size is None else 5)
    for text in texts:
        equal = torch.equal(_logits(model, tokenizer, text), before[text])
        assert equal == (text in same)


def test_the_most_frequent_tokens_keep_their_rows_and_the_others_read_the_nearest(tokenizer):
    model, special = _model(tokenizer), set(tokenizer.all_special_ids)
    rows = shared_rows(model, tokenizer, CORPUS, 8)
    counts = torch.zeros(len(tokenizer))
    for text in CORPUS:
        for token in set(tokenizer(text)["input_ids"]) - special:
            counts[token] += tokenizer(text)["input_ids"].count(token)
    own = {token for token, row in enumerate(rows.tolist()) if token == row}
    assert special <= own and len(own - special) == 8
    assert min(counts[list(own - special)]) >= max(counts[[t for t in range(len(rows)) if t not in own]])
    table = model.get_input_embeddings().weight.detach()
    table = torch.nn.functional.normalize(table - table.mean(dim=0))
    kept = sorted(own - special)
    for token in set(range(len(rows))) - own:
        assert rows[token] == kept[int((table[kept] @ table[token]).argmax())]


def test_room_that_the_corpus_leaves_goes_to_the_first_of_the_vocabulary(tokenizer):
    model, used = _model(tokenizer), _used(tokenizer, CORPUS[:3]) - set(tokenizer.all_special_ids)
    others = sorted(set(range(len(tokenizer))) - used - set(tokenizer.all_special_ids))
    rows = shared_rows(model, tokenizer, CORPUS[:3], len(used) + 12)
    assert set(rows.tolist()) == used | set(others[:12]) | set(tokenizer.all_special_ids)
    whole = shared_rows(model, tokenizer, CORPUS[:3], len(tokenizer))
    assert whole.tolist() == list(range(len(tokenizer)))


def test_pairs_and_what_a_tokenizer_cuts_are_counted_as_they_are_read(tokenizer):
    pair = (OTHER[0], CORPUS[0])
    rows = shared_rows(_model(tokenizer), tokenizer, [pair])
    assert set(tokenizer(*pair)["input_ids"]) <= set(rows.tolist())
    tokenizer.model_max_length = 5
    rows = shared_rows(_model(tokenizer), tokenizer, [CORPUS[0]])
    assert len(set(rows.tolist()) - set(tokenizer.all_special_ids)) <= 3


def test_blocks_and_batches_leave_nothing_out(tokenizer, monkeypatch):
    model = _model(tokenizer)
    whole = shared_rows(model, tokenizer, CORPUS, 8)
    monkeypatch.setattr(vocabulary, "BLOCK", 7)
    monkeypatch.setattr(vocabulary, "BATCH", 3)
    assert shared_rows(model, tokenizer, CORPUS, 8).tolist() == whole.tolist()


def test_tokens_that_only_the_configuration_or_the_table_knows():
    tokenizer = _tokenizer("wordpiece")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, model_max_length=64)
    bare = read_long_texts(bare, "head")
    model, size = _model(tokenizer), len(tokenizer)
    model.resize_token_embeddings(size + 8)
    model.config.eos_token_id, model.config.bos_token_id = [size + 2, 7], size + 100  # as Llama's, as GPT-2's
    model.get_input_embeddings().padding_idx = size + 4
    rows = shared_rows(model, bare, CORPUS, size)
    own = {token for token, row in enumerate(rows.tolist()) if token == row}
    assert own >= {size + 2, 7, size + 4, *tokenizer.all_special_ids}
    assert not own & {size, size + 1, size + 3}
    assert not set(rows[size:].tolist()) & {7, *tokenizer.all_special_ids}


def test_rows_that_bert_leaves_unused_are_nobodys():
    tokenizer = _tokenizer("wordpiece")
    spelt = tokenizer.convert_ids_to_tokens
    unused = {token: f"[unused{token}]" for token in (5, 9)}
    tokenizer.convert_ids_to_tokens = lambda ids: [
        unused.get(one, piece) for one, piece in zip(ids, spelt(ids), strict=True)
    ]
    rows = shared_rows(_model(tokenizer), tokenizer, [OTHER[0]], len(tokenizer) - 40)
    assert not set(rows.tolist()) & unused.keys() - _used(tokenizer, [OTHER[0]])


def test_texts_without_a_known_token_are_refused(tokenizer):
    with pytest.raises(
        DistillError, match="--vocabulary: the texts have no token that this checkpoint knows"
    ):
        shared_rows(_model(tokenizer), tokenizer, [""])


def test_a_model_without_a_table_of_tokens_is_named(tokenizer):
    model = _model(tokenizer)
    model.get_input_embeddings = lambda: None
    with pytest.raises(DistillError, match="--vocabulary: this checkpoint has no table of tokens"):
        shared_rows(model, tokenizer, CORPUS)


def _lookup(table, axis=0):
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["texts", "tokens"])
    found = helper.make_tensor_value_info("found", TensorProto.FLOAT, ["texts", "tokens", "width"])
    node = helper.make_node("Gather", ["table", "ids"], ["found"], axis=axis)
    constants = [numpy_helper.from_array(table.numpy(), "table")]
    return helper.make_model(helper.make_graph([node], "lookup", [ids], [found], constants))


def test_equal_rows_are_stored_once():
    table = torch.randn(10, 4)[torch.tensor([0, 1, 2, 1, 1, 5, 0, 0, 2, 5])]
    graph, ids = _lookup(table), torch.arange(10).reshape(2, 5).numpy()
    before = ReferenceEvaluator(graph).run(None, {"ids": ids})[0]
    assert store_equal_rows_once(graph)
    assert sorted(tuple(entry.dims) for entry in graph.graph.initializer) == [(4, 4), (10,)]
    assert (ReferenceEvaluator(graph).run(None, {"ids": ids})[0] == before).all()


@pytest.mark.parametrize("distinct", [1300, 30])
def test_a_table_of_shared_rows_is_quantized_whatever_its_length(distinct):
    graph, ids = _lookup(torch.randn(distinct, 8)[torch.randint(distinct, (3000,))]), np.arange(3000)[None]
    before = ReferenceEvaluator(graph).run(None, {"ids": ids})[0]
    store_equal_rows_once(graph)
    _quantize_tables(graph)
    sizes = {entry.name: (entry.dims[0], entry.data_type) for entry in graph.graph.initializer}
    assert sizes["table_distinct_int8"][1] == TensorProto.INT8 and sizes["table_distinct_int8"][0] <= distinct
    np.testing.assert_allclose(ReferenceEvaluator(graph).run(None, {"ids": ids})[0], before, atol=0.03)


@pytest.mark.parametrize("limit", [2**31, 100])
def test_a_graph_that_fits_one_file_without_its_equal_rows_becomes_one(tmp_path, monkeypatch, limit):
    graph = _lookup(torch.randn(300, 64)[torch.randint(300, (3000,))])
    ids = np.arange(3000)[None]
    before = ReferenceEvaluator(graph).run(None, {"ids": ids})[0]
    onnx.save(graph, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    monkeypatch.setattr(bundle, "LARGEST", limit)
    manifest = Manifest(stage="export", labels=[], options={}, seed=0, data={}, details={"files": {}})
    bundle._place(tmp_path / "model.onnx", tmp_path, manifest)
    assert (tmp_path / "onnx" / "model.onnx_data").exists() is (limit == 100)
    found = ReferenceEvaluator(onnx.load(tmp_path / "onnx" / "model.onnx")).run(None, {"ids": ids})[0]
    assert (found == before).all()


@pytest.mark.parametrize(("table", "axis"), [(torch.randn(10, 4), 0), (torch.zeros(4, 10), 1)])
def test_other_tables_stay_as_they_are(table, axis):
    graph = _lookup(table, axis)
    assert not store_equal_rows_once(graph)
    assert [node.op_type for node in graph.graph.node] == ["Gather"]


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("layers", [0, 1])
def test_a_student_is_trained_and_exported_with_rows_that_are_shared(
    chain, tmp_path, layers, provider, monkeypatch
):
    read = []

    def watched(model, tokenizer, train, validation, *rest):
        read.extend({*concatenated.from_iterable(part["input_ids"])} for part in (train, validation))
        return fit(model, tokenizer, train, validation, *rest)

    monkeypatch.setattr(training, "fit", watched)
    manifest = train_student(
        StudentOptions(
            output=tmp_path / "s",
            teacher=chain.teacher,
            layers=layers,
            vocabulary=8,
            max_steps=20,
            precision="fp32",
            learning_rate=1e-2,
        )
    )
    rows = manifest.details["vocabulary"]
    assert 8 < rows <= 13
    model, tokenizer = (
        load_model(str(tmp_path / "s"), manifest.labels),
        load_tokenizer(str(tmp_path / "s"), 64),
    )
    table = model.get_input_embeddings().weight
    assert len(table.unique(dim=0)) == rows < len(table)
    # In training, too, every token that is read has a row that no other one reads.
    assert len(read) == 2 and all(len(table[list(part)].unique(dim=0)) == len(part) for part in read)
    assert manifest.parameters == count_parameters(model) - (len(table) - rows) * table.shape[1]
    export = ExportOptions(tmp_path / "s", tmp_path / "b", provider=(provider,), int8=True, max_drop=100.0)
    exported = export_student(export)
    files = list((tmp_path / "b" / "onnx").glob("*.onnx"))
    for file in files:
        tables = [entry.dims for entry in onnx.load(file).graph.initializer if len(entry.dims) == 2]
        lengths = [length for length, width in tables if width > 1]  # not those of whole numbers
        assert rows in lengths and len(table) not in lengths
    plain = Classifier(tmp_path / "b", provider="cpu", file="onnx/model.onnx", calibrated=False)
    expected = text_logits(model.eval(), tokenizer, CORPUS[:20], "cpu", "fp32")
    np.testing.assert_allclose(plain.predict_logits(CORPUS[:20]), expected, atol=1e-4)
    quantized = Classifier(tmp_path / "b", provider="cpu", calibrated=False)
    if provider == "cpu":
        np.testing.assert_allclose(quantized.predict_logits(CORPUS[:20]), expected, atol=0.2)
    else:
        assert len(files) > 1 and len(exported.details["on_cuda"]) == len(files)


def test_a_resumed_run_keeps_its_rows_and_texts_beside_the_training_text_count(chain, tmp_path, monkeypatch):
    more = tmp_path / "more.csv"
    more.write_text("text\n" + "\n".join(["[MASK]" + text for text in CORPUS[:3]]) + "\n")
    options = StudentOptions(
        output=tmp_path / "s", teacher=chain.teacher, layers=0, vocabulary=0, unlabeled=str(more),
        augment="20", max_steps=1, precision="fp32",
    )  # fmt: skip
    counted = []
    monkeypatch.setattr(
        training, "shared_rows", lambda *given: counted.append(len(given[2])) or shared_rows(*given)
    )
    manifest = train_student(options)
    assert counted == [manifest.data["rows"]["train"] + 3 + 20]
    model, tokenizer = (
        load_model(str(tmp_path / "s"), manifest.labels),
        load_tokenizer(str(tmp_path / "s"), 64),
    )
    options.checkpoints.mkdir(parents=True)
    kept = np.zeros(len(tokenizer), dtype=np.int64)
    np.save(options.checkpoints / "rows.npy", kept)
    assert training._shared_rows(model, tokenizer, None, options, True).tolist() == kept.tolist()


def test_a_negative_number_of_rows_is_refused(chain, tmp_path):
    with pytest.raises(DistillError, match="--vocabulary -1: give 0"):
        train_student(StudentOptions(output=tmp_path / "s", teacher=chain.teacher, vocabulary=-1))
