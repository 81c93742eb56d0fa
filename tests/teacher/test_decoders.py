import json
import shutil

import pytest
import torch
import transformers
from conftest import make_rows, train_tokenizer
from distill.student.options import StudentOptions
from distill.student.training import train_student
from distill.teacher.training import TeacherOptions, train_teacher

from distill.artifact import read_manifest
from distill.models import load_model, load_tokenizer
from distill.predictions import read_predictions

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES = {
    "llama": lambda size: transformers.LlamaConfig(
        vocab_size=size, **SMALL, num_key_value_heads=2, eos_token_id=0
    ),
    "qwen3": lambda size: transformers.Qwen3Config(
        vocab_size=size, **SMALL, num_key_value_heads=2, head_dim=8, eos_token_id=0
    ),
    "gemma": lambda size: transformers.GemmaConfig(
        vocab_size=size, **SMALL, num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=0
    ),
    "gpt2": lambda size: transformers.GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=0
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request, tmp_path_factory):
    """A small random language model whose tokenizer pads on the left and has no padding token."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer("byte-level bpe", [text for text, _ in make_rows(200)], ["<end>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", model_max_length=64, padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = FAMILIES[request.param](tokenizer.get_vocab_size())
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_decoder_reads_the_same_alone_and_in_a_padded_batch(decoder):
    model = load_model(str(decoder), ["a", "b"]).eval()
    tokenizer = load_tokenizer(str(decoder), 64)
    texts = ["lovely phone", "it was a great phone and I love it", "box"]
    with torch.no_grad():
        batch = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
        bare = tokenizer(texts[0], return_tensors="pt").input_ids
        last = model.base_model(bare).last_hidden_state[0, -1]
    torch.testing.assert_close(batch, torch.stack(alone), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.score(last), alone[0], atol=1e-5, rtol=1e-4)


def test_a_decoder_whose_configuration_pads_otherwise_reads_the_last_token_all_the_same(decoder, tmp_path):
    shutil.copytree(decoder, tmp_path / "other")
    config = json.loads((decoder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "pad_token_id": 5}))
    test_a_decoder_reads_the_same_alone_and_in_a_padded_batch(tmp_path / "other")


def test_something_stands_between_the_texts_of_a_pair(decoder, tmp_path):
    tokenizer = load_tokenizer(str(decoder), 64)
    alone, pair = tokenizer("lovely").input_ids, tokenizer("lovely", "phone").input_ids
    assert pair == [*alone, tokenizer.eos_token_id, *tokenizer("phone").input_ids]
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(decoder / "config.json", tmp_path)
    assert load_tokenizer(str(tmp_path), 64)("lovely", "phone").input_ids == pair


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_decoder_teaches_an_encoder_with_another_tokenizer(tmp_path, decoder, data_file, checkpoint, lora):
    teacher, student = tmp_path / "runs" / "teacher", tmp_path / "runs" / "student"
    common = {"precision": "fp32", "batch_size": 16, "learning_rate": 1e-3, "max_steps": 20, "epochs": 2}
    manifest = train_teacher(
        TeacherOptions(output=teacher, data=str(data_file), model=str(decoder), lora=lora, **common)
    )
    logits = read_predictions(teacher, "test")["teacher"].logits
    assert logits.shape == (manifest.data["rows"]["test"], 3)
    train_student(
        StudentOptions(output=student, teacher=teacher, student=str(checkpoint), augment="1x", **common)
    )
    assert read_manifest(student, "train-student").data["augmented"] > 0
