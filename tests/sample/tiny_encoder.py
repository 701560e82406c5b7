"""An encoder that knows nothing yet, for the demo and the tests: small enough to learn the sample in seconds."""

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers


def make_tokenizer(folder: str, texts: list[str], vocab_size: int):
    """Writes a WordPiece tokenizer learned from the texts to `folder`, and returns it."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **special)
    fast.save_pretrained(folder)
    return fast


def make_tiny_encoder(folder: str, texts: list[str], seed: int):
    """Writes an encoder to `folder` that knows nothing yet: a BERT of two layers of 128, with its tokenizer."""
    tokenizer = make_tokenizer(folder, texts, vocab_size=4000)
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
