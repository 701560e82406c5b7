"""report.py: what its commands print and write, and the pages in a real browser."""

import contextlib
import csv
import html
import io
import json
import re
import subprocess
import warnings
from collections import Counter

import numpy as np
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import figures
import page
import report
from analysis import SCORES, mcnemar
from data import KLUE_LABELS, PROMPTS, Template
from encoder import add_markers, load_tokenizer
from metrics import score, write_predictions
from rows import Entity, Row, read_rows
from tests.helpers import BROWSER, SAMPLE, write_rows

HOSTILE = (
    '<script>document.title = "hit"</script> & <img src=nowhere onerror="hit()"> 비틀즈와 "링고"'
)
WIDTHS = (400, 1200, 1400)
# Shows each page in frames of these widths. "beyond": elements that reach past the right edge of
# the body, except those in a box that scrolls.
HARNESS = """<!doctype html><body><script>
const results = [], pages = PAGES, widths = WIDTHS
for (const page of pages) for (const width of widths) {
    const frame = document.createElement("iframe")
    frame.style = `border: 0; height: 900px; width: ${width}px`
    frame.srcdoc = page
    frame.onload = () => {
        const inside = frame.contentDocument, text = inside.body.innerText
        const edge = inside.body.getBoundingClientRect().right + 1
        const beyond = [...inside.body.querySelectorAll("*")].filter(
            element => element.getBoundingClientRect().right > edge && !element.closest("table"))
        results.push({width, inner: frame.contentWindow.innerWidth,
            scroll: inside.documentElement.scrollWidth,
            beyond: beyond.map(element => element.tagName),
            scrolled: [...inside.querySelectorAll(".box")].filter(
                box => box.scrollWidth > box.clientWidth).map(
                box => box.closest("section").querySelector("h2").innerText),
            images: [...inside.images].map(image => image.naturalWidth),
            scripts: inside.scripts.length,
            hostile: text.includes('<script>document.title = "hit"'),
            title: inside.title + document.title})
        if (results.length == widths.length * pages.length)
            document.body.innerText = JSON.stringify(results)
    }
    document.body.append(frame)
}
</script>"""


def report_main(*arguments):
    """Run report.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["report.py", *map(str, arguments)])
        report.main()


def labels_of(probs):
    return [KLUE_LABELS[c] for c in probs.argmax(1)]


def write_run(folder, rows, seed, sharpness=4.0):
    """Write valid.csv and summary.json like a run of train.py; (probs, gold)."""
    random = np.random.default_rng(seed)
    gold = np.array([KLUE_LABELS.index(row.label) for row in rows])
    logits = random.normal(size=(len(rows), 30))
    logits[np.arange(len(rows)), gold] += sharpness
    logits[0, 0 if sharpness < 3 else gold[0]] += 20  # the first row: surely wrong or surely right
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ids, labels = [row.id for row in rows], [row.label for row in rows]
    write_predictions(folder / "valid.csv", ids, labels_of(probs), probs, labels)
    settings = {"data": str(folder.parent / "train.csv"), "valid": "", "skip_bad_rows": False}
    summary = {"settings": settings, "labels": list(KLUE_LABELS)}
    (folder / "summary.json").write_text(json.dumps(summary))
    return probs, gold


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    """A data file of 150 rows, one of them hostile, and four runs that were validated on it."""
    folder = tmp_path_factory.mktemp("report")
    subject, object_ = (
        Entity(word, HOSTILE.index(word), HOSTILE.index(word) + len(word) - 1, "<b>")
        for word in ("비틀즈", "링고")
    )
    hostile = Row("<i>0", HOSTILE, subject, object_, "per:religion", "<u>source", "")
    some = [hostile, *rows[1:150]]
    write_rows(folder / "train.csv", some)
    for seed, name in enumerate(("a-1", "a-2", "b-1", "b-2")):
        write_run(folder / name, some, seed, 2.0 if name[0] == "a" else 4.0)
    return folder


@pytest.fixture(scope="module")
def printed(folder, encoder_folder):
    """{folder of the page: what was printed} for one report of each command."""
    train, run_a, run_b = (
        folder / name for name in ("train.csv", "a-1/valid.csv", "b-1/valid.csv")
    )
    lengths = ("--model", encoder_folder, "--max-length", 40)
    commands = {
        "eda": ("data", train, SAMPLE / "test_data.csv", *lengths, "--out", folder / "eda"),
        "a-1/valid": ("errors", run_a),
        "compare": ("compare", run_a, run_b, "--out", folder / "compare"),
    }
    texts = {}
    for place, command in commands.items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            report_main(*command)
        texts[place] = out.getvalue()
    return texts


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without images, for tests of the text: drawing takes most of a report's time."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


def n_images(page_text):
    return page_text.count("data:image/png;base64,")


# --- the commands -----------------------------------------------------------------------------


def test_data_of_two_files(folder, printed):
    text = printed["eda"]
    n = sum(row.label == "no_relation" for row in read_rows(folder / "train.csv"))
    assert re.search(rf"^no_relation +{n} +{100 * n / 150:.2f} ", text, re.MULTILINE)
    assert re.search(r"^over 40 +\d+ +\d+$", text, re.MULTILINE)
    assert {path.name for path in (folder / "eda").iterdir()} == {"index.html"}
    page_text = (folder / "eda/index.html").read_text()
    with_figures = ("By label", "By source", "Lengths in tokens")
    assert all(f'<img alt="{title}"' in page_text for title in with_figures)
    tables = ("Labels and types of train.csv", "Repeated rows", "Shared by both files")
    assert all(f"<h2>{title}</h2>" in page_text for title in tables)
    assert n_images(page_text) == 6
    assert "&lt;u&gt;source" in page_text
    assert "<u>source" not in page_text
    assert not re.search(r"""(src|href)=["']?(http|//|\w+\.)""", page_text)  # no requests


