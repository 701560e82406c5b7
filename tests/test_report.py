"""The reports on data and predictions: what they print and write, and their pages in a real browser."""

import contextlib
import csv
import html
import io
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import report
from data import KLUE_LABELS, PROMPTS, Entity, Row, Template, read_rows
from metrics import SCORES, mcnemar, score, write_predictions
from model import add_markers, load_tokenizer
from tests.conftest import SAMPLE

HOSTILE = '<script>document.title = "hit"</script> & <img src=nowhere onerror="hit()"> 비틀즈와 "링고"'
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# shows each page in a frame 400 and one 1400 pixels wide, and tells what it sees there
HARNESS = """<!doctype html><body><script>
const results = [], frames = []
for (const page of PAGES) for (const width of [400, 1400]) {
    const frame = document.createElement("iframe")
    frame.style = `border: 0; height: 900px; width: ${width}px`
    frame.srcdoc = page
    frame.onload = () => {
        const inside = frame.contentDocument, text = inside.body.innerText
        results.push({width, inner: frame.contentWindow.innerWidth, scroll: inside.documentElement.scrollWidth,
            images: [...inside.images].map(image => image.naturalWidth), scripts: inside.scripts.length,
            hostile: text.includes('<script>document.title = "hit"'), title: inside.title + document.title})
        if (results.length == 2 * PAGES.length) document.body.innerText = JSON.stringify(results)
    }
    document.body.append(frame)
}
</script>"""


def write_rows(path, rows):
    """A data file of these rows."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "sentence", "subject_entity", "object_entity", "label", "source"])
        for row in rows:
            entities = (dict(zip(("word", "start_idx", "end_idx", "type"), e)) for e in (row.subject, row.object))
            writer.writerow([row.id, row.sentence, *entities, row.label, row.source])


def program(main, *arguments):
    """Runs a command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["program.py", *map(str, arguments)])
        main()


def write_run(folder, rows, seed, sharpness=4.0):
    """What train.py leaves of a run: valid.csv, and in summary.json where its rows are."""
    random = np.random.default_rng(seed)
    gold = np.array([KLUE_LABELS.index(row.label) for row in rows])
    logits = random.normal(size=(len(rows), 30))
    logits[np.arange(len(rows)), gold] += sharpness
    logits[0, 0 if sharpness < 3 else gold[0]] += 20  # the first row: surely wrong, or surely right
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predicted = [KLUE_LABELS[c] for c in probs.argmax(1)]
    write_predictions(folder / "valid.csv", [row.id for row in rows], predicted, probs, [row.label for row in rows])
    settings = {"data": str(folder.parent / "train.csv"), "valid": "", "skip_bad_rows": False}
    (folder / "summary.json").write_text(json.dumps({"settings": settings, "labels": list(KLUE_LABELS)}))
    return probs, gold


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    """A data file of 150 rows, one of them hostile, and four runs on them; the tests leave their reports there."""
    folder = tmp_path_factory.mktemp("report")
    subject, object = (Entity(word, HOSTILE.index(word), HOSTILE.index(word) + 2 - i, "<b>")
                       for i, word in enumerate(("비틀즈", "링고")))  # fmt: skip
    hostile = Row("<i>0", HOSTILE, subject, object, "per:religion", "<u>source", "")
    some = [hostile, *rows[1:150]]
    write_rows(folder / "train.csv", some)
    for seed, name in enumerate(("a-1", "a-2", "b-1", "b-2")):
        write_run(folder / name, some, seed, 2.0 if name[0] == "a" else 4.0)
    return folder


@pytest.fixture(scope="module")
def printed(folder, encoder_folder):
    """The three reports, written into the folder: what each printed, by the place of its page."""
    files, runs = (folder / "train.csv", SAMPLE / "test_data.csv"), (folder / "a-1/valid.csv", folder / "b-1/valid.csv")
    more = ("--model", encoder_folder, "--max-length", 40, "--out", folder / "eda")
    commands = {
        "eda": (report.data_report, *files, *more),
        "a-1/valid": (report.metrics_report, runs[0]),
        "compare": (report.metrics_report, *runs, "--out", folder / "compare"),
    }
    texts = {}
    for place, command in commands.items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            program(*command)
        texts[place] = out.getvalue()
    return texts


