"""Small texts and tokenizers made on the spot."""

import random
from pathlib import Path

from tokenizer import encode, train

ODD_STRINGS = [
    "",
    " ",
    "   leading, trailing   and   inner runs   ",
    "\n",
    "\n\n\n\t\t  \n \t x\r\n\ry\r",
    "\u2581 a real lower block \u2581\u2581 and a space \u2581",
    "emoji \U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 flags \U0001f1eb\U0001f1f7 e\u0301 \u00e9",
    "\u0e44\u0e17\u0e22 \u4e2d\u6587 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u10d0\u10d1 \U00012000",
    "\ufeffbyte-order mark, nul \x00\x00, escape \x1b[0m, delete \x7f, nbsp \u00a0\u2003\u3000\u2028\u0085",
    "<s></s><unk><pad><0x0A><|reserved_0|><|reserved_1|>",
    "0123456789 3.14159 1e-12",
    "\uffff\ufffd\U0010ffff",
]


def write_texts(folder: Path, files: int, words: int, seed: int = 0) -> Path:
    """`files` text files of `words` words from a lexicon of 900, some with newlines and wide gaps."""
    generator = random.Random(seed)
    lexicon = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 9))) for _ in range(900)]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        gaps = generator.choices([" ", " ", " ", ", ", "\n", "\n\n", "    "], k=words)
        text = "".join(word + gap for word, gap in zip(generator.choices(lexicon, k=words), gaps, strict=True))
        (folder / f"text{index:04d}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def train_model(texts: Path, output: Path, *options: str) -> Path:
    assert train.main(["--input", str(texts), "--output", str(output), "--vocab-size", "640", *options]) == 0
    return output


def run_encode(model: Path, texts: Path, output: Path, *options: str) -> int:
    arguments = ["--tokenizer", str(model), "--input", str(texts), "--output", str(output), "--quiet", *options]
    return encode.main(arguments)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
