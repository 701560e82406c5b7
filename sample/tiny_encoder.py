"""A tiny encoder with random weights, which learns the sample in seconds: for demo and tests."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers


def make_tokenizer(folder: str, texts: Iterable[str], vocab_size: int):
    """Learn a WordPiece tokenizer from the texts, deterministically; save it and return it."""
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    normalizer, pre_tokenizer = normalizers.NFC(), pre_tokenizers.BertPreTokenizer()
    texts = [normalizer.normalize_str(text) for text in texts]
    # The trainer numbers single characters in another order in each process, and breaks ties
    # between equally frequent pairs by these numbers. So the characters are passed in sorted order.
    words = (word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text))
    inner = {f"##{c}" for word in words for c in word[1:]}
    fixed = [*special.values(), *sorted(inner)]
    learned = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learned.pre_tokenizer = pre_tokenizer
    options = {"vocab_size": vocab_size, "special_tokens": fixed, "show_progress": False}
    learned.train_from_iterator(texts, trainers.WordPieceTrainer(**options))
    tokenizer = Tokenizer(models.WordPiece(learned.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    sep, cls = ((name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]"))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, **special
    )
    fast.save_pretrained(folder)
    return fast


def make_tiny_encoder(folder: str, texts: Iterable[str], seed: int):
    """Write a BERT of two layers of 128 with random weights, and its tokenizer, to `folder`."""
    tokenizer = make_tokenizer(folder, texts, vocab_size=4000)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, hidden_size=128,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    # safetensors writes it for its owner only
    shutil.copymode(Path(folder, "config.json"), Path(folder, "model.safetensors"))
