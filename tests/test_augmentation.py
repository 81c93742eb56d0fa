import random
from itertools import pairwise

import pytest
from conftest import FILLER, WORDS, make_rows, write_csv
from distill.student.corpus import with_soft_labels
from distill.student.losses import UNLABELED

from distill import DistillError
from distill.augmentation import (
    AUGMENTATIONS,
    Corpus,
    augment,
    augmented,
    drop_words,
    mix_texts,
    replace_words,
    substitute_words,
)
from distill.options import budget_of
from distill.sources import text_id
from distill.words import segments

TEXTS = [text for text, _ in make_rows(60)]
CORPUS = Corpus([segments(text) for text in TEXTS])


def _bare(words):
    return [word.strip().casefold() for word in words]


@pytest.fixture(params=range(20))
def generator(request):
    return random.Random(request.param)


def test_dropping_leaves_the_order_of_the_other_words(generator):
    words = segments(TEXTS[0])
    rest = iter(words)
    assert all(word in rest for word in drop_words(words, CORPUS, generator))


def test_mixing_takes_a_beginning_and_an_end(generator):
    words = segments(TEXTS[0])
    mixed = _bare(mix_texts(words, CORPUS, generator))
    cuts = range(1, len(mixed))
    assert any(
        mixed[:cut] == _bare(words)[:cut]
        and any(_bare(segments(text))[-len(mixed[cut:]) :] == mixed[cut:] for text in TEXTS)
        for cut in cuts
    )


def test_a_substitute_stands_beside_the_same_neighbour_somewhere_in_the_corpus(generator):
    words = segments(TEXTS[1])
    changed = substitute_words(words, CORPUS, generator)
    assert len(changed) == len(words)
    pairs = {pair for text in TEXTS for pair in _pairs(segments(text))}
    new, old = _bare(changed), _bare(words)
    for position, (before, after) in enumerate(zip(old, new, strict=True)):
        if before != after:
            left = new[position - 1] if position else ""
            right = old[position + 1] if position + 1 < len(old) else ""
            assert (left, after) in pairs or (after, right) in pairs


def _pairs(words):
    bare = ["", *_bare(words), ""]
    return list(pairwise(bare))


def test_blanks_before_a_substituted_word_stay():
    corpus = Corpus([segments("a\tb c"), segments("a x c")])
    made = {"".join(substitute_words(segments("a\tb c"), corpus, random.Random(seed))) for seed in range(40)}
    assert "a\tx c" in made


def test_a_word_is_replaced_by_one_that_is_like_it():
    words = segments("a good film, a good plot")
    corpus = Corpus(
        [segments(f"word{number} is rare") for number in range(500)], {"good": ["fine", "bad", "is"]}
    )
    made = {"".join(replace_words(words, corpus, random.Random(seed))) for seed in range(200)}
    # "is" is grammar in this corpus; a word that was used waits until the others were.
    two = [
        ("good", "good"),
        ("fine", "good"),
        ("good", "fine"),
        ("bad", "good"),
        ("good", "bad"),
        ("fine", "bad"),
        ("bad", "fine"),
    ]
    assert made == {f"a {one} film, a {other} plot" for one, other in two}


def test_similar_words_take_turns_the_most_alike_first():
    corpus = Corpus([segments(f"word{number}") for number in range(2000)], {"odd": ["even", "strange"]})
    made = [replace_words(["odd"], corpus, random.Random(seed)) for seed in range(20)]
    assert [words for words in made if words != ["odd"]][:3] == [["even"], ["strange"], ["even"]]


def test_a_similar_word_waits_for_those_that_were_used_less_whatever_for():
    similar = {"odd": ["even"], "rare": ["even", "scarce"]}
    corpus = Corpus([segments(f"word{number}") for number in range(2000)], similar)
    seeds = [seed for seed in range(40) if replace_words(["odd"], corpus, random.Random(seed)) == ["even"]]
    assert [replace_words(["rare"], corpus, random.Random(seed)) for seed in seeds] == [["scarce"]] * len(
        seeds
    )


