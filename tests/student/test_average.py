"""A student without layers: from the teacher's tokens to its bundle."""

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import make_configs, make_tokenizer
from distill.export.bundle import ExportOptions
from distill.export.cold_start import cold_start
from distill.export.onnx import default_exporter
from distill.student import average
from distill.student.average import DROPOUT, average_tokens, frequent_bigrams, start_from, teacher_states
from distill.student.options import StudentOptions
from distill.student.shape import Shape
from distill.student.vocabulary import share_rows, shared_rows
from safetensors.torch import load_file
from torch.nn import functional as F

from distill import Classifier, DistillError, export_student, train_student
from distill.artifact import Manifest, read_manifest
from distill.averaging import depth
from distill.data import load_data
from distill.models import load_model, load_tokenizer, text_logits
from distill.predictions import read_predictions
from distill.trainer import LossTrainer

FAMILIES = make_configs(layers=2)
TEXTS = ["the food was great", "bad", "service, great service and terrible food", ""]


def _average(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.resize_token_embeddings(len(make_tokenizer()))
    student = average_tokens(model, make_tokenizer(), bigrams=[(7, 7), (7, 9)]).eval()
    with torch.no_grad():
        student.bigrams.weight[1:].normal_()
    return student, model


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_from_the_token_embeddings_and_loads_as_it_was_saved(family, tmp_path):
    student, model = _average(FAMILIES[family])
    table = student.get_input_embeddings()
    torch.testing.assert_close(table.weight, model.get_input_embeddings().weight)
    table.weight.data[0] += 1
    torch.testing.assert_close(model.get_input_embeddings().weight[0], table.weight[0] - 1)  # a copy
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.num_labels == 3 and depth(again) == 0 and depth(model) == 2
    ids = torch.arange(5, 25).reshape(2, 10)
    torch.testing.assert_close(again(input_ids=ids).logits, student(input_ids=ids).logits)


def test_bigrams_that_occur_twice_are_known_the_most_frequent_first():
    tokenizer = make_tokenizer()
    texts = ["great phone", "great phone it was", "it was great", "awful phone"]
    great, phone, it, was = tokenizer.convert_tokens_to_ids(["great", "phone", "it", "was"])
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    found = frequent_bigrams(tokenizer, texts)
    assert found == sorted([(begin, great), (great, phone), (it, was), (phone, end)])
    assert frequent_bigrams(tokenizer, [*texts, "my it was"], 1) == [(it, was)]
    assert frequent_bigrams(tokenizer, ["great", "awful"]) == []


def test_rare_bigrams_are_forgotten_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(average, "COUNTED", 1)
    monkeypatch.setattr(average, "TEXTS", 1)
    tokenizer = make_tokenizer()
    pair = tuple(tokenizer.convert_tokens_to_ids(["great", "phone"]))
    assert frequent_bigrams(tokenizer, ["great phone great phone", "awful phone", "awful phone"]) == [pair]


def test_tokens_that_share_a_row_share_its_bigrams(tmp_path):
    student, _ = _average(FAMILIES["bert"])
    rows = torch.arange(len(make_tokenizer()))
    rows[11] = 9
    expected = student(input_ids=torch.tensor([[7, 9]])).logits
    share_rows(student, rows)
    student.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), ["a", "b", "c"]).eval()
    for model in (student, again):
        torch.testing.assert_close(model(input_ids=torch.tensor([[7, 11]])).logits, expected)
    kept = again.pairs.tolist()
    rows = torch.arange(len(make_tokenizer()))
    rows[12] = 11
    share_rows(again, rows)
    assert again.pairs.tolist() == kept
    torch.testing.assert_close(again(input_ids=torch.tensor([[7, 12]])).logits, expected)


def test_a_bigram_of_a_token_without_a_row_of_its_own_is_read_as_that_of_another():
    student, _ = _average(FAMILIES["bert"])  # knows (7, 7) and (7, 9)
    expected = student(input_ids=torch.tensor([[7, 9]])).logits
    rows = torch.arange(len(make_tokenizer()))
    rows[9] = 11
    with torch.no_grad():
        student.tokens.weight[11] = student.tokens.weight[9]
    share_rows(student, rows)
    assert student.pairs.tolist() == [[7, 7], [7, 11]]
    for second in (9, 11):
        torch.testing.assert_close(student(input_ids=torch.tensor([[7, second]])).logits, expected)


def test_its_embeddings_are_dropped_out_as_asked():
    model = transformers.AutoModelForSequenceClassification.from_config(FAMILIES["bert"])
    for asked, found in (({}, DROPOUT), ({"dropout": 0.3}, 0.3), ({"dropout": 0.0}, 0)):
        assert average_tokens(model, make_tokenizer(), **asked).drop.p == found


