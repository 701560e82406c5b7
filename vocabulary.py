"""Find the parts of a text that the tokenizer does not know: they all become one unknown token.

for line in unknown_in_rows(tokenizer, rows, Template()):
    print(line)
"""

import re
import unicodedata
from collections import Counter
from pathlib import Path

from common import printable, shorten
from data import Rendered, Template
from rows import Row

SAMPLE = 1000  # texts that are looked at
FEW = 0.02  # share of unknown tokens that needs a reason
SEE = "see post_processor in its tokenizer.json"


def unknown_in_rows(tokenizer, rows: list[Row], template: Template) -> list[str]:
    """Lines about unknown tokens in what the encoder reads of `rows`; see `unknown_tokens`."""
    separator = tokenizer.sep_token or tokenizer.eos_token or ""
    some = rows[:: len(rows) // SAMPLE + 1]
    return unknown_tokens(tokenizer, [template.render(row, separator) for row in some])


def unknown_in_sentences(tokenizer, sentences: list[str]) -> list[str]:
    """The same for plain sentences."""
    some = sentences[:: len(sentences) // SAMPLE + 1]
    return unknown_tokens(tokenizer, [Rendered("", text, "", ()) for text in some])


def unknown_tokens(tokenizer, rendered: list[Rendered]) -> list[str]:
    """Lines about unknown tokens in these texts; none if there are none.

    The share of all tokens; above a few per cent the likely reason; what of the markers and the
    prompt is unknown; a [CLS] that is not added. A dropped character counts as an unknown token.
    """
    backend, n_known = tokenizer.backend_tokenizer, 0
    texts = [(r, text) for r in rendered for text in (r.text, r.before, r.after) if text]
    encodings = backend.encode_batch([text for _, text in texts], add_special_tokens=False)
    unknown, found, of_template = _unknown_id(tokenizer), Counter(), Counter()
    for (r, text), encoding in zip(texts, encodings):
        places = _unknown_places(text, encoding, unknown)
        n_known += len(encoding.ids) - encoding.ids.count(unknown)
        for start, end in places:
            piece = text[start:end]
            markers = (text[a:b] for span in r.spans for a, b in (span[:2], span[2:])
                       if a < end and start < b)  # fmt: skip
            is_marker = text is r.text and any(piece.strip() in marker for marker in markers)
            words = (w for span in r.spans for w in re.findall(r"\w+", r.text[span[1] : span[2]]))
            is_prompt = text is not r.text and not any(word in piece for word in words)
            (of_template if is_marker or is_prompt else found)[piece] += 1
    n_unknown = found.total() + of_template.total()
    lines, share = [], n_unknown / max(n_known + n_unknown, 1)
    if share:
        lines.append(f"{share:.2%} of the tokens are unknown to the tokenizer")
    if share > FEW:
        reason = _likely_reason(tokenizer, found + of_template)
        lines[0] = f"WARNING: {lines[0]}, such as {_shown(found or of_template)}: {reason}"
    if of_template:
        problem = "the tokenizer does not know all of the entity markers and the prompt"
        hint = "see --marker and --prompt"
        lines.append(f"WARNING: {problem}: {_shown(of_template)}; {hint}")
    first = tokenizer.cls_token
    if first and tokenizer.cls_token_id not in tokenizer("가")["input_ids"]:
        lines.append(f"WARNING: the tokenizer does not add its {first} to a sentence; {SEE}")
    return lines


def _unknown_places(text: str, encoding, unknown: int | None) -> list[tuple[int, int]]:
    """Start and end of each piece of the text that is unknown or dropped."""
    places, dropped = [], bytearray(b"\1") * len(text)
    for token, (start, end) in zip(encoding.ids, encoding.offsets):
        dropped[start:end] = bytes(end - start)
        if token == unknown:
            places.append((start, end))
    alone = (i for i, is_dropped in enumerate(dropped) if is_dropped and _is_visible(text[i]))
    return places + [(i, i + 1) for i in alone]


def _unknown_id(tokenizer) -> int | None:
    """The id that stands for unknown text; None for tokenizers that know all bytes.

    GPT-2's tokenizer names its end token as the unknown one, and never uses it so.
    """
    rare = tokenizer.backend_tokenizer.encode("𐎀 𐤀 𓀀", add_special_tokens=False).ids
    return tokenizer.unk_token_id if tokenizer.unk_token_id in rare else None


def _is_visible(character: str) -> bool:
    """Whether it is a letter, a digit or a sign: tokenizers may drop marks and control codes."""
    return unicodedata.category(character)[0] in "LNPS"


def _shown(pieces: Counter) -> str:
    return ", ".join(printable(shorten(piece)) for piece, _ in pieces.most_common(5))


def _likely_reason(tokenizer, pieces: Counter) -> str:
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer and len(normalizer.normalize_str("각")) > 1:
        reason = "it splits Hangul into letters, as lower-casing and stripping accents do"
        folder = Path(tokenizer.name_or_path)
        if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
            return f"{reason}; its folder has no tokenizer_config.json"
        return f"{reason}; see do_lower_case and strip_accents in its tokenizer_config.json"
    if any(not unicodedata.is_normalized("NFC", piece) for piece in pieces):
        return "the text is in decomposed form (NFD), where Hangul is a sequence of letters"
    vocabulary = tokenizer.get_vocab()
    letters = {letter for piece in pieces for letter in piece if not letter.isspace()}
    known = [c for c in letters if {c, f"##{c}", f"▁{c}"} & vocabulary.keys()]
    if 2 * len(known) > len(letters):
        return "its vocabulary has their characters, so tokenizer_class or tokenizer.json is wrong"
    return "its vocabulary lacks their characters; is the encoder one for this language?"
