import json
import re

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import make_rows, write_csv

from distill.data import load_data, load_unlabeled, reload_data
from distill.errors import DistillError
from distill.sources import Columns

ROWS = make_rows(120)


def _texts(data, split):
    return list(data.splits[split]["text"])


def _kinds(data):
    return {(finding.kind, finding.split): finding for finding in data.findings}


def test_all_four_formats_give_the_same_data(tmp_path):
    write_csv(tmp_path / "a.csv", ROWS)
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in ROWS))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in ROWS))
    table = pyarrow.table({"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    loaded = [load_data(str(path)) for path in sorted(tmp_path.iterdir())]
    assert len(loaded) == 4
    assert len({data.fingerprint for data in loaded}) == 1


def test_rows_are_memory_mapped_not_held(tmp_path):
    data = load_data(str(write_csv(tmp_path / "a.csv", ROWS)))
    assert all(split.cache_files for split in data.splits.values())


def test_integer_labels_are_sorted_as_numbers(tmp_path):
    rows = [(f"text {i}", str(i % 12)) for i in range(240)]
    assert load_data(str(write_csv(tmp_path / "a.csv", rows))).labels == [str(i) for i in range(12)]


def test_texts_and_labels_that_look_like_missing_values_or_numbers_survive(tmp_path):
    rows = [("NA", "001"), ("null", "001"), ("None", "01"), ("1.0", "01")] + [
        (f"t{i}", "001") for i in range(20)
    ]
    rows += [(f"u{i}", "01") for i in range(20)]
    write_csv(tmp_path / "d" / "train.csv", rows)
    write_csv(tmp_path / "d" / "dev.csv", [("vv", "01"), ("ww", "001")])
    write_csv(tmp_path / "d" / "test.csv", [("xx", "01"), ("yy", "001")])
    data = load_data(str(tmp_path / "d"))
    assert _texts(data, "train")[:4] == ["NA", "null", "None", "1.0"]
    assert sorted(data.labels) == ["001", "01"]


def test_columns_are_found_by_their_usual_names_and_can_be_named(tmp_path):
    path = write_csv(
        tmp_path / "a.csv", [(y, t, t.upper()) for t, y in ROWS], ("Category", "Review", "other")
    )
    assert _texts(load_data(str(path)), "test")[0].islower()
    assert _texts(load_data(str(path), Columns(text="other")), "test")[0].isupper()


def test_byte_order_mark_and_line_breaks_in_quotes_are_read(tmp_path):
    rows = [(f"{t}\nsecond line", y) for t, y in ROWS]
    path = write_csv(tmp_path / "a.csv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert _texts(load_data(str(path)), "train")[0].endswith("\nsecond line")


def test_missing_splits_are_stratified_and_depend_on_the_seed_alone(tmp_path):
    path = str(write_csv(tmp_path / "a.csv", make_rows(300)))
    first, again, other = load_data(path, seed=1), load_data(path, seed=1), load_data(path, seed=2)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    for split, count in (("train", 80), ("validation", 10), ("test", 10)):
        assert np.bincount(first.splits[split]["label"]).tolist() == [count] * 3
    everything = [text for split in first.splits for text in _texts(first, split)]
    assert len(everything) == len(set(everything)) == 300


def test_folder_with_other_spellings_of_the_splits(tmp_path):
    write_csv(tmp_path / "training.csv", ROWS[:60])
    write_csv(tmp_path / "dev.csv", ROWS[60:90])
    write_csv(tmp_path / "test.csv", ROWS[90:])
    (tmp_path / "LICENSE.txt").write_text("ignored")
    data = load_data(str(tmp_path))
    assert [len(split) for split in data.splits.values()] == [60, 30, 30]


def test_a_single_file_in_a_folder_is_split(tmp_path):
    write_csv(tmp_path / "all.csv", ROWS)
    assert len(load_data(str(tmp_path)).splits["test"]) == 12


def test_empty_texts_and_missing_labels_are_dropped_and_counted_with_their_lines(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("", "positive"), *ROWS, ("fine", ""), ("fine too", " ")])
    findings = _kinds(load_data(str(path)))
    assert findings["empty text", "train"].examples == ["line 2"]
    assert findings["missing label", "train"].count == 2
    assert findings["missing label", "train"].examples == ["line 123", "line 124"]


def test_a_class_too_small_to_split_stays_in_train(tmp_path):
    path = write_csv(tmp_path / "a.csv", [*ROWS, ("odd one", "rare"), ("odd two", "rare")])
    data = load_data(str(path))
    assert _kinds(data)["class too small to split", "train"].examples == ["rare"]
    assert {"odd one", "odd two"} <= set(_texts(data, "train"))


def test_a_label_that_only_evaluation_has_is_reported_and_kept(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "validation.csv", [("new text", "positive"), ("newer text", "furious")])
    write_csv(tmp_path / "test.csv", [("newest text", "furious")])
    data = load_data(str(tmp_path))
    assert _kinds(data)["label only in evaluation", "train"].count == 2
    assert "furious" in data.labels
    assert len(data.splits["test"]) == 1


def test_duplicates_inside_a_split_are_reported_and_across_splits_leave_train_never_test(tmp_path):
    write_csv(tmp_path / "train.csv", [*ROWS[:60], ROWS[0], ("shared", "positive"), ("both", "neutral")])
    write_csv(tmp_path / "validation.csv", [*ROWS[60:90], ("shared", "negative"), ("both", "neutral")])
    write_csv(tmp_path / "test.csv", [*ROWS[90:], ("both", "neutral"), ("both", "positive")])
    data = load_data(str(tmp_path))
    findings = _kinds(data)
    assert findings["duplicate text", "train"].count == 1
    assert findings["same text, different labels", "test"].count == 1
    assert findings["text also in validation or test", "train"].count == 2
    assert findings["text also in test", "validation"].count == 1
    assert "both" not in _texts(data, "train") + _texts(data, "validation")
    assert "shared" not in _texts(data, "train") and "shared" in _texts(data, "validation")
    assert _texts(data, "test").count("both") == 2


def test_the_examples_of_duplicates_are_different_texts(tmp_path):
    write_csv(tmp_path / "train.csv", [*ROWS[:90], *[("!", "neutral")] * 4, ROWS[5]])
    write_csv(tmp_path / "test.csv", ROWS[90:])
    found = _kinds(load_data(str(tmp_path)))["duplicate text", "train"]
    assert found.count == 4 and sorted(found.examples) == sorted(["'!'", repr(ROWS[5][0])])


def test_a_changed_file_is_read_again_and_changes_the_fingerprint(tmp_path):
    path = tmp_path / "a.csv"
    first = load_data(str(write_csv(path, ROWS)))
    second = load_data(str(write_csv(path, [("changed", "positive"), *ROWS[1:]])))
    assert first.fingerprint != second.fingerprint


def test_pairs_of_texts_have_an_id_of_their_own(tmp_path):
    path = write_csv(
        tmp_path / "a.csv", [(t, f"{i}", y) for i, (t, y) in enumerate(ROWS)], ("text", "other", "label")
    )
    alone, pairs = load_data(str(path)), load_data(str(path), Columns(text_pair="other"))
    assert "text_pair" in pairs.splits["train"].column_names
    assert alone.splits["test"]["id"][0] != pairs.splits["test"]["id"][0]


def test_a_hub_dataset_with_class_names_and_unlabelled_test_split(monkeypatch):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features(
        {"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"]), "idx": Value("int32")}
    )
    rows = [{"sentence": t, "label": i % 2, "idx": i} for i, (t, _) in enumerate(ROWS)]
    hidden = [{"sentence": f"hidden {i}", "label": -1, "idx": i} for i in range(5)]
    loaded = DatasetDict(
        train=Dataset.from_list(rows[:100], features), validation=Dataset.from_list(rows[100:], features),
        test=Dataset.from_list(hidden, features),
    )  # fmt: skip
    monkeypatch.setattr("distill.sources.load_dataset", lambda name, config: loaded)
    data = load_data("glue:sst2")
    assert data.labels == ["bad", "good"]
    assert len(data.splits["validation"]) == 20
    assert len(data.splits["test"]) == 10  # made from train, because the Hub's test split has no labels
    assert _kinds(data)["missing label", "test"].count == 5