def test_frequent_words_are_replaced_less_often():
    rare = Corpus(
        [segments(f"word{number} is rare") for number in range(2000)], {"odd": ["even"], "rare": ["even"]}
    )
    made = ["".join(replace_words(segments("odd rare"), rare, random.Random(seed))) for seed in range(2000)]
    odd, often = (sum(text.split()[place] == "even" for text in made) / 2000 for place in (0, 1))
    assert odd == pytest.approx(0.4, abs=0.04)
    assert often == pytest.approx(0.4 * (0.001 / (1 / 3)) ** 0.5, abs=0.02)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_scripts_without_blanks_are_augmented_by_the_character(augmentation):
    texts = ["今日は天気がいい", "明日も雨が降る"]
    corpus = Corpus([segments(text) for text in texts], dict.fromkeys(texts[0], "雪風水"))
    made = {
        "".join(augmentation(segments(texts[0]), corpus, random.Random(seed))).strip() for seed in range(20)
    }
    assert len(made) > 3 and not any(" " in text for text in made)


def test_the_same_seed_gives_the_same_texts_and_a_smaller_budget_the_first_of_them():
    assert list(augment(TEXTS, 100, 1, set())) == list(augment(TEXTS, 100, 1, set()))
    assert list(augment(TEXTS, 30, 1, set())) == list(augment(TEXTS, 100, 1, set()))[:30]
    assert list(augment(TEXTS, 30, 2, set())) != list(augment(TEXTS, 30, 1, set()))


def test_no_held_out_text_no_training_text_and_no_text_twice():
    first = list(augment(TEXTS, 100, 1, set()))
    held_out = {text_id(text) for text in first[::2]}
    made = list(augment(TEXTS, 100, 1, set(held_out)))
    assert len(made) == len(set(made)) == 100
    assert not {text_id(text) for text in made} & (held_out | {text_id(text) for text in TEXTS})


def test_a_part_of_a_pair_that_is_empty_stays_so():
    pairs = [(text, other) for text, other in zip(TEXTS, [*TEXTS[1:30], *[""] * 31], strict=True)]
    made = list(augment(pairs, 100, 0, set()))
    assert all(first for first, _ in made)
    assert any(not second for _, second in made) and any(second for _, second in made)


def test_a_corpus_of_many_words_takes_no_time():
    import time

    words = [f"word{number}" for number in range(200_000)]
    started = time.monotonic()
    corpus = Corpus([words[start : start + 20] for start in range(0, len(words), 20)])
    assert time.monotonic() - started < 10
    assert corpus.share["word7"] == pytest.approx(1 / 200_000)


def test_where_nothing_can_be_made_one_line_says_so(tmp_path):
    from datasets import Dataset

    corpus = Dataset.from_dict({"id": [text_id("one")], "text": ["one"]})
    # Two words of one are the only text that can be made, and it is held out.
    held_out = {text_id("oneone")}
    with pytest.raises(DistillError, match="--augment: nothing new can be made of these 1 texts"):
        augmented(corpus, 40, 0, held_out, tmp_path)


def test_a_corpus_too_small_for_the_budget_gives_what_it_can():
    assert 0 < len(list(augment(["one two three", "two three four"], 1000, 0, set()))) < 1000


def test_both_texts_of_a_pair_change():
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    made = list(augment(pairs, 100, 0, set()))
    assert all(len(pair) == 2 and all(pair) for pair in made)
    assert len({first for first, _ in made} - set(TEXTS)) > 50
    assert len({second for _, second in made} - set(TEXTS)) > 50


def test_augmented_rows_have_ids_and_no_label(tmp_path):
    from datasets import Dataset

    corpus = Dataset.from_dict({"id": [text_id(text) for text in TEXTS], "text": TEXTS})
    made = augmented(corpus, 40, 0, set(), tmp_path)
    assert list(made["id"]) == [text_id(text) for text in made["text"]]
    rows = with_soft_labels(
        corpus.add_column("label", [1] * len(corpus)), [made], [[0.0, 1.0]] * (len(corpus) + 40)
    )
    assert list(rows["label"]) == [1] * len(corpus) + [UNLABELED] * 40


