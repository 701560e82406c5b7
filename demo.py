"""A local page to try a model: mark entities in a sentence, read their relations.

    python demo.py runs/demo/ckpt.pt --port 8000    # or several, or folders of --export

Choose subject, object or entity, and a type. Then select the word with the mouse. The bars are for
subject and object; if there are none, for the first two entities.
"""

# First: it handles Ctrl-C while the others are imported.
from common import InputError, Parser, exit_on_error, expect, optional_import

# isort: split

import os

from data import KLUE_LABELS, TYPES
from predictor import Predictor

KOREAN = dict(zip(KLUE_LABELS, (
    "관계 없음/임직원/구성 단체/제품/직함/단체의 다른 이름/소속/본사 소재지/"
    "작품/구성원 수/자녀/거주지/인물의 다른 이름/친척/동료/출신/형제자매/배우자/"
    "설립일/정치·종교 성향/상위 단체/부모/해산일/학교/사망일/출생일/출생지/"
    "사망지/설립자/종교"
).split("/")))  # fmt: skip
COLUMNS = ["subject", "relation", "object", "probability"]
NEXT = {"subject": "object", "object": "entity", "entity": "entity"}  # role of the mark after it
EXAMPLES = [
    [("한태영", "subject PER"), ("의 생가가 있는 ", None), ("인천", "object LOC"),
     ("에는 해마다 많은 방문객이 찾아온다.", None)],
    [("조지 해리슨", "entity PER"), ("은 ", None), ("비틀즈", "entity ORG"),
     ("와 ", None), ("1969년", "entity DAT"), (" 앨범을 냈다.", None)],
]  # fmt: skip


def entities_of(marked: list[dict]) -> tuple[str, list[dict], list[dict]]:
    """(sentence, its entities, subject and object) of the marked text of the page."""
    sentence, entities, roles = "", [], {}
    for part in marked or []:
        word, name = part["token"], part["class_or_confidence"]
        if name:
            role, _, type_ = name.strip().rpartition(" ")  # of a name that anyone can edit
            expect(role in NEXT and type_ in TYPES, word, "mark", name, "a role and a type")
            start = len(sentence) + len(word) - len(word.lstrip())
            entities.append({"word": word.strip(), "start_idx": start, "type": type_})
            roles[role] = entities[-1]
        sentence += word
    if len(entities) < 2:
        raise InputError(f"found {len(entities)} marked entities, expected at least 2")
    others = [e for e in entities if e not in (roles.get("subject"), roles.get("object"))]
    return sentence, entities, [roles.get(role) or others.pop(0) for role in ("subject", "object")]


def name_marks(marked: list[dict], role: str, type_: str):
    """(the text, its new marks named; role of the next mark); None without new ones ("label")."""
    found = [(part["token"], part["class_or_confidence"]) for part in marked or []]
    named = [(x, f"{role} {type_}" if name == "label" else name) for x, name in found]
    return (named, NEXT[role]) if named != found else None


def relations(predictor: Predictor, marked: list[dict], threshold: float, language: str):
    """({relation: probability} of subject and object, the triples of all entities)."""
    sentence, entities, (subject, obj) = entities_of(marked)
    names = KOREAN if language == "한국어" else {}
    (one,) = predictor.predict([{"sentence": sentence, "subject": subject, "object": obj}])
    triples = predictor.triples(sentence, entities, threshold)
    bars = {names.get(label, label): p for label, p in one["probabilities"].items()}
    return bars, [[s.word, names.get(x, x), o.word, round(p, 3)] for s, x, o, p in triples]


def page(predictor: Predictor):
    """The page, a gradio.Blocks."""
    gradio = optional_import("gradio", "demo.py")

    def predict(*inputs):
        try:
            return relations(predictor, *inputs)
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title="Relation extraction") as blocks:
        gradio.Markdown(f"# Relation extraction\n{__doc__.split(chr(10) * 2)[2]}")
        examples = [["".join(token for token, _ in marked), marked] for marked in EXAMPLES]
        sentence = gradio.Textbox(examples[0][0], label="Sentence", submit_btn="Mark entities")
        with gradio.Row():
            role = gradio.Radio(list(NEXT), value="subject", label="The next word is")
            type_ = gradio.Radio(TYPES, value="PER", label="of the type")
        marked = gradio.HighlightedText(EXAMPLES[0], interactive=True, elem_id="marked")
        threshold = gradio.Slider(0, 1, 0.5, label="Least probability in the table")
        language = gradio.Radio(["English", "한국어"], value="English", label="Relations in")
        button = gradio.Button("Predict", variant="primary")
        bars = gradio.Label(num_top_classes=5, label="Subject and object", elem_id="bars")
        shown = "All entities: relations of at least the probability set above"
        table = gradio.Dataframe(headers=COLUMNS, label=shown, elem_id="triples")
        gradio.Examples(examples, [sentence, marked], example_labels=[x for x, _ in examples])
        sentence.submit(lambda text: ([(text, None)], "subject"), sentence, [marked, role])
        rename = lambda *x: name_marks(*x) or (gradio.skip(), gradio.skip())  # noqa: E731
        marked.change(rename, [marked, role, type_], [marked, role], show_progress="hidden")
        button.click(predict, [marked, threshold, language], [bars, table])
    return blocks


@exit_on_error
def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", help="ckpt.pt of one or more runs, or folders of --export")
    add("--port", type=int, help="of the page (default: the first free one from 7860 on)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    arguments = parser.parse_args()
    if arguments.port not in (None, *range(1, 65536)):
        raise InputError(f"--port: found {arguments.port}, expected 1 to 65535")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would use the network
    optional_import("gradio", "demo.py")  # before the model is loaded
    predictor = Predictor(arguments.checkpoints, arguments.device)
    page(predictor).launch(server_port=arguments.port)


if __name__ == "__main__":
    main()