def test_texts_whose_tokens_keep_their_rows_keep_their_answers():
    student, _ = _average(FAMILIES["mpnet"])
    texts, tokenizer = TEXTS[:3], make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    before = text_logits(student, tokenizer, texts, "cpu", "fp32")
    rows = shared_rows(student, tokenizer, texts)
    assert len(rows.unique()) < len(tokenizer)
    share_rows(student, rows)
    np.testing.assert_allclose(text_logits(student, tokenizer, texts, "cpu", "fp32"), before, atol=1e-6)


@pytest.fixture(scope="module")
def student(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("average") / "student"
    train_student(
        StudentOptions(output=folder, teacher=chain.teacher, layers=0, vocabulary=0, precision="fp32",
                       epochs=6, batch_size=16, learning_rate=1e-3)
    )  # fmt: skip
    return folder


def test_it_learns_and_is_read_from_its_folder_as_it_was_trained(student, chain):
    manifest = json.loads((student / "distill.json").read_text())
    assert manifest["details"]["layers"] == 0
    assert manifest["metrics"]["validation"]["macro_f1"] > 0.8
    model, tokenizer = load_model(str(student), manifest["labels"]), load_tokenizer(str(student), 64)
    assert "token_type_ids" not in tokenizer(TEXTS[0])
    known = read_predictions(student, "validation")["student"]
    by_id = dict(zip(known.ids, known.logits, strict=True))
    validation = load_data(str(chain.data), quiet=True).splits["validation"]
    found = text_logits(model.eval(), tokenizer, list(validation["text"]), "cpu", "fp32")
    np.testing.assert_allclose(found, [by_id[one] for one in validation["id"]], atol=1e-4)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_its_bundle_answers_as_it_does(student, provider, tmp_path):
    options = ExportOptions(student, tmp_path / "b", provider=(provider,), int8=True, max_drop=100.0)
    manifest = export_student(options)
    model, tokenizer = load_model(str(student), manifest.labels), load_tokenizer(str(student), 64)
    expected = text_logits(model.eval(), tokenizer, TEXTS, "cpu", "fp32")
    graph = onnx.load(tmp_path / "b" / "onnx" / "model.onnx").graph
    assert not {"Softmax", "Transpose", "Sin"} & {node.op_type for node in graph.node}
    plain = Classifier(tmp_path / "b", provider="cpu", file="onnx/model.onnx", calibrated=False)
    np.testing.assert_allclose(plain.predict_logits(TEXTS), expected, atol=1e-4)
    if provider == "cpu":
        quantized = Classifier(tmp_path / "b", provider="cpu", calibrated=False)
        np.testing.assert_allclose(quantized.predict_logits(TEXTS), expected, atol=0.2)


def test_its_cold_start_in_pytorch_is_measured(student):
    seconds, megabytes = cold_start(student, "model.safetensors", "pytorch", TEXTS[:1])
    assert seconds > 0 and megabytes > 0


def test_optimum_opens_its_bundle(student, tmp_path):
    if default_exporter() != "optimum":
        pytest.skip("Optimum is not for transformers 5")
    from optimum.onnxruntime import ORTModelForSequenceClassification

    manifest = export_student(ExportOptions(student, tmp_path / "b"))
    model = ORTModelForSequenceClassification.from_pretrained(tmp_path / "b", subfolder="onnx")
    tokenizer = load_tokenizer(str(tmp_path / "b"), 64)
    found = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits
    own = load_model(str(student), manifest.labels).eval()
    np.testing.assert_allclose(found, text_logits(own, tokenizer, TEXTS[:1], "cpu", "fp32"), atol=1e-4)
    assert model.config.id2label == dict(enumerate(manifest.labels))
    assert model.config.max_position_embeddings == manifest.max_length


def test_it_may_have_no_bigrams(chain, tmp_path):
    details = train_student(_settings(chain, tmp_path / "s", layers=0, bigrams=0, max_steps=1)).details
    assert details["bigrams"] == 0
    assert "bigrams.weight" not in load_file(tmp_path / "s" / "model.safetensors")


def _settings(chain, output, **changes):
    return StudentOptions(output=output, teacher=chain.teacher, **{"precision": "fp32", **changes})


def test_it_is_trained_further_from_its_folder(student, chain, tmp_path):
    manifest = json.loads((student / "distill.json").read_text())
    before = load_model(str(student), manifest["labels"])
    for layers in (0, None):
        options = _settings(chain, tmp_path / f"{layers}", student=str(student), layers=layers, max_steps=1)
        details = train_student(replace(options, learning_rate=1e-9)).details
        after = load_model(str(options.output), manifest["labels"])
        assert details["layers"] == 0
        torch.testing.assert_close(after.dense.weight, before.dense.weight, atol=1e-4, rtol=0)
    for changes, line in (
        ({"layers": 1}, "only 0 layers"),
        ({"intermediate_size": 1}, "has no layers"),
        ({"layers": 0, "bigrams": 5}, "bigrams of its own"),
    ):
        with pytest.raises(DistillError, match=line):
            train_student(_settings(chain, tmp_path / "s", student=str(student), **changes))


def test_all_but_its_tokens_learns_at_the_heads_rate(chain, tmp_path, monkeypatch):
    rates = []

    def create(self, *rest):
        optimizer = original(self, *rest)
        table = self.model.get_input_embeddings().weight
        for group in optimizer.param_groups:
            rates.append((group["lr"], any(one is table for one in group["params"]), len(group["params"])))
        return optimizer

    original = LossTrainer.create_optimizer
    monkeypatch.setattr(LossTrainer, "create_optimizer", create)
    train_student(_settings(chain, tmp_path / "s", layers=0, max_steps=1, learning_rate=1e-4))
    assert [(rate, size) for rate, is_table, size in rates if is_table] == [(pytest.approx(1e-4), 1)]
    assert [rate for rate, is_table, _ in rates if not is_table] == pytest.approx([1e-3, 1e-3])


def test_it_starts_from_what_the_teacher_makes_of_tokens_and_bigrams(chain, tmp_path):
    teacher = read_manifest(chain.teacher, "train-teacher")
    model, tokenizer = load_model(str(chain.teacher), teacher.labels).eval(), make_tokenizer()

    def read(text):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            layer = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0, 1:-1]  # of 4
        return ids[1:-1], F.layer_norm(layer, layer.shape[1:], eps=0.0)

    great, of_great = read("great")
    phone, of_phone = read("phone")
    _, of_both = read("great phone")
    ends = tokenizer.cls_token_id, *great
    states, gained = teacher_states(chain.teacher, teacher, [(*great, *phone), ends], "cpu", "fp32")
    own = model.get_input_embeddings().weight[great].detach()
    expected = of_great + F.layer_norm(own, own.shape[1:], eps=0.0)
    assert states.shape == model.get_input_embeddings().weight.shape
    np.testing.assert_allclose(states[great], expected, atol=1e-4)
    expected = (of_both - torch.cat([of_great, of_phone])).sum(dim=0) / 2**0.5
    np.testing.assert_allclose(gained, torch.stack([expected, torch.zeros(32)]), atol=1e-4)
    student = average_tokens(model, tokenizer, bigrams=[(*great, *phone), ends])
    start_from(student, states, gained)
    np.testing.assert_array_equal(student.bigrams.weight[1:].detach(), gained)
    table = student.get_input_embeddings().weight.detach()
    before = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(F.layer_norm(table, (32,), eps=0), F.layer_norm(torch.tensor(states), (32,)))
    torch.testing.assert_close(table.std(dim=1, correction=0).mean(), before.std(dim=1).mean())


