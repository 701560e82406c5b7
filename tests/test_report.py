"""The reports on data and predictions: what they print and write, and their pages in a real browser."""

import csv
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
from data import KLUE_LABELS, PROMPTS, Entity, Row, Template, read_rows, write_predictions
from model import encode, load_tokenizer
from tests.conftest import SAMPLE

HOSTILE = '<script>document.title = "hit"</script> & <img src=nowhere onerror="hit()"> 비틀즈와 "링고"'
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
const images = [...document.images].map(image => image.naturalWidth)
const result = {title: document.title, images, inner: innerWidth, scroll: document.documentElement.scrollWidth,
    scripts: document.scripts.length, text: document.body.innerText.includes('<script>document.title = "hit"')}
document.body.innerHTML = "<pre>" + JSON.stringify(result) + "</pre>"
"""


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
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predicted = [KLUE_LABELS[c] for c in probs.argmax(1)]
    write_predictions(folder / "valid.csv", [row.id for row in rows], predicted, probs, [row.label for row in rows])
    settings = {"data": str(folder.parent / "train.csv"), "valid": "", "skip_bad_rows": False}
    (folder / "summary.json").write_text(json.dumps({"settings": settings, "labels": list(KLUE_LABELS)}))
    return probs, gold


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    """Reports on 150 rows of the sample, one of them hostile, and on runs on them; in what.txt what they printed."""
    folder = tmp_path_factory.mktemp("report")
    subject, object = (Entity(word, HOSTILE.index(word), HOSTILE.index(word) + 2 - i, "<b>")
                       for i, word in enumerate(("비틀즈", "링고")))  # fmt: skip
    hostile = Row("<i>0", HOSTILE, subject, object, "per:religion", "<u>source", "")
    some = [hostile, *rows[1:150]]
    write_rows(folder / "train.csv", some)
    for seed, name in enumerate(("a-1", "a-2", "b-1", "b-2")):
        write_run(folder / name, some, seed, 2.0 if name[0] == "a" else 4.0)
    return folder


def test_a_report_on_two_files(folder, encoder_folder, rows, capsys):
    files = (folder / "train.csv", SAMPLE / "test_data.csv")
    program(report.data_report, *files, "--model", encoder_folder, "--max-length", 40, "--out", folder / "eda")
    text = capsys.readouterr().out
    n_no_relation = sum(row.label == "no_relation" for row in read_rows(files[0]))
    assert re.search(rf"^no_relation +{n_no_relation} +{100 * n_no_relation / 150:.2f} ", text, re.MULTILINE)
    assert re.search(r"^over 40 +\d+ +\d+$", text, re.MULTILINE)
    figures = {path.name for path in (folder / "eda").glob("*.png")}
    assert {"by-label.png", "repeated-rows.png", "shared-by-both-files.png", "lengths-in-tokens.png"} <= figures
    page = (folder / "eda/index.html").read_text()
    assert page.count("data:image/png;base64,") == len(figures)
    assert "&lt;u&gt;source" in page
    assert "<u>source" not in page
    assert not re.search(r"""(src|href)=["']?(http|//|\w+\.)""", page)  # nothing is fetched


def test_a_report_on_a_run(folder, capsys):
    program(report.metrics_report, folder / "a-1/valid.csv")
    text = capsys.readouterr().out
    for part in ("no_relation: precision", "By source", "By characters between the entities", "[E1] 비틀즈 [/E1]"):
        assert part in text, part
    assert {path.name for path in (folder / "a-1/valid").iterdir()} >= {
        "index.html", "confusion-matrix.png", "precision-and-recall.png"
    }  # fmt: skip
    page = (folder / "a-1/valid/index.html").read_text()
    assert '<mark class="s">비틀즈</mark>' in page
    assert "&lt;script&gt;document.title" in page
    assert "<script" not in page