def test_errors_of_a_run(folder, printed):
    text = printed["a-1/valid"]
    assert "no_relation: precision" in text
    assert "By source" in text
    assert "By characters between the entities" in text
    assert re.search(r"Expected calibration error: \d+\.\d+ % before, \d+\.\d+ % after", text)
    assert re.search(r"^ *0\.95 +(\d+\.\d+|–) +\d+\.\d+ +\d+ +\d+\.\d+$", text, re.MULTILINE)
    assert "[E1] 비틀즈 [/E1]" in text
    assert {path.name for path in (folder / "a-1/valid").iterdir()} == {"index.html"}
    page_text = (folder / "a-1/valid/index.html").read_text()
    assert '<img alt="Confusion matrix"' in page_text
    assert '<img alt="Calibration"' in page_text
    assert '<img alt="Precision-recall curves"' in page_text
    assert '<mark class="s">비틀즈</mark>' in page_text
    assert "&lt;script&gt;document.title" in page_text
    assert "<script" not in page_text


def test_a_submission_needs_gold_labels(folder, capsys, tmp_path, undrawn):
    some = read_rows(folder / "train.csv")
    probs, gold = write_run(tmp_path / "x", some, 0, 2.0)
    mine, few = tmp_path / "mine.csv", tmp_path / "few.csv"
    write_predictions(mine, [row.id for row in some], labels_of(probs), probs)
    with pytest.raises(SystemExit, match="2"):
        report_main("errors", mine)
    assert capsys.readouterr().err.count("\n") == 1
    report_main("errors", mine, "--gold", folder / "train.csv")
    text = capsys.readouterr().out
    for name, value in score(probs, gold).items():
        if name != "absent":
            assert re.search(rf"^{SCORES[name]} +{value:.2f} ", text, re.MULTILINE)
    assert (tmp_path / "mine/index.html").exists()
    assert "rows of" not in text
    right = np.tile(np.eye(30)[gold[0]], (5, 1))
    write_predictions(few, [row.id for row in some[:5]], [some[0].label] * 5, right)
    report_main("errors", few, "--gold", folder / "train.csv")
    expected = f"{few}: 5 of the {len(some):,} rows of {folder / 'train.csv'}\n"
    assert capsys.readouterr().out.startswith(expected)


def test_a_gold_label_that_no_row_predicts_is_named(tmp_path, capsys):
    rows = read_rows(SAMPLE / "train.csv")[:3]
    labels = ["none", "a", "rare"]
    write_rows(tmp_path / "gold.csv", [r._replace(label=x) for r, x in zip(rows, labels)])
    probs = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1]])
    ids = [row.id for row in rows]
    write_predictions(tmp_path / "mine.csv", ids, ["none", "a", "none"], probs)
    with pytest.raises(SystemExit, match="2"):
        report_main("errors", tmp_path / "mine.csv", "--gold", tmp_path / "gold.csv")
    error = capsys.readouterr().err
    assert "gold.csv:4: label: found 'rare', expected one of 2 known labels; no row of " in error
    assert error.endswith("mine.csv has the others, and its folder no summary.json\n")