SMALL = {"vocab_size": len(make_tokenizer()), "hidden_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40}  # fmt: skip
OTHERS = {
    "gpt2": transformers.GPT2Config(vocab_size=SMALL["vocab_size"], n_embd=32, n_layer=2, n_head=4),
    "llama": transformers.LlamaConfig(**SMALL),
    "albert": transformers.AlbertConfig(**SMALL, embedding_size=16),
    "bart": transformers.BartConfig(
        vocab_size=SMALL["vocab_size"], d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    ),
}  # fmt: skip


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_family_of_teachers_is_asked_for_its_tokens(family, bare, tmp_path):
    config = copy.deepcopy({**FAMILIES, **OTHERS}[family])
    config.pad_token_id = 0
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    if bare:  # GPT-2's and Qwen's add nothing at the ends
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer = (
            transformers.PreTrainedTokenizerFast(  # transformers 5 gives a BertTokenizer its own again
                tokenizer_object=tokenizer.backend_tokenizer,
                **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")},
                eos_token="[SEP]",
            )
        )
    tokenizer.save_pretrained(tmp_path)
    teacher = Manifest("train-teacher", ["a", "b", "c"], {}, seed=0, data={}, max_length=16)
    found = torch.tensor(average._Reader(tmp_path, teacher, "cpu", "fp32").tokens())
    table = model.get_input_embeddings().weight.detach()
    own = F.layer_norm(table, table.shape[1:], eps=1e-12)
    if family in ("albert", "bart"):
        torch.testing.assert_close(found, own, atol=1e-4, rtol=0)
        return
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id
    text = {False: [ends[0], 17, ends[1]], True: [17]}[bare]
    if bare and family in ("gpt2", "llama"):  # not the first token of a text
        text = [ends[1], 17]
    with torch.no_grad():
        layers = model.base_model(torch.tensor([text]), output_hidden_states=True).hidden_states
    state = layers[1][0, text.index(17)]  # of 2 layers
    torch.testing.assert_close(
        found[17] - own[17], F.layer_norm(state, state.shape, eps=1e-12), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("student", ["the teacher", "a checkpoint"])
def test_the_teacher_is_where_it_starts_unless_a_checkpoint_is_named(student, chain, tmp_path, monkeypatch):
    from distill.student import training

    begun = []
    monkeypatch.setattr(training, "fit", lambda model, *rest: begun.append(model) or 1 / 0)
    named = {"student": str(chain.checkpoint)} if student == "a checkpoint" else {}
    with pytest.raises(ZeroDivisionError):
        train_student(_settings(chain, tmp_path / "s", layers=0, **named))
    assert begun[0].drop.p == DROPOUT
    table = begun[0].get_input_embeddings().weight.detach()
    teacher = read_manifest(chain.teacher, "train-teacher")
    states = torch.tensor(teacher_states(chain.teacher, teacher, [], "cpu", "fp32")[0])
    like = F.cosine_similarity(table, states - states.mean(dim=1, keepdim=True)).min()
    assert bool(like > 0.999) is not bool(named)


def test_its_parameters_are_those_that_answer(student):
    manifest = json.loads((student / "distill.json").read_text())
    weights = load_file(student / "model.safetensors")
    equal = len(weights["tokens.weight"]) - manifest["details"]["vocabulary"]
    learnt = sum(weight.numel() for weight in weights.values() if weight.is_floating_point())
    assert manifest["parameters"] == learnt - equal * weights["tokens.weight"].shape[1]


def test_a_resumed_run_measures_no_speed_again(chain, tmp_path, monkeypatch):
    from distill.student import building, training

    options = _settings(chain, tmp_path / "s", latency_budget=1e6, max_steps=2)
    monkeypatch.setattr(building, "choose_shape", lambda *rest: Shape(0))
    monkeypatch.setattr(training, "publish", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_student(options)
    monkeypatch.undo()
    monkeypatch.setattr(building, "choose_shape", lambda *rest: 1 / 0)
    assert train_student(replace(options, resume=True)).details["layers"] == 0


def test_its_configuration_says_what_the_logits_mean():
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_attention_heads=4, num_hidden_layers=1, num_labels=2,
        id2label={0: "cold", 1: "warm"}, label2id={"cold": 0, "warm": 1},
        problem_type="multi_label_classification",
    )  # fmt: skip
    found = average_tokens(
        transformers.AutoModelForSequenceClassification.from_config(config), make_tokenizer()
    ).config
    assert (found.id2label, found.problem_type) == ({0: "cold", 1: "warm"}, "multi_label_classification")
    tokenizer = make_tokenizer()
    assert (found.pad_token_id, found.cls_token_id) == (tokenizer.pad_token_id, tokenizer.cls_token_id)


def test_a_speed_that_no_layer_has_takes_none(chain, tmp_path, monkeypatch):
    from distill.student import shape

    monkeypatch.setattr(shape, "measure", lambda subjects, sample: {"student": float(depths.pop(0))})
    depths = [9, 0.1, 9]  # of 4 narrow layers, none, and 3 narrow ones
    options = StudentOptions(output=tmp_path / "s", teacher=chain.teacher, latency_budget=0.5, max_steps=1)
    assert train_student(options).details["layers"] == 0 and not depths


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--layers", 0, "--intermediate-size", 8), "--intermediate-size: without layers there are no"),
        (("--layers", -1), "-1 is not in the range x>=0"),
        (("--bigrams", -1), "-1 is not in the range x>=0"),
        (("--bigrams", 99999, "--layers", 0), "--bigrams 99999: give a number from 0 to 65536"),
        (("--bigrams", 9), "--bigrams: only a student without layers has them; give --layers 0"),
        (("--bigrams", 9, "--layers", 1), "--bigrams: only a student without layers has them"),
    ],
)
def test_what_it_cannot_have_is_one_line(run, chain, tmp_path, options, line):
    done = run("train-student", "--teacher", chain.teacher, "--output", tmp_path / "s", *options)
    assert done.exit_code and line in done.output and "Traceback" not in done.output
    assert not any(tmp_path.iterdir())
