import numpy as np
import pytest
import torch
import transformers
from conftest import make_configs, make_tokenizer

from distill import devices
from distill.data import load_data
from distill.devices import choose_precision
from distill.errors import DistillError
from distill.models import BATCH_TOKENS, load_model, load_tokenizer, text_logits
from distill.training import predict_logits


def test_bf16_is_chosen_on_a_cpu_only_with_the_instructions(monkeypatch):
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: False)
    assert choose_precision("cpu") == "fp32"
    with pytest.raises(DistillError, match="use fp32"):
        choose_precision("cpu", "bf16")
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: True)
    assert choose_precision("cpu") == "bf16"


def test_pytorchs_own_ceiling_is_honoured(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not devices.cpu_has_bf16()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_t4_trains_in_fp16_and_newer_gpus_in_bf16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_precision("cuda") == expected


def test_bf16_on_a_t4_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(DistillError, match="use fp16"):
        choose_precision("cuda", "bf16")


@pytest.mark.parametrize(("family", "limit"), [("Roberta", 38), ("MPNet", 38), ("Bert", 40)])
def test_texts_are_cut_at_what_the_models_positions_hold(tmp_path, family, limit):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, pad_token_id=0 if family == "Bert" else 1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), 256)
    assert tokenizer.model_max_length == limit
    assert load_tokenizer(str(tmp_path), 16).model_max_length == 16
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    ids = tokenizer("lovely " * 100, truncation=True, return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, 2)


def _small(model, most):
    """The model, out of memory with more than so many texts of ordinary length."""
    original = model.forward

    def forward(input_ids, **inputs):
        if len(input_ids) > most and input_ids.shape[1] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(input_ids, **inputs)

    model.forward = forward


def test_predictions_that_are_out_of_memory_go_on_in_smaller_batches(chain):
    data = load_data(str(chain.data), quiet=True)
    model, tokenizer = load_model(str(chain.teacher), data.labels), load_tokenizer(str(chain.teacher), 64)
    expected = predict_logits(model, tokenizer, data.splits["test"], "cpu", "fp32")
    _small(model, 3)
    found = predict_logits(model, tokenizer, data.splits["test"], "cpu", "fp32")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    _small(model, 0)
    with pytest.raises(DistillError, match="a text of .* tokens; give a smaller --max-length"):
        predict_logits(model, tokenizer, data.splits["test"], "cpu", "fp32")


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_a_model_too_large_for_a_device_is_there_in_half_its_size_and_comes_back_whole(family, monkeypatch):
    torch.manual_seed(0)
    config = {**make_configs(2), "gpt2": transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4,
                                                                 pad_token_id=0)}[family]  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.config.pad_token_id = 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = ["lovely phone", "it was a great phone and I love it"]
    expected = text_logits(model, make_tokenizer(), texts, "cpu", "bf16")
    # A CPU that is taken for another device, and too small for fp32.
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("meta")))
    original, calls = type(model).to, []

    def to(self, device):
        calls.append(device)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, device)

    monkeypatch.setattr(type(model), "to", to)
    with devices.placed(model, "cpu", "bf16"):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.bfloat16}
        monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cpu")))
        found = text_logits(model, make_tokenizer(), texts, "cpu", "bf16")
    np.testing.assert_allclose(
        found, expected, atol=0 if family == "gpt2" else 0.02
    )  # all tokens, or the first
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_a_model_that_does_not_fit_at_all_is_told_in_one_line(monkeypatch):
    model = transformers.AutoModelForSequenceClassification.from_config(make_configs(2)["bert"])

    def to(self, device):
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self

    monkeypatch.setattr(type(model), "to", to)
    monkeypatch.setattr(devices, "_matrices", lambda model: [])
    with pytest.raises(DistillError, match="0.0 billion parameters does not fit this device in fp16"):
        devices.put_on(model, "cuda", "fp16")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (RuntimeError(7), False),
    ],
)
def test_libraries_that_found_no_memory_are_understood(error, expected):
    assert devices.out_of_memory(error) is expected


def test_logits_in_batches_equal_those_of_single_texts(chain, monkeypatch):
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 50)
    data = load_data(str(chain.data), quiet=True)
    model, tokenizer = load_model(str(chain.teacher), data.labels), load_tokenizer(str(chain.teacher), 64)
    found = predict_logits(model, tokenizer, data.splits["test"], "cpu", "fp32")
    for row, text in zip(found, data.splits["test"]["text"], strict=True):
        with torch.no_grad():
            single = model(**tokenizer(text, return_tensors="pt")).logits[0].numpy()
        np.testing.assert_allclose(row, single, atol=1e-5)
