"""Neurons of a student's feed-forward networks."""

import pytest
import torch
import transformers
from conftest import make_configs, make_rows, make_tokenizer
from distill.student.neurons import activation_norms, keep_neurons

from distill.artifact import read_manifest
from distill.errors import DistillError
from distill.models import load_model

TEXTS = [text for text, _ in make_rows(40)]
FAMILIES = {
    **make_configs(layers=2),
    "qwen3": transformers.Qwen3Config(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=40, num_labels=3, pad_token_id=0,
    ),
}  # fmt: skip
INPUTS = {
    "input_ids": torch.arange(5, 25).reshape(2, 10),
    "attention_mask": torch.ones(2, 10, dtype=torch.long),
}


def _model(family):
    torch.manual_seed(0)
    config = FAMILIES[family]
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and part.bias is not None:
            part.bias.data.normal_(std=0.5)
    return model


def _ends(model, width=48):
    """The layers that read the neurons."""
    linear = (part for part in model.modules() if isinstance(part, torch.nn.Linear))
    return [part for part in linear if part.in_features == width]


def _tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length, tokenizer.model_input_names = 32, ["input_ids", "attention_mask"]
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_neurons_that_add_nothing_the_answers_are_the_same(family, tmp_path):
    model = _model(family).eval()
    idle = torch.randperm(48)[:30]
    for end in _ends(model):
        end.weight.data[:, idle] = 0
    narrow = keep_neurons(model, 18, TEXTS, _tokenizer()).eval()
    assert [end.in_features for end in _ends(narrow, 18)] == [18, 18]
    narrow.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(**INPUTS).logits
        torch.testing.assert_close(narrow(**INPUTS).logits, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(again(**INPUTS).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "read_in_the_last"), [("bert", "first token"), ("mpnet", "all tokens")])
def test_activations_are_those_of_real_tokens(family, read_in_the_last):
    model, tokenizer = _model(family), _tokenizer()
    texts = ["the phone was lovely", "awful", "it was very slow and the box is black"]
    found = activation_norms(model.train(), _ends(model), texts, tokenizer)
    expected = [torch.zeros(48), torch.zeros(48)]
    inputs = []
    for end in _ends(model.eval()):
        end.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0].detach()))
    for text in texts:
        inputs.clear()
        model(**tokenizer(text, return_tensors="pt"))
        expected[0] += inputs[0].square().sum(dim=0)
        expected[1] += inputs[1][: 1 if read_in_the_last == "first token" else None].square().sum(dim=0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.sqrt())


def test_a_neuron_counts_by_what_it_adds():
    model = _model("bert")
    first = model.bert.encoder.layer[0]
    first.intermediate.dense.weight.data.zero_()
    # Each fires as much as its bias says.
    for neuron, (fires, weighs) in {7: (1.0, 10.0), 8: (10.0, 3.0), 9: (20.0, 1.0)}.items():
        first.intermediate.dense.bias.data[neuron] = fires
        first.output.dense.weight.data[:, neuron] = weighs
    narrow = keep_neurons(model, 1, TEXTS, _tokenizer())
    kept = narrow.bert.encoder.layer[0].output.dense.weight
    torch.testing.assert_close(kept, torch.full((32, 1), 3.0))


def test_all_neurons_are_the_model_itself():
    model = _model("bert")
    assert keep_neurons(model, 48, TEXTS, _tokenizer()) is model


@pytest.mark.parametrize(
    ("model", "keep", "line"),
    [
        (lambda: _model("bert"), 49, "the student's checkpoint has only 48 neurons"),
        (
            lambda: transformers.AutoModelForSequenceClassification.from_config(
                transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, num_labels=3)
            ),
            8,
            "cannot tell the feed-forward networks of a gpt2 apart",
        ),
        (
            # As wide as the hidden states: a projection of the attention looks the same.
            lambda: transformers.AutoModelForSequenceClassification.from_config(
                transformers.BertConfig(
                    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
                )
            ),
            8,
            "cannot tell the feed-forward networks of a bert apart, which are as narrow as its hidden states",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_narrowed_is_refused(model, keep, line):
    with pytest.raises(DistillError, match=f"--intermediate-size {keep}: {line}"):
        keep_neurons(model(), keep, TEXTS, _tokenizer())


def test_a_student_with_fewer_neurons_is_trained_and_exported(run, chain, tmp_path):
    student = tmp_path / "student"
    done = run(
        "train-student", "--teacher", chain.teacher, "--student", chain.checkpoint, "--layers", 2,
        "--intermediate-size", 16, "--max-steps", 2, "--output", student,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    manifest = read_manifest(student, "train-student")
    assert manifest.options["intermediate_size"] == 16
    assert load_model(str(student), manifest.labels).config.intermediate_size == 16
    done = run("export", "--student", student, "--output", tmp_path / "export")
    assert done.exit_code == 0, done.output


def test_a_speed_is_measured_with_the_neurons_that_are_left(run, chain, tmp_path, monkeypatch):
    from distill.student import shape

    import distill

    seen = []
    candidate = distill.open_candidate

    def watched(model, *args, **kwargs):
        seen.append(model.config.intermediate_size)
        return candidate(model, *args, **kwargs)

    monkeypatch.setattr(shape.distill, "open_candidate", watched)
    done = run(
        "train-student", "--teacher", chain.teacher, "--student", chain.checkpoint, "--latency-budget", "1000ms",
        "--intermediate-size", 16, "--max-steps", 1, "--output", tmp_path / "student",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert seen and set(seen) == {16}