def test_unlabeled_texts_come_from_an_address_too(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_csv(tmp_path / "more" / "a.csv", [("one",), ("two",)], ("text",))
    write_csv(tmp_path / "more" / "b.csv", [("three",)], ("text",))
    (tmp_path / "more" / "notes.md").write_text("no text of ours")
    address = (tmp_path / "more").as_uri()
    assert list(load_unlabeled(address)["text"]) == ["one", "two", "three"]
    assert list(load_unlabeled(f"{address}/b.csv")["text"]) == ["three"]
    assert len([*(tmp_path / "cache" / "distill").iterdir()]) == 2
    write_csv(tmp_path / "more" / "c.csv", [("four", "b", "c")], ("text", "label"))
    with pytest.raises(DistillError, match=re.escape(f"{address}/c.csv, line 2")):
        load_unlabeled(f"{address}")
    for wrong in (f"{address}/absent.csv", f"{address}/notes.md", "nothing://bucket/texts"):
        with pytest.raises(DistillError, match=re.escape(wrong)):
            load_unlabeled(wrong)


def test_unlabeled_texts_need_no_label_and_lose_the_empty_ones(tmp_path):
    path = write_csv(tmp_path / "u.csv", [("one",), ("",), ("two",)], ("text",))
    assert list(load_unlabeled(str(path))["text"]) == ["one", "two"]


def test_a_local_source_that_is_gone_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    write_csv(tmp_path / "mine" / "train.csv", ROWS)
    data = load_data("mine")
    kept = data.manifest()
    (tmp_path / "mine").rename(tmp_path / "moved")
    monkeypatch.setattr("distill.sources.load_dataset", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(
        DistillError, match=r"^mine: no such file or folder here \(.*, say where with --data\)$"
    ):
        reload_data(kept, data.labels)
    with pytest.raises(DistillError, match=r"^--data ./typo: no such file or folder; name one"):
        reload_data(kept, data.labels, "./typo")
    assert reload_data(kept, data.labels, "moved").fingerprint == data.fingerprint


def test_a_label_that_only_evaluation_has_once_duplicates_are_dropped_is_reported(tmp_path):
    write_csv(tmp_path / "train.csv", [*ROWS[:60], ("rare", "furious")])
    write_csv(tmp_path / "test.csv", [*ROWS[60:], ("rare", "furious")])
    assert _kinds(load_data(str(tmp_path)))["label only in evaluation", "train"].examples == ["furious"]
