import pytest
import torch
import transformers
from conftest import make_configs
from distill.student.architecture import cut_positions, evenly_spaced, keep_layers

from distill.errors import DistillError

FAMILIES = make_configs(layers=6)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_layers_and_everything_else_have_the_same_weights(family):
    model = _model(family)
    student = keep_layers(model, 3)
    assert student.config.num_hidden_layers == 3
    before, after = model.state_dict(), student.state_dict()
    for name, tensor in after.items():
        for new, old in enumerate(
            evenly_spaced(6, 3, getattr(model.config, "global_attn_every_n_layers", 1))
        ):
            source = name.replace(f"layer.{new}.", f"layer.{old}.").replace(
                f"layers.{new}.", f"layers.{old}."
            )
            if source != name or f"layer.{new}." in name or f"layers.{new}." in name:
                torch.testing.assert_close(tensor, before[source])
                break
        else:
            torch.testing.assert_close(tensor, before[name])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_loads_with_the_same_logits(family, layers, tmp_path):
    student = keep_layers(_model(family), layers).eval()
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**INPUTS).logits, student(**INPUTS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_layer_changes_nothing(family):
    model = _model(family)
    with torch.no_grad():
        expected = model(**INPUTS).logits
        torch.testing.assert_close(
            keep_layers(model, 6).eval()(**INPUTS).logits, expected, atol=1e-5, rtol=1e-4
        )


def test_layers_are_evenly_spaced_from_the_first_to_the_last():
    assert evenly_spaced(6, 3) == [0, 2, 5]
    assert evenly_spaced(12, 4) == [0, 4, 7, 11]
    assert evenly_spaced(12, 1) == [11]
    assert evenly_spaced(12, 1, period=3) == [0]


@pytest.mark.parametrize(("total", "keep"), [(22, 11), (22, 21), (22, 3), (28, 9), (6, 6), (7, 5)])
def test_layers_whose_kind_depends_on_their_number_keep_their_kind(total, keep):
    kept = evenly_spaced(total, keep, 3)
    assert [layer % 3 for layer in kept] == [new % 3 for new in range(keep)]
    assert kept[0] == 0 and kept == sorted(set(kept)) and total - 4 < kept[-1] < total


def test_a_modernbert_student_attends_as_the_layers_that_it_keeps():
    model = _model("modernbert")
    student = keep_layers(model, 4)
    kept = evenly_spaced(6, 4, getattr(model.config, "global_attn_every_n_layers", 1))

    def kind(layer):  # transformers 5, 4
        return layer.attention_type if hasattr(layer, "attention_type") else layer.attn.local_attention

    assert [kind(layer) for layer in student.model.layers] == [kind(model.model.layers[old]) for old in kept]
    assert len({kind(layer) for layer in student.model.layers}) == 2


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=4, n_head=2, num_labels=3),
        transformers.BartConfig(vocab_size=60, d_model=16, encoder_layers=4, decoder_layers=4, num_labels=3,
                                encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=40),
    ],
)  # fmt: skip
def test_a_family_whose_layers_cannot_be_told_apart_is_refused(config):
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(DistillError, match="smaller checkpoint with --student"):
        keep_layers(model, 2)


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(DistillError, match="--layers 7"):
        keep_layers(_model("bert"), 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_that_no_text_reaches_are_cut_and_change_no_answer(family):
    model = _model(family)
    shorter = cut_positions(model, 10).eval()
    tables = [
        tensor for name, tensor in shorter.state_dict().items() if name.endswith("position_embeddings.weight")
    ]
    if tables:
        offset = 1 + model.config.pad_token_id if family in ("roberta", "mpnet") else 0
        assert [len(tensor) for tensor in tables] == [10 + offset]
        assert shorter.config.max_position_embeddings == 10 + offset
    with torch.no_grad():
        torch.testing.assert_close(shorter(**INPUTS).logits, model(**INPUTS).logits, atol=1e-6, rtol=1e-5)
    assert cut_positions(model, 10_000) is model