def test_a_vote_is_scored_by_its_predicted_labels(tmp_path, capsys, undrawn):
    ids, gold = list("abcd"), ["no_relation", "per:title", "org:members", "org:members"]
    class_of = {label: c for c, label in enumerate(KLUE_LABELS)}
    probs = np.zeros((4, 30))
    probs[:, 0] = 0.5  # a vote of two files that differ in each row: argmax would be no_relation
    probs[np.arange(4), [class_of["per:title"], *(class_of[label] for label in gold[1:])]] += 0.5
    write_predictions(tmp_path / "voted.csv", ids, gold, probs, gold)
    report_main("errors", tmp_path / "voted.csv", "--out", tmp_path / "page")
    text = capsys.readouterr().out
    assert re.search(r"micro F1 +100\.00", text)
    assert text.endswith("no sentences: use --gold FILE with the rows\n")
    assert "By source" not in text


def test_the_rows_of_a_run_are_found_if_its_data_file_exists(folder, tmp_path):
    some = read_rows(folder / "train.csv")
    assert report.load([str(folder / "a-1/valid.csv")], None).rows == some
    write_run(tmp_path / "x", some, 0)
    assert report.load([str(tmp_path / "x/valid.csv")], None).rows is None


def test_compare_two_runs(folder, printed):
    text = printed["compare"]
    assert "micro F1: B is better by" in text
    assert "McNemar's exact test" in text
    right = {}
    for name in ("a-1", "b-1"):
        with open(folder / name / "valid.csv", encoding="utf-8") as file:
            right[name] = [row["label"] == row["pred_label"] for row in csv.DictReader(file)]
    pairs = Counter(zip(right["a-1"], right["b-1"]))
    assert re.search(rf"^only A right +{pairs[True, False]}$", text, re.MULTILINE)
    assert re.search(rf"^only B right +{pairs[False, True]}$", text, re.MULTILINE)
    n_cases = (folder / "compare/index.html").read_text().count('class="case"')
    assert n_cases == pairs[True, False] + pairs[False, True]


