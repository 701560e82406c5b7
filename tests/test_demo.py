"""demo.py: its functions, and the page in headless Chromium."""

import sys

import pytest

import demo
from common import InputError
from data import KLUE_LABELS
from predictor import Predictor
from tests.helpers import BROWSER, ROOT

NEEDS = "pip install -r requirements-dev.txt installs it"
# Where a word of an element is on the page: left, right, middle.
PLACE = """([element, word]) => {
    const walker = document.createTreeWalker(document.querySelector(element), NodeFilter.SHOW_TEXT)
    while (walker.nextNode()) {
        const at = walker.currentNode.data.indexOf(word), range = document.createRange()
        if (at < 0) continue
        range.setStart(walker.currentNode, at)
        range.setEnd(walker.currentNode, at + word.length)
        const box = range.getBoundingClientRect()
        return [box.left, box.right, (box.top + box.bottom) / 2]
    }
}"""


def marked(*parts):
    return [{"token": token, "class_or_confidence": name} for token, name in parts]


TWO = marked(("박준호", "subject PER"), ("는 ", None), ("부산", "object LOC"), ("에 산다.", None))


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint, device="cpu", amp="off")


def test_marks_become_entities_with_offsets():
    parts = marked(("부산", "object LOC"), (" 시민", "entity PER"), (" 박준호", "subject PER"))
    sentence, entities, pair = demo.entities_of(parts)
    assert sentence == "부산 시민 박준호"
    assert [(e["word"], e["start_idx"], e["type"]) for e in entities] == [
        ("부산", 0, "LOC"), ("시민", 3, "PER"), ("박준호", 6, "PER"),
    ]  # fmt: skip
    assert [e["word"] for e in pair] == ["박준호", "부산"]
    others = marked(("가", "entity PER"), ("나", "entity ORG"), ("다", "subject LOC"))
    assert [e["word"] for e in demo.entities_of(others)[2]] == ["다", "가"]
    twice = marked(("가", "subject PER"), ("나", "subject ORG"))
    assert [e["word"] for e in demo.entities_of(twice)[2]] == ["나", "가"]
    for parts in (None, marked(("가", None)), marked(("가", "subject PER"))):
        with pytest.raises(InputError, match="marked entities, expected at least 2"):
            demo.entities_of(parts)


@pytest.mark.parametrize("name", ["subject", "PER", "Subject PER", "subject XYZ"])
def test_a_name_that_says_no_role_or_type_is_an_error(name):
    with pytest.raises(InputError, match=f"부산: mark: found '{name}', expected a role and a type"):
        demo.entities_of([*TWO[:2], *marked(("부산", name))])


def test_a_new_mark_gets_the_chosen_name():
    found, role = demo.name_marks(marked(("가", "label"), ("나", None)), "subject", "PER")
    assert found == [("가", "subject PER"), ("나", None)]
    assert role == "object"
    assert demo.name_marks(marked(*found), role, "PER") is None
    assert demo.name_marks(None, role, "PER") is None


def test_relations_are_those_of_predictor_in_either_language(predictor):
    bars, triples = demo.relations(predictor, TWO, 0.0, "English")
    row = {"sentence": "박준호는 부산에 산다.", "subject": "박준호", "object": "부산",
           "subject_type": "PER", "object_type": "LOC"}  # fmt: skip
    (expected,) = predictor.predict([row])
    assert bars == expected["probabilities"]
    in_korean, korean_triples = demo.relations(predictor, TWO, 0.0, "한국어")
    assert list(in_korean.values()) == list(bars.values())
    assert list(in_korean) == list(demo.KOREAN.values())
    assert [t[::2] for t in korean_triples] == [t[::2] for t in triples]
    assert len(set(demo.KOREAN.values())) == len(KLUE_LABELS) == len(demo.KOREAN)
    several = demo.EXAMPLES[1]
    assert demo.relations(predictor, marked(*several), 1.0, "English")[1] == []