def test_a_report_on_two_files(folder, printed):
    text = printed["eda"]
    n_no_relation = sum(row.label == "no_relation" for row in read_rows(folder / "train.csv"))
    assert re.search(rf"^no_relation +{n_no_relation} +{100 * n_no_relation / 150:.2f} ", text, re.MULTILINE)
    assert re.search(r"^over 40 +\d+ +\d+$", text, re.MULTILINE)
    figures = {path.name for path in (folder / "eda").glob("*.png")}
    assert {"by-label.png", "repeated-rows.png", "shared-by-both-files.png", "lengths-in-tokens.png"} <= figures
    page = (folder / "eda/index.html").read_text()
    assert page.count("data:image/png;base64,") == len(figures)
    assert "&lt;u&gt;source" in page
    assert "<u>source" not in page
    assert not re.search(r"""(src|href)=["']?(http|//|\w+\.)""", page)  # nothing is fetched


def test_a_report_on_a_run(folder, printed):
    for part in ("no_relation: precision", "By source", "By characters between the entities", "[E1] 비틀즈 [/E1]"):
        assert part in printed["a-1/valid"], part
    assert {path.name for path in (folder / "a-1/valid").iterdir()} >= {
        "index.html", "confusion-matrix.png", "precision-and-recall.png"
    }  # fmt: skip
    page = (folder / "a-1/valid/index.html").read_text()
    assert '<mark class="s">비틀즈</mark>' in page
    assert "&lt;script&gt;document.title" in page
    assert "<script" not in page


def test_a_page_is_whole_though_nobody_reads_what_is_printed(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError), contextlib.redirect_stdout(Closed()):
        report.write_report("a title", [report.Section("first"), report.Section("last", "its note")], tmp_path)
    assert "its note" in (tmp_path / "index.html").read_text()


def test_a_submission_needs_the_labels(folder, capsys, tmp_path):
    some = read_rows(folder / "train.csv")
    probs, gold = write_run(tmp_path / "x", some, 0, 2.0)
    write_predictions(tmp_path / "mine.csv", [r.id for r in some], [KLUE_LABELS[c] for c in probs.argmax(1)], probs)
    with pytest.raises(SystemExit, match="2"):
        program(report.metrics_report, tmp_path / "mine.csv")
    assert capsys.readouterr().err.count("\n") == 1
    program(report.metrics_report, tmp_path / "mine.csv", "--gold", folder / "train.csv")
    text = capsys.readouterr().out
    for name, value in score(probs, gold).items():
        if name != "absent":
            assert re.search(rf"^{SCORES[name]} +{value:.2f} ", text, re.MULTILINE)
    assert (tmp_path / "mine/index.html").exists()
    assert "rows of" not in text
    write_predictions(
        tmp_path / "few.csv", [r.id for r in some[:5]], [some[0].label] * 5, np.tile(np.eye(30)[gold[0]], (5, 1))
    )
    program(report.metrics_report, tmp_path / "few.csv", "--gold", folder / "train.csv")
    assert capsys.readouterr().out.startswith(
        f"{tmp_path / 'few.csv'}: 5 of the {len(some):,} rows of {folder / 'train.csv'}\n"
    )


def test_a_vote_is_scored_by_the_labels_that_it_names(tmp_path, capsys):
    ids, gold = list("abcd"), ["no_relation", "per:title", "org:members", "org:members"]
    number = {label: c for c, label in enumerate(KLUE_LABELS)}
    probs = np.zeros((4, 30))
    probs[:, 0] = 0.5  # two files that differ in each row: the likeliest class alone would be no_relation
    probs[np.arange(4), [number["per:title"], *(number[label] for label in gold[1:])]] += 0.5
    write_predictions(tmp_path / "voted.csv", ids, gold, probs, gold)
    program(report.metrics_report, tmp_path / "voted.csv", "--out", tmp_path / "page")
    assert re.search(r"micro F1 +100\.00", capsys.readouterr().out)


