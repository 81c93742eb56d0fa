"""A classifier without layers: what it computes."""

import torch
from torch.nn import functional as F

from distill.averaging import SLOTS, AveragingConfig, AveragingForSequenceClassification, slot_of


def _model():
    torch.manual_seed(0)
    config = AveragingConfig(vocab_size=40, hidden_size=32, bigrams=2, num_labels=3)
    model = AveragingForSequenceClassification(config).eval()
    model.know_bigrams([(7, 7), (7, 9)])
    with torch.no_grad():
        model.bigrams.weight[1:].normal_()
    return model


def test_its_logits_are_those_of_the_formula():
    student = _model()
    student = student.double()
    for name, parameter in student.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.normal_()
    ids = torch.tensor([[1, 7, 7, 9, 2, 0, 0]])
    found = student(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 0]])).logits
    weights = student.state_dict()

    def norm(values, name):
        return F.layer_norm(values, (32,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)

    tokens = norm(weights["tokens.weight"][ids[0, :5]], "token_norm")
    pairs = weights["bigrams.weight"][[0, 0, 1, 2, 0]]  # 7 7 and 7 9
    mean = norm(tokens + pairs, "norm").mean(dim=0)
    hidden = norm(F.gelu(mean @ weights["dense.weight"].T + weights["dense.bias"]), "dense_norm")
    torch.testing.assert_close(found[0], hidden @ weights["classifier.weight"].T + weights["classifier.bias"])


def test_a_bigram_is_read_in_its_order_and_nothing_else_is_read_as_it():
    student = _model()

    def logits(*ids):
        return student(input_ids=torch.tensor([ids])).logits[0].detach()

    with torch.no_grad():
        before = {ids: logits(*ids) for ids in ((7, 9), (9, 7), (9,), (7, 1, 9))}
        student.bigrams.weight[2] += 1  # of 7 9
    same = {ids: torch.equal(logits(*ids), logit) for ids, logit in before.items()}
    assert same == {(7, 9): False, (9, 7): True, (9,): True, (7, 1, 9): True}


def test_of_bigrams_in_one_slot_the_most_frequent_is_known():
    config = AveragingConfig(vocab_size=SLOTS, hidden_size=1, bigrams=2)
    model = AveragingForSequenceClassification(config)
    five, six = slot_of(torch.tensor([5, 6]), torch.zeros(2, dtype=torch.int64)).tolist()
    other = (five - six) % SLOTS
    model.know_bigrams([(5, 0), (6, other)])
    assert model.slots.unique().tolist() == [0, 1]


def test_a_text_without_tokens_has_finite_logits():
    student = _model()
    ids = torch.tensor([[0, 0]])
    assert student(input_ids=ids, attention_mask=torch.zeros_like(ids)).logits.isfinite().all()


def test_transformers_own_loss_is_that_of_the_problem():
    student = _model()
    ids = torch.tensor([[7, 9]])
    one = student(input_ids=ids, labels=torch.tensor([1]))
    torch.testing.assert_close(one.loss, F.cross_entropy(one.logits, torch.tensor([1])))
    student.config.problem_type = "multi_label_classification"
    several = torch.tensor([[1.0, 0.0, 1.0]])
    expected = F.binary_cross_entropy_with_logits(one.logits, several)
    torch.testing.assert_close(student(input_ids=ids, labels=several).loss, expected)
