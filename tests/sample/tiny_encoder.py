"""An encoder that knows nothing yet, for the demo and the tests: small enough to learn the sample in seconds."""

from collections.abc import Iterable

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers


def make_tokenizer(folder: str, texts: Iterable[str], vocab_size: int):
    """Writes a WordPiece tokenizer learned from the texts to `folder`, and returns it: always the same one."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    normalizer, pre_tokenizer = normalizers.NFC(), pre_tokenizers.BertPreTokenizer()
    texts = [normalizer.normalize_str(text) for text in texts]
    # the trainer numbers these pieces in another order in each process, which decides between pairs as frequent
    inner = {f"##{c}" for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text) for c in word[1:]}
    learned = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learned.pre_tokenizer = pre_tokenizer
    fixed = [*special.values(), *sorted(inner)]
    learned.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    )
    tokenizer = Tokenizer(models.WordPiece(learned.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    ends = [("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **special)
    fast.save_pretrained(folder)
    return fast


def make_tiny_encoder(folder: str, texts: Iterable[str], seed: int):
    """Writes an encoder to `folder` that knows nothing yet: a BERT of two layers of 128, with its tokenizer."""
    tokenizer = make_tokenizer(folder, texts, vocab_size=4000)
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