def test_a_submission_needs_the_labels(folder, rows, capsys, tmp_path):
    some = read_rows(folder / "train.csv")
    probs, _ = write_run(tmp_path / "x", some, 0, 2.0)
    write_predictions(tmp_path / "mine.csv", [r.id for r in some], [KLUE_LABELS[c] for c in probs.argmax(1)], probs)
    with pytest.raises(SystemExit, match="2"):
        program(report.metrics_report, tmp_path / "mine.csv")
    assert capsys.readouterr().err.count("\n") == 1
    program(report.metrics_report, tmp_path / "mine.csv", "--gold", folder / "train.csv")
    of_submission = capsys.readouterr().out
    program(report.metrics_report, folder / "a-1/valid.csv", "--out", tmp_path / "out")
    table = re.compile(r"^(micro F1|AUPRC|accuracy) .*$", re.MULTILINE)
    assert [m.group() for m in table.finditer(of_submission)] == [
        m.group() for m in table.finditer(capsys.readouterr().out)
    ]
    program(report.metrics_report, tmp_path / "x/valid.csv")  # its rows are not where its summary says
    assert "no sentences: --gold names" in capsys.readouterr().out


def test_two_sides_are_compared(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    program(report.metrics_report, "a-1/valid.csv", "b-1/valid.csv", "--out", "compare")
    text = capsys.readouterr().out
    assert "micro F1: B is ahead by" in text
    assert "McNemar's exact test" in text
    right = {}
    for name in ("a-1", "b-1"):
        with open(folder / name / "valid.csv", encoding="utf-8") as file:
            right[name] = [row["label"] == row["pred_label"] for row in csv.DictReader(file)]
    only_b = sum(b and not a for a, b in zip(right["a-1"], right["b-1"]))
    assert re.search(rf"^only B right +{only_b}$", text, re.MULTILINE)
    assert (folder / "compare/index.html").read_text().count('class="case"') == sum(
        a != b for a, b in zip(right["a-1"], right["b-1"])
    )
    program(report.metrics_report, "--a", "a-*/valid.csv", "--b", "b-1/valid.csv", "b-2/valid.csv", "--out", tmp_path)
    text = capsys.readouterr().out
    assert "A ± SD" in text
    assert "McNemar" not in text


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
    assert lines == ["낱말        n      x", "비틀즈  1,234   0.50", "a [31m       5  12.00"]


def test_entities_that_overlap_are_marked_in_the_page():
    row = Row("0", "<조지 해리슨>", Entity("조지 해리슨", 1, 6, None), Entity("해리", 4, 5, None), None, "", "")
    expected = '&lt;<mark class="s">조지 </mark><mark class="s o">해리</mark><mark class="s">슨</mark>&gt;'
    assert report.html_sentence(row) == expected
    assert report.distance(row) == 0
    assert report.distance(row._replace(sentence="조지와 해리", subject=Entity("조지", 0, 1, None))) == 2


@pytest.mark.parametrize("prompt", PROMPTS)
def test_lengths_are_those_of_the_encoders_input(encoder_folder, rows, prompt):
    tokenizer, template = load_tokenizer(encoder_folder), Template(prompt=prompt)
    examples, _ = encode(rows[:50], template, tokenizer, KLUE_LABELS, 10_000)
    assert report.token_lengths(rows[:50], template, tokenizer).tolist() == [len(e.ids) for e in examples]


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
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("page", ["eda", "a-1/valid", "compare"])
def test_pages_in_a_browser(folder, tmp_path, page, width):
    """No errors, all figures shown, no page wider than the window, and text from the data is text."""
    path = tmp_path / "page.html"
    html = (folder / page / "index.html").read_text()
    path.write_text(html.replace("</body>", f"<script>addEventListener('load', () => {{{PROBE}}})</script></body>"))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    options += "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --dump-dom "
    options += f"--user-data-dir={tmp_path / 'profile'} --window-size={width},900 {path.as_uri()}"
    done = subprocess.run([BROWSER, *options.split()], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(re.search("<pre>(.*)</pre>", done.stdout)[1].replace("&lt;", "<").replace("&amp;", "&"))
    assert "CONSOLE" not in done.stderr
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert min(found["images"]) > 0
    assert len(found["images"]) == html.count("data:image/png")
    assert found["title"] != "hit"
    assert found["scripts"] == 1  # the probe
    assert found["text"] == (page != "eda")  # tables of data hold no sentences