def test_compare_several_seeds(folder, capsys, tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(folder)
    report_main("compare", "a-*/valid.csv", "b-?/valid.csv", "--out", tmp_path)
    text = capsys.readouterr().out
    assert text.startswith("A: a-1/valid.csv, a-2/valid.csv; B: b-1/valid.csv, b-2/valid.csv: 150")
    assert "A ± SD" in text
    assert "B ± SD" in text
    assert "McNemar" not in text
    report_main("compare", "a-*/valid.csv", "b-1/valid.csv", "--out", tmp_path)
    text = capsys.readouterr().out
    assert "A ± SD" in text
    assert "B ± SD" not in text


def test_mcnemar_is_printed(folder, capsys, tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(folder)
    write_run(folder / "c", read_rows("train.csv"), 5, 2.3)
    report_main("compare", "a-1/valid.csv", "c/valid.csv", "--out", tmp_path)
    text = capsys.readouterr().out
    only_a, only_b = (
        int(re.search(rf"^only {side} right +(\d+)$", text, re.MULTILINE)[1]) for side in "AB"
    )
    assert 0.01 < mcnemar(only_a, only_b) < 0.99
    assert f"McNemar's exact test of the two accuracies: p = {mcnemar(only_a, only_b):.4f}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["errors"], "required: FILE"),
        (["errors", "a-1/absent.csv"], "cannot be read"),
        (["errors", "a-1/valid.csv", "--gold", SAMPLE / "test_data.csv"], "--gold FILE"),
        (["errors", "a-1/valid.csv", "--golden", "x"], "did you mean --gold?"),
        (["compare", "a-1/valid.csv", "b-1/valid.csv", "--output_dir=x"], "did you mean --out?"),
        (["errors", "a-1/valid.csv", "--gold", "gold.csv"], "gold.csv:3: label: found 'per:titel'"),
        (["data", "train.csv", "train.csv"], "expected one or two different ones"),
        (["data", "train.csv", "b.csv", "c.csv"], "found 3 files"),
        (["data", "absent.csv"], "report.py: absent.csv: cannot be read"),
        (["compare", "a-1/valid.csv"], "required: B"),
        (["compare", "a-*/absent.csv", "b-1/valid.csv"], "a-*/absent.csv: cannot be read"),
        (["compare", "a-*/valid.csv", "a-1/valid.csv"], "a-1/valid.csv: found in both A and B"),
        (["compare", "a-1/valid.csv", "a-2/valid.csv", "b-1/valid.csv"], "quote patterns"),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    some = read_rows("train.csv")
    write_rows("gold.csv", [some[0], some[1]._replace(label="per:titel"), *some[2:]])
    with pytest.raises(SystemExit, match="2"):
        report_main(*arguments)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_report_starts_as_a_program(run):
    error = run("report.py", "errors", "absent.csv", code=2).stderr
    assert error.startswith("report.py: absent.csv: cannot be read")


@pytest.mark.parametrize("command", ["data", "errors", "compare"])
def test_each_command_has_help(command, capsys):
    for arguments in ((command, "-h"), ("-h",)):
        with pytest.raises(SystemExit, match="0"):
            report_main(*arguments)
        text = capsys.readouterr().out
        assert text.startswith("usage: report.py")
        assert command in text


# --- the parts --------------------------------------------------------------------------------


def test_tables_in_the_terminal_are_aligned_and_printable():
    table = [{"낱말": "비틀즈", "n": 1234, "x": 0.5}, {"낱말": "a\x1b[31m\n", "n": 5, "x": 12.0}]
    lines = page.text_table(table).splitlines()
    assert lines == ["낱말         n      x", "비틀즈   1,234   0.50", "a [31m       5  12.00"]


def test_a_page_is_complete_even_if_printing_fails(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    sections = [page.Section("first"), page.Section("last", "its note")]
    with pytest.raises(BrokenPipeError), contextlib.redirect_stdout(Closed()):
        page.write_report("a title", sections, tmp_path)
    assert "its note" in (tmp_path / "index.html").read_text()


def test_overlapping_entities_are_marked_in_the_page():
    harrison, harri = Entity("조지 해리슨", 1, 6, None), Entity("해리", 4, 5, None)
    row = Row("0", "<조지 해리슨>", harrison, harri, None, "", "")
    expected = '&lt;<mark class="s">조지 </mark><mark class="s o">해리</mark>'
    expected += '<mark class="s">슨</mark>&gt;'
    assert page.html_sentence(row) == expected
    assert report.distance(row) == 0
    apart = row._replace(sentence="조지와 해리", subject=Entity("조지", 0, 1, None))
    assert report.distance(apart) == 2


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("marker", ["typed_entity_marker_punct", "entity_mask"])
def test_lengths_are_those_of_the_encoder_input(encoder_folder, rows, marker, prompt):
    tokenizer, template = load_tokenizer(str(encoder_folder)), Template(marker, prompt)
    add_markers(tokenizer, template, rows[:50])
    lengths = report.token_lengths({"sample": rows[:50]}, template, str(encoder_folder))
    for row, length in zip(rows, lengths["sample"]):
        before, text, after, _ = template.render(row)
        ids = tokenizer(before, text)["input_ids"] if before else tokenizer(text)["input_ids"]
        n_after = len(tokenizer(after, add_special_tokens=False)["input_ids"])
        assert length == len(ids) + n_after


def test_bins():
    names, which = report.binned([0, 49, 50, 75, 1000], [0, 50, 75])
    assert names == ["0 to 49", "50 to 74", "75 or more"]
    assert which.tolist() == [0, 0, 1, 2, 2]


def test_figures_draw_korean_with_an_installed_font_or_name_a_package(monkeypatch, capsys):
    figures.drawable_characters.cache_clear()
    if ord("가") in figures.drawable_characters():
        figure = figures.bar_figure([{"label": "인물:종교", "n": 1}], ["n"], "rows")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns of missing glyphs
            figure.savefig(io.BytesIO(), format="png")
        assert figures.drawable(["인물:종교", "$a$"]) == ["인물:종교", r"\$a\$"]
    monkeypatch.setattr(figures.font_manager, "findSystemFonts", list)
    figures.drawable_characters.cache_clear()
    figures.warn_of_missing_font.cache_clear()
    capsys.readouterr()
    for _ in range(2):
        assert figures.drawable(["no_relation", "인물:종교"]) == ["no_relation", "#2"]
    error = capsys.readouterr().err
    assert "fonts-nanum" in error
    assert error.count("\n") == 1
    monkeypatch.undo()
    figures.drawable_characters.cache_clear()


def test_a_figure_says_which_bars_it_leaves_out():
    table = [{"label": f"a{i}", "n": i} for i in range(51)]
    label = figures.bar_figure(table, ["n"], "rows").axes[0].get_xlabel()
    assert label == "rows (the first 50 of 51 lines of the table)"
    assert figures.bar_figure(table[:50], ["n"], "rows").axes[0].get_xlabel() == "rows"


@pytest.mark.parametrize("n_labels", [2, 30, 60])
def test_figures_fit_into_a_page_of_1200_pixels(n_labels):
    random = np.random.default_rng(0)
    gold, predicted = random.integers(0, n_labels, (2, 300))
    labels = [f"a_label_with_a_very_long_name/{c}" for c in range(n_labels)]
    figure = figures.confusion_figure(predicted, gold, labels)
    assert figure.get_size_inches()[0] * figure.dpi <= 1100
    shown = [text for text in figure.axes[0].texts if text.get_visible()]
    assert sum(int(text.get_text()) for text in shown) == 300
    if n_labels < 60:
        probs = random.dirichlet(np.ones(n_labels), 300)
        figure = figures.curves_figure(probs, gold, labels)
        assert figure.get_size_inches()[0] * figure.dpi <= 1100


def test_tensorboard_shows_an_evaluation(folder, tmp_path):
    some = read_rows(folder / "train.csv")
    probs, gold = write_run(tmp_path / "x", some, 0, 2.0)
    with SummaryWriter(tmp_path / "events") as writer:
        figures.log_evaluation(writer, 7, probs, gold, KLUE_LABELS, some)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    present = {row.label for row in some}
    assert {f"valid_label_f1/{label}" for label in present} == set(events.Tags()["scalars"])
    assert {f"pr/{label}" for label in present} <= set(events.Tags()["tensors"])
    assert events.Tags()["images"] == ["confusion matrix"]
    text = events.Tensors("worst mistakes/text_summary")[0]
    assert text.step == 7
    assert "[E1]" in text.tensor_proto.string_val[0].decode()


# --- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_browser(folder, printed, tmp_path_factory):
    """What the harness found in each page at each width."""
    if not BROWSER:
        pytest.skip("no chromium installed")
    scratch = tmp_path_factory.mktemp("browser")
    pages = [(folder / place / "index.html").read_text() for place in printed]
    as_script = json.dumps(pages).replace("<", "\\u003c")
    harness = HARNESS.replace("WIDTHS", json.dumps(WIDTHS)).replace("PAGES", as_script)
    (scratch / "harness.html").write_text(harness)
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    options += "--disable-background-networking --disable-component-update --disable-sync "
    options += f"--enable-logging=stderr --dump-dom --user-data-dir={scratch / 'profile'} "
    options += (scratch / "harness.html").as_uri()
    command = [BROWSER, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    results = json.loads(html.unescape(re.search(r"<body>(\[.*\])", done.stdout)[1]))
    assert len(results) == len(pages) * len(WIDTHS)
    n_found = sorted(len(found["images"]) for found in results)
    assert n_found == sorted(len(WIDTHS) * list(map(n_images, pages)))
    return results


def test_pages_in_a_browser(in_browser):
    """All figures are shown, no page is wider than the window, text from the data is text."""
    for found in in_browser:
        assert found["inner"] == found["width"]
        assert found["scroll"] <= found["width"]
        assert min(found["images"]) > 0
        assert found["scripts"] == 0
        assert "hit" not in found["title"]
    # all pages but that of report.py data show sentences
    assert sum(found["hostile"] for found in in_browser) == 2 * len(WIDTHS)


def test_nothing_runs_off_a_page_of_1200_pixels(in_browser):
    """Figures keep their size, and no element ends beyond the right edge of the body."""
    found_at_1200 = [found for found in in_browser if found["width"] == 1200]
    assert len(found_at_1200) == 3
    for found in found_at_1200:
        assert found["beyond"] == []
        assert found["scrolled"] == []  # a box scrolls unseen where scroll bars are hidden
        assert max(found["images"]) <= 1100
