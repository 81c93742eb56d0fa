"""Neurons of a student's feed-forward networks."""

import pytest
import torch
import transformers
from conftest import make_configs, make_rows, make_tokenizer
from distill.student.neurons import keep_neurons

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
    return transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager"
    ).eval()


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
    model = _model(family)
    idle = torch.randperm(48)[:30]
    for end in _ends(model):
        end.weight.data[:, idle] = 0
    narrow = keep_neurons(model, 18, TEXTS, _tokenizer()).eval()
    assert [end.in_features for end in _ends(narrow, 18)] == [18, 18]
    assert sum(part.numel() for part in narrow.parameters()) < sum(
        part.numel() for part in model.parameters()
    )
    narrow.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(**INPUTS).logits
        torch.testing.assert_close(narrow(**INPUTS).logits, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(again(**INPUTS).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_neuron_counts_by_what_it_adds_and_not_by_its_weights_alone():
    model = _model("bert")
    first = model.bert.encoder.layer[0]
    # Large weights behind a neuron that never fires, small ones behind one that always does.
    first.intermediate.dense.bias.data[7] = -100.0
    first.output.dense.weight.data[:, 7] = 1.0
    first.intermediate.dense.bias.data[9] = 100.0
    first.output.dense.weight.data[:, 9] = 0.01
    narrow = keep_neurons(model, 1, TEXTS, _tokenizer())
    torch.testing.assert_close(
        narrow.bert.encoder.layer[0].intermediate.dense.weight, first.intermediate.dense.weight[9:10]
    )


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
            "cannot tell the feed-forward networks of a bert apart",
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