@pytest.mark.parametrize("several", [False, True])
def test_a_text_made_out_of_those_with_one_label_keeps_it(tmp_path, several):
    from datasets import Dataset

    names = sorted(WORDS)
    rows = [(text, names.index(label)) for text, label in make_rows(90)]
    texts, labels = zip(*rows, strict=True)
    given = [[int(label == index) for index in range(3)] for label in labels] if several else labels
    corpus = Dataset.from_dict({"id": list(map(text_id, texts)), "text": texts, "label": given})
    made = augmented(corpus, 300, 0, {text_id(text) for text in texts[:5]}, tmp_path)
    assert made.features == corpus.features
    assert len(set(made["id"])) == len(made) == 300
    assert not set(made["id"]) & set(corpus["id"])
    for text, label in zip(made["text"], made["label"], strict=True):
        own = names[label.index(1) if several else label]
        assert set(text.split()) <= {*FILLER, *WORDS[own]}


def test_no_text_is_made_that_another_label_has(tmp_path):
    from datasets import Dataset

    texts = ["not good", "good", "not great", "great", "not fine", "fine"]
    corpus = Dataset.from_dict({"id": list(map(text_id, texts)), "text": texts, "label": [0, 1] * 3})
    made = augmented(corpus, 60, 0, set(), tmp_path)
    assert len(made) == len(set(made["id"])) and not set(made["text"]) & set(texts)


@pytest.mark.parametrize("budget", [10, 19, 45])
def test_shares_of_the_labels_add_up_to_the_budget(tmp_path, budget):
    from datasets import Dataset

    texts = [f"{text} {number}" for number, text in enumerate(TEXTS)]
    labels = [number % 20 for number in range(len(texts))]
    corpus = Dataset.from_dict({"id": list(map(text_id, texts)), "text": texts, "label": labels})
    assert len(augmented(corpus, budget, 0, set(), tmp_path)) == budget


def test_a_fold_is_not_trained_on_texts_it_is_asked_about(tmp_path, checkpoint, monkeypatch):
    from distill.teacher import training

    asked = []

    def spy(train, budget, seed, held_out, folder):
        asked.append((set(train["id"]), held_out))
        return augmented(train, budget, seed, held_out, folder)

    monkeypatch.setattr(training, "augmented", spy)
    data = write_csv(tmp_path / "data.csv", make_rows(60))
    options = training.TeacherOptions(
        output=tmp_path / "t", data=str(data), model=str(checkpoint), augment="1x", folds=2, max_steps=1
    )
    training.train_teacher(options)
    whole = asked[-1][0]
    for own, held_out in asked[:2]:
        assert whole - own <= held_out


def test_a_teacher_learns_on_augmented_text_and_counts_it(tmp_path, checkpoint):
    from distill.teacher.training import TeacherOptions

    from distill import train_teacher

    data = write_csv(tmp_path / "data.csv", make_rows(60))
    options = TeacherOptions(
        output=tmp_path / "t", data=str(data), model=str(checkpoint), augment="2x", folds=2, max_steps=2,
        precision="fp32",
    )  # fmt: skip
    manifest = train_teacher(options)
    assert manifest.data["augmented"] == 2 * manifest.data["rows"]["train"]
    with pytest.raises(DistillError, match="--augment many: give how many"):
        train_teacher(TeacherOptions(output=tmp_path / "u", data=str(data), model="x", augment="many"))


def test_the_budget_is_a_number_or_a_multiple():
    assert budget_of("10x", 70) == 700
    assert budget_of("0.5x", 70) == 35
    assert budget_of("5000", 70) == 5000
    with pytest.raises(DistillError, match="--augment 4: 4 texts in all; to make 4 of each write 4x"):
        budget_of("4", 70)
    for wrong in ("ten", "-1", "0", "0x", "x"):
        with pytest.raises(DistillError, match=r"--augment .*: give how many texts to make, as 10x"):
            budget_of(wrong, 70)


def test_a_student_learns_on_augmented_text_and_counts_it(chain, tmp_path):
    from distill.student.options import StudentOptions

    from distill import train_student

    manifest = train_student(
        StudentOptions(
            output=tmp_path / "s",
            teacher=chain.teacher,
            layers=1,
            augment="0.5x",
            max_steps=2,
            precision="fp32",
        )
    )
    assert manifest.data["augmented"] == round(0.5 * manifest.data["rows"]["train"])
    assert manifest.data["unlabeled"] == 0
    assert not (tmp_path / "checkpoints").exists()