def test_rows_are_found_through_the_summary_if_they_are_there(folder, tmp_path):
    some = read_rows(folder / "train.csv")
    assert report.load([str(folder / "a-1/valid.csv")], None).rows == some
    write_run(tmp_path / "x", some, 0)
    assert report.load([str(tmp_path / "x/valid.csv")], None).rows is None


def test_two_sides_are_compared(folder, printed, capsys, tmp_path, monkeypatch):
    text = printed["compare"]
    assert "micro F1: B is ahead by" in text
    assert "McNemar's exact test" in text
    right = {}
    for name in ("a-1", "b-1"):
        with open(folder / name / "valid.csv", encoding="utf-8") as file:
            right[name] = [row["label"] == row["pred_label"] for row in csv.DictReader(file)]
    only_a, only_b = (
        sum(one and not other for one, other in zip(right[x], right[y])) for x, y in (("a-1", "b-1"), ("b-1", "a-1"))
    )
    assert re.search(rf"^only A right +{only_a}$", text, re.MULTILINE)
    assert re.search(rf"^only B right +{only_b}$", text, re.MULTILINE)
    assert (folder / "compare/index.html").read_text().count('class="case"') == sum(
        a != b for a, b in zip(right["a-1"], right["b-1"])
    )
    monkeypatch.chdir(folder)
    program(report.metrics_report, "--a", "a-*/valid.csv", "--b", "b-1/valid.csv", "b-2/valid.csv", "--out", tmp_path)
    text = capsys.readouterr().out
    assert "A ± SD" in text
    assert "McNemar" not in text
    write_run(folder / "c", read_rows("train.csv"), 5, 2.3)
    program(report.metrics_report, "a-1/valid.csv", "c/valid.csv", "--out", tmp_path)
    text = capsys.readouterr().out
    only_a, only_b = (int(re.search(rf"^only {side} right +(\d+)$", text, re.MULTILINE)[1]) for side in "AB")
    assert 0.01 < mcnemar(only_a, only_b) < 0.99
    assert f"would come with p = {mcnemar(only_a, only_b):.4f}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one file, or two to compare, or --a FILES --b FILES"),
        (["a-1/valid.csv", "--a", "a-2/valid.csv"], "expected one file"),
        (["a-1/absent.csv"], "cannot be read"),
        (["--a", "a-*/valid.csv", "a-1/valid.csv", "--b", "b-1/valid.csv"], "--a: names a file twice"),
        (["a-1/valid.csv", "--gold", str(SAMPLE / "test_data.csv")], "--gold names the rows' file"),
    ],
)
def test_what_cannot_be_reported_on_is_said_in_a_line(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        program(report.metrics_report, *arguments)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_programs_start_as_users_type_them(run):
    assert run("metrics.py", "absent.csv", code=2).stderr.startswith("metrics.py: absent.csv: cannot be read")
    assert run("data.py", "absent.csv", code=2).stderr.startswith("data.py: absent.csv: cannot be read")


# --- the parts ---------------------------------------------------------------------------------------------------


def test_tables_in_the_terminal_stand_in_columns_and_hold_no_commands():
    table = [{"낱말": "비틀즈", "n": 1234, "x": 0.5}, {"낱말": "a\x1b[31m\n", "n": 5, "x": 12.0}]
    lines = report.text_table(table).splitlines()
    assert lines == ["낱말         n      x", "비틀즈   1,234   0.50", "a [31m       5  12.00"]


def test_entities_that_overlap_are_marked_in_the_page():
    row = Row("0", "<조지 해리슨>", Entity("조지 해리슨", 1, 6, None), Entity("해리", 4, 5, None), None, "", "")
    expected = '&lt;<mark class="s">조지 </mark><mark class="s o">해리</mark><mark class="s">슨</mark>&gt;'
    assert report.html_sentence(row) == expected
    assert report.distance(row) == 0
    assert report.distance(row._replace(sentence="조지와 해리", subject=Entity("조지", 0, 1, None))) == 2


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("marker", ["typed_entity_marker_punct", "entity_mask"])
def test_lengths_are_those_of_the_encoders_input(encoder_folder, rows, marker, prompt):
    tokenizer, template = load_tokenizer(encoder_folder), Template(marker, prompt)
    add_markers(tokenizer, template, rows[:50])
    lengths = report.token_lengths({"sample": rows[:50]}, template, encoder_folder)
    for row, length in zip(rows, lengths["sample"]):
        before, text, after, _ = template.render(row)
        ids = tokenizer(before, text)["input_ids"] if before else tokenizer(text)["input_ids"]
        assert length == len(ids) + len(tokenizer(after, add_special_tokens=False)["input_ids"])


def test_bins():
    names, which = report.binned([0, 49, 50, 75, 1000], [0, 50, 75])
    assert names == ["0 to 49", "50 to 74", "75 or more"]
    assert which.tolist() == [0, 0, 1, 2, 2]


def test_figures_draw_korean_with_an_installed_font_or_say_which_package_has_one(monkeypatch, capsys):
    report.drawable_characters.cache_clear()
    if ord("가") in report.drawable_characters():
        figure = report.bar_figure([{"label": "인물:종교", "n": 1}], ["n"], "rows")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing
            figure.savefig(io.BytesIO(), format="png")
        assert report.drawable(["인물:종교", "$a$"]) == ["인물:종교", r"\$a\$"]
    monkeypatch.setattr(report.font_manager, "findSystemFonts", list)
    report.drawable_characters.cache_clear()
    report.say_once.cache_clear()
    capsys.readouterr()
    for _ in range(2):
        assert report.drawable(["no_relation", "인물:종교"]) == ["no_relation", "#2"]
    error = capsys.readouterr().err
    assert "fonts-nanum" in error
    assert error.count("\n") == 1
    monkeypatch.undo()
    report.drawable_characters.cache_clear()


def test_tensorboard_shows_an_evaluation(folder, tmp_path):
    some = read_rows(folder / "train.csv")
    probs, gold = write_run(tmp_path / "x", some, 0, 2.0)
    with SummaryWriter(tmp_path / "events") as writer:
        report.log_evaluation(writer, 7, probs, gold, KLUE_LABELS, some)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    present = {row.label for row in some}
    assert {f"label_f1/{label}" for label in present} == set(events.Tags()["scalars"])
    assert {f"pr/{label}" for label in present} <= set(events.Tags()["tensors"])
    assert events.Tags()["images"] == ["confusion matrix"]
    text = events.Tensors("worst mistakes/text_summary")[0]
    assert text.step == 7
    assert "[E1]" in text.tensor_proto.string_val[0].decode()


@pytest.mark.skipif(not BROWSER, reason="no chromium")
def test_pages_in_a_browser(folder, printed, tmp_path):
    """No errors, all figures shown, no page wider than the window, and text from the data is text."""
    pages = [(folder / place / "index.html").read_text() for place in printed]
    harness = tmp_path / "harness.html"
    as_script = json.dumps(pages).replace("<", "\\u003c")
    harness.write_text(HARNESS.replace("const results", f"const PAGES = {as_script}, results"))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    options += "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom "
    options += f"--user-data-dir={tmp_path / 'profile'} {harness.as_uri()}"
    done = subprocess.run([BROWSER, *options.split()], capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    results = json.loads(html.unescape(re.search(r"<body>(\[.*\])", done.stdout)[1]))
    assert len(results) == 6
    for found in results:
        assert found["inner"] == found["width"]
        assert found["scroll"] <= found["width"]
        assert min(found["images"]) > 0
        assert found["scripts"] == 0
        assert "hit" not in found["title"]
    assert sorted(len(found["images"]) for found in results) == sorted(2 * [p.count("data:image/png") for p in pages])
    assert sum(found["hostile"] for found in results) == 4  # all but the tables of data hold sentences
