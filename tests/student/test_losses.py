import numpy as np
import pytest
import torch
from distill.student.losses import UNLABELED, distillation_loss, hard_label_loss, hidden_state_loss
from scipy.special import log_softmax, rel_entr, softmax
from torch.distributions import Bernoulli, Independent, kl_divergence
from torch.nn import functional as F


def _case(classes=5, rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3
    teacher = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3
    return student, teacher, torch.arange(rows) % classes


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("classes", [2, 5, 150])
def test_loss_equals_an_independent_computation_in_float64(temperature, alpha, classes):
    student, teacher, labels = _case(classes)
    p = softmax(teacher.numpy() / temperature, axis=1)
    q = softmax(student.numpy() / temperature, axis=1)
    divergence = rel_entr(p, q).sum() / len(labels)
    entropy = -np.mean(log_softmax(student.numpy(), axis=1)[np.arange(len(labels)), labels.numpy()])
    expected = alpha * temperature**2 * divergence + (1 - alpha) * entropy
    assert distillation_loss(student, teacher, labels, temperature, alpha).item() == pytest.approx(
        expected, rel=1e-10
    )


def test_gradient_passes_gradcheck_with_unlabelled_rows():
    student, teacher, labels = _case()
    labels[2] = UNLABELED
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, teacher, labels, 3.0, 0.7), (student,))


def test_alpha_zero_is_plain_cross_entropy():
    student, teacher, labels = _case()
    torch.testing.assert_close(
        distillation_loss(student, teacher, labels, 4.0, 0.0), F.cross_entropy(student, labels)
    )


def test_alpha_one_ignores_the_labels():
    student, teacher, labels = _case()
    first = distillation_loss(student, teacher, labels, 2.0, 1.0)
    torch.testing.assert_close(first, distillation_loss(student, teacher, labels.roll(1), 2.0, 1.0))


def test_temperature_one_is_the_plain_divergence():
    student, teacher, labels = _case()
    divergence = F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="batchmean")
    torch.testing.assert_close(distillation_loss(student, teacher, labels, 1.0, 1.0), divergence)


def test_unlabelled_rows_have_the_soft_term_only():
    student, teacher, labels = _case()
    mixed = labels.clone()
    mixed[3:] = UNLABELED
    soft = distillation_loss(student, teacher, labels, 2.0, 1.0)
    hard = F.cross_entropy(student[:3], labels[:3], reduction="sum") / len(labels)
    torch.testing.assert_close(distillation_loss(student, teacher, mixed, 2.0, 0.6), 0.6 * soft + 0.4 * hard)


def test_a_student_that_equals_its_teacher_feels_no_pull_and_the_teacher_never_does():
    student, teacher, labels = _case()
    student = teacher.clone().requires_grad_()
    teacher.requires_grad_()
    distillation_loss(student, teacher, labels, 2.0, 1.0).backward()
    assert student.grad.abs().max() < 1e-12
    assert teacher.grad is None


def test_temperature_squared_keeps_the_size_of_the_gradient():
    norms = []
    for temperature in (10.0, 40.0):
        student, teacher, labels = _case()
        student.requires_grad_()
        distillation_loss(student, teacher, labels, temperature, 1.0).backward()
        norms.append(student.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


def _several_labels():
    student, teacher, _ = _case()
    return student, teacher, (torch.arange(30).reshape(6, 5) % 3 == 0).long()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_several_labels_are_independent_of_each_other(temperature, alpha):
    """The loss is that of products of Bernoulli distributions."""
    student, teacher, labels = _several_labels()
    p, q = (Independent(Bernoulli(logits=logits / temperature), 1) for logits in (teacher, student))
    hard = -Independent(Bernoulli(logits=student), 1).log_prob(labels.double()).mean()
    expected = alpha * temperature**2 * kl_divergence(p, q).mean() + (1 - alpha) * hard
    found = distillation_loss(student, teacher, labels, temperature, alpha)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_gradient_with_several_labels_passes_gradcheck_and_unlabelled_rows_have_no_hard_term():
    student, teacher, labels = _several_labels()
    labels[2] = UNLABELED
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, teacher, labels, 3.0, 0.7), (student,))
    hard_label_loss(student, labels).backward()
    assert not student.grad[2].any() and student.grad[[0, 1, 3, 4, 5]].all()


def test_hidden_state_loss_equals_an_independent_computation_in_float64():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    known = torch.rand(3, 5, generator=generator) < 0.6
    squares = [
        ((student[text, token] - teacher[text, token]) ** 2).mean().item()
        for text, token in known.nonzero().tolist()
    ]
    assert hidden_state_loss(student, teacher, known).item() == pytest.approx(np.mean(squares), rel=1e-12)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: hidden_state_loss(h, teacher, known), (student,))
    assert hidden_state_loss(student, teacher, known & False).item() == 0
