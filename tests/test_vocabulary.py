"""What is said about tokens that a tokenizer does not know."""

import json
import unicodedata

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import infer
import pretrain
import report
import train
from common import InputError
from data import Template
from encoder import load_encoder, load_tokenizer
from tests.helpers import SAMPLE
from vocabulary import unknown_in_rows, unknown_in_sentences

SENTENCES = ["서울은 한국의 수도이다", "부산은 항구 도시이다", "세종은 조선의 왕이다"]


def saved(tokenizer, folder, **special):
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(
        folder
    )
    return load_tokenizer(str(folder))


def word_piece(folder, texts, known=lambda character: True, **special):
    """A WordPiece tokenizer that knows the single characters of these texts."""
    letters = sorted({c for text in texts for c in text if not c.isspace() and known(c)})
    names = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    tokenizer = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return saved(tokenizer, folder, unk_token="[UNK]", **special)


@pytest.fixture
def folder_without_settings(encoder_folder, tmp_path):
    """An encoder's folder with vocab.txt, but without tokenizer_config.json."""
    folder = tmp_path / "encoder"
    load_encoder(str(encoder_folder)).save_pretrained(folder)
    vocabulary = load_tokenizer(str(encoder_folder)).get_vocab()
    text = "\n".join(sorted(vocabulary, key=vocabulary.get))
    (folder / "vocab.txt").write_text(f"{text}\n", encoding="utf-8")
    return folder


def test_a_missing_tokenizer_config_is_named(folder_without_settings, rows):
    tokenizer = load_tokenizer(str(folder_without_settings))
    line, *_ = unknown_in_rows(tokenizer, rows, Template())
    share = float(line.removeprefix("WARNING: ").partition("%")[0])
    assert share > 20
    assert "splits Hangul into letters" in line
    assert line.endswith("its folder has no tokenizer_config.json")
    settings = {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}
    (folder_without_settings / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(folder_without_settings))
    assert unknown_in_rows(tokenizer, rows, Template()) == []


def test_all_programs_say_it(call, folder_without_settings, tmp_path):
    options = f"--data {SAMPLE} --model {folder_without_settings} --limit 60 --batch-size 30"
    options += " --valid none --epochs 1 --amp off --out a"
    said = [call(train, *options.split()), call(infer, "a/ckpt.pt")]
    said.append(call(pretrain, *options.replace("--out a", "--out b").split()))
    model = ("--model", folder_without_settings)
    said.append(call(report, "data", SAMPLE / "train.csv", *model))
    for printed in said:
        assert "% of the tokens are unknown to the tokenizer, such as" in printed.out + printed.err


def test_decomposed_text_is_named(tmp_path):
    tokenizer = word_piece(tmp_path, SENTENCES)
    assert unknown_in_sentences(tokenizer, SENTENCES) == []
    nfd = [unicodedata.normalize("NFD", text) for text in SENTENCES]
    (line,) = unknown_in_sentences(tokenizer, nfd)
    assert line.startswith("WARNING: 100.00% of the tokens are unknown")
    assert "decomposed form (NFD)" in line


def test_a_wrong_tokenizer_class_is_named(tmp_path):
    letters = sorted({c for text in SENTENCES for c in text})
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["?", *letters])}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # of words, not of characters
    (line,) = unknown_in_sentences(saved(tokenizer, tmp_path, unk_token="?"), SENTENCES)
    assert "its vocabulary has their characters, so tokenizer_class or tokenizer.json is" in line
    assert "such as '서울은', '한국의'" in line


def test_a_vocabulary_of_another_language_is_named(tmp_path):
    tokenizer = word_piece(tmp_path, ["abc de"])
    (line,) = unknown_in_sentences(tokenizer, [*SENTENCES, "abc de"])
    assert "its vocabulary lacks their characters" in line


def test_a_few_unknown_tokens_are_counted_without_a_warning(tmp_path):
    tokenizer = word_piece(tmp_path, SENTENCES)
    assert unknown_in_sentences(tokenizer, [*SENTENCES * 3, "漢"]) == [
        "1.18% of the tokens are unknown to the tokenizer"
    ]


def test_unknown_characters_of_markers_and_prompt_are_named(tmp_path, rows):
    texts = [row.sentence for row in rows] + ["organization person location date other number"]
    texts += ["의 관계 와 과 문장에서 를 추출하시오 다음", *map(chr, range(33, 127))]
    everything = word_piece(tmp_path / "all", texts)
    assert unknown_in_rows(everything, rows, Template()) == []
    some = word_piece(tmp_path / "some", texts, known=lambda c: c not in "^@추출")
    line = unknown_in_rows(some, rows, Template(prompt="quiz"))[-1]
    assert line.startswith("WARNING: the tokenizer does not know all of the entity markers and")
    assert "'@'" in line
    assert "'^'" in line
    assert "'추출하시오'" in line
    assert "'*'" not in line


def test_text_that_a_tokenizer_drops_counts_as_unknown(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "가": 1, "</s>": 2}, []))
    line, *_ = unknown_in_sentences(
        saved(tokenizer, tmp_path, eos_token="</s>"), ["a가서울", "a가"]
    )
    assert line.startswith("WARNING: 33.33% of the tokens are unknown")


def test_byte_level_tokenizers_know_everything(tmp_path):
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate([*names, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = saved(tokenizer, tmp_path, eos_token="<end>", unk_token="<end>")
    assert unknown_in_sentences(tokenizer, [*SENTENCES, "漢 𐎀 <end>"]) == []


def test_special_tokens_that_are_not_added_are_named(tmp_path):
    tokenizer = word_piece(tmp_path, SENTENCES, cls_token="[CLS]")
    (line,) = unknown_in_sentences(tokenizer, SENTENCES)
    assert line.startswith("WARNING: the tokenizer does not add its [CLS] to a sentence; see post")


def test_a_tokenizer_that_drops_hangul_is_refused(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    with pytest.raises(InputError, match=r"its tokenizer drops Hangul: '가' gives no token"):
        saved(tokenizer, tmp_path)
