"""The tokenizer and the configuration of the small BERT for captions of digits, and how their files are made.

python -m noisycond.denoisers.digits_tokenizer        # makes them anew
"""

import json
import string
from pathlib import Path

from noisycond.data.digit_captions import vocabulary


NAME = "digits-bert"
FOLDER = Path(__file__).parent.parent / "data" / "text_encoders" / NAME
MAX_LENGTH = 24  # tokens; a caption of the digits has 3 to 20, and stock BERT's 77 would cost three times as much
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def pieces() -> list[str]:
    """The WordPiece vocabulary: special tokens, the captions' words, then every letter, numeral and ASCII punctuation
    mark, alone and as a continuation, so that no English text has an unknown token."""
    characters = (*string.ascii_lowercase, *string.digits)
    known = [
        *SPECIAL,
        *vocabulary(),
        *characters,
        *(f"##{character}" for character in characters),
        *string.punctuation,
    ]
    return list(dict.fromkeys(known))


def files() -> dict[str, str]:
    """The shipped files by name: tokenizer and configuration, but no weights, which are trained from scratch."""
    model = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(pieces()),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": MAX_LENGTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": MAX_LENGTH}
    return {
        "config.json": json.dumps(model, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer, indent=2) + "\n",
        "vocab.txt": "".join(f"{piece}\n" for piece in pieces()),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{FOLDER}: {len(pieces())} tokens.")


if __name__ == "__main__":
    main()
