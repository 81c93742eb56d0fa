"""The page in a real browser; skipped where Chromium or Selenium is not installed."""

import shutil

import pytest
from distill.explain.page import render_page
from distill.explain.report import ReportOptions, compile_report

pytest.importorskip("selenium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no Chromium"),
]
ATTACK = "<script>alert(1)</script>"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,1600",
]  # fmt: skip


@pytest.fixture(scope="module")
def browsed(chain):
    report, browsed, _ = compile_report(
        ReportOptions(chain.teacher, chain.student, chain.export, texts=2, explain=4)
    )
    answers = [[[0], 0.9], [[1], 0.8], [[0], 0.7]]
    browsed["rows"] += [
        {"n": 9001, "y": [0], "a": answers, "t": ATTACK},
        {"n": 9002, "y": [1], "a": answers, "t": "x" * 10_000},
    ]
    return report, browsed


@pytest.fixture(scope="module")
def driver(browsed, tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(*browsed), encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.get(path.as_uri())
    yield driver
    driver.quit()


def _listed(driver):
    while driver.find_element("id", "more").is_displayed():
        driver.find_element("id", "more").click()
    return len(driver.find_elements("css selector", "#list > li"))


def _choose(driver, identifier, text):
    from selenium.webdriver.support.select import Select

    Select(driver.find_element("id", identifier)).select_by_visible_text(text)


def test_nothing_is_logged_and_nothing_is_asked_of_the_network(driver):
    import json

    assert driver.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file://", "data:")) for url in asked)


def test_every_filter_shows_what_it_says(driver, browsed):
    from selenium.webdriver.support.select import Select

    rows, labels, versions = (browsed[1][name] for name in ("rows", "labels", "versions"))
    wrong = [[label != row["y"] for label, _ in row["a"]] for row in rows]
    expected = {
        "all of them": len(rows),
        "versions disagree": sum(len({tuple(labels) for labels, _ in row["a"]}) > 1 for row in rows),
        "every version is wrong": sum(all(one) for one in wrong),
        "explained": sum("w" in row for row in rows),
        **{f"{name} is wrong": sum(one[index] for one in wrong) for index, name in enumerate(versions)},
        **{
            f"{name} is wrong, teacher right": sum(one[index] and not one[0] for one in wrong)
            for index, name in enumerate(versions) if index
        },
        **{
            f"{name} is right, teacher wrong": sum(one[0] and not one[index] for one in wrong)
            for index, name in enumerate(versions) if index
        },
        **{
            f"{name} is {word}, for other reasons": sum(
                "o" in row and row["o"][index - 1] and (row["a"][index][0] == row["y"]) is right for row in rows
            )
            for index, name in enumerate(versions) if index
            for word, right in (("right", True), ("wrong", False))
        },
    }  # fmt: skip
    offered = [option.text for option in Select(driver.find_element("id", "who")).options]
    assert sorted(offered) == sorted(expected)
    for name, count in expected.items():
        _choose(driver, "who", name)
        assert _listed(driver) == count, name
        assert driver.find_element("id", "count").text == f"{count} texts"
    _choose(driver, "who", "all of them")
    _choose(driver, "class", labels[1])
    assert _listed(driver) == sum(row["y"] == [1] for row in rows)
    _choose(driver, "class", "any")


def test_hostile_and_huge_texts_are_shown_as_they_are(driver):
    search = driver.find_element("id", "search")
    search.send_keys("<SCRIPT>alert")
    assert _listed(driver) == 1
    shown = driver.find_element("css selector", "#list .text")
    assert shown.text == ATTACK
    assert driver.execute_script("return document.scripts.length") == 2
    search.clear()
    search.send_keys("xxxxxxxxxx")
    assert _listed(driver) == 1
    box = driver.find_element("css selector", "#list .text")
    assert box.size["height"] < 300
    assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    search.clear()
    search.send_keys(" ")


def test_the_class_that_words_speak_for_can_be_chosen(driver, browsed):
    from selenium.webdriver.support.select import Select

    driver.find_element("id", "search").clear()
    _choose(driver, "who", "explained")
    _listed(driver)
    boxes = driver.find_elements("css selector", "#list > li select")
    chooser = next(box for box in map(Select, boxes) if len(box.options) > 1)
    item = chooser._el.find_element("xpath", "./ancestor::li")
    before = item.find_element("css selector", ".versions").get_attribute("innerHTML")
    other = next(option.text for option in chooser.options if not option.is_selected())
    chooser.select_by_visible_text(other)
    assert item.find_element("css selector", ".versions").get_attribute("innerHTML") != before


@pytest.mark.parametrize("width", [390, 1280])
def test_the_first_screen_has_the_verdict_the_table_and_the_picture(driver, width):
    driver.set_window_size(width, 1600)
    parts = ["h1"] if width < 1000 else ["h1", "#versions table", "#versions svg"]
    for part in parts:
        box = driver.find_element("css selector", part)
        assert box.location["y"] + box.size["height"] < 800
        assert box.size["width"] <= width


def test_the_keyboard_goes_on_with_the_texts_that_were_added(driver):
    driver.find_element("id", "search").clear()
    more = driver.find_element("id", "more")
    if more.is_displayed():
        before = len(driver.find_elements("css selector", "#list > li"))
        more.send_keys("\n")
        focused = driver.execute_script(
            "return [...document.getElementById('list').children].indexOf(document.activeElement)"
        )
        assert focused == before