def test_the_package_that_is_missing_is_named(call, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused = call(demo, checkpoint, code=2).err
    expected = "demo.py needs the package gradio: pip install -r requirements-dev.txt"
    assert refused == f"demo.py: {expected}\n"


def test_a_port_that_is_none_is_one_line(call, checkpoint):
    for port in (0, 99999):
        refused = call(demo, checkpoint, "--port", port, code=2).err
        assert refused == f"demo.py: --port: found {port}, expected 1 to 65535\n"


def test_the_help_names_folders_and_the_page_has_no_installation(call, predictor):
    gradio = pytest.importorskip("gradio", reason=NEEDS)
    assert "runs, or folders of --export" in call(demo, "-h").out
    blocks = demo.page(predictor).blocks.values()
    (text,) = (block.value for block in blocks if isinstance(block, gradio.Markdown))
    assert "The bars are for subject and object; if there are none" in " ".join(text.split())
    assert not {"pip", "requirements-dev.txt"} & {*text.split()}
    (table,) = (block.label for block in blocks if isinstance(block, gradio.Dataframe))
    assert table == "All entities: relations of at least the probability set above"


def test_it_is_short():
    assert len((ROOT / "demo.py").read_text(encoding="utf-8").splitlines()) < 120


@pytest.mark.slow
def test_two_words_are_marked_with_the_mouse_and_the_top_relation_is_read(predictor, monkeypatch):
    pytest.importorskip("gradio", reason=NEEDS)
    playwright = pytest.importorskip("playwright.sync_api", reason=NEEDS)
    if not BROWSER:
        pytest.skip("no Chromium")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    blocks = demo.page(predictor)
    options = {"prevent_thread_lock": True, "quiet": True, "server_name": "127.0.0.1"}
    _, url, _ = blocks.launch(**options)
    try:
        with playwright.sync_playwright() as start:
            browser = start.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1100, "height": 1200})
            page.set_default_timeout(30_000)
            page.goto(url)
            sentence = page.get_by_label("Sentence")
            texts = ["".join(token for token, _ in example) for example in demo.EXAMPLES]
            playwright.expect(sentence).to_have_value(texts[0], timeout=30_000)
            page.get_by_text(texts[1]).click()
            playwright.expect(sentence).to_have_value(texts[1], timeout=30_000)
            sentence.fill("박준호는 부산에 산다.")
            sentence.press("Enter")
            page.wait_for_function(
                "document.querySelector('#marked').innerText.trim() == '박준호는 부산에 산다.'"
            )
            for word, type_, following in (("박준호", "PER", "object"), ("부산", "LOC", "entity")):
                page.get_by_label(type_, exact=True).click()
                page.wait_for_timeout(1000)  # what covers the text while an event runs is gone
                left, right, middle = page.evaluate(PLACE, ["#marked .textfield", word])
                page.mouse.move(left + 1, middle)
                page.mouse.down()
                page.mouse.move(right - 1, middle, steps=4)
                page.mouse.up()
                chosen = page.get_by_label(following, exact=True)
                playwright.expect(chosen).to_be_checked(timeout=30_000)
            page.get_by_role("button", name="Predict").focus()  # ends the editing of the name
            text = "document.querySelector('#marked').innerText.toUpperCase()"
            page.wait_for_function(f"{text}.includes('SUBJECT PER')")
            assert "OBJECT LOC" in page.evaluate(text)
            bars, _ = demo.relations(predictor, TWO, 0.5, "English")
            for language in ("English", "한국어"):
                page.get_by_label(language).click()
                page.get_by_role("button", name="Predict").click()
                top = max(bars, key=bars.get)
                top = top if language == "English" else demo.KOREAN[top]
                page.wait_for_function(
                    f"document.querySelector('#bars').innerText.split('\\n').includes('{top}')"
                )
            browser.close()
    finally:
        blocks.close()
